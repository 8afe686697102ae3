"""Where a benchmark's figures go: JSON, with what made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bert.files import write_json
from bert.provenance import device_name, provenance


def _gpu() -> dict[str, Any] | None:
    """What CUDA says of the GPU; None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    """Write figures as JSON, with the command (absolute paths by their last part), machine, versions and date."""
    record = provenance()
    record["machine"]["gpu"] = _gpu()
    write_json(path, record | {"device": device_name(), **figures})
