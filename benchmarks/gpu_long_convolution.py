"""One long convolution alone on a GPU: 65,536 tokens x 768 channels, bf16, bidirectional, forward, taps given.

    python benchmarks/gpu_long_convolution.py --output results/long_convolution.json

Ours is the kernel on channels-first memory, its layout, with the filter prepared as evaluation keeps it; beside it
the public `monarch_mixer.long_convolution`, which prepares the filter in every call. The peer is PyTorch's FFT in
fp32 on the layout that suits it, casts and the filter's transform included; the floor is a copy of the tensor. On a
GPU each is timed as a CUDA graph of ten calls: the device's time, not what Python takes to start a call. The error is
relative, of the whole output, to an FFT in fp64 of the same bf16 inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import gpu_common as common
import torch
from machine import write_figures
from torch import Tensor

from monarch_mixer import long_convolution
from monarch_mixer.kernels import use_kernels
from monarch_mixer.kernels.support import kernels_apply
from monarch_mixer.long_convolution import fft_convolution

TOKENS, CHANNELS = 65_536, 768
LENGTHS = [128, 256, 512, 1024, 1999, 2048, 4096, 8192, 16384, 32768]  # 1999 is a prime
BARS = {128: 0.075, 512: 0.18, 2048: 0.60, 8192: 0.80, 32768: 1.4}  # ms; the aim is half of each
CALLS_OF_A_GRAPH = 10
METHODS = ("ours", "with filter", "fft", "copy")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--lengths", type=common.integers, help="by commas (default: powers of two, and 1999)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing a row (default: %(default)s)")
    args = parser.parse_args()
    args.lengths = args.lengths or ([16, 31] if args.small else LENGTHS)
    device = common.use_device(args.device)
    print(
        f"{'length':>6} {'ours ms':>9} {'bar':>6} {'+ filter':>9} {'fft ms':>9} {'copy ms':>9} {'x copy':>7} "
        f"{'error':>9} {'first s':>8}"
    )
    rows: list[dict[str, Any]] = []
    for length in args.lengths:
        row = measure(length, args, device)
        rows.append(row)
        print(line(row), flush=True)
        if args.output:
            write_figures(args.output, {"tokens": TOKENS, "channels": CHANNELS, "rows": rows})
        if args.plot:
            lines = {name: [(row["length"], row[name]["ms"]) for row in rows if "ms" in row[name]] for name in METHODS}
            lines["bar"] = [(row["length"], row["bar_ms"]) for row in rows if row["bar_ms"]]
            common.draw_lines(
                args.plot,
                lines,
                title=f"one long convolution, {TOKENS:,} tokens x {CHANNELS}, bf16, {common.device_name()}",
                x_label="tokens a sequence",
                y_label="ms",
                dashed=["bar", "copy"],
            )


def measure(length: int, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time the three methods in turns at one length."""
    common.free_memory()
    tokens, channels = (4 * length, 8) if args.small else (TOKENS, CHANNELS)
    batch = max(1, tokens // length)
    memory = torch.randn(channels, batch, length, dtype=torch.bfloat16, device=device)
    x = memory.permute(1, 2, 0)
    x_for_fft = x.transpose(1, 2).contiguous().transpose(1, 2)  # each row of a transform contiguous, and no copy
    target = torch.empty_like(memory)
    scale = length**-0.5  # outputs of about 1
    forward, backward = (torch.randn(length, channels, device=device) * scale for _ in range(2))
    skip = torch.randn(channels, device=device)

    @torch.no_grad()
    def with_filter() -> Tensor:
        return long_convolution(x, forward, backward, skip)

    ours = _prepared(memory, forward, backward, skip) if kernels_apply(x, x.dtype) else with_filter

    @torch.no_grad()
    def fft() -> Tensor:
        with use_kernels(False):
            return fft_convolution(x_for_fft.float(), forward, backward, skip).to(x.dtype)

    row: dict[str, Any] = {"length": length, "batch": batch, "bar_ms": BARS.get(length), "error": None}
    functions = {"ours": ours, "with filter": with_filter, "fft": fft, "copy": lambda: target.copy_(memory)}
    try:
        row["first_call_s"] = common.once(ours, device)
        row["error"] = relative_error(ours(), fft_convolution(x.double(), forward.double(), backward.double(), skip))
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises: the other rows go on
        row["ours"] = {"error": common.message(error)}
        del functions["ours"]
    calls = 1
    if device.type == "cuda":
        calls = CALLS_OF_A_GRAPH
        functions = {name: _graph(function, device) for name, function in functions.items()}
    for name, times in common.alternate(functions, args.seconds, device).items():
        row[name] = {"error": times} if isinstance(times, str) else {key: value / calls for key, value in times.items()}
    return row


def _graph(function: Callable[[], Tensor], device: torch.device) -> Callable[[], Any]:
    """Return the replay of a CUDA graph of some calls."""
    common.once(function, device)  # libraries and kernels are loaded outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_OF_A_GRAPH):
            function()
    return graph.replay


def _prepared(memory: Tensor, forward: Tensor, backward: Tensor, skip: Tensor) -> Callable[[], Tensor]:
    """Return the convolution of `memory` (channels, batch, length) with its filter made ready once."""
    from monarch_mixer.kernels.sequence_mixer import mix, operand

    taps = torch.cat([backward[: len(backward) - 1].flip(0), forward]).t()
    prepared = operand(taps, memory.dtype)
    if prepared.ndim > 2:
        prepared = prepared.to(memory.dtype)  # as evaluation keeps a transform

    @torch.no_grad()
    def run() -> Tensor:
        return mix(None, None, None, memory, (prepared, skip)).permute(1, 2, 0)

    return run


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected; NaN never passes."""
    return float((out.double() - expected).norm() / expected.norm())


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    times = [f"{row[name]['ms']:>9.4f}" if "ms" in row[name] else f"{'-':>9}" for name in METHODS]
    bar = "" if row["bar_ms"] is None else f"{row['bar_ms']}"
    if "error" in row["ours"]:
        return f"{row['length']:>6} {times[0]} {bar:>6} {' '.join(times[1:])}  {row['ours']['error']}"
    over = row["ours"]["ms"] / row["copy"]["ms"]
    return (
        f"{row['length']:>6} {times[0]} {bar:>6} {' '.join(times[1:])} {over:>7.1f} {row['error']:>9.1e} "
        f"{row['first_call_s']:>8.1f}"
    )


if __name__ == "__main__":
    main()
