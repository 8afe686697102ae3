"""Registers and spills of the long convolution's kernels for sequences of one block, without a GPU.

    python benchmarks/kernel_registers.py --blocks 4096,8192 --output results/kernel_registers.json

Compiles for Hopper (sm_90) in bf16, with and without a padding mask, and asks Triton's own ptxas. Spills are bytes a
thread stores and loads because it has no register for them. Another version of Triton gives other figures: to look at
one, put it first on PYTHONPATH (`pip install --no-deps --target DIR triton==3.6.0`).
"""

from __future__ import annotations

import argparse
import itertools
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

from monarch_mixer.kernels.monarch_fft_one_block import backward_kernel, forward_kernel
from monarch_mixer.kernels.monarch_fft_tables import SHAPES

DIVISIBLE = ("length", "plane", "channels")  # by 16, as the launcher finds them for most models
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


# The gated kernels of a length that fills its block: forward in evaluation with the residual convolution, and backward.
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "forward": (forward_kernel, {"RESIDUAL": True, "SAVE_INNER": False, "inner_ptr": None}),
    "backward": (backward_kernel, {"input_ptr": None, "grad_input_ptr": None}),
}
FP32 = ("parameters", "skip_ptr", "residual_skip_ptr", "grad_spectrum_ptr", "grad_skip_ptr")


def compiled(kernel: str, block: int, padded: bool) -> str:
    """The PTX of one of KERNELS."""
    function, constants = KERNELS[kernel]
    shape = SHAPES[block]
    constants = {**constants, "GATED": True, "PADDED": padded, "MASKED": False, "PRECISION": "tf32"}
    constants |= {"ROWS": shape.rows, "COLUMNS": shape.columns, "SEQUENCES": shape.sequences, "KEEP": shape.keep}
    pointers = dict.fromkeys(FP32, "*fp32") | {"twiddle_ptr": "*fp16"}
    if padded:
        pointers["lengths_ptr"] = "*i32"
    else:
        constants["lengths_ptr"] = None
    names = function.arg_names
    pointers |= {n: "*bf16" for n in names if n.endswith("_ptr") and n not in pointers and n not in constants}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    source = ASTSource(
        fn=function,
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
    print(f"Triton {triton.__version__}, sm_90")
    print(f"{'kernel':>8} {'block':>8} {'padding':>8} {'registers':>10} {'spilled, bytes':>15}")
    for kernel, block, padded in itertools.product(KERNELS, map(int, arguments.blocks.split(",")), (False, True)):
        row = {"kernel": kernel, "block": block, "padded": padded, **resources(compiled(kernel, block, padded))}
        rows.append(row)
        padding = "masked" if padded else "-"
        print(f"{kernel:>8} {block:8,} {padding:>8} {row['registers']:10} {row['spill_stores']:15}")
    if arguments.output:
        write_figures(arguments.output, {"triton": triton.__version__, "target": "sm_90", "rows": rows})


if __name__ == "__main__":
    main()
