"""The gated long convolutions of long sequences by a Fourier transform written as Monarch products on tensor cores.

A transform of 2 * block points is two products with small matrices and a twiddle between them (paper, section 3.1).
It is taken at the odd frequencies (k + 1/2): the transform of a real sequence then has exactly `block` independent
complex values, no self-conjugate ones, and half of the first factor's rows are the conjugates of the other half, so
neither they nor anything complex in time is ever computed. Such a transform multiplies by -1 what wraps around, which
a filter of twice the block accounts for by the sign of its negative lags.

With time n = n1 * columns + n2 (2 * rows by columns, the upper half of a sequence's block being zeros) and frequency
k = k1 + 2 * rows * k2, for k1 < rows:

    X[k1, k2] = sum_n2 W_columns[n2, k2] * twiddle[k1, n2] * sum_n1 W_rows[k1, n1] * x[n1, n2]

A sequence longer than the largest block is cut into blocks, each transformed once; every output block sums the products
with the filter's transform at their distance.
"""

# mypy: disable-error-code="valid-type, index, call-arg"

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from monarch_mixer.kernels import support
from monarch_mixer.kernels.gates import Gradients, row_ends, short_convolve
from monarch_mixer.kernels.products import dot
from monarch_mixer.kernels.support import dot_precision


class Shape(NamedTuple):
    """How a transform of 2 * block points is factored, and how programs are cut."""

    rows: int
    columns: int
    sequences: int  # of a tile, where a sequence fits one block
    warps: int
    keep: int  # whether programs keep twiddles (1) and filters too (2) in registers: see `_forward_kernel`


# By block = rows * columns. Operations a token are 8 * rows + 16 * columns. Up to 2,048 the shapes are such that Triton
# multiplies by warps rather than by groups of four of them (under 64 rows, or two warps): 64 rows by 16 or 32 columns
# were faster at 2,048 (the mixer 0.51 ms, not 0.71), but what Triton 3.6 made of so many small products read outside
# the shared memory now and then (compute-sanitizer on an H100; it finds nothing in the shapes below).
SHAPES = {
    256: Shape(16, 16, 4, 2, 2),
    512: Shape(32, 16, 2, 2, 2),
    1024: Shape(32, 32, 1, 2, 2),
    2048: Shape(32, 64, 1, 4, 2),
    4096: Shape(64, 64, 1, 4, 0),
    8192: Shape(128, 64, 1, 8, 0),
}
# In fp32 the tiles of larger ones do not fit.
MAX_BLOCK = {torch.float32: 2048, torch.bfloat16: 8192, torch.float16: 8192}
# The batch is split where that makes at most so many programs.
PROGRAMS = {"forward": 1536, "backward": 1536, "blocks": 3072}


@triton.jit
def _to_frequency(
    x, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype: tl.constexpr, PRECISION: tl.constexpr
):
    """Transform x (rows, sequences * columns) to real and imaginary parts (rows * sequences, columns)."""
    real = dot(cos, x, None, PRECISION)
    negative_imag = dot(sin, x, None, PRECISION)
    return _columns_to_frequency(real, negative_imag, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype, PRECISION)


@triton.jit
def _columns_to_frequency(
    real, negative_imag, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype: tl.constexpr, PRECISION: tl.constexpr
):
    """Turn by the twiddle and transform the columns; the first product's imaginary part comes with its sign turned."""
    columns: tl.constexpr = cos2.shape[0]
    count: tl.constexpr = real.shape[0] * real.shape[1] // columns
    turned_real = real * twiddle_cos - negative_imag * twiddle_sin
    negative_turned = real * twiddle_sin + negative_imag * twiddle_cos
    turned_real = tl.reshape(turned_real.to(dtype), (count, columns))
    turned_imag = tl.reshape((-negative_turned).to(dtype), (count, columns))
    out_real = dot(turned_real, cos2, None, PRECISION)
    out_real = dot(turned_imag, sin2, out_real, PRECISION)
    out_imag = dot(turned_imag, cos2, None, PRECISION)
    out_imag = dot(turned_real, negative2, out_imag, PRECISION)
    return out_real, out_imag


@triton.jit
def _columns_to_time(
    real,
    imag,
    twiddle_cos,
    twiddle_sin,
    cos2,
    sin2,
    negative2,
    rows: tl.constexpr,
    dtype: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Undo `_columns_to_frequency`, up to the first factor: real and imaginary parts (rows, sequences * columns)."""
    columns: tl.constexpr = cos2.shape[0]
    width: tl.constexpr = real.shape[0] * columns // rows
    real = real.to(dtype)
    imag = imag.to(dtype)
    turned_real = dot(real, cos2, None, PRECISION)
    turned_real = dot(imag, negative2, turned_real, PRECISION)
    turned_imag = dot(real, sin2, None, PRECISION)
    turned_imag = dot(imag, cos2, turned_imag, PRECISION)
    turned_real = tl.reshape(turned_real, (rows, width))
    turned_imag = tl.reshape(turned_imag, (rows, width))
    return (
        turned_real * twiddle_cos - turned_imag * twiddle_sin,
        turned_real * twiddle_sin + turned_imag * twiddle_cos,
    )


@triton.jit
def _to_time(
    real, imag, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2,
    rows: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Transform back (the adjoint of `_to_frequency`) to real sequences (rows, sequences * columns)."""
    real, imag = _columns_to_time(
        real, imag, twiddle_cos, twiddle_sin, cos2, sin2, negative2, rows=rows, dtype=dtype, PRECISION=PRECISION
    )
    out = dot(cos, real.to(dtype), None, PRECISION)
    return dot(sin, (-imag).to(dtype), out, PRECISION)


@triton.jit
def _matrices(tables_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load cos and sin of the first factor, and cos, sin and -sin of the second; all are symmetric."""
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    first = tables_ptr + r[:, None] * ROWS + r[None, :]
    second = tables_ptr + 2 * ROWS * ROWS + c[:, None] * COLUMNS + c[None, :]
    return (
        tl.load(first),
        tl.load(first + ROWS * ROWS),
        tl.load(second),
        tl.load(second + COLUMNS * COLUMNS),
        tl.load(second + 2 * COLUMNS * COLUMNS),
    )


@triton.jit
def _twiddles(twiddle_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Load cos and sin of the twiddle (ROWS, WIDTH), repeated for each sequence of a tile."""
    index = tl.arange(0, ROWS)[:, None] * COLUMNS + (tl.arange(0, WIDTH) % COLUMNS)[None, :]
    return tl.load(twiddle_ptr + index).to(tl.float32), tl.load(twiddle_ptr + ROWS * COLUMNS + index).to(tl.float32)


@triton.jit
def _filter_tile(ptr, skip_ptr, channel, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEQUENCES: tl.constexpr):
    """Load a channel's transform (2, ROWS, COLUMNS) with its skip weight, each row once for each sequence of a tile."""
    ptr += channel * 2 * ROWS * COLUMNS
    index = (tl.arange(0, ROWS * SEQUENCES) // SEQUENCES)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    real = tl.load(ptr + index).to(tl.float32) + tl.load(skip_ptr + channel)
    return real, tl.load(ptr + ROWS * COLUMNS + index).to(tl.float32)


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
    step: tl.constexpr = min(32, ROWS)
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
    _, _, cos2, sin2, negative2 = _matrices(tables_ptr, ROWS, COLUMNS)
    twiddle_cos, twiddle_sin = _twiddles(twiddle_ptr, ROWS, COLUMNS, COLUMNS)
    real, imag = _columns_to_frequency(
        real, negative_imag, twiddle_cos, twiddle_sin, cos2, sin2, negative2, tl.float32, PRECISION
    )
    out = out_ptr + (channel * num_distances + distance) * 2 * block + n
    tl.store(out, real * scale)
    tl.store(out + block, imag * scale)


@triton.jit
def _taps_gradient_kernel(
    spectrum_ptr, tables_ptr, twiddle_ptr, out_ptr, length, num_distances, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The adjoint of `_spectrum_kernel`: `block` lags, from the gradients at the two distances that see them."""
    channel = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1)  # lags from (first - 1 - num_distances // 2) * block up
    block: tl.constexpr = ROWS * COLUMNS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    step: tl.constexpr = min(32, ROWS)
    _, _, cos2, sin2, negative2 = _matrices(tables_ptr, ROWS, COLUMNS)
    twiddle_cos, twiddle_sin = _twiddles(twiddle_ptr, ROWS, COLUMNS, COLUMNS)
    n = row[:, None] * COLUMNS + column[None, :]
    sign = tl.where(row % 2 == 0, 1.0, -1.0)[:, None]
    source = spectrum_ptr + (channel * num_distances + first) * 2 * block + n
    before = first >= 1
    after = first < num_distances
    past_real, past_imag = _columns_to_time(
        tl.load(source, mask=(n >= 0) & after, other=0.0), tl.load(source + block, mask=(n >= 0) & after, other=0.0),
        twiddle_cos, twiddle_sin, cos2, sin2, negative2, ROWS, tl.float32, PRECISION,
    )  # fmt: skip
    past_real *= sign
    past_imag *= sign
    real, imag = _columns_to_time(
        tl.load(source - 2 * block, mask=(n >= 0) & before, other=0.0),
        tl.load(source - block, mask=(n >= 0) & before, other=0.0),
        twiddle_cos, twiddle_sin, cos2, sin2, negative2, ROWS, tl.float32, PRECISION,
    )  # fmt: skip
    out = out_ptr + channel * (2 * length - 1) + length - 1
    for start in range(0, ROWS, step):
        time_row = start + tl.arange(0, step)
        cos = tl.load(tables_ptr + time_row[:, None] * ROWS + row[None, :])
        sin = tl.load(tables_ptr + ROWS * ROWS + time_row[:, None] * ROWS + row[None, :])
        n_out = time_row[:, None] * COLUMNS + column[None, :]
        taps = dot(sin, past_real, None, PRECISION)
        taps = dot(cos, past_imag, taps, PRECISION)
        taps = tl.where(n_out > 0, taps, 0.0)
        taps = dot(cos, real, taps, PRECISION)
        taps = dot(sin, -imag, taps, PRECISION)
        lag = (first - 1 - num_distances // 2) * block + n_out
        tl.store(out + lag, taps * scale, mask=(lag < length) & (lag > -length))


@triton.jit
def _stream(
    projected_ptr, which, channel, channels, offset, position, valid, length, end, plane, parameters,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Return the short convolution of one of the three projected streams at runs of eight positions."""
    # Added one by one: twice the plane may not fit the integer the plane came in.
    if which >= 1:
        projected_ptr += plane
    if which == 2:
        projected_ptr += plane
    return short_convolve(
        projected_ptr, offset, position, valid, length, end, parameters, channel + which * channels, MASKED
    )


@triton.jit
def _places(first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEQUENCES: tl.constexpr):
    """Return sequence and position of every element of a tile whose sequences start at `first`, (ROWS, width)."""
    column = tl.arange(0, SEQUENCES * COLUMNS)[None, :]
    position = tl.arange(0, ROWS)[:, None] * COLUMNS + column % COLUMNS
    return first + column // COLUMNS, position


@triton.jit
def _runs(first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEQUENCES: tl.constexpr):
    """Return sequence and position of every run of eight elements of such a tile, (width / 8, ROWS)."""
    each: tl.constexpr = COLUMNS // 8
    run = tl.arange(0, SEQUENCES * each)[:, None]
    position = run % each * 8 + tl.arange(0, ROWS)[None, :] * COLUMNS
    return first + run // each, position


@triton.jit
def _forward_kernel(
    projected_ptr, parameters, spectrum_ptr, skip_ptr, input_ptr, residual_spectrum_ptr, residual_skip_ptr,
    out_ptr, inner_ptr, tables_ptr, twiddle_ptr, lengths_ptr, channels, batch, length, plane, num_parts,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, SAVE_INNER: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEQUENCES: tl.constexpr, KEEP: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Both convolutions of a part of a channel's sequences, which fit a block each, SEQUENCES at a time."""
    channel = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    # Pointers to the channel, so that offsets within it are small integers.
    start = channel * batch * length
    if GATED:
        projected_ptr += start
        if SAVE_INNER:
            inner_ptr += start
    if RESIDUAL:
        input_ptr += start
    out_ptr += start
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    width: tl.constexpr = SEQUENCES * COLUMNS
    # The matrices stay on the chip through the loop. Twiddles and filters do where KEEP says so; else they come from
    # the cache each time, and leave room for more programs.
    cos, sin, cos2, sin2, negative2 = _matrices(tables_ptr, ROWS, COLUMNS)
    if KEEP >= 1:
        twiddle_cos, twiddle_sin = _twiddles(twiddle_ptr, ROWS, COLUMNS, width)
    if KEEP >= 2:
        if GATED:
            k_real, k_imag = _filter_tile(spectrum_ptr, skip_ptr, channel, ROWS, COLUMNS, SEQUENCES)
        if RESIDUAL:
            r_real, r_imag = _filter_tile(residual_spectrum_ptr, residual_skip_ptr, channel, ROWS, COLUMNS, SEQUENCES)
    for group in range(part, tl.cdiv(batch, SEQUENCES), num_parts):
        if KEEP < 1:
            twiddle_cos, twiddle_sin = _twiddles(twiddle_ptr, ROWS, COLUMNS, width)
        sequence, position = _places(group * SEQUENCES, ROWS, COLUMNS, SEQUENCES)
        valid = (sequence < batch) & (position < length)
        offset = sequence * length + position
        out = tl.zeros([ROWS, width], tl.float32)
        if GATED:
            run_sequence, run = _runs(group * SEQUENCES, ROWS, COLUMNS, SEQUENCES)
            run_valid = (run_sequence < batch) & (run >= 0)
            run_offset = run_sequence * length + run
            end = row_ends(lengths_ptr, run_sequence, batch)[:, :, None] if PADDED else length
            z = _stream(
                projected_ptr, 0, channel, channels, run_offset, run, run_valid, length, end, plane, parameters,
                MASKED or PADDED,
            )  # fmt: skip
            z *= _stream(
                projected_ptr, 2, channel, channels, run_offset, run, run_valid, length, end, plane, parameters,
                MASKED or PADDED,
            )  # fmt: skip
            real, imag = _to_frequency(
                z.to(dtype), cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype, PRECISION
            )
            if KEEP < 2:
                k_real, k_imag = _filter_tile(spectrum_ptr, skip_ptr, channel, ROWS, COLUMNS, SEQUENCES)
            inner = _to_time(
                real * k_real - imag * k_imag, real * k_imag + imag * k_real,
                cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, ROWS, dtype, PRECISION,
            )  # fmt: skip
            if SAVE_INNER:
                tl.store(inner_ptr + offset, inner.to(dtype), mask=valid)
            after = _stream(
                projected_ptr, 1, channel, channels, run_offset, run, run_valid, length, length, plane, parameters,
                MASKED,
            )  # fmt: skip
            out += inner * after
        if RESIDUAL:
            u = tl.load(input_ptr + offset, mask=valid, other=0.0)
            if PADDED:
                u = tl.where(position < row_ends(lengths_ptr, sequence, batch), u, 0.0)
            real, imag = _to_frequency(u, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype, PRECISION)
            if KEEP < 2:
                r_real, r_imag = _filter_tile(
                    residual_spectrum_ptr, residual_skip_ptr, channel, ROWS, COLUMNS, SEQUENCES
                )
            out += _to_time(
                real * r_real - imag * r_imag, real * r_imag + imag * r_real,
                cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, ROWS, dtype, PRECISION,
            )  # fmt: skip
        tl.store(out_ptr + offset, out.to(dtype), mask=valid)


@triton.jit
def _backward_kernel(
    projected_ptr, parameters, spectrum_ptr, skip_ptr, input_ptr, inner_ptr, grad_ptr,
    grad_short_ptr, grad_input_ptr, grad_spectrum_ptr, grad_skip_ptr, tables_ptr, twiddle_ptr, lengths_ptr,
    channels, batch, length, plane, num_parts,
    GATED: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEQUENCES: tl.constexpr, KEEP: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one of the two convolutions: of its input (or gates), and of its transform over a part's batch."""
    channel = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    # Pointers to the channel, so that offsets within it are small integers.
    start = channel * batch * length
    if GATED:
        projected_ptr += start
        inner_ptr += start
        grad_short_ptr += start
    else:
        input_ptr += start
        grad_input_ptr += start
    grad_ptr += start
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    block: tl.constexpr = ROWS * COLUMNS
    width: tl.constexpr = SEQUENCES * COLUMNS
    tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    grad_spectrum = grad_spectrum_ptr + (channel * num_parts + part) * 2 * block + tile
    grad_skip = 0.0
    cos, sin, cos2, sin2, negative2 = _matrices(tables_ptr, ROWS, COLUMNS)
    if KEEP >= 1:
        twiddle_cos, twiddle_sin = _twiddles(twiddle_ptr, ROWS, COLUMNS, width)
    if KEEP >= 2:
        k_real, k_imag = _filter_tile(spectrum_ptr, skip_ptr, channel, ROWS, COLUMNS, SEQUENCES)
    for group in range(part, tl.cdiv(batch, SEQUENCES), num_parts):
        if KEEP < 1:
            twiddle_cos, twiddle_sin = _twiddles(twiddle_ptr, ROWS, COLUMNS, width)
        sequence, position = _places(group * SEQUENCES, ROWS, COLUMNS, SEQUENCES)
        valid = (sequence < batch) & (position < length)
        offset = sequence * length + position
        run_sequence, run = _runs(group * SEQUENCES, ROWS, COLUMNS, SEQUENCES)
        run_valid = (run_sequence < batch) & (run >= 0)
        run_offset = run_sequence * length + run
        grad = tl.load(grad_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        if GATED:
            inner = tl.load(inner_ptr + offset, mask=valid, other=0.0).to(tl.float32)
            tl.store(grad_short_ptr + plane + offset, (grad * inner).to(dtype), mask=valid)
            grad *= _stream(
                projected_ptr, 1, channel, channels, run_offset, run, run_valid, length, length, plane, parameters,
                MASKED,
            )  # fmt: skip
            # Where both are zero, so are their gradients.
            end = row_ends(lengths_ptr, run_sequence, batch)[:, :, None] if PADDED else length
            before = _stream(
                projected_ptr, 0, channel, channels, run_offset, run, run_valid, length, end, plane, parameters,
                MASKED or PADDED,
            )  # fmt: skip
            value = _stream(
                projected_ptr, 2, channel, channels, run_offset, run, run_valid, length, end, plane, parameters,
                MASKED or PADDED,
            )  # fmt: skip
            x = before * value
        else:
            x = tl.load(input_ptr + offset, mask=valid, other=0.0).to(tl.float32)
            if PADDED:
                is_real = position < row_ends(lengths_ptr, sequence, batch)
                x = tl.where(is_real, x, 0.0)
        # From the frequencies, as that of lag 0, this would carry the transforms' rounding, large against a small sum.
        grad_skip += tl.sum(x * grad)
        real, imag = _to_frequency(
            x.to(dtype), cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype, PRECISION
        )
        grad_real, grad_imag = _to_frequency(
            grad.to(dtype), cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype, PRECISION
        )
        # conj(X) * gradient, summed over the tile's sequences and, in memory that stays in the cache, over the loop.
        product_real = real * grad_real + imag * grad_imag
        product_imag = real * grad_imag - imag * grad_real
        if SEQUENCES > 1:
            product_real = tl.sum(tl.reshape(product_real, (ROWS, SEQUENCES, COLUMNS)), 1)
            product_imag = tl.sum(tl.reshape(product_imag, (ROWS, SEQUENCES, COLUMNS)), 1)
        if group >= num_parts:
            product_real += tl.load(grad_spectrum)
            product_imag += tl.load(grad_spectrum + block)
        tl.debug_barrier()
        tl.store(grad_spectrum, product_real)
        tl.store(grad_spectrum + block, product_imag)
        tl.debug_barrier()
        if KEEP < 2:
            k_real, k_imag = _filter_tile(spectrum_ptr, skip_ptr, channel, ROWS, COLUMNS, SEQUENCES)
        grad_x = _to_time(
            grad_real * k_real + grad_imag * k_imag, grad_imag * k_real - grad_real * k_imag,
            cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, ROWS, dtype, PRECISION,
        )  # fmt: skip
        if GATED:
            tl.store(grad_short_ptr + offset, (grad_x * value).to(dtype), mask=valid)
            tl.store(grad_short_ptr + plane + plane + offset, (grad_x * before).to(dtype), mask=valid)
        else:
            if PADDED:
                grad_x = tl.where(is_real, grad_x, 0.0)
            tl.store(grad_input_ptr + offset, grad_x.to(dtype), mask=valid)
    tl.store(grad_skip_ptr + channel * num_parts + part, grad_skip)


# --- sequences of several blocks: each block's transform goes through memory


@triton.jit
def _blocks_to_frequency_kernel(
    projected_ptr, parameters, input_ptr, grad_ptr, out_ptr, tables_ptr, twiddle_ptr, lengths_ptr,
    channels, batch, length, plane, num_blocks, num_parts,
    SOURCE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Transform every block of what SOURCE names: "gate" (first gate * value), "plain" (input or gradient), or
    "gradient" (gradient * last gate). PADDED: of "gate" and "plain", only sequences' real positions.
    """
    channel = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    # Pointers to the channel, so that offsets within it are small integers.
    channel_start = channel * batch * length
    if SOURCE == "plain":
        input_ptr += channel_start
    else:
        projected_ptr += channel_start
    if SOURCE == "gradient":
        grad_ptr += channel_start
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    block: tl.constexpr = ROWS * COLUMNS
    tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    cos, sin, cos2, sin2, negative2 = _matrices(tables_ptr, ROWS, COLUMNS)
    for item in range(part, batch * num_blocks, num_parts):
        sequence = item // num_blocks
        begin = item % num_blocks * block
        twiddle_cos, twiddle_sin = _twiddles(twiddle_ptr, ROWS, COLUMNS, COLUMNS)
        _, run = _runs(0, ROWS, COLUMNS, 1)
        run += begin
        valid = run < length
        start = sequence * length
        offset = start + begin + tile
        end = tl.load(lengths_ptr + sequence) if PADDED else length
        inside = begin + tile < length
        if SOURCE == "gate":
            x = _stream(
                projected_ptr, 0, channel, channels, start + run, run, valid, length, end, plane, parameters,
                MASKED or PADDED,
            )  # fmt: skip
            x *= _stream(
                projected_ptr, 2, channel, channels, start + run, run, valid, length, end, plane, parameters,
                MASKED or PADDED,
            )  # fmt: skip
            x = x.to(dtype)
        elif SOURCE == "gradient":
            x = _stream(
                projected_ptr, 1, channel, channels, start + run, run, valid, length, length, plane, parameters, MASKED
            )
            x *= tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            x = x.to(dtype)
        else:
            x = tl.load(input_ptr + offset, mask=inside, other=0.0)
            if PADDED:
                x = tl.where(begin + tile < end, x, 0.0)
        real, imag = _to_frequency(x, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype, PRECISION)
        out = out_ptr + ((channel * batch + sequence) * num_blocks * 2 + item % num_blocks * 2) * block + tile
        tl.store(out, real.to(dtype))
        tl.store(out + block, imag.to(dtype))


@triton.jit
def _combine(
    blocks_ptr, spectrum_ptr, skip_ptr, channel, sequence, index, batch, num_blocks,
    ADJOINT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum over a sequence's blocks their transforms times the filter's at the distance to block `index`."""
    block: tl.constexpr = ROWS * COLUMNS
    tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    blocks = blocks_ptr + (channel * batch + sequence) * num_blocks * 2 * block + tile
    filters = spectrum_ptr + channel * (2 * num_blocks - 1) * 2 * block + tile
    skip = tl.load(skip_ptr + channel)
    real = tl.zeros([ROWS, COLUMNS], tl.float32)
    imag = tl.zeros([ROWS, COLUMNS], tl.float32)
    for source in range(num_blocks):
        distance = source - index if ADJOINT else index - source
        x_ptr = blocks + source * 2 * block
        k_ptr = filters + (distance + num_blocks - 1) * 2 * block
        x_real, x_imag = tl.load(x_ptr).to(tl.float32), tl.load(x_ptr + block).to(tl.float32)
        k_real, k_imag = tl.load(k_ptr).to(tl.float32), tl.load(k_ptr + block).to(tl.float32)
        k_real += tl.where(distance == 0, skip, 0.0)
        if ADJOINT:
            k_imag = -k_imag
        real += x_real * k_real - x_imag * k_imag
        imag += x_real * k_imag + x_imag * k_real
    return real, imag


@triton.jit
def _blocks_forward_kernel(
    projected_ptr, parameters, blocks_ptr, spectrum_ptr, skip_ptr, residual_blocks_ptr,
    residual_spectrum_ptr, residual_skip_ptr, out_ptr, inner_ptr, tables_ptr, twiddle_ptr,
    channels, batch, length, plane, num_blocks, num_parts,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, SAVE_INNER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    # Pointers to the channel, so that offsets within it are small integers.
    channel_start = channel * batch * length
    if GATED:
        projected_ptr += channel_start
        if SAVE_INNER:
            inner_ptr += channel_start
    out_ptr += channel_start
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    block: tl.constexpr = ROWS * COLUMNS
    tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    cos, sin, cos2, sin2, negative2 = _matrices(tables_ptr, ROWS, COLUMNS)
    for item in range(part, batch * num_blocks, num_parts):
        sequence = item // num_blocks
        index = item % num_blocks
        twiddle_cos, twiddle_sin = _twiddles(twiddle_ptr, ROWS, COLUMNS, COLUMNS)
        start = sequence * length
        offset = start + index * block + tile
        inside = index * block + tile < length
        out = tl.zeros([ROWS, COLUMNS], tl.float32)
        if GATED:
            real, imag = _combine(
                blocks_ptr, spectrum_ptr, skip_ptr, channel, sequence, index, batch, num_blocks, False, ROWS, COLUMNS
            )
            inner = _to_time(
                real, imag, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, ROWS, dtype, PRECISION
            )
            if SAVE_INNER:
                tl.store(inner_ptr + offset, inner.to(dtype), mask=inside)
            _, run = _runs(0, ROWS, COLUMNS, 1)
            run += index * block
            after = _stream(
                projected_ptr, 1, channel, channels, start + run, run, run < length, length, length, plane, parameters,
                MASKED,
            )  # fmt: skip
            out += inner * after
        if RESIDUAL:
            real, imag = _combine(
                residual_blocks_ptr, residual_spectrum_ptr, residual_skip_ptr, channel, sequence, index, batch,
                num_blocks, False, ROWS, COLUMNS,
            )  # fmt: skip
            out += _to_time(
                real, imag, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, ROWS, dtype, PRECISION
            )
        tl.store(out_ptr + offset, out.to(dtype), mask=inside)


@triton.jit
def _blocks_backward_kernel(
    projected_ptr, parameters, blocks_ptr, spectrum_ptr, skip_ptr, input_ptr, inner_ptr, grad_ptr,
    grad_short_ptr, grad_input_ptr, grad_skip_ptr, tables_ptr, twiddle_ptr, lengths_ptr,
    channels, batch, length, plane, num_blocks, num_parts,
    GATED: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    # Pointers to the channel, so that offsets within it are small integers.
    channel_start = channel * batch * length
    if GATED:
        projected_ptr += channel_start
        inner_ptr += channel_start
        grad_short_ptr += channel_start
    else:
        input_ptr += channel_start
        grad_input_ptr += channel_start
    grad_ptr += channel_start
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    block: tl.constexpr = ROWS * COLUMNS
    tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    cos, sin, cos2, sin2, negative2 = _matrices(tables_ptr, ROWS, COLUMNS)
    grad_skip = 0.0
    for item in range(part, batch * num_blocks, num_parts):
        sequence = item // num_blocks
        index = item % num_blocks
        twiddle_cos, twiddle_sin = _twiddles(twiddle_ptr, ROWS, COLUMNS, COLUMNS)
        start = sequence * length
        offset = start + index * block + tile
        inside = index * block + tile < length
        real, imag = _combine(
            blocks_ptr, spectrum_ptr, skip_ptr, channel, sequence, index, batch, num_blocks, True, ROWS, COLUMNS
        )
        grad_x = _to_time(real, imag, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, ROWS, dtype, PRECISION)
        grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            inner = tl.load(inner_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_short_ptr + plane + offset, (grad * inner).to(dtype), mask=inside)
            _, run = _runs(0, ROWS, COLUMNS, 1)
            run += index * block
            valid = run < length
            grad *= _stream(
                projected_ptr, 1, channel, channels, start + run, run, valid, length, length, plane, parameters, MASKED
            )
            # Where both are zero, so are their gradients.
            end = tl.load(lengths_ptr + sequence) if PADDED else length
            before = _stream(
                projected_ptr, 0, channel, channels, start + run, run, valid, length, end, plane, parameters,
                MASKED or PADDED,
            )  # fmt: skip
            value = _stream(
                projected_ptr, 2, channel, channels, start + run, run, valid, length, end, plane, parameters,
                MASKED or PADDED,
            )  # fmt: skip
            tl.store(grad_short_ptr + offset, (grad_x * value).to(dtype), mask=inside)
            tl.store(grad_short_ptr + plane + plane + offset, (grad_x * before).to(dtype), mask=inside)
            x = before * value
        else:
            if PADDED:
                is_real = index * block + tile < tl.load(lengths_ptr + sequence)
                grad_x = tl.where(is_real, grad_x, 0.0)
            tl.store(grad_input_ptr + offset, grad_x.to(dtype), mask=inside)
            x = tl.load(input_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            if PADDED:
                x = tl.where(is_real, x, 0.0)
        grad_skip += tl.sum(x * grad)
    tl.store(grad_skip_ptr + channel * num_parts + part, grad_skip)


@triton.jit
def _blocks_spectrum_gradient_kernel(
    blocks_ptr, grad_blocks_ptr, out_ptr, batch, num_blocks, BLOCK: tl.constexpr, PIECE: tl.constexpr
):
    """conj(X_j) * gradient_i summed over the batch and the pairs of blocks at one distance i - j."""
    piece = tl.program_id(0)
    distance = tl.program_id(1) - (num_blocks - 1)
    channel = tl.program_id(2).to(tl.int64)
    index = piece * PIECE + tl.arange(0, PIECE)
    real = tl.zeros([PIECE], tl.float32)
    imag = tl.zeros([PIECE], tl.float32)
    for sequence in range(batch):
        base = (channel * batch + sequence) * num_blocks
        for target in range(num_blocks):
            source = target - distance
            inside = (source >= 0) & (source < num_blocks)
            x_ptr = blocks_ptr + (base + source) * 2 * BLOCK + index
            g_ptr = grad_blocks_ptr + (base + target) * 2 * BLOCK + index
            mask = (index < BLOCK) & inside
            x_real = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
            x_imag = tl.load(x_ptr + BLOCK, mask=mask, other=0.0).to(tl.float32)
            g_real = tl.load(g_ptr, mask=mask, other=0.0).to(tl.float32)
            g_imag = tl.load(g_ptr + BLOCK, mask=mask, other=0.0).to(tl.float32)
            real += x_real * g_real + x_imag * g_imag
            imag += x_real * g_imag - x_imag * g_real
    out = out_ptr + (channel * (2 * num_blocks - 1) + distance + num_blocks - 1) * 2 * BLOCK + index
    tl.store(out, real)
    tl.store(out + BLOCK, imag)


@functools.lru_cache(maxsize=64)
def _tables(block: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
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


def block_for(length: int, dtype: torch.dtype) -> int:
    """Return the block of a sequence: the smallest that holds it, or the largest there is."""
    return min(MAX_BLOCK[dtype], max(min(SHAPES), triton.next_power_of_2(length)))


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
    tables, twiddle = _tables(block, torch.float32, taps.device)
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
    tables, twiddle = _tables(block, torch.float32, grad_spectrum.device)
    _taps_gradient_kernel[(channels, num_distances + 1)](
        grad_spectrum, tables, twiddle, out, length, num_distances, math.sqrt(block),
        ROWS=rows, COLUMNS=columns, PRECISION=_filter_precision(dtype), num_warps=8, num_stages=1,
    )  # fmt: skip
    return out


def _filter_precision(dtype: torch.dtype) -> str:
    return dot_precision(dtype) if dtype == torch.float32 else "tf32"


def _block_parts(channels: int, items: int) -> int:
    return max(1, min(items, PROGRAMS["blocks"] // channels))


def forward(
    gated: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    residual: tuple[Tensor, Tensor, Tensor] | None,
    save_inner: bool,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the mixed sequences and the inner convolution; as `toeplitz.forward`, with transforms in place of taps."""
    projected, parameters, filter_spectrum, skip = gated or (None,) * 4
    x, residual_spectrum, residual_skip = residual or (None,) * 3
    like = x if x is not None else projected
    either = filter_spectrum if filter_spectrum is not None else residual_spectrum
    assert like is not None and either is not None
    batch, length = like.shape[1:]
    channels, num_distances, _, rows, columns = either.shape
    block, num_blocks = rows * columns, (num_distances + 1) // 2
    tables, twiddle = _tables(block, like.dtype, like.device)
    precision = dot_precision(like.dtype)
    out = support.empty(channels, batch, length, dtype=like.dtype, device=like.device)
    inner = (
        support.empty(channels, batch, length, dtype=like.dtype, device=like.device) if save_inner and gated else None
    )
    switches = {"GATED": gated is not None, "RESIDUAL": residual is not None, "SAVE_INNER": inner is not None}
    if num_blocks == 1:
        sequences = min(SHAPES[block].sequences, triton.next_power_of_2(batch))
        num_parts = max(1, min(triton.cdiv(batch, sequences), PROGRAMS["forward"] // channels))
        _forward_kernel[(channels, num_parts)](
            projected, parameters, filter_spectrum, skip, x, residual_spectrum, residual_skip, out, inner,
            tables, twiddle, lengths, channels, batch, length, channels * batch * length, num_parts,
            **switches, PADDED=lengths is not None,
            ROWS=rows, COLUMNS=columns, SEQUENCES=sequences, KEEP=SHAPES[block].keep,
            MASKED=length % block != 0, PRECISION=precision, num_warps=SHAPES[block].warps, num_stages=1,
        )  # fmt: skip
        return out, inner
    num_parts = _block_parts(channels, batch * num_blocks)
    blocks = _blocks_to_frequency("gate", gated, None, num_blocks, either, lengths) if gated else None
    residual_blocks = _blocks_to_frequency("plain", None, x, num_blocks, either, lengths) if residual else None
    _blocks_forward_kernel[(channels, num_parts)](
        projected, parameters, blocks, filter_spectrum, skip, residual_blocks, residual_spectrum, residual_skip,
        out, inner, tables, twiddle, channels, batch, length, channels * batch * length, num_blocks, num_parts,
        **switches, ROWS=rows, COLUMNS=columns, MASKED=length % block != 0, PRECISION=precision,
        num_warps=SHAPES[block].warps, num_stages=1,
    )  # fmt: skip
    return out, inner


def _blocks_to_frequency(
    source: str,
    gated: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    x: Tensor | None,
    num_blocks: int,
    like_spectrum: Tensor,
    lengths: Tensor | None = None,
) -> Tensor:
    """Transform every block; `x` is the input ("plain") or the gradient ("plain", "gradient": without `lengths`)."""
    projected, parameters = gated[:2] if gated else (None, None)
    like = x if x is not None else projected
    assert like is not None
    channels = like_spectrum.shape[0]
    rows, columns = like_spectrum.shape[-2:]
    batch, length = like.shape[1:]
    block = rows * columns
    tables, twiddle = _tables(block, like.dtype, like.device)
    num_parts = _block_parts(channels, batch * num_blocks)
    out = support.empty(channels, batch, num_blocks, 2, rows, columns, dtype=like.dtype, device=like.device)
    _blocks_to_frequency_kernel[(channels, num_parts)](
        projected, parameters, x, x, out, tables, twiddle, lengths, channels, batch, length,
        channels * batch * length, num_blocks, num_parts,
        SOURCE=source, PADDED=lengths is not None, ROWS=rows, COLUMNS=columns, MASKED=length % block != 0,
        PRECISION=dot_precision(like.dtype), num_warps=SHAPES[block].warps, num_stages=1,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    gated: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    residual: tuple[Tensor, Tensor, Tensor] | None,
    inner: Tensor | None,
    lengths: Tensor | None = None,
) -> Gradients:
    """Return the gradients; as `toeplitz.backward`, with transforms in place of taps."""
    gradients = Gradients()
    if residual is not None:
        x, spectrum_, skip = residual
        of_x, of_spectrum, of_skip = _convolution_backward(grad, spectrum_, skip, lengths, x=x)
        gradients = gradients._replace(x=of_x, residual_operand=of_spectrum, residual_skip=of_skip)
    if gated is not None:
        of_short, of_spectrum, of_skip = _convolution_backward(
            grad, gated[2], gated[3], lengths, gated=gated, inner=inner
        )
        gradients = gradients._replace(short=of_short, operand=of_spectrum, skip=of_skip)
    return gradients


def _convolution_backward(
    grad: Tensor,
    filter_spectrum: Tensor,
    skip: Tensor,
    lengths: Tensor | None,
    x: Tensor | None = None,
    gated: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    inner: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of one convolution's input (of its three gates), of its transform and its skip weights."""
    projected, parameters = gated[:2] if gated else (None, None)
    channels, batch, length = grad.shape
    num_distances, _, rows, columns = filter_spectrum.shape[1:]
    block, num_blocks = rows * columns, (num_distances + 1) // 2
    tables, twiddle = _tables(block, grad.dtype, grad.device)
    precision = dot_precision(grad.dtype)
    planes = 3 if gated else 1
    out = support.empty(planes * channels, batch, length, dtype=grad.dtype, device=grad.device)
    grad_short, grad_input = (out, None) if gated else (None, out)
    if num_blocks == 1:
        sequences = min(SHAPES[block].sequences, triton.next_power_of_2(batch))
        num_parts = max(1, min(triton.cdiv(batch, sequences), PROGRAMS["backward"] // channels))
        grad_spectrum = support.empty(channels, num_parts, 1, 2, rows, columns, dtype=torch.float32, device=grad.device)
        grad_skip = support.empty(channels, num_parts, dtype=torch.float32, device=grad.device)
        _backward_kernel[(channels, num_parts)](
            projected, parameters, filter_spectrum, skip, x, inner, grad, grad_short, grad_input, grad_spectrum,
            grad_skip, tables, twiddle, lengths, channels, batch, length, channels * batch * length, num_parts,
            GATED=gated is not None, PADDED=lengths is not None,
            ROWS=rows, COLUMNS=columns, SEQUENCES=sequences, KEEP=SHAPES[block].keep,
            MASKED=length % block != 0, PRECISION=precision,
            num_warps=SHAPES[block].warps, num_stages=1,
        )  # fmt: skip
        return out, grad_spectrum.sum(1), grad_skip.sum(1)
    num_parts = _block_parts(channels, batch * num_blocks)
    blocks = _blocks_to_frequency("gate" if gated else "plain", gated, x, num_blocks, filter_spectrum, lengths)
    grad_blocks = _blocks_to_frequency("gradient" if gated else "plain", gated, grad, num_blocks, filter_spectrum)
    grad_skip = support.empty(channels, num_parts, dtype=torch.float32, device=grad.device)
    _blocks_backward_kernel[(channels, num_parts)](
        projected, parameters, grad_blocks, filter_spectrum, skip, x, inner, grad, grad_short, grad_input, grad_skip,
        tables, twiddle, lengths, channels, batch, length, channels * batch * length, num_blocks, num_parts,
        GATED=gated is not None, PADDED=lengths is not None,
        ROWS=rows, COLUMNS=columns, MASKED=length % block != 0, PRECISION=precision,
        num_warps=SHAPES[block].warps, num_stages=1,
    )  # fmt: skip
    grad_spectrum = support.empty(channels, num_distances, 2, rows, columns, dtype=torch.float32, device=grad.device)
    piece = min(1024, block)
    _blocks_spectrum_gradient_kernel[(triton.cdiv(block, piece), num_distances, channels)](
        blocks, grad_blocks, grad_spectrum, batch, num_blocks, BLOCK=block, PIECE=piece, num_warps=4
    )
    return out, grad_spectrum, grad_skip.sum(1)
