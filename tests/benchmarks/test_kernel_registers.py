"""The registers of a kernel, compiled without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_kernel_is_compiled_with_and_without_a_mask(tmp_path: Path) -> None:
    # A process of its own: the other tests' kernels are interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks/kernel_registers.py"), "--blocks", "256"]
    command += ["--output", str(tmp_path / "r.json")]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["kernel"], row["padded"]) for row in rows] == [
        (kernel, padded) for kernel in ("forward", "backward") for padded in (False, True)
    ]
    assert all(64 < row["registers"] <= 255 and row["spill_stores"] >= 0 for row in rows)
    interpreted = {**environment, "TRITON_INTERPRET": "1"}
    refused = subprocess.run(command, capture_output=True, text=True, check=False, env=interpreted)
    assert refused.returncode == 1 and "unset TRITON_INTERPRET" in refused.stderr
