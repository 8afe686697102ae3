"""How transforms are factored, and the matrices and twiddles of a factoring. See `monarch_fft`."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from monarch_mixer.kernels import support


class Shape(NamedTuple):
    """How a transform of 2 * block points is factored, and how programs are cut."""

    rows: int
    columns: int
    sequences: int  # of a tile, where a sequence fits one block
    warps: int
    keep: bool  # whether programs keep twiddles and filters in registers


# By block = rows * columns. Operations a token are 8 * rows + 16 * columns. Up to 2,048 the shapes are such that Triton
# multiplies by warps rather than by groups of four of them (under 64 rows, or two warps): 64 rows by 16 or 32 columns
# were faster at 2,048 (the mixer 0.51 ms, not 0.71), but what Triton 3.6 made of so many small products read outside
# the shared memory now and then (compute-sanitizer on an H100; it finds nothing in the shapes below).
SHAPES = {
    256: Shape(16, 16, 4, 2, True),
    512: Shape(32, 16, 2, 2, True),
    1024: Shape(32, 32, 1, 2, True),
    2048: Shape(32, 64, 1, 4, True),
    4096: Shape(64, 64, 1, 4, False),
    8192: Shape(128, 64, 1, 8, False),
}
# In fp32 the tiles of larger ones do not fit.
MAX_BLOCK = {torch.float32: 2048, torch.bfloat16: 8192, torch.float16: 8192}


def block_for(length: int, dtype: torch.dtype) -> int:
    """Return the block of a sequence: the smallest that holds it, or the largest there is."""
    exact = dtype == torch.float32 and not support.tf32_allowed("cuda")
    largest = support.LARGEST_EXACT_BLOCK if exact else MAX_BLOCK[dtype]
    return min(largest, max(min(SHAPES), triton.next_power_of_2(length)))


@functools.lru_cache(maxsize=64)
def transform_tables(block: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the matrices (cos, sin of rows; cos, sin, -sin of columns), keeping norms, and the twiddle (cos, sin)."""
    rows, columns = SHAPES[block][:2]
    k1 = torch.arange(rows, dtype=torch.float64)[:, None] + 0.5
    # Counting time from half a step earlier makes the matrix symmetric; the twiddle takes the difference.
    first = math.pi * k1 * k1.t() / rows
    k2 = torch.arange(columns, dtype=torch.float64)
    second = 2 * math.pi * (k2[:, None] * k2[None, :] % columns) / columns
    twiddle = math.pi * k1 * (k2[None, :] / block - 0.5 / rows)
    matrices = torch.cat(
        [
            *(part.flatten() / math.sqrt(rows) for part in (first.cos(), first.sin())),
            *(part.flatten() / math.sqrt(columns) for part in (second.cos(), second.sin(), -second.sin())),
        ]
    )
    turns = torch.cat([twiddle.cos().flatten(), twiddle.sin().flatten()])
    # Half the memory traffic; with values up to 1 fp16 is eight times finer than the bf16 of the products.
    turns_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    return support.outside_graphs(lambda: (matrices.to(device, dtype), turns.to(device, turns_dtype)), device)
