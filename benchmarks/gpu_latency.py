"""Latency of one sequence at inference: M2-BERT-base against Hugging Face's BERT, compiled, bf16 autocast, batch 1.

    python benchmarks/gpu_latency.py --output results/latency.json

Each model is compiled in torch.compile's default mode and with CUDA graphs ("reduce-overhead"); the table has the
better of the two. A latency is what the caller waits: from the call until the device is done. The first call compiles.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import gpu_common as common
import torch
from gpu_common import HF_BERT, PEERS
from machine import write_figures

LENGTHS = [128, 2048, 32768]
MODES = ["default", "reduce-overhead"]
WARM_UP_CALLS = 5  # with CUDA graphs, the second call records and the third is the first replay
MAX_FIRST_CALL_S = 60.0


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--models", type=common.names, default=["m2-base", HF_BERT], help="by commas")
    parser.add_argument("--lengths", type=common.integers, help="by commas (default: 128,2048,32768)")
    parser.add_argument("--modes", default=",".join(MODES), help="of torch.compile, or eager (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing a row (default: %(default)s)")
    args = parser.parse_args()
    args.lengths = args.lengths or ([16, 32] if args.small else LENGTHS)
    device = common.use_device(args.device)
    print(f"batch 1, bf16 autocast; first calls must stay under {MAX_FIRST_CALL_S:.0f} s")
    print(f"{'length':>6} {'model':<17} {'best mode':<16} {'median ms':>9} {'p95 ms':>9} {'hf / it':>8} {'first s':>8}")
    rows: list[dict[str, Any]] = []
    for length in args.lengths:
        measured = measure(length, args, device)
        rows += measured
        for row in best_rows(measured):
            print(line(row), flush=True)
        if args.output:
            write_figures(args.output, {"best": best_rows(rows), "rows": rows})
    if args.plot:
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in best_rows(rows):
            if "ms" in row:
                lines.setdefault(row["model"], []).append((row["length"], row["ms"]))
        title = f"latency of one sequence, bf16, {common.device_name()}"
        common.draw_lines(args.plot, lines, title=title, x_label="tokens", y_label="ms")


def measure(length: int, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each model and mode; a model's modes share no compiled code."""
    rows: list[dict[str, Any]] = []
    runs: dict[int, Callable[[], Any]] = {}  # by the number of the row
    torch._dynamo.reset()
    common.free_memory()
    for mode in args.modes.split(","):
        for name in args.models:
            row: dict[str, Any] = {"length": length, "model": name, "mode": mode}
            rows.append(row)
            try:
                run = make_run(name, length, mode, args, device)
                row["first_call_s"] = common.once(run, device)
                for _ in range(WARM_UP_CALLS):
                    common.once(run, device)
                runs[len(rows) - 1] = run
            except Exception as error:  # noqa: BLE001 - whatever a compiler raises is that row's result
                row["error"] = common.message(error)
    for index, times in common.alternate(runs, args.seconds, device, wait=True).items():
        rows[index].update({"error": times} if isinstance(times, str) else times)
    return rows


def make_run(
    name: str, length: int, mode: str, args: argparse.Namespace, device: torch.device
) -> Callable[[], torch.Tensor]:
    """Return a function of one forward pass of one sequence."""
    peer = PEERS[name]
    with device:
        encoder = common.build_encoder(name, length, small=args.small).eval().requires_grad_(False)
    ids = common.random_ids(device, length, length, encoder.model.config.vocab_size)
    model: Any = encoder if mode == "eager" else torch.compile(encoder, dynamic=False, mode=mode)

    def run() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad(), common.running(device, peer.kernels):
            return model(ids)

    return run


def best_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each length's and model's fastest mode, with how many times its latency Hugging Face's BERT takes."""
    best: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rows:
        key = row["length"], row["model"]
        if key not in best or row.get("ms", float("inf")) < best[key].get("ms", float("inf")):
            best[key] = dict(row)
    for (length, _), row in best.items():
        peer = best.get((length, HF_BERT), {}).get("ms")
        row["hf_over_it"] = peer / row["ms"] if peer and "ms" in row else None
    return list(best.values())


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    start = f"{row['length']:>6} {row['model']:<17} {row['mode']:<16}"
    if "error" in row:
        return f"{start} {row['error']}"
    over = "" if row["hf_over_it"] is None else f"{row['hf_over_it']:.2f}"
    first = f"{row['first_call_s']:>8.1f}" + ("" if row["first_call_s"] <= MAX_FIRST_CALL_S else " OVER")
    return f"{start} {row['ms']:>9.3f} {row['ms_p95']:>9.3f} {over:>8} {first}"


if __name__ == "__main__":
    main()
