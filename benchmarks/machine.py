"""What a figure is worth nothing without: the machine, the versions and the date."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "mosaicml", "mosaicml-streaming", "transformers", "tokenizers", "numpy")


def processor() -> str:
    """Return the processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def device_name() -> str:
    """Return the name of the GPU where there is one, else of the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a benchmark of the layers alone runs without the recipe's packages
        return None


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    """Write figures as JSON, with the command (paths by their last part), machine, versions and date."""
    command = [part if part.startswith("-") else Path(part).name for part in sys.argv]
    record = {
        "command": " ".join(["python", *command]),
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "gpu": _gpu(),
        },
        "versions": {package: _version(package) for package in PACKAGES},
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
