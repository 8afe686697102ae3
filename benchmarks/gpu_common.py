"""What the GPU benchmarks share: the models by name, timing, the card's two ceilings, the plot, the common options."""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import device_name
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from bert.configuration import M2BertConfig
from bert.files import save_figure
from bert.modeling import M2BertModel, real_lengths
from bert.recipe.schema import load_config
from monarch_mixer.kernels import use_kernels

REPOSITORY = Path(__file__).resolve().parents[1]
HF_BERT = "hf-bert-base"  # the peer that the bars are ratios to
# A model of every kind, for a CPU and a second: what tests run.
SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
ROUNDS = 5  # the models of a row take turns so often; the spread of the rounds' medians says what a difference is worth


@dataclass(frozen=True)
class Peer:
    """A model to measure: the recipe that describes it, and how it runs."""

    recipe: str
    kernels: bool = True  # False: the layers' plain PyTorch versions, with FFTs for the long convolutions
    compiled: bool = True
    masked: bool = False  # batches have padding, which the sequence mixer leaves out


PEERS = {
    "m2-base": Peer("m2-base"),
    "m2-base-masked": Peer("m2-base", masked=True),
    HF_BERT: Peer("hf-bert-base"),
    "bert-base": Peer("bert-base"),
    "m2-fft-reference": Peer("m2-base", kernels=False, compiled=False),
    "m2-fft-compiled": Peer("m2-base", kernels=False),
}


class Encoder(nn.Module):
    """Token ids (batch, length) to hidden states (batch, length, hidden): embeddings and layers; no pooler.

    Without a mask, but where an M2-BERT is given one (batch, length) to leave its padding out.

    Hugging Face's own forward makes a mask of ones, which costs a compiled model the flash kernels; its parts are
    called without, so that the peer runs as fast as it can.
    """

    def __init__(self, model: M2BertModel | BertModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.model.embeddings(input_ids)
        if attention_mask is None:
            return self.model.encoder(hidden)[0]
        return self.model.encoder(hidden, real_lengths(attention_mask))[0]


def build_encoder(name: str, length: int, *, small: bool = False, dropout: float | None = None) -> Encoder:
    """Build the encoder of a peer for sequences of `length` tokens on the current default device.

    Args:
        name: of `PEERS`.
        length: what position tables and filters are made for.
        small: a tiny one, to try a command out.
        dropout: instead of the recipe's own probabilities.
    """
    recipe = PEERS[name].recipe
    path = REPOSITORY / "yamls" / "pretrain" / f"{recipe}.yaml"
    model = load_config(path, [f"max_seq_len={length}"]).model
    config: dict[str, Any] = {**model.config, **(SMALL if small else {})}
    if dropout is not None:
        config["hidden_dropout_prob"] = config["attention_probs_dropout_prob"] = dropout
    if model.name == "hf_bert":
        config["max_position_embeddings"] = max(config["max_position_embeddings"], length)
        return Encoder(BertModel(BertConfig(**config), add_pooling_layer=False))
    config["monarch_mixer_sequence_mixing"] = model.name == "m2_bert"
    return Encoder(M2BertModel(M2BertConfig.from_recipe(config), add_pooling_layer=False))


@contextlib.contextmanager
def running(device: torch.device, kernels: bool) -> Iterator[None]:
    """Run what is inside in bf16 autocast, with the kernels or without (compiled code is traced again for each)."""
    with use_kernels(kernels), torch.autocast(device.type, torch.bfloat16):
        yield


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(function: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def time_calls(function: Callable[[], Any], seconds: float, device: torch.device, *, wait: bool = False) -> list[float]:
    """Call repeatedly for about `seconds` (at least three times); return each call's milliseconds.

    On a GPU between two events, without waiting in between: what a queue of such calls takes. With `wait`: what the
    caller of each sees until the device is done.
    """
    estimate = once(function, device)
    count = min(1000, max(3, round(seconds / max(estimate, 1e-6))))
    if wait or device.type != "cuda":
        return [1e3 * once(function, device) for _ in range(count)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    synchronize(device)
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def alternate(
    functions: Mapping[Any, Callable[[], Any]], seconds: float, device: torch.device, *, wait: bool = False
) -> dict[Any, dict[str, float] | str]:
    """Time several functions in turns, each for about `seconds` in all; `wait` as in `time_calls`.

    Returns:
        By name: "ms", the median of all calls, "ms_p95", and "ms_min" and "ms_max", the least and largest median of a
        round; or the message of the error that a function ended with.
    """
    rounds: dict[Any, list[list[float]]] = {name: [] for name in functions}
    errors: dict[Any, str] = {}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            if name in errors:
                continue
            try:
                rounds[name].append(time_calls(function, seconds / ROUNDS, device, wait=wait))
            except Exception as error:  # noqa: BLE001 - whatever a compiler or a kernel raises is that row's result
                errors[name] = message(error)
    return {name: errors.get(name) or _summary(rounds[name]) for name in functions}


def _summary(rounds: list[list[float]]) -> dict[str, float]:
    calls = sorted(itertools.chain.from_iterable(rounds))
    medians = [statistics.median(times) for times in rounds]
    return {
        "ms": statistics.median(calls),
        "ms_p95": calls[int(0.95 * (len(calls) - 1))],
        "ms_min": min(medians),
        "ms_max": max(medians),
    }


def message(error: Exception) -> str:
    """Return an error as one short line of a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def free_memory() -> None:
    """Give back what deleted models held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reserved_gb(device: torch.device) -> float | None:
    """Return what this process keeps of the device's memory, that of CUDA graphs too, in GB; None on a CPU.

    Right after `free_memory` that is what lives; else the most there was since, as far as it was not given back.
    """
    return torch.cuda.memory_reserved(device) / 1e9 if device.type == "cuda" else None


def peak_gb(function: Callable[[], Any], device: torch.device) -> float | None:
    """Return the most memory that tensors held during a call, in GB; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    once(function, device)
    return torch.cuda.max_memory_allocated(device) / 1e9


@dataclass(frozen=True)
class Ceilings:
    """What the card reaches at most, measured in this run."""

    copy_bytes_per_s: float  # read and written, device to device
    matmul_flops_per_s: float  # bf16, random data

    def floor_ms(self, num_bytes: float, flops: float) -> float:
        """Return the time that no kernel with so many bytes and operations can beat."""
        return 1e3 * max(num_bytes / self.copy_bytes_per_s, flops / self.matmul_flops_per_s)

    def __str__(self) -> str:
        return (
            f"copy {self.copy_bytes_per_s / 1e12:.2f} TB/s (read and written), "
            f"bf16 matrix product {self.matmul_flops_per_s / 1e12:.0f} TFLOP/s"
        )


def measure_ceilings(device: torch.device, small: bool = False) -> Ceilings:
    """Measure a large copy and a large matrix product on random data."""
    size, count = (256, 1 << 20) if small else (8192, 1 << 30)
    source = torch.empty(count, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    copy = statistics.median(time_calls(lambda: target.copy_(source), 0.2, device))
    product = statistics.median(time_calls(lambda: left @ right, 0.3, device))
    return Ceilings(2 * 2 * count / (copy / 1e3), 2 * size**3 / (product / 1e3))


def random_ids(device: torch.device, tokens: int, length: int, vocabulary: int) -> Tensor:
    """Draw token ids (tokens // length, length)."""
    return torch.randint(0, vocabulary, (max(1, tokens // length), length), device=device)


def random_mask(ids: Tensor) -> Tensor:
    """Return a mask for ids (batch, length) whose rows end at random places of their second half."""
    batch, length = ids.shape
    ends = torch.randint((length + 1) // 2, length + 1, (batch, 1), device=ids.device)
    return (torch.arange(length, device=ids.device) < ends).long()


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every GPU benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    made.add_argument("--small", action="store_true", help="a tiny model and a few tokens, to try the command out")
    made.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    made.add_argument("--plot", type=Path, help="also draw them to this PNG file")
    return made


def integers(text: str) -> list[int]:
    """Read a list such as 128,512."""
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Read a list of models such as m2-base,hf-bert-base."""
    chosen = text.split(",")
    for name in chosen:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(PEERS)}")
    return chosen


def use_device(name: str) -> torch.device:
    """Say where the figures come from and make the device ready, so that no row pays for its start."""
    device = torch.device(name)
    print(
        f"{device_name()}, torch {torch.__version__}, {' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}", flush=True
    )
    torch.manual_seed(0)
    warm = torch.randn(64, 64, device=device)
    once(lambda: warm @ warm, device)
    return device


def draw_lines(
    path: Path,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log: bool = True,
    dashed: Iterable[str] = (),
) -> None:
    """Draw named lines of (x, y) points to a PNG; names in `dashed` are bars and floors."""
    # Imported where it is used: it takes a second. The Figure class needs no display and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label, title=title)
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        x_values = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(x_values, [f"{x:,}" for x in x_values], fontsize=8)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    dashed = set(dashed)
    for name, points in lines.items():
        if points:
            style = {"linestyle": "--", "color": "grey"} if name in dashed else {"marker": "o" if log else ""}
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, markersize=4, **style)
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend()
    save_figure(figure, path)
