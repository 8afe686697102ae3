"""Where the time of an M2-BERT-base encoder goes on a GPU: its kernels, each beside the floor of what it computes.

    python benchmarks/kernel_profile.py --length 128 --mode forward --output results/profile_128.json

First the card's two ceilings, measured in this run. Then the floor of each part of the model: the larger of the time
that its bytes take (inputs, outputs and weights once, as one fused kernel would move them) and the time that its
operations take. Then the kernels by time. Matrix products of PyTorch get a floor from their shapes. What our operators
(`monarch_mixer::`) start is added up by the part they compute (`PARTS_OF_OPERATORS`) and set beside its floor. Other
kernels (fused pointwise ones, copies) have none.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import gpu_common as common
import torch
from gpu_common import PEERS, Ceilings
from machine import write_figures
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bert.composer_models import fft_convolution_flops
from bert.configuration import M2BertConfig
from bert.files import save_figure

TOKENS = {"forward": 65_536, "training": 32_768}
BF16 = 2  # bytes
OURS = "monarch_mixer::"
# An operator of ours whose name matches computes that part; the first match counts.
PARTS_OF_OPERATORS = (
    (r"mlp", "gated MLP"),
    (r"layer_norm", "residual and LayerNorm"),
    (r"mix|spectrum|taps|transpose|convolution", "sequence mixer"),
)
# PyTorch's matrix products: which of their arguments are the two factors.
PRODUCTS = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2), "aten::baddbmm": (1, 2)}


class Launch(NamedTuple):
    """What a row of the profile is about."""

    kernel: str
    product: str = ""  # the matrix product that started it, with its shapes
    operator: str = ""  # the operator of ours that started it


Times = dict[Launch, list[float]]  # microseconds, a number a launch


@dataclass(frozen=True)
class Part:
    """A part of the encoder, in all layers together: what it must do at least."""

    name: str
    num_bytes: float
    flops: float
    note: str


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--mode", choices=list(TOKENS), default="forward")
    parser.add_argument("--model", choices=list(PEERS), default="m2-base")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="a batch (default: the mode's)")
    parser.add_argument("--dropout", type=float, help="training: instead of the recipe's own")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--calls", type=int, default=5, help="profiled (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=30, help="printed (default: %(default)s)")
    args = parser.parse_args()
    args.tokens = args.tokens or (64 if args.small else TOKENS[args.mode])
    args.length = min(args.length, args.tokens)
    device = common.use_device(args.device)
    ceilings = common.measure_ceilings(device, args.small)
    print(f"measured ceilings: {ceilings}")
    config, times, ms = measure(args, device)
    tokens = args.tokens // args.length * args.length
    parts = []
    if isinstance(config, M2BertConfig) and config.monarch_mixer_sequence_mixing:
        parts = model_parts(config, tokens, args.length, args.mode)
        print_parts(parts, ceilings)
    rows = kernel_rows(times, args.calls, ceilings)
    total = sum(row["ms"] for row in rows)
    print(
        f"\n{args.model}, {args.mode}, {tokens:,} tokens at {args.length}: {ms:.3f} ms, kernels {total:.3f} ms a call"
    )
    print(f"{'calls':>6} {'ms':>9} {'share':>6} {'floor ms':>9} {'x floor':>7}  kernel")
    for row in rows[: args.rows]:
        floor = "" if row["floor_ms"] is None else f"{row['floor_ms']:.3f}"
        over = "" if not row["floor_ms"] else f"{row['ms'] / row['floor_ms']:.1f}"
        print(f"{row['calls']:>6.0f} {row['ms']:>9.3f} {row['share']:>6.1%} {floor:>9} {over:>7}  {row['name'][:100]}")
    by_part = part_rows(rows, parts, ceilings)
    if args.output:
        figures = {
            "mode": args.mode,
            "model": args.model,
            "length": args.length,
            "tokens": tokens,
            "ceilings": asdict(ceilings),
            "ms": ms,
            "parts": [{**asdict(p), "floor_ms": ceilings.floor_ms(p.num_bytes, p.flops)} for p in parts],
            "by_part": by_part,
            "rows": rows,
        }
        write_figures(args.output, figures)
    if args.plot:
        plot(args, rows)


def model_parts(config: M2BertConfig, tokens: int, length: int, mode: str) -> list[Part]:
    """Return the floor of each part of M2-BERT.

    Forward. A vector is one token's hidden state in bf16. The backward pass is taken as twice the forward in operations
    and in bytes: a product for the inputs and one for the weights, and what it reads again.
    """
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    blocks = config.monarch_mlp_nblocks if config.use_monarch_mlp else 1
    halves = 2 if config.use_glu_mlp else 1
    convolutions = 2 if config.residual_long_conv else 1
    vector = BF16 * tokens * width
    mlp_weights = (halves + 1) * width * inner // blocks
    per_channel = min(convolution_flops(length), fft_convolution_flops(length))
    parts = [
        ("input projection", 4 * vector + BF16 * 3 * width**2, 2 * tokens * 3 * width**2, "reads 1, writes 3 vectors"),
        (
            "sequence mixer",
            5 * vector,
            tokens * width * (2 * 3 * 3 + 3 + convolutions * per_channel),
            "reads 4, writes 1; the cheaper of direct sum and FFT",
        ),
        ("output projection", 2 * vector + BF16 * width**2, 2 * tokens * width**2, "reads 1, writes 1"),
        ("gated MLP", 2 * vector + BF16 * mlp_weights, 2 * tokens * mlp_weights, "reads 1, writes 1: fused"),
        ("residual and LayerNorm", 3 * vector, 8 * tokens * width, "reads 2, writes 1; 0 where fused into the MLP"),
    ]
    factor = layers * (3 if mode == "training" else 1)
    return [Part(name, factor * num_bytes, factor * flops, note) for name, num_bytes, flops, note in parts]


def convolution_flops(length: int) -> float:
    """Return the operations of a two-sided Toeplitz product, per token and channel."""
    return 2.0 * length


def print_parts(parts: Sequence[Part], ceilings: Ceilings) -> None:
    """Print the floor of each part, and their sum: the parts run one after the other."""
    print(f"\n{'floor of':<24} {'GB':>8} {'GFLOP':>9} {'bytes ms':>9} {'flops ms':>9} {'floor ms':>9}  note")
    for part in parts:
        by_bytes, by_flops = ceilings.floor_ms(part.num_bytes, 0), ceilings.floor_ms(0, part.flops)
        print(
            f"{part.name:<24} {part.num_bytes / 1e9:>8.2f} {part.flops / 1e9:>9.1f} {by_bytes:>9.3f} {by_flops:>9.3f} "
            f"{max(by_bytes, by_flops):>9.3f}  {part.note}"
        )
    print(f"{'sum':<24} {'':>37} {sum(ceilings.floor_ms(p.num_bytes, p.flops) for p in parts):>9.3f}")


def measure(args: argparse.Namespace, device: torch.device) -> tuple[Any, Times, float]:
    """Profile some calls; return the model's configuration, the kernels' times, and ms a call without profiler."""
    from gpu_encoder import make_run, modes_of  # one definition of a forward pass and of a training step

    mode = "eager" if args.no_compile else modes_of(args.model, ["default"])[0]
    run, config = make_run(args.model, args.length, mode, args, device)
    for _ in range(3):
        common.once(run, device)
    ms = common.alternate({"run": run}, 1.0, device)["run"]
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(args.calls):
            run()
        common.synchronize(device)
    if isinstance(ms, str):
        raise SystemExit(ms)
    return config, kernel_times(profiler.events(), device), ms["ms"]


def kernel_times(events: Any, device: torch.device) -> Times:
    """Return the times of all launches; on a CPU those of the operators, without what they spent in others."""
    times: Times = defaultdict(list)
    if device.type != "cuda":
        for event in events:
            times[Launch(event.name, product_of(event))].append(event.self_cpu_time_total)
        return times
    counted: dict[str, int] = defaultdict(int)
    for event in events:
        if event.device_type != DeviceType.CPU or not event.kernels:
            continue
        product, operator = product_of(event), operator_of(event)
        if product:  # it may be several kernels: they share its floor
            longest = max(event.kernels, key=lambda kernel: kernel.duration)
            launch = Launch(longest.name, product, operator)
            times[launch].append(sum(kernel.duration for kernel in event.kernels))
        elif operator:
            for kernel in event.kernels:
                times[Launch(kernel.name, "", operator)].append(kernel.duration)
        if product or operator:
            for kernel in event.kernels:
                counted[kernel.name] += 1
    for event in events:
        # Annotations (torch.compile makes one a graph) span kernels that are counted themselves.
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            if counted[event.name] > 0:
                counted[event.name] -= 1
            else:
                times[Launch(event.name)].append(event.device_time)
    return times


def product_of(event: Any) -> str:
    """Return a matrix product with its shapes as text, "" for anything else."""
    if event.name not in PRODUCTS:
        return ""
    left, right = (event.input_shapes[index] for index in PRODUCTS[event.name])
    if not left or not right:
        return ""
    return f"{event.name} {'x'.join(map(str, left))} @ {'x'.join(map(str, right))}"


def operator_of(event: Any) -> str:
    """Return the operator of ours that an event is, or happens in; "" for none."""
    while event is not None and not event.name.startswith(OURS):
        event = event.cpu_parent
    return "" if event is None else event.name


def product_floor(product: str, ceilings: Ceilings) -> float:
    """Return the floor in ms of one matrix product in bf16."""
    left, right = ([int(size) for size in re.findall(r"\d+", side)] for side in product.split(" ", 1)[1].split("@"))
    batch = left[0] if len(left) == 3 else 1
    rows, inner, columns = left[-2], left[-1], right[-1]
    num_bytes = BF16 * batch * (rows * inner + inner * columns + rows * columns)
    return ceilings.floor_ms(num_bytes, 2.0 * batch * rows * inner * columns)


def kernel_rows(times: Times, calls: int, ceilings: Ceilings) -> list[dict[str, Any]]:
    """Return a row a kernel, slowest first; times and calls are of one call of the model."""
    total = sum(sum(own) for own in times.values())
    rows = []
    for launch, own in times.items():
        count = len(own) / calls
        names = [launch.operator, launch.product, launch.kernel]
        if launch.product.split(" ")[0] == launch.kernel:  # on a CPU the product is the operator itself
            names.pop()
        row = {
            "name": "  ".join(filter(None, names)),
            "part": part_of(launch.operator),
            "calls": count,
            "ms": sum(own) / 1e3 / calls,
            "share": sum(own) / total if total else 0.0,
            "floor_ms": product_floor(launch.product, ceilings) * count if launch.product else None,
        }
        rows.append(row)
    return sorted(rows, key=lambda row: -row["ms"])


def part_of(operator: str) -> str | None:
    """Return the part of the model that an operator of ours computes."""
    name = operator.removeprefix(OURS)
    return next((part for pattern, part in PARTS_OF_OPERATORS if name and re.search(pattern, name)), None)


def part_rows(rows: list[dict[str, Any]], parts: Sequence[Part], ceilings: Ceilings) -> list[dict[str, Any]]:
    """Print and return what our operators of each part take together, beside the part's floor."""
    found = []
    for part in parts:
        ms = sum(row["ms"] for row in rows if row["part"] == part.name)
        if ms > 0:
            floor = ceilings.floor_ms(part.num_bytes, part.flops)
            found.append({"part": part.name, "ms": ms, "floor_ms": floor})
            print(f"our operators of the {part.name}: {ms:.3f} ms, floor {floor:.3f} ms, {ms / floor:.1f} times it")
    return found


def plot(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Draw the slowest kernels as bars, with their floors."""
    from matplotlib.figure import Figure

    top = rows[:15][::-1]
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="ms a call", title=f"{args.model}, {args.mode}, {args.length} tokens")
    axes.barh(range(len(top)), [row["ms"] for row in top], label="measured")
    axes.barh(range(len(top)), [row["floor_ms"] or 0.0 for row in top], height=0.4, color="grey", label="floor")
    axes.set_yticks(range(len(top)), [row["name"][:50] for row in top], fontsize=7)
    axes.legend()
    save_figure(figure, args.plot)


if __name__ == "__main__":
    main()
