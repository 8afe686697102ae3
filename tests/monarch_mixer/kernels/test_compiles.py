"""The installed Triton compiles every kernel: its interpreter, which the other tests use, takes more than it does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "src" / "monarch_mixer" / "kernels"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile them for this GPU")
def test_every_kernel_compiles():
    # With Triton's own cache, whose keys are all that a kernel is made of: what is as it was is not compiled again.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "compile_all.py")]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    launched = set(re.findall(r"\bmonarch_mixer\.kernels\.(\w+\.\w+)", ended.stdout))
    # A kernel is launched as name[grid](...); what is called by others is compiled with them.
    written = set()
    for path in KERNELS.glob("*.py"):
        text = path.read_text()
        kernels = re.findall(r"^@triton\.jit\ndef (\w+)", text, re.MULTILINE)
        everything = "".join(other.read_text() for other in KERNELS.glob("*.py"))
        written |= {f"{path.stem}.{name}" for name in kernels if re.search(rf"\b{name}\[", everything)}
    assert written <= launched and len(written) > 15
