"""What a figure is worth nothing without: the command, the machine, the versions and the date."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "mosaicml", "mosaicml-streaming", "transformers", "tokenizers", "numpy")


def processor() -> str:
    """Return the processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def device_name() -> str:
    """Return the name of the GPU where there is one, else of the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Return the versions of packages; None for one that is not installed (the project itself may be on the path)."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a benchmark of the layers alone runs without the recipe's packages
        return None


def commit() -> str | None:
    """Return the commit of this folder, "-changed" where files differ from it; None where git cannot tell."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-changed" if changes.stdout.strip() else "")


def provenance(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Return command (absolute paths by their last part), date, machine and versions; CUDA is not touched.

    Args:
        arguments: of the command, its script first; None: this process's.
    """
    return {
        "command": shlex.join(["python", *map(_shortened, _started_as() if arguments is None else arguments)]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": versions(),
    }


def _started_as() -> list[str]:
    """The arguments of Python that started this process: a script, or -m and a module."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or spec.origin != sys.argv[0]:
        return sys.argv
    return ["-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]


def _shortened(part: str) -> str:
    """An argument with an absolute path by the path's last part: where it lay on a machine says nothing."""
    key, equals, value = part.rpartition("=")
    return f"{key}{equals}{Path(value).name}" if Path(value).is_absolute() else part
