"""What the Triton kernels share: where they run, their arithmetic, and how their outputs are allocated."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_T = TypeVar("_T")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Ampere, the first with bf16 and asynchronous copies. The kernels are tuned on, and were run on, Hopper (9.0).
MIN_CAPABILITY = (8, 0)
# What `kernels_apply` is told, and the log says, of a sequence mixer that has none.
NO_CENTERED_SHORT_CONVOLUTION = "the sequence mixer's know the causal short convolution alone, not a centered one"

# Tokens of the largest block of the transforms that are to be exact to fp32. Larger ones round more: a padded batch's
# gradients are to be those of its texts alone up to 1e-5, and with 2,048 they were up to 1.4e-5 off on an H200.
LARGEST_EXACT_BLOCK = 1024

_state = {"enabled": True}
_logged: set[str] = set()


@contextlib.contextmanager
def use_kernels(enabled: bool) -> Iterator[None]:
    """Switch the kernels on or off (the plain PyTorch versions run then) within a `with` block."""
    before = _state["enabled"]
    _state["enabled"] = enabled
    try:
        yield
    finally:
        _state["enabled"] = before


def kernels_enabled() -> bool:
    """Say whether kernels may run at all; see `use_kernels`."""
    return _state["enabled"]


def kernels_apply(x: Tensor, dtype: torch.dtype, lacking: str | None = None) -> bool:
    """Say whether an op on `x`, computed in `dtype`, runs as Triton kernels.

    Where the device or the dtype is not supported, or the op itself (`lacking` says why), the reference runs, and the
    log says so once.
    """
    return kernels_enabled() and x.is_cuda and _supported(x.device.index or 0, dtype, lacking)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype an op computes in: autocast's where it is on, else that of `x`."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


@torch.compiler.assume_constant_result
def _supported(device: int, dtype: torch.dtype, lacking: str | None) -> bool:
    capability = torch.cuda.get_device_capability(device)
    if importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed"
    elif capability < MIN_CAPABILITY:
        reason = f"compute capability {capability[0]}.{capability[1]} is under {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    elif dtype not in DTYPES:
        reason = f"there are none for {dtype}"
    elif lacking is not None:
        reason = lacking
    else:
        return True
    if reason not in _logged:
        _logged.add(reason)
        log.warning("Monarch Mixer runs without its Triton kernels: %s", reason)
    return False


def dot_precision(dtype: torch.dtype) -> str:
    """Return Triton's `input_precision` for products of `dtype`.

    fp32 products are exact to fp32 (three tf32 products each) unless PyTorch's own may be tf32.
    """
    if interpreting():
        return "interpreted"
    return "tf32x3" if dtype == torch.float32 and not tf32_allowed("cuda") else "tf32"


@torch.compiler.assume_constant_result
def tf32_allowed(device_type: str) -> bool:
    """Say whether PyTorch's fp32 products on such a device may be tf32, whose mantissa has 10 bits.

    A compiled graph keeps the answer that it was traced with.
    """
    return device_type == "cuda" and torch.backends.cuda.matmul.allow_tf32


def exact_in_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether what is computed in `dtype` is to be exact to fp32, with fp64 where sums or sines ask for it.

    Not where fp32 products may be tf32, nor where the device has no fp64 (MPS).
    """
    return dtype == torch.float32 and device.type in ("cpu", "cuda") and not tf32_allowed(device.type)


def stored_share(dtype: torch.dtype) -> float:
    """Return the power of two times which the gated MLP's intermediate and output are stored, fp16's range being small.

    Both grow with the square of the input, which nothing normalises after long convolutions: as the recipes start
    M2-BERT-base, the intermediate is up to 3e4 at 8,192 tokens and 5e5 at 32,768. fp16 ends at 65,504, so stored at
    1.7e7, and is as exact as ever from 0.016 up; of smaller values it keeps steps of 1.5e-5.
    """
    return 1 / 256 if dtype == torch.float16 else 1.0


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate what a kernel writes; all of it, which tests check by filling it with NaN first."""
    return torch.empty(shape, dtype=dtype, device=device)


def outside_graphs(make: Callable[[], _T], device: torch.device) -> _T:
    """Return what `make` returns, its memory outside the pool of any CUDA graph that is being warmed up or captured.

    What a graph's pool holds is overwritten by replays. Pools take what the capturing thread or its stream allocates:
    `make` runs without gradients in a thread of its own, on the default stream.
    """
    if device.type != "cuda":
        return make()
    caller = torch.cuda.current_stream(device)
    before, after = torch.cuda.Event(), torch.cuda.Event()
    capturing = torch.cuda.is_current_stream_capturing()
    if not capturing:
        before.record(caller)

    def run() -> _T:
        with torch.cuda.device(device), torch.no_grad():
            stream = torch.cuda.current_stream(device)
            if not capturing:
                stream.wait_event(before)
            made = make()
            after.record(stream)
            if capturing:
                stream.synchronize()
            return made

    with ThreadPoolExecutor(1) as executor:
        made = executor.submit(run).result()
    if not capturing:
        caller.wait_event(after)
    return made


def interpreting() -> bool:
    """Say whether Triton runs kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1; for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
