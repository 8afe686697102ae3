"""The kernels' tests: on a GPU where there is one (`make test-gpu`), else in Triton's interpreter on CPU tensors."""

import dataclasses

import numpy as np
import pytest
import torch

PATCHED = set()  # the functions for which Triton's interpreter has replaced what `triton.language` holds


@pytest.fixture(autouse=True)
def interpreted_without_waste(monkeypatch):
    """Spare the interpreter what changes nothing and takes half its time.

    At every call it looks through `triton.language` for functions to replace. Triton 3.3 leaves them replaced, so that
    a second look finds none; later versions put them back, by the scope that `_patch_lang` returns. And it computes
    whether integers overflow, for an assertion that it then leaves out, since its options do not say `debug`.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_once(fn):
        if fn in PATCHED:
            return None
        scope = patch(fn)
        if scope is None:
            PATCHED.add(fn)
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


@pytest.fixture(autouse=True)
def bf16_rounds_to_nearest(monkeypatch):
    """Make the interpreter round to bf16 as GPUs do: Triton 3.3's cuts off, twice the error and all of it downwards."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data, from_type, to_type, mode):
        if (from_type.name, to_type.name) != ("fp32", "bf16"):
            return convert(data, from_type, to_type, mode)
        bits = np.ascontiguousarray(data).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter beside a GPU")),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ]
)
def device(request):
    """Where a kernel test runs: in the interpreter on the CPU, or on a GPU."""
    return request.param


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """As `poison`, in every test, for modules that call `support.empty` by that name."""
    from monarch_mixer.kernels import support

    def empty(*shape, dtype, device):
        return torch.full(shape, float("nan") if dtype.is_floating_point else -(2**30), dtype=dtype, device=device)

    monkeypatch.setattr(support, "empty", empty)
