"""How far the kernels are from fp64: sequence mixer and dimension mixer, outputs and every gradient, by precision.

    python benchmarks/kernel_accuracy.py --output results/kernel_accuracy.json

The error is relative: the norm of the difference to the plain PyTorch modules in fp64, by the norm of theirs. A row has
that of the output, and the largest of a gradient's with its name. "tf32" is fp32 with PyTorch's
`torch.backends.cuda.matmul.allow_tf32`, which the kernels follow. In fp32 the sequence mixer is left to PyTorch beyond
512 tokens (docs/padding.md), and so are its rows.
"""

from __future__ import annotations

import copy
from typing import Any

import gpu_common as common
import torch
from machine import write_figures
from torch import nn

from monarch_mixer import DimensionMixer, MonarchSequenceMixer

LENGTHS = [128, 509, 2048, 4097]
CHANNELS, BATCH = 96, 3
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--lengths", type=common.integers, help="by commas (default: 128,509,2048,4097)")
    args = parser.parse_args()
    lengths = args.lengths or ([16, 31] if args.small else LENGTHS)
    device = common.use_device(args.device)
    print(f"{'part':<16} {'length':>6} {'precision':>9} {'output':>9} {'gradient':>9}  of")
    rows: list[dict[str, Any]] = []
    for length in lengths:
        for part in ("sequence mixer", "dimension mixer"):
            for row in measure(part, length, device):
                rows.append(row)
                print(
                    f"{part:<16} {length:>6} {row['precision']:>9} {row['output']:>9.1e} {row['gradient']:>9.1e}  "
                    f"{row['worst_gradient']}",
                    flush=True,
                )
        if args.output:
            write_figures(args.output, {"channels": CHANNELS, "batch": BATCH, "rows": rows})
    if args.plot:
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            lines.setdefault(f"{row['part']}, {row['precision']}", []).append((row["length"], row["gradient"]))
        title = f"largest relative error of a gradient, {common.device_name()}"
        common.draw_lines(args.plot, lines, title=title, x_label="tokens a sequence", y_label="relative error")


def build(part: str, length: int) -> nn.Module:
    """Return a part of an M2-BERT layer with random weights of a trained layer's size."""
    if part == "dimension mixer":
        return DimensionMixer(CHANNELS, 4 * CHANNELS, num_blocks=4)
    return MonarchSequenceMixer(CHANNELS, length, layer_norm=True)


def measure(part: str, length: int, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each precision."""
    torch.manual_seed(length)
    module = build(part, length).to(device)
    x, grad = (torch.randn(BATCH, length, CHANNELS, device=device) for _ in range(2))
    expected = run(copy.deepcopy(module).double(), x.double(), grad.double(), torch.float64, device)
    rows = []
    for precision, dtype in PRECISIONS.items():
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        got = run(module, x, grad, dtype, device)
        errors = {name: float((got[name].double() - value).norm() / value.norm()) for name, value in expected.items()}
        output = errors.pop("output")
        worst = max(errors, key=lambda name: errors[name])
        rows.append(
            {"part": part, "length": length, "precision": precision, "output": output}
            | {"gradient": errors[worst], "worst_gradient": worst, "gradients": errors}
        )
    torch.backends.cuda.matmul.allow_tf32 = False
    return rows


def run(
    module: nn.Module, x: torch.Tensor, grad: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the output and the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    half = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(device.type, dtype if half else torch.bfloat16, enabled=half):
        out = module(x)
    out.backward(grad.to(out.dtype))
    results = {"output": out.detach(), "input": x.grad}
    for name, parameter in module.named_parameters():
        results[name], parameter.grad = parameter.grad, None
    return {name: value for name, value in results.items() if value is not None}


if __name__ == "__main__":
    main()
