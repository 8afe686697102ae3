"""How far a padded batch is from its texts alone in fp32, without tf32: outputs, and every gradient of a loss on them.

    python benchmarks/padding_exactness.py --output results/padding_exactness.json

Models as their recipes start them, without dropout; three texts, almost as long as the batch, half and a third of it.
The output's error is the largest difference of a hidden state by the largest of those alone. A gradient's is the norm
of the difference by its norm, or by a hundredth of all gradients' where its own is less: there it cancels to nothing.
A row has the worst parameter's, with its name, and that of all together. `--checkpointing` saves memory on a small
machine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gpu_common as common
import torch
from machine import device_name, write_figures
from torch import Tensor

LENGTHS = [128, 512, 2048, 8192]
MODELS = ["m2-base", "bert-base", "hf-bert-base"]
LINE = "{model:<14} {length:>6} {output:>8.1e} {gradient:>8.1e} {all:>8.1e}  {of}"


class Pass(NamedTuple):
    """What a forward and backward pass gives: hidden states at real tokens, and gradients by parameter."""

    hidden: Tensor
    gradients: dict[str, Tensor]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--lengths", type=common.integers, help="by commas (default: 128,512,2048,8192)")
    parser.add_argument("--models", type=common.names, default=MODELS, help="by commas (default: all three)")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    args = parser.parse_args()
    device = common.use_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[dict[str, Any]] = []
    print(f"{device_name()}\n{'model':<14} {'length':>6} {'output':>8} {'gradient':>8} {'all':>8}  of")
    for length in args.lengths or ([16, 80] if args.small else LENGTHS):
        for name in args.models:
            rows.append(measure(name, length, device, small=args.small, checkpointing=args.checkpointing))
            print(LINE.format(**rows[-1]), flush=True)
            common.free_memory()
        if args.output:
            write_figures(args.output, {"checkpointing": args.checkpointing, "rows": rows})
    if args.plot:
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            lines.setdefault(row["model"], []).append((row["length"], row["gradient"]))
        title = f"worst gradient of a padded batch, fp32, {device_name()}"
        common.draw_lines(args.plot, lines, title=title, x_label="tokens a sequence", y_label="relative error")


def measure(name: str, length: int, device: torch.device, *, small: bool, checkpointing: bool) -> dict[str, Any]:
    """Return a model's row at a length."""
    torch.manual_seed(length)
    model = common.build_encoder(name, length, small=small, dropout=0.0).model.to(device).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
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
        "model": name,
        "length": length,
        "texts": sizes,
        "output": float((padded.hidden - hidden).abs().max() / hidden.abs().max()),
        "gradient": errors[worst],
        "all": float(torch.stack([*differences.values()]).norm() / total),
        "of": worst,
    }


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
