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

# Folders, files (without .py) and names of tests that make a StreamingDataset.
STREAMING = {"recipe", "faults", "test_streaming_text", "test_contrastive_training", "test_prepare", "test_scaling"} | {
    "test_training_throughput",
    "test_synthetic_shards_are_what_the_loader_reads",
}
FIXTURES = Path(__file__).parent / "fixtures"


def pytest_collection_modifyitems(items):
    # Streaming numbers its shared memory by looking which numbers are taken: two processes that start together may take
    # the same one. So what trains or streams runs in one of pytest-xdist's processes.
    for item in items:
        place = item.path.relative_to(Path(__file__).parent).with_suffix("").parts
        if STREAMING.intersection((*place, item.originalname)):
            item.add_marker(pytest.mark.xdist_group("streaming"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def goldens():
    """Load a golden case: its configuration, tensors and the path of its weights."""

    def load(case: str) -> tuple[dict, dict[str, torch.Tensor], Path]:
        folder = FIXTURES / "goldens" / case
        config = json.loads((folder / "config.json").read_text())["model_config"]
        return config, load_file(folder / "golden.safetensors"), folder / "weights.safetensors"

    return load
