"""The same short training run with the kernels on and off: the loss curves, and how far they are apart.

    python benchmarks/kernels_loss_curve.py --output results/loss_curve.json --plot docs/figures/loss_curve.png

A small M2-BERT (4 layers, hidden 256, 128 tokens) on the embedded corpus, dropout 0, AdamW with gradient clipping, from
one seed and over one order of batches. Three curves: kernels in bf16 autocast, PyTorch in bf16 autocast, and PyTorch in
fp32, which says how much of a difference bf16 alone makes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import gpu_common as common
import numpy as np
import torch
from machine import write_figures
from torch import Tensor

from bert.composer_models import build_masked_lm
from bert.data.embedded import embedded_documents
from bert.data.masking import mask_tokens
from bert.data.packing import ChunkTokenizer, ConcatPacker, PackingSpec
from bert.data.tokenizer import backend_json, special_token_ids, train_wordpiece
from monarch_mixer.kernels import use_kernels

LENGTH, VOCABULARY, MASK_RATE, SEED = 128, 4096, 0.3, 17
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 1024,
    "hidden_dropout_prob": 0.0,
    "max_position_embeddings": LENGTH,
    "long_conv_l_max": LENGTH,
    # As the demo: with the paper's settings so short a run of so small a model learns next to nothing.
    "hyena_w": 1,
    "hyena_training_additions": True,
    "initializer_range": 0.05,
}
# name -> kernels on, bf16 autocast on
CURVES = {"kernels, bf16": (True, True), "PyTorch, bf16": (False, True), "PyTorch, fp32": (False, False)}
WARM_UP_SHARE = 0.1
AVERAGED = 10  # the last steps whose mean is the loss that a run reached

Batch = dict[str, Tensor]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="sequences a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--text", type=Path, help="a text file, a document a line, instead of the embedded corpus")
    parser.add_argument("--compile", action="store_true", help="compile the models")
    args = parser.parse_args()
    config: dict[str, Any] = dict(MODEL)
    if args.small:
        args.steps, args.batch = 4, 2
        config |= {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    device = common.use_device(args.device)
    batches = make_batches(args, device)
    curves: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for name, (kernels, bf16) in CURVES.items():
        start = time.perf_counter()
        curves[name] = train(config, batches, args, device, kernels=kernels, bf16=bf16)
        seconds[name] = time.perf_counter() - start
    report(args, config, curves, seconds)


def make_batches(args: argparse.Namespace, device: torch.device) -> list[Batch]:
    """Tokenise the embedded corpus, and mask and shuffle it as the training loader does."""
    documents = args.text.read_text("utf-8").splitlines() if args.text else list(embedded_documents("train"))
    if args.small:
        documents = documents[:100]
    tokenizer = train_wordpiece(documents, VOCABULARY)
    ids = special_token_ids(tokenizer)
    spec = PackingSpec(backend_json(tokenizer), "concat", LENGTH, "uint16", ids["cls"], ids["sep"])
    windows = np.stack(ConcatPacker(spec, []).pack(ChunkTokenizer(spec)(documents)))
    generator = np.random.default_rng(SEED)
    order = np.concatenate(
        [generator.permutation(len(windows)) for _ in range(1 + args.steps * args.batch // len(windows))]
    )
    batches = []
    for step in range(args.steps):
        samples = order[step * args.batch : (step + 1) * args.batch]
        masked, labels = mask_tokens(
            windows[samples],
            samples,
            seed=SEED,
            epoch=step,  # a sample that comes again gets other masks
            rate=MASK_RATE,
            mask_id=ids["mask"],
            special_ids=ids.values(),
            vocab_size=len(tokenizer),
        )
        batches.append(
            {
                "input_ids": torch.from_numpy(masked).to(device),
                "labels": torch.from_numpy(labels).to(device),
            }
        )
    return batches


def train(
    config: dict[str, Any],
    batches: list[Batch],
    args: argparse.Namespace,
    device: torch.device,
    *,
    kernels: bool,
    bf16: bool,
) -> list[float]:
    """Train from the seed; return the loss before each step."""
    torch.manual_seed(SEED)
    model = build_masked_lm("m2_bert", config, train_mask_rate=MASK_RATE, eval_mask_rate=MASK_RATE)
    model.to(device).train()  # built on the CPU, whose draws are the same everywhere
    torch._dynamo.reset()
    forward: Any = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-5)
    warm_up = max(1, round(WARM_UP_SHARE * len(batches)))
    losses = []
    with use_kernels(kernels):
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (step + 1) / warm_up)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = forward(batch)["loss"]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).float().tolist()


def report(
    args: argparse.Namespace, config: dict[str, Any], curves: dict[str, list[float]], seconds: dict[str, float]
) -> None:
    """Print the largest differences; write and draw the curves."""
    reference, full = curves["PyTorch, bf16"], curves["PyTorch, fp32"]
    differences = {
        "kernels, bf16 - PyTorch, bf16": largest_difference(curves["kernels, bf16"], reference),
        "kernels, bf16 - PyTorch, fp32": largest_difference(curves["kernels, bf16"], full),
        "PyTorch, bf16 - PyTorch, fp32": largest_difference(reference, full),
    }
    print(f"{'':<16} {'first loss':>10} {f'mean of last {AVERAGED}':>16} {'seconds':>8}")
    for name, losses in curves.items():
        last = losses[-AVERAGED:]
        print(f"{name:<16} {losses[0]:>10.4f} {sum(last) / len(last):>16.4f} {seconds[name]:>8.1f}")
    print("largest difference at a step, nats")
    for name, (difference, step) in differences.items():
        print(f"  {name:<30} {difference:.4f} (step {step})")
    if args.output:
        figures = {
            "model": config,
            "steps": args.steps,
            "batch": args.batch,
            "lr": args.lr,
            "largest_difference": {n: {"nats": d, "step": s} for n, (d, s) in differences.items()},
            "seconds": seconds,
            "curves": curves,
        }
        write_figures(args.output, figures)
    if args.plot:
        lines = {name: list(enumerate(losses, 1)) for name, losses in curves.items()}
        title = f"kernels on and off, same seed and batches, {common.device_name()}"
        common.draw_lines(
            args.plot, lines, title=title, x_label="step", y_label="loss on masked tokens, nats", log=False
        )


def largest_difference(one: list[float], other: list[float]) -> tuple[float, int]:
    """Return the largest distance of two curves and its step, counted from 1; a NaN is the largest."""
    distances = (torch.tensor(one, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)).abs()
    step = int(distances.nan_to_num(nan=torch.inf).argmax())
    return float(distances[step]), step + 1


if __name__ == "__main__":
    main()
