"""Encoder throughput of M2-BERT-base and its peers on a GPU, bf16 autocast, a fixed number of tokens a batch.

    python benchmarks/gpu_encoder.py --mode forward  --output results/encoder_forward.json
    python benchmarks/gpu_encoder.py --mode training --output results/training_step.json

forward: evaluation mode without gradients, 65,536 tokens. training: forward and backward (no optimizer), dropout as in
the recipes, 32,768 tokens. So short a step may wait for the processor to start its kernels: in training every model is
compiled twice, in torch.compile's default mode and with CUDA graphs ("reduce-overhead"), and the faster one counts. All
models of a length are timed in turns in this process. A model that fails is a row with its error. The JSON is written
after every length, so a run that is stopped keeps what it has; --append puts a further run's lengths beside those of an
earlier one on the same kind of device. With --models m2-base,m2-base-masked it says what leaving padding out costs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import gpu_common as common
import torch
from gpu_common import HF_BERT, PEERS
from machine import write_figures

from monarch_mixer.kernels import use_kernels

TOKENS = {"forward": 65_536, "training": 32_768}
LENGTHS = {"forward": [128, 512, 2048, 8192, 32768], "training": [128, 512, 2048, 8192]}
# Of m2-base, as a ratio to Hugging Face's BERT compiled in the same run: what must be reached, and the aim.
BARS: dict[str, dict[int, tuple[float, float]]] = {
    "forward": {128: (1.5, 2.0), 512: (1.4, 2.0), 2048: (1.3, 1.9), 8192: (2.2, 3.5), 32768: (5.0, 8.0)},
    "training": {128: (1.3, 1.6), 2048: (1.2, 1.7), 8192: (2.0, 3.0)},
}
MODES = {"forward": ["default"], "training": ["default", "reduce-overhead"]}  # of torch.compile
WARM_UP_CALLS = 3  # with CUDA graphs, the second call records and the third is the first replay
Run = Callable[[], Any]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--mode", choices=list(TOKENS), default="forward")
    parser.add_argument(
        "--models",
        type=common.names,
        default=["m2-base", HF_BERT, "bert-base", "m2-fft-reference"],
        help=f"of {', '.join(PEERS)}, by commas (default: m2-base, {HF_BERT}, bert-base, m2-fft-reference)",
    )
    parser.add_argument("--lengths", type=common.integers, help="by commas (default: the mode's)")
    parser.add_argument("--tokens", type=int, help="a batch (default: the mode's)")
    parser.add_argument("--dropout", type=float, help="training: instead of the recipes' own")
    parser.add_argument(
        "--modes",
        type=lambda text: text.split(","),
        help=f"of torch.compile, by commas (default: {MODES})",
    )
    parser.add_argument("--append", action="store_true", help="keep the rows that --output holds of other lengths")
    parser.add_argument("--no-compile", action="store_true", help="every model without torch.compile")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing a row (default: %(default)s)")
    args = parser.parse_args()
    args.lengths = args.lengths or ([16, 32] if args.small else LENGTHS[args.mode])
    args.tokens = args.tokens or (64 if args.small else TOKENS[args.mode])
    args.modes = ["eager"] if args.no_compile else args.modes or MODES[args.mode]

    device = common.use_device(args.device)
    print(f"{args.mode}, {args.tokens:,} tokens a batch, bf16 autocast")
    print(
        f"{'length':>6} {'model':<17} {'compile':<15} {'tokens/ms':>9} {'ms':>9} {'ratio':>6} {'must/aim':>9} "
        f"{'peak GB':>8} {'first s':>8}"
    )
    rows = earlier_rows(args) if args.append else []
    for length in args.lengths:
        measured = measure(length, args, device)
        for row in measured:
            print(line(row, args.mode), flush=True)
        rows = sorted(rows + measured, key=lambda row: row["length"])
        if args.output:
            figures = {"mode": args.mode, "tokens": args.tokens, "dropout": args.dropout, "rows": rows}
            write_figures(args.output, figures)
        if args.plot:
            plot(args, rows)


def earlier_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of --output that this run does not measure.

    Raises:
        SystemExit: they are of another device, or were measured otherwise.
    """
    if not args.output or not args.output.exists():
        return []
    figures = json.loads(args.output.read_text(encoding="utf-8"))
    settings = {"device": common.device_name(), "mode": args.mode, "tokens": args.tokens, "dropout": args.dropout}
    for key, value in settings.items():
        if figures[key] != value:
            raise SystemExit(f"{args.output}: its {key} is {figures[key]}, this run's {value}; leave out --append")
    return [row for row in figures["rows"] if row["length"] not in args.lengths]


def measure(length: int, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Build and warm up every model in every mode, then time them in turns; return the faster row of each model."""
    torch._dynamo.reset()  # the models share their code: a length's graphs would count as recompilations of the last's
    common.free_memory()
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    runs: dict[tuple[str, str], Run] = {}
    for name, mode in [(model, mode) for model in args.models for mode in modes_of(model, args.modes)]:
        row = rows[name, mode] = {"length": length, "model": name, "compile": mode}
        before = common.reserved_gb(device)
        try:
            run, _ = make_run(name, length, mode, args, device)
            row["first_call_s"] = common.once(run, device)
            for _ in range(WARM_UP_CALLS):
                run()
            after = common.reserved_gb(device)
            row["peak_gb"] = None if before is None or after is None else after - before
            runs[name, mode] = run
        except Exception as error:  # noqa: BLE001 - out of memory, or whatever a compiler raises: the rest goes on
            row["error"] = common.message(error)
        common.free_memory()
    tokens = max(1, args.tokens // length) * length
    for key, times in common.alternate(runs, args.seconds, device).items():
        if isinstance(times, str):
            rows[key]["error"] = times
        else:
            rows[key] |= {"tokens_per_ms": tokens / times["ms"], **times}
    best = {name: faster([row for row in rows.values() if row["model"] == name]) for name in args.models}
    peer = best.get(HF_BERT, {}).get("tokens_per_ms")
    for row in best.values():
        row["ratio_to_hf"] = row["tokens_per_ms"] / peer if peer and "tokens_per_ms" in row else None
    masked, unmasked = best.get("m2-base-masked", {}), best.get("m2-base", {})
    if "ms" in masked and "ms" in unmasked:
        masked["masking_cost"] = masked["ms"] / unmasked["ms"] - 1
    return list(best.values())


def modes_of(name: str, modes: Sequence[str]) -> Sequence[str]:
    """Return those of `modes` that a model is measured in."""
    return modes if PEERS[name].compiled else ["eager"]


def faster(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the fastest of a model's rows, with the milliseconds (or the error) of each way that it was compiled."""
    best = min(rows, key=lambda row: row.get("ms", float("inf")))
    return {**best, "by_compile": {row["compile"]: row.get("ms", row.get("error")) for row in rows}}


def make_run(name: str, length: int, mode: str, args: argparse.Namespace, device: torch.device) -> tuple[Run, Any]:
    """Return a function of one forward pass, or of one forward and backward pass, and the model's configuration."""
    peer = PEERS[name]
    with device:
        encoder = common.build_encoder(name, length, small=args.small, dropout=args.dropout)
    vocabulary = encoder.model.config.vocab_size
    ids = common.random_ids(device, args.tokens, length, vocabulary)
    inputs = (ids, common.random_mask(ids)) if peer.masked else (ids,)
    model: Any = encoder
    if mode != "eager":
        model = torch.compile(encoder, dynamic=False, mode=mode)
    if args.mode == "forward":
        encoder.eval()

        def forward() -> None:
            with torch.no_grad(), common.running(device, peer.kernels):
                model(*inputs)

        return forward, encoder.model.config
    encoder.train()
    gradients: list[torch.Tensor] = []

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        encoder.zero_grad(set_to_none=True)
        with common.running(device, peer.kernels):
            hidden = model(*inputs)
            if not gradients:
                gradients.append(torch.randn_like(hidden))
        with use_kernels(peer.kernels):  # a backward pass chooses its kernels too
            hidden.backward(gradients[0])

    return step, encoder.model.config


def line(row: dict[str, Any], mode: str) -> str:
    """Return a row of the table."""
    start = f"{row['length']:>6} {row['model']:<17} {row['compile']:<15}"
    if "error" in row:
        return f"{start} {row['error']}"
    must, aim = BARS[mode].get(row["length"], (None, None)) if row["model"] == "m2-base" else (None, None)
    bar = "" if must is None else f"{must} / {aim}"
    ratio = "" if row["ratio_to_hf"] is None else f"{row['ratio_to_hf']:.2f}"
    peak = "" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}"
    times = f"{row['tokens_per_ms']:>9.1f} {row['ms']:>9.3f}"
    masking = f"  {row['masking_cost']:+.1%} of m2-base" if "masking_cost" in row else ""
    return f"{start} {times} {ratio:>6} {bar:>9} {peak:>8} {row['first_call_s']:>8.1f}{masking}"


def plot(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Draw tokens/ms over the length, and the bars where Hugging Face's BERT was measured."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "tokens_per_ms" not in row:
            continue
        points.setdefault(row["model"], []).append((row["length"], row["tokens_per_ms"]))
        if row["model"] == HF_BERT and row["length"] in BARS[args.mode]:
            bar = BARS[args.mode][row["length"]][0] * row["tokens_per_ms"]
            points.setdefault("must", []).append((row["length"], bar))
    title = f"encoder, {args.mode}, {args.tokens:,} tokens a batch, bf16, {common.device_name()}"
    common.draw_lines(
        args.plot, points, title=title, x_label="tokens a sequence", y_label="tokens / ms", dashed=["must"]
    )


if __name__ == "__main__":
    main()
