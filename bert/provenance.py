"""What a figure is worth nothing without: the command, the machine, the versions and the date."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "mosaicml", "mosaicml-streaming", "transformers", "tokenizers", "numpy")


def processor() -> str:
    """Return the processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python and of what the figures depend on; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def provenance(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Return command (paths by their last part), date, machine and versions.

    Args:
        arguments: of the command, its script first; None: this process's.
    """
    parts = [_shortened(part) for part in (sys.argv if arguments is None else arguments)]
    return {
        "command": " ".join(["python", *parts]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": versions(),
    }


def _shortened(part: str) -> str:
    """An argument with a path in it by the path's last part: where a folder lay on one machine says nothing."""
    key, equals, value = part.rpartition("=")
    return part if value.startswith("-") else f"{key}{equals}{Path(value).name}"
