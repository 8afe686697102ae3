"""The transform of filters, which the kernels multiply by, and its adjoint. See `monarch_fft`."""

# mypy: disable-error-code="valid-type, index, call-arg"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from monarch_mixer.kernels import support
from monarch_mixer.kernels.monarch_fft_tables import SHAPES, transform_tables
from monarch_mixer.kernels.monarch_fft_tiles import columns_to_frequency, columns_to_time, matrices, twiddles
from monarch_mixer.kernels.products import dot
from monarch_mixer.kernels.support import dot_precision


def spectrum(taps: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Transform filters for sequences cut into blocks.

    Args:
        taps: (channels, 2 * length - 1) in fp32, from the most negative lag up.
        block: a key of SHAPES.
        dtype: the dtype the convolution will run in; fp32 makes this exact to fp32 too.

    Returns:
        (channels, 2 * num_blocks - 1, 2, rows, columns) in fp32: by block distance, real and imaginary parts.
    """
    channels, lags = taps.shape
    length = (lags + 1) // 2
    rows, columns = SHAPES[block][:2]
    num_distances = 2 * triton.cdiv(length, block) - 1
    out = support.empty(channels, num_distances, 2, rows, columns, dtype=torch.float32, device=taps.device)
    tables, twiddle = transform_tables(block, torch.float32, taps.device)
    _spectrum_kernel[(channels, num_distances)](
        taps, tables, twiddle, out, length, num_distances, math.sqrt(block),
        ROWS=rows, COLUMNS=columns, PRECISION=_filter_precision(dtype), num_warps=8, num_stages=1,
    )  # fmt: skip
    return out


def taps_gradient(grad_spectrum: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the taps (channels, 2 * length - 1), the adjoint of `spectrum`.

    Args:
        grad_spectrum: (channels, 2 * num_blocks - 1, 2, rows, columns).
        length: positions of a sequence.
        dtype: as in `spectrum`.
    """
    channels, num_distances, _, rows, columns = grad_spectrum.shape
    block = rows * columns
    out = support.empty(channels, 2 * length - 1, dtype=torch.float32, device=grad_spectrum.device)
    tables, twiddle = transform_tables(block, torch.float32, grad_spectrum.device)
    one_block = num_distances == 1
    _taps_gradient_kernel[(channels, 1 if one_block else num_distances + 1)](
        grad_spectrum, tables, twiddle, out, length, num_distances, math.sqrt(block), ONE_BLOCK=one_block,
        ROWS=rows, COLUMNS=columns, PRECISION=_filter_precision(dtype), num_warps=8, num_stages=1,
    )  # fmt: skip
    return out


def _filter_precision(dtype: torch.dtype) -> str:
    return dot_precision(dtype) if dtype == torch.float32 else "tf32"


@triton.jit
def _spectrum_kernel(
    taps_ptr, tables_ptr, twiddle_ptr, out_ptr, length, num_distances, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Transform the taps around one block distance: lags from -block to block about it."""
    channel = tl.program_id(0).to(tl.int64)
    distance = tl.program_id(1)
    block: tl.constexpr = ROWS * COLUMNS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    step: tl.constexpr = 32 if ROWS > 32 else ROWS
    base = taps_ptr + channel * (2 * length - 1) + length - 1
    first_lag = (distance - num_distances // 2) * block
    # The rows of the upper half of time are those of the lower, a quarter turn on: (-1)**k1 with cos and sin swapped.
    sign = tl.where(row % 2 == 0, 1.0, -1.0)[:, None]
    real = tl.zeros([ROWS, COLUMNS], tl.float32)
    negative_imag = tl.zeros([ROWS, COLUMNS], tl.float32)
    # Some rows of time at once: whole fp32 matrices would not fit the shared memory.
    for start in range(0, ROWS, step):
        time_row = start + tl.arange(0, step)
        cos = tl.load(tables_ptr + row[:, None] * ROWS + time_row[None, :])
        sin = tl.load(tables_ptr + ROWS * ROWS + row[:, None] * ROWS + time_row[None, :])
        n = time_row[:, None] * COLUMNS + column[None, :]
        lag = first_lag + n
        past = tl.load(base + lag, mask=(lag < length) & (lag > -length), other=0.0)
        lag -= block
        future = tl.load(base + lag, mask=(lag < length) & (lag > -length) & (n > 0), other=0.0)
        real = dot(cos, past, real, PRECISION)
        real += sign * dot(sin, future, None, PRECISION)
        negative_imag = dot(sin, past, negative_imag, PRECISION)
        negative_imag -= sign * dot(cos, future, None, PRECISION)
    n = row[:, None] * COLUMNS + column[None, :]
    _, _, cos2, sin2, negative2 = matrices(tables_ptr, ROWS, COLUMNS)
    twiddle_cos, twiddle_sin = twiddles(twiddle_ptr, ROWS, COLUMNS, COLUMNS)
    real, imag = columns_to_frequency(
        real, negative_imag, twiddle_cos, twiddle_sin, cos2, sin2, negative2, tl.float32, PRECISION
    )
    out = out_ptr + (channel * num_distances + distance) * 2 * block + n
    tl.store(out, real * scale)
    tl.store(out + block, imag * scale)


@triton.jit
def _taps_gradient_kernel(
    spectrum_ptr, tables_ptr, twiddle_ptr, out_ptr, length, num_distances, scale,
    ONE_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The adjoint of `_spectrum_kernel`: `block` lags, from the gradients at the two distances that see them.

    ONE_BLOCK: there is one distance, which alone sees the lags before it and from it up; a program does both.
    """
    channel = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1)  # lags from (first - 1 - num_distances // 2) * block up
    block: tl.constexpr = ROWS * COLUMNS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    step: tl.constexpr = 32 if ROWS > 32 else ROWS
    _, _, cos2, sin2, negative2 = matrices(tables_ptr, ROWS, COLUMNS)
    twiddle_cos, twiddle_sin = twiddles(twiddle_ptr, ROWS, COLUMNS, COLUMNS)
    n = row[:, None] * COLUMNS + column[None, :]
    sign = tl.where(row % 2 == 0, 1.0, -1.0)[:, None]
    source = spectrum_ptr + (channel * num_distances + first) * 2 * block + n
    after = (n >= 0) & (first < num_distances)
    past_real, past_imag = columns_to_time(
        tl.load(source, mask=after, other=0.0), tl.load(source + block, mask=after, other=0.0),
        twiddle_cos, twiddle_sin, cos2, sin2, negative2, ROWS, tl.float32, PRECISION,
    )  # fmt: skip
    if ONE_BLOCK:
        real, imag = past_real, past_imag
    else:
        before = (n >= 0) & (first >= 1)
        real, imag = columns_to_time(
            tl.load(source - 2 * block, mask=before, other=0.0), tl.load(source - block, mask=before, other=0.0),
            twiddle_cos, twiddle_sin, cos2, sin2, negative2, ROWS, tl.float32, PRECISION,
        )  # fmt: skip
    past_real *= sign
    past_imag *= sign
    out = out_ptr + channel * (2 * length - 1) + length - 1
    for start in range(0, ROWS, step):
        time_row = start + tl.arange(0, step)
        cos = tl.load(tables_ptr + time_row[:, None] * ROWS + row[None, :])
        sin = tl.load(tables_ptr + ROWS * ROWS + time_row[:, None] * ROWS + row[None, :])
        n_out = time_row[:, None] * COLUMNS + column[None, :]
        lag = (first - 1 - num_distances // 2) * block + n_out
        taps = dot(sin, past_real, None, PRECISION)
        taps = dot(cos, past_imag, taps, PRECISION)
        taps = tl.where(n_out > 0, taps, 0.0)
        if ONE_BLOCK:
            tl.store(out + lag, taps * scale, mask=(n_out > 0) & (lag > -length))
            taps = dot(cos, real, None, PRECISION)
            lag = n_out
        else:
            taps = dot(cos, real, taps, PRECISION)
        taps = dot(sin, -imag, taps, PRECISION)
        tl.store(out + lag, taps * scale, mask=(lag < length) & (lag > -length))
