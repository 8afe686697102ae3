"""What `scaling.py` compares on several devices, and the process that runs such a comparison on each rank.

`composer -n N scaling_variants.py PLAN.json` trains one recipe after the other through the recipe's own `main`, so that
they share the time that a process takes to start. The plan is a list of `Job`s. What a variant changes is an override
of the recipe where the recipe has a key, else a patch that only this process sees.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import composer.optim
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.autograd import DeviceType
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torchmetrics.utilities.distributed import gather_all_tensors

from bert.recipe.builders import REGISTRY, Entry
from bert.recipe.train import main as train_main

PROFILED_STEPS = 3
LONGEST_GAPS = 24  # that a profile keeps: of some eight microbatches a step, which have one each at least
Interval = tuple[float, float]


@dataclass(frozen=True)
class Variant:
    """One way to train, and what it shows."""

    shows: str
    overrides: tuple[str, ...] = ()  # of the recipe
    patches: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def _ddp(**arguments: Any) -> Callable[[], Any]:
    """Let DistributedDataParallel reduce the gradients, with arguments that Composer does not give it."""

    def prepare(module: torch.nn.Module, find_unused_parameters: bool) -> torch.nn.Module:
        return DistributedDataParallel(module, find_unused_parameters=find_unused_parameters, **arguments)

    @contextlib.contextmanager
    def patches() -> Iterator[None]:
        with (
            patch("composer.trainer.trainer.prepare_ddp_module", prepare),
            patch("bert.recipe.train._reduces_at_once", lambda config: False),
        ):
            yield

    return patches


@contextlib.contextmanager
def _never_synchronised(state: State, *_: Any) -> Iterator[None]:
    with state.model.no_sync() if isinstance(state.model, DistributedDataParallel) else contextlib.nullcontext():
        yield


def _always_synchronised(*_: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


_SYNC = "composer.trainer.trainer.ddp_sync_context"


@contextlib.contextmanager
def _own_cores() -> Iterator[None]:
    """Keep this rank and its loader's workers to its share of the cores, in the order of their numbers."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    cores, ranks, rank = sorted(before), dist.get_local_world_size(), dist.get_local_rank()
    share = max(1, len(cores) // ranks)
    os.sched_setaffinity(0, cores[rank * share : (rank + 1) * share] or cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


VARIANTS: dict[str, Variant] = {
    "default": Variant("the recipe"),
    "no-sync": Variant(
        "no reduction of gradients at all: what it costs", patches=partial(patch, _SYNC, _never_synchronised)
    ),
    "multi-sync": Variant("reduction after every microbatch", patches=partial(patch, _SYNC, _always_synchronised)),
    "bf16-reduce": Variant("half the bytes", ("gradient_reduction=bf16",)),
    "overlap": Variant("reduction within the compiled backward pass", ("overlap_reduction=true", "compile=true")),
    "no-cuda-graphs": Variant("kernels are started one by one", ("compile=true",)),
    "ddp": Variant("DistributedDataParallel reduces, in buckets of 25 MiB", patches=_ddp()),
    "ddp-100": Variant("the same in buckets of 100 MiB", patches=_ddp(bucket_cap_mb=100)),
    "ddp-400": Variant("the same in one bucket of up to 400 MiB", patches=_ddp(bucket_cap_mb=400)),
    "ddp-view": Variant("the same, and gradients lie in the buckets", patches=_ddp(gradient_as_bucket_view=True)),
    "ddp-static": Variant("the same, told that the graph never changes", patches=_ddp(static_graph=True)),
    "auto-microbatch": Variant(
        "Composer looks for the microbatch", ("device_train_microbatch_size=auto", "compile=false")
    ),
    "workers-2": Variant("2 loader workers a rank", ("train_loader.num_workers=2",)),
    "workers-16": Variant("16 loader workers a rank", ("train_loader.num_workers=16",)),
    "own-cores": Variant("each rank keeps to its share of the cores", patches=_own_cores),
    "composer-adamw": Variant(
        "Composer's optimizer, parameter by parameter",
        patches=partial(patch.dict, REGISTRY["optimizer"], {"decoupled_adamw": Entry(composer.optim.DecoupledAdamW)}),
    ),
    "metric-barriers": Variant(
        "torchmetrics' own gathering", patches=partial(patch, "bert.composer_models.gather_scalars", gather_all_tensors)
    ),
    "profile": Variant("the default under PyTorch's profiler: not a speed"),
}


@dataclass(frozen=True)
class Job:
    """A run of the plan."""

    variant: str  # of VARIANTS; several joined by + are all applied
    arguments: list[str]  # of the recipe's command
    result: str  # JSON file that says how it ended: seconds, error, kernels
    profile_from: int | None = None  # the batch that the profiler starts at


@dataclass(frozen=True)
class Gap:
    """A time in which nothing runs on the device: what to read to see who is late."""

    ms: float
    at: float  # milliseconds from the first kernel on
    after: str  # the kernel before it
    before: str  # the kernel that ends it


@dataclass(frozen=True)
class Kernels:
    """Where the device's time goes on rank 0, in milliseconds a step."""

    wall: float
    compute: float  # any kernel or copy but NCCL's runs
    nccl: float  # NCCL's run, from a rank's arrival: waiting for the last one counts
    nccl_exposed: float  # and nothing else does
    idle: float  # nothing runs
    by_name: dict[str, list[float]] = field(default_factory=dict)  # NCCL's kernels: calls and ms a step
    gaps: list[Gap] = field(default_factory=list)  # the longest of all steps together


def parts(name: str) -> list[Variant]:
    """The variants that a name such as overlap+bf16-reduce joins; ValueError for an unknown one."""
    found = []
    for part in name.split("+"):
        if part not in VARIANTS:
            raise ValueError(f"'{part}' is none of {', '.join(VARIANTS)}")
        found.append(VARIANTS[part])
    return found


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals as disjoint ones, in order."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def length(intervals: Iterable[Interval]) -> float:
    """The length of the intervals' union."""
    return sum(end - start for start, end in merged(intervals))


def kernel_times(events: Iterable[Any], wall_s: float, steps: int) -> Kernels | None:
    """Add up a profile's device events (times in microseconds); None where there are none, as on a CPU."""
    compute: list[Interval] = []
    nccl: list[Interval] = []
    names: dict[Interval, str] = {}
    by_name: dict[str, list[float]] = {}
    for event in events:
        if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        interval = (event.time_range.start, event.time_range.end)
        if event.name.startswith("nccl:"):  # a range of the host's, shown on the device's line
            continue
        names[interval] = event.name.replace("(anonymous namespace)::", "").partition("(")[0][:80]
        if not event.name.startswith("nccl"):
            compute.append(interval)
            continue
        nccl.append(interval)
        counts = by_name.setdefault(event.name.partition("(")[0], [0.0, 0.0])
        counts[0] += 1 / steps
        counts[1] += (interval[1] - interval[0]) / 1e3 / steps
    if not compute and not nccl:
        return None
    scale = 1e-3 / steps
    busy, computing = length(compute + nccl) * scale, length(compute) * scale
    wall = 1e3 * wall_s / steps
    return Kernels(wall, computing, length(nccl) * scale, busy - computing, wall - busy, by_name, gaps(names))


def gaps(names: Mapping[Interval, str]) -> list[Gap]:
    """The longest times between device events (by their interval in microseconds), longest first.

    What is idle before the first event and after the last is none of them.
    """
    found: list[Gap] = []
    (start, end), *others = sorted(names)
    first, last = start, names[start, end]
    for interval in others:
        if interval[0] > end:
            found.append(Gap((interval[0] - end) / 1e3, (end - first) / 1e3, last, names[interval]))
        if interval[1] > end:
            end, last = interval[1], names[interval]
    return sorted(found, key=lambda gap: -gap.ms)[:LONGEST_GAPS]


class DeviceProfile(Callback):
    """Profile the GPU's kernels on rank 0 for a few batches, from `first` on; without a GPU nothing."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first
        self.kernels: Kernels | None = None
        self._profile: profile | None = None
        self._start = 0.0

    def batch_start(self, state: State, logger: Logger) -> None:
        due = state.timestamp.batch.value == self.first and dist.get_global_rank() == 0
        if due and torch.cuda.is_available():
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.start()
            self._start = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._profile is not None and state.timestamp.batch.value == self.first + PROFILED_STEPS:
            torch.cuda.synchronize()
            wall = time.perf_counter() - self._start
            self._profile.stop()
            self.kernels = kernel_times(self._profile.events() or (), wall, PROFILED_STEPS)
            self._profile = None


def run_job(job: Job) -> dict[str, Any]:
    """Train as a job says; return its seconds, and its error or its profile where there is one."""
    start = time.perf_counter()
    made: list[DeviceProfile] = []

    def make(first: int) -> DeviceProfile:
        made.append(DeviceProfile(first))
        return made[-1]

    arguments = list(job.arguments)
    row: dict[str, Any] = {}
    try:
        with contextlib.ExitStack() as stack:
            for variant in parts(job.variant):
                arguments += variant.overrides
                stack.enter_context(variant.patches())
            if job.profile_from is not None:
                stack.enter_context(patch.dict(REGISTRY["callbacks"], {"device_profile": Entry(make)}))
                arguments.append(f"callbacks.device_profile.first={job.profile_from}")
            torch._dynamo.reset()  # graphs of the run before, which other settings made
            if code := train_main(arguments):
                row["error"] = f"ended with {code}: see the log"
    except Exception as error:  # noqa: BLE001 - whatever a variant raises is its result
        row["error"] = f"{type(error).__name__}: {error}"[:500]
    row["process_s"] = time.perf_counter() - start
    if made and made[0].kernels is not None:
        row["kernels"] = asdict(made[0].kernels)
    return row


def main() -> None:
    for values in json.loads(Path(sys.argv[1]).read_text()):
        job = Job(**values)
        row = run_job(job)
        if dist.get_global_rank() == 0:
            path = Path(job.result)
            path.with_suffix(".tmp").write_text(json.dumps(row))
            path.with_suffix(".tmp").replace(path)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if dist.get_world_size() > 1:
            dist.barrier()


if __name__ == "__main__":
    main()
