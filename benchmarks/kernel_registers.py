"""Registers and spills of the long convolution's forward kernel for sequences of one block, without a GPU.

    python benchmarks/kernel_registers.py --blocks 4096,8192 --output results/kernel_registers.json

Compiles for Hopper (sm_90) in bf16, with and without a padding mask, and asks Triton's own ptxas. Spills are bytes a
thread stores and loads because it has no register for them. Another version of Triton gives other figures: to look at
one, put it first on PYTHONPATH (`pip install --no-deps --target DIR triton==3.6.0`).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if "TRITON_INTERPRET" in os.environ:  # it replaces the compiler, and Triton looks when it is imported
    sys.exit("unset TRITON_INTERPRET: an interpreted kernel has no registers")

import triton
from machine import write_figures
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from monarch_mixer.kernels.monarch_fft_one_block import forward_kernel
from monarch_mixer.kernels.monarch_fft_tables import SHAPES

DIVISIBLE = ("length", "plane", "channels")  # by 16, as the launcher finds them for most models
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


def compiled(block: int, padded: bool) -> str:
    """The PTX of the gated kernel with residual convolution in evaluation, of a length that fills its block."""
    shape = SHAPES[block]
    constants: dict[str, Any] = {"GATED": True, "RESIDUAL": True, "SAVE_INNER": False, "PADDED": padded}
    constants |= {"ROWS": shape.rows, "COLUMNS": shape.columns, "SEQUENCES": shape.sequences, "KEEP": shape.keep}
    constants |= {"MASKED": False, "PRECISION": "tf32", "inner_ptr": None}
    pointers = dict.fromkeys(("parameters", "skip_ptr", "residual_skip_ptr"), "*fp32") | {"twiddle_ptr": "*fp16"}
    if padded:
        pointers["lengths_ptr"] = "*i32"
    else:
        constants["lengths_ptr"] = None
    names = forward_kernel.arg_names
    pointers |= {n: "*bf16" for n in names if n.endswith("_ptr") and n not in pointers and n not in constants}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    source = ASTSource(
        fn=forward_kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers or n in DIVISIBLE},
    )
    options = {"num_warps": shape.warps, "num_stages": 1}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def resources(ptx: str) -> dict[str, int]:
    """What ptxas says of a kernel."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [PTXAS, "-v", "--gpu-name", "sm_90a", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", said, re.DOTALL)
    if found is None:
        raise SystemExit(f"ptxas said something else: {said}")
    return dict(zip(("spill_stores", "spill_loads", "registers"), map(int, found.groups()), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default=",".join(map(str, SHAPES)), help="by commas (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    rows = []
    print(f"Triton {triton.__version__}, sm_90\n{'block':>8} {'padding':>8} {'registers':>10} {'spilled, bytes':>15}")
    for block in map(int, arguments.blocks.split(",")):
        for padded in (False, True):
            row = {"block": block, "padded": padded, **resources(compiled(block, padded))}
            rows.append(row)
            print(f"{block:8,} {'masked' if padded else '-':>8} {row['registers']:10} {row['spill_stores']:15}")
    if arguments.output:
        write_figures(arguments.output, {"triton": triton.__version__, "target": "sm_90", "rows": rows})


if __name__ == "__main__":
    main()
