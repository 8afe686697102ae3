"""Parts of the transform's kernels: a tile's way to frequencies and back, and the loading of what that takes."""

# mypy: disable-error-code="valid-type, index, call-arg"

from __future__ import annotations

import triton
import triton.language as tl

from monarch_mixer.kernels.gates import short_convolve
from monarch_mixer.kernels.products import dot


@triton.jit
def to_frequency(
    x, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype: tl.constexpr, PRECISION: tl.constexpr
):
    """Transform x (rows, sequences * columns) to real and imaginary parts (rows * sequences, columns)."""
    real = dot(cos, x, None, PRECISION)
    negative_imag = dot(sin, x, None, PRECISION)
    return columns_to_frequency(real, negative_imag, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype, PRECISION)


@triton.jit
def columns_to_frequency(
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
def columns_to_time(
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
    """Undo `columns_to_frequency`, up to the first factor: real and imaginary parts (rows, sequences * columns)."""
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
def to_time(
    real, imag, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2,
    rows: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Transform back (the adjoint of `to_frequency`) to real sequences (rows, sequences * columns).

    A sequence's mean is sqrt(block) times as large among its frequencies, and must not leave fp16's range there.
    """
    down: tl.constexpr = 1 / 16 if dtype == tl.float16 else 1.0
    if dtype == tl.float16:
        real *= down
        imag *= down
    real, imag = columns_to_time(
        real, imag, twiddle_cos, twiddle_sin, cos2, sin2, negative2, rows=rows, dtype=dtype, PRECISION=PRECISION
    )
    out = dot(cos, real.to(dtype), None, PRECISION)
    out = dot(sin, (-imag).to(dtype), out, PRECISION)
    if dtype == tl.float16:
        out *= 1 / down
    return out


@triton.jit
def matrices(tables_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
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
def twiddles(twiddle_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Load cos and sin of the twiddle (ROWS, WIDTH), for each sequence of a tile, in the table's dtype."""
    index = tl.arange(0, ROWS)[:, None] * COLUMNS + (tl.arange(0, WIDTH) % COLUMNS)[None, :]
    return tl.load(twiddle_ptr + index), tl.load(twiddle_ptr + ROWS * COLUMNS + index)


@triton.jit
def filter_tile(ptr, skip_ptr, channel, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEQUENCES: tl.constexpr):
    """Load a channel's transform (2, ROWS, COLUMNS) with its skip weight, each row once for each sequence of a tile."""
    ptr += channel * 2 * ROWS * COLUMNS
    index = (tl.arange(0, ROWS * SEQUENCES) // SEQUENCES)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    real = tl.load(ptr + index).to(tl.float32) + tl.load(skip_ptr + channel)
    return real, tl.load(ptr + ROWS * COLUMNS + index).to(tl.float32)


@triton.jit
def stream(
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
def before_and_value(projected_ptr, channel, channels, offset, position, valid, length, plane, parameters):
    """Return the two streams whose product enters the convolution; what is not valid is finite in them."""
    before = stream(
        projected_ptr, 0, channel, channels, offset, position, valid, length, length, plane, parameters, False
    )
    value = stream(
        projected_ptr, 2, channel, channels, offset, position, valid, length, length, plane, parameters, False
    )
    return before, value


@triton.jit
def places(first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEQUENCES: tl.constexpr):
    """Return sequence and position of every element of a tile whose sequences start at `first`, (ROWS, width)."""
    column = tl.arange(0, SEQUENCES * COLUMNS)[None, :]
    position = tl.arange(0, ROWS)[:, None] * COLUMNS + column % COLUMNS
    return first + column // COLUMNS, position


@triton.jit
def is_real(end, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEQUENCES: tl.constexpr):
    """Whether an element of such a tile comes before its sequence's `end`, a number or (1, width).

    As a comparison of a column of numbers with a row of them, so that no position is kept in a register of its own.
    """
    column = tl.arange(0, SEQUENCES * COLUMNS)[None, :] % COLUMNS
    return tl.arange(0, ROWS)[:, None] * COLUMNS < end - column


@triton.jit
def runs(first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEQUENCES: tl.constexpr):
    """Return sequence and position of every run of eight elements of such a tile, (width / 8, ROWS)."""
    each: tl.constexpr = COLUMNS // 8
    run = tl.arange(0, SEQUENCES * each)[:, None]
    position = run % each * 8 + tl.arange(0, ROWS)[None, :] * COLUMNS
    return first + run // each, position
