"""How far a padded batch is from its texts alone in fp32, without tf32: outputs, and every gradient of a loss on them.

    python benchmarks/padding_exactness.py --output results/padding_exactness.json

Models as their recipes start them, without dropout; three texts, almost as long as the batch, half and a third of it.
The output's error is the largest difference of a hidden state by the largest of those alone. A gradient's is the norm
of the difference by its norm, or by a hundredth of all gradients' where its own is less: there it cancels to nothing.
A row has the worst parameter's, with its name, and that of all together. `--checkpointing` saves memory on a small
machine.

What it costs on a GPU: `--tokens 32768` times a forward and backward pass of so many, not compiled, with padding left
out and without a mask, in turns; `--blocks 1024,2048` has rows for each of these as the largest block of the kernels'
exact transforms (the library's own is LARGEST_EXACT_BLOCK).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import gpu_common as common
import torch
from machine import device_name, write_figures
from torch import Tensor

from monarch_mixer.kernels import support

LENGTHS = [128, 512, 2048, 8192]
MODELS = ["m2-base", "bert-base", "hf-bert-base"]
LINE = "{model:<14} {length:>6} {block:>6} {output:>8.1e} {gradient:>8.1e} {all:>8.1e} {ms:>8} {ms_unmasked:>8}  {of}"
BLOCKS = (256, 512, 1024, 2048)  # what fits in fp32
SECONDS = 2.0  # of timing, a way


class Pass(NamedTuple):
    """What a forward and backward pass gives: hidden states at real tokens, and gradients by parameter."""

    hidden: Tensor
    gradients: dict[str, Tensor]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--lengths", type=common.integers, help="by commas (default: 128,512,2048,8192)")
    parser.add_argument("--models", type=common.names, default=MODELS, help="by commas (default: all three)")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--blocks", type=common.integers, metavar="TOKENS", help="by commas (default: as it is)")
    parser.add_argument("--tokens", type=int, help="time a pass of so many")
    args = parser.parse_args()
    device = common.use_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    blocks = args.blocks or [support.LARGEST_EXACT_BLOCK]
    if unknown := {*blocks} - {*BLOCKS}:
        parser.error(f"--blocks: {min(unknown)} is none of {', '.join(map(str, BLOCKS))}")
    rows: list[dict[str, Any]] = []
    names = {key: key.replace("_", " ") for key in ("model", "length", "output", "gradient", "all", "ms", "of")}
    print(LINE.replace(".1e", "").format(**names, block="block", ms_unmasked="unmasked"), flush=True)
    for length in args.lengths or ([16, 80] if args.small else LENGTHS):
        for name in args.models:
            model = build(name, length, device, small=args.small, checkpointing=args.checkpointing)
            made = []
            for block in blocks if name.startswith("m2") else [None]:  # the others have no such kernels
                with largest_block(block):
                    made.append({"model": name, "length": length, "block": block, **measure(model, length)})
            if args.tokens:
                time_passes(model, made, args.tokens, seconds=0.01 if args.small else SECONDS)
            for row in made:
                times = {key: f"{row[key]:.2f}" if key in row else "" for key in ("ms", "ms_unmasked")}
                print(LINE.format(**{**row, **times, "block": row["block"] or ""}), flush=True)
            rows += made
            del model
            common.free_memory()
        if args.output:
            write_figures(args.output, {"checkpointing": args.checkpointing, "tokens": args.tokens, "rows": rows})
    if args.plot:
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            name = row["model"] + (f", blocks of {row['block']}" if len(blocks) > 1 and row["block"] else "")
            lines.setdefault(name, []).append((row["length"], row["gradient"]))
        title = f"worst gradient of a padded batch, fp32, {device_name()}"
        common.draw_lines(args.plot, lines, title=title, x_label="tokens a sequence", y_label="relative error")


@contextlib.contextmanager
def largest_block(tokens: int | None) -> Iterator[None]:
    """Let the kernels' exact transforms have blocks of up to so many tokens; None: as it is."""
    before = support.LARGEST_EXACT_BLOCK
    support.LARGEST_EXACT_BLOCK = before if tokens is None else tokens
    try:
        yield
    finally:
        support.LARGEST_EXACT_BLOCK = before


def build(name: str, length: int, device: torch.device, *, small: bool, checkpointing: bool) -> Any:
    """Return a model of a peer for sequences of `length` tokens, to be trained without dropout."""
    torch.manual_seed(length)
    model = common.build_encoder(name, length, small=small, dropout=0.0).model.to(device).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def measure(model: Any, length: int) -> dict[str, Any]:
    """Return how far a padded batch of `length` tokens is from its texts alone."""
    torch.manual_seed(length)
    device = model.device
    sizes = [max(1, size) for size in (length - 3, length // 2, length // 3 + 1)]
    texts = [torch.randint(1, model.config.vocab_size, (size,), device=device) for size in sizes]
    weights = [torch.randn(size, model.config.hidden_size, device=device) for size in sizes]
    padded = run(model, texts, weights, length)
    parts = [run(model, [text], [weight], len(text)) for text, weight in zip(texts, weights, strict=True)]
    alone = {key: torch.stack([part.gradients[key] for part in parts]).sum(0) for key in padded.gradients}
    hidden = torch.cat([part.hidden for part in parts])
    total = torch.stack([gradient.norm() for gradient in alone.values()]).norm()
    differences = {key: (padded.gradients[key] - gradient).norm() for key, gradient in alone.items()}
    errors = {key: float(d / torch.maximum(alone[key].norm(), 0.01 * total)) for key, d in differences.items()}
    worst = max(errors, key=lambda key: errors[key])
    return {
        "texts": sizes,
        "output": float((padded.hidden - hidden).abs().max() / hidden.abs().max()),
        "gradient": errors[worst],
        "all": float(torch.stack([*differences.values()]).norm() / total),
        "of": worst,
    }


def time_passes(model: Any, rows: list[dict[str, Any]], tokens: int, *, seconds: float) -> None:
    """Put into each row of a model and a length what a forward and backward pass takes, with a mask and without."""
    ids = common.random_ids(model.device, tokens, rows[0]["length"], model.config.vocab_size)
    mask = common.random_mask(ids)

    def step(block: int | None, attention_mask: Tensor | None) -> None:
        model.zero_grad()
        with largest_block(block):
            model(input_ids=ids, attention_mask=attention_mask)[0].square().sum().backward()

    ways = {
        (row["block"], key): functools.partial(step, row["block"], given)
        for row in rows
        for key, given in (("ms", mask), ("ms_unmasked", None))
    }
    times = common.alternate(ways, seconds, model.device)
    for row in rows:
        for key in ("ms", "ms_unmasked"):
            time = times[row["block"], key]
            row[key if isinstance(time, dict) else f"{key}_error"] = time["ms"] if isinstance(time, dict) else time


def run(model: Any, texts: list[Tensor], weights: list[Tensor], width: int) -> Pass:
    """Run the texts as a batch that is padded to `width` with tokens of any kind."""
    ids = torch.randint(1, model.config.vocab_size, (len(texts), width), device=texts[0].device)
    mask = torch.zeros_like(ids)
    for index, text in enumerate(texts):
        ids[index, : len(text)], mask[index, : len(text)] = text, 1
    model.zero_grad()
    states = model(input_ids=ids, attention_mask=mask)[0]
    hidden = torch.cat([states[index, : len(text)] for index, text in enumerate(texts)])
    (hidden * torch.cat(weights)).sum().backward()
    return Pass(hidden.detach(), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})


if __name__ == "__main__":
    main()
