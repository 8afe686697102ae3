"""Without a GPU the kernels run in Triton's interpreter, on CPU tensors."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any module with kernels is imported


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
    """Fill what kernels allocate with NaN first, so that what they do not write shows."""
    from monarch_mixer.kernels import support

    def empty(*shape, dtype, device):
        return torch.full(shape, float("nan") if dtype.is_floating_point else -(2**30), dtype=dtype, device=device)

    monkeypatch.setattr(support, "empty", empty)
