"""Shared by all tests: determinism and one CPU thread a process, since the machine has few cores."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# The kernels' tests run in Triton's interpreter where there is no GPU. Triton looks when it is first imported, and
# Composer imports it: so here, before any test module.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def exact_products():
    """Keep fp32 products fp32 on a GPU: Composer's trainer allows tf32 in its process, also after it has ended."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="session")
def goldens():
    """Load a golden case: its configuration, tensors and the path of its weights."""

    def load(case: str) -> tuple[dict, dict[str, torch.Tensor], Path]:
        folder = FIXTURES / "goldens" / case
        config = json.loads((folder / "config.json").read_text())["model_config"]
        return config, load_file(folder / "golden.safetensors"), folder / "weights.safetensors"

    return load
