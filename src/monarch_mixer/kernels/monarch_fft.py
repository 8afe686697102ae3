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

import torch
import triton
import triton.language as tl
from torch import Tensor

from monarch_mixer.kernels.gates import Gradients, short_convolve
from monarch_mixer.kernels.products import dot
from monarch_mixer.kernels.support import dot_precision, empty

# block -> (rows, columns); operations a token are 8 * rows + 16 * columns, and a tensor core wants 64 rows.
FACTORS = {
    256: (16, 16),
    512: (32, 16),
    1024: (64, 16),
    2048: (64, 32),
    4096: (128, 32),
    8192: (128, 64),
}
# In fp32 the tiles of larger ones do not fit.
MAX_BLOCK = {torch.float32: 2048, torch.bfloat16: 8192, torch.float16: 8192}
# Elements of a tile, which sequences of a short block share, and warps of a program, forward and backward.
TILE = {"forward": 8192, "backward": 8192}
WARPS = {"forward": 8, "backward": 8, "blocks": 8}
# The batch is split where that makes at most so many programs.
PROGRAMS = {"forward": 1536, "backward": 1536, "blocks": 3072}


@triton.jit
def _to_frequency(x, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype: tl.constexpr, PRECISION: tl.constexpr):
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
    real, imag, twiddle_cos, twiddle_sin, cos2, sin2, negative2, rows: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr
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
    out = dot(tl.trans(cos), real.to(dtype), None, PRECISION)
    return dot(tl.trans(sin), (-imag).to(dtype), out, PRECISION)


@triton.jit
def _matrices(tables_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load cos and sin of the first factor; of the second, which is symmetric, cos, sin and -sin."""
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
def _spectrum_tile(ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEQUENCES: tl.constexpr):
    """Load a filter's transform (2, ROWS, COLUMNS), each row once for each sequence of a tile."""
    index = (tl.arange(0, ROWS * SEQUENCES) // SEQUENCES)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.load(ptr + index).to(tl.float32), tl.load(ptr + ROWS * COLUMNS + index).to(tl.float32)


@triton.jit
def _spectrum_kernel(
    taps_ptr, tables_ptr, twiddle_ptr, out_ptr, length, num_distances, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Transform the taps around one block distance: lags from -block to block about it."""
    channel = tl.program_id(0).to(tl.int64)
    distance = tl.program_id(1)
    block: tl.constexpr = ROWS * COLUMNS
    cos, sin, cos2, sin2, negative2 = _matrices(tables_ptr, ROWS, COLUMNS)
    twiddle_cos, twiddle_sin = _twiddles(twiddle_ptr, ROWS, COLUMNS, COLUMNS)
    n = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    lag = (distance - num_distances // 2) * block + n
    base = taps_ptr + channel * (2 * length - 1) + length - 1
    past = tl.load(base + lag, mask=(lag < length) & (lag > -length), other=0.0)
    lag -= block
    future = tl.load(base + lag, mask=(lag < length) & (lag > -length) & (n > 0), other=0.0)
    # The rows of the upper half of time are those of the lower, a quarter turn on: (-1)**k1 with cos and sin swapped.
    sign = tl.where(tl.arange(0, ROWS) % 2 == 0, 1.0, -1.0)[:, None]
    real = dot(cos, past, None, PRECISION) + sign * dot(sin, future, None, PRECISION)
    negative_imag = dot(sin, past, None, PRECISION)
    negative_imag -= sign * dot(cos, future, None, PRECISION)
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
    """The adjoint of `_spectrum_kernel`: taps of `block` lags, from the gradients at the two distances that see them."""
    channel = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1)  # lags from (first - 1 - num_distances // 2) * block up
    block: tl.constexpr = ROWS * COLUMNS
    cos, sin, cos2, sin2, negative2 = _matrices(tables_ptr, ROWS, COLUMNS)
    twiddle_cos, twiddle_sin = _twiddles(twiddle_ptr, ROWS, COLUMNS, COLUMNS)
    n = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    out = tl.zeros([ROWS, COLUMNS], tl.float32)
    source = spectrum_ptr + (channel * num_distances + first) * 2 * block + n
    if first >= 1:
        out += _to_time(
            tl.load(source - 2 * block), tl.load(source - block), cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2,
            rows=ROWS, dtype=tl.float32, PRECISION=PRECISION,
        )  # fmt: skip
    if first < num_distances:
        real, imag = _columns_to_time(
            tl.load(source), tl.load(source + block), twiddle_cos, twiddle_sin, cos2, sin2, negative2,
            rows=ROWS, dtype=tl.float32, PRECISION=PRECISION,
        )  # fmt: skip
        sign = tl.where(tl.arange(0, ROWS) % 2 == 0, 1.0, -1.0)[:, None]
        future = dot(tl.trans(sin), sign * real, None, PRECISION)
        future += dot(tl.trans(cos), sign * imag, None, PRECISION)
        out += tl.where(n > 0, future, 0.0)
    lag = (first - 1 - num_distances // 2) * block + n
    inside = (lag < length) & (lag > -length)
    tl.store(out_ptr + channel * (2 * length - 1) + length - 1 + lag, out * scale, mask=inside)


@triton.jit
def _forward_kernel(
    projected_ptr, parameters, spectrum_ptr, skip_ptr, input_ptr, residual_spectrum_ptr, residual_skip_ptr,
    out_ptr, inner_ptr, tables_ptr, twiddle_ptr, channels, batch, length, num_parts,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, SAVE_INNER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEQUENCES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both convolutions of a part of a channel's sequences, which fit a block each, SEQUENCES at a time."""
    channel = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    block: tl.constexpr = ROWS * COLUMNS
    width: tl.constexpr = SEQUENCES * COLUMNS
    cos, sin, cos2, sin2, negative2 = _matrices(tables_ptr, ROWS, COLUMNS)
    plane = channels.to(tl.int64) * batch * length
    column = tl.arange(0, width)[None, :]
    position = tl.arange(0, ROWS)[:, None] * COLUMNS + column % COLUMNS
    # The matrices stay on the chip through the loop; twiddles and the filter come from the cache.
    for group in range(part, tl.cdiv(batch, SEQUENCES), num_parts):
        twiddle_cos, twiddle_sin = _twiddles(twiddle_ptr, ROWS, COLUMNS, width)
        sequence = group * SEQUENCES + column // COLUMNS
        valid = (sequence < batch) & (position < length)
        offset = (channel * batch + sequence) * length + position
        out = tl.zeros([ROWS, width], tl.float32)
        if GATED:
            z = short_convolve(projected_ptr, offset, position, valid, parameters, channel)
            z *= short_convolve(projected_ptr, offset + 2 * plane, position, valid, parameters, channel + 2 * channels)
            real, imag = _to_frequency(
                z.to(dtype), cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype=dtype, PRECISION=PRECISION
            )
            k_real, k_imag = _spectrum_tile(spectrum_ptr + channel * 2 * block, ROWS, COLUMNS, SEQUENCES)
            inner = _to_time(
                real * k_real - imag * k_imag, real * k_imag + imag * k_real,
                cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, rows=ROWS, dtype=dtype, PRECISION=PRECISION,
            )  # fmt: skip
            inner += tl.load(skip_ptr + channel) * z
            if SAVE_INNER:
                tl.store(inner_ptr + offset, inner.to(dtype), mask=valid)
            after = short_convolve(projected_ptr, offset + plane, position, valid, parameters, channel + channels)
            out += inner * after
        if RESIDUAL:
            u = tl.load(input_ptr + offset, mask=valid, other=0.0)
            real, imag = _to_frequency(
                u, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype=dtype, PRECISION=PRECISION
            )
            k_real, k_imag = _spectrum_tile(residual_spectrum_ptr + channel * 2 * block, ROWS, COLUMNS, SEQUENCES)
            out += _to_time(
                real * k_real - imag * k_imag, real * k_imag + imag * k_real,
                cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, rows=ROWS, dtype=dtype, PRECISION=PRECISION,
            )  # fmt: skip
            out += tl.load(residual_skip_ptr + channel) * u.to(tl.float32)
        tl.store(out_ptr + offset, out.to(dtype), mask=valid)


@triton.jit
def _backward_kernel(
    projected_ptr, parameters, spectrum_ptr, skip_ptr, input_ptr, inner_ptr, grad_ptr,
    grad_short_ptr, grad_input_ptr, grad_spectrum_ptr, grad_skip_ptr, tables_ptr, twiddle_ptr,
    channels, batch, length, num_parts,
    GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEQUENCES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one of the two convolutions: of its input (or its gates), and of its transform over a part's batch."""
    channel = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    block: tl.constexpr = ROWS * COLUMNS
    width: tl.constexpr = SEQUENCES * COLUMNS
    plane = channels.to(tl.int64) * batch * length
    column = tl.arange(0, width)[None, :]
    position = tl.arange(0, ROWS)[:, None] * COLUMNS + column % COLUMNS
    skip = tl.load(skip_ptr + channel)
    tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    grad_spectrum = grad_spectrum_ptr + (channel * num_parts + part) * 2 * block + tile
    grad_skip = 0.0
    cos, sin, cos2, sin2, negative2 = _matrices(tables_ptr, ROWS, COLUMNS)
    for group in range(part, tl.cdiv(batch, SEQUENCES), num_parts):
        twiddle_cos, twiddle_sin = _twiddles(twiddle_ptr, ROWS, COLUMNS, width)
        sequence = group * SEQUENCES + column // COLUMNS
        valid = (sequence < batch) & (position < length)
        offset = (channel * batch + sequence) * length + position
        if GATED:
            grad = tl.load(grad_ptr + offset, mask=valid, other=0.0).to(tl.float32)
            inner = tl.load(inner_ptr + offset, mask=valid, other=0.0).to(tl.float32)
            tl.store(grad_short_ptr + offset + plane, (grad * inner).to(dtype), mask=valid)
            grad *= short_convolve(projected_ptr, offset + plane, position, valid, parameters, channel + channels)
            x = short_convolve(projected_ptr, offset, position, valid, parameters, channel)
            x *= short_convolve(projected_ptr, offset + 2 * plane, position, valid, parameters, channel + 2 * channels)
        else:
            grad = tl.load(grad_ptr + offset, mask=valid, other=0.0).to(tl.float32)
            x = tl.load(input_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        # From the frequencies, as that of lag 0, this would carry the transforms' rounding, large against a small sum.
        grad_skip += tl.sum(x * grad)
        real, imag = _to_frequency(
            x.to(dtype), cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype=dtype, PRECISION=PRECISION
        )
        grad_real, grad_imag = _to_frequency(
            grad.to(dtype), cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype=dtype, PRECISION=PRECISION
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
        k_real, k_imag = _spectrum_tile(spectrum_ptr + channel * 2 * block, ROWS, COLUMNS, SEQUENCES)
        grad_x = _to_time(
            grad_real * k_real + grad_imag * k_imag, grad_imag * k_real - grad_real * k_imag,
            cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, rows=ROWS, dtype=dtype, PRECISION=PRECISION,
        )  # fmt: skip
        grad_x += skip * grad
        if GATED:
            before = short_convolve(projected_ptr, offset, position, valid, parameters, channel)
            value = short_convolve(
                projected_ptr, offset + 2 * plane, position, valid, parameters, channel + 2 * channels
            )
            tl.store(grad_short_ptr + offset, (grad_x * value).to(dtype), mask=valid)
            tl.store(grad_short_ptr + offset + 2 * plane, (grad_x * before).to(dtype), mask=valid)
        else:
            tl.store(grad_input_ptr + offset, grad_x.to(dtype), mask=valid)
    tl.store(grad_skip_ptr + channel * num_parts + part, grad_skip)


# --- sequences of several blocks: each block's transform goes through memory


@triton.jit
def _blocks_to_frequency_kernel(
    projected_ptr, parameters, input_ptr, grad_ptr, out_ptr, tables_ptr, twiddle_ptr,
    channels, batch, length, num_blocks, num_parts,
    SOURCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Transform every block of what SOURCE names: "gate" (first gate * value), "plain" (input or gradient), or
    "gradient" (gradient * last gate)."""
    channel = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    block: tl.constexpr = ROWS * COLUMNS
    plane = channels.to(tl.int64) * batch * length
    tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    cos, sin, cos2, sin2, negative2 = _matrices(tables_ptr, ROWS, COLUMNS)
    for item in range(part, batch * num_blocks, num_parts):
        sequence = item // num_blocks
        index = item % num_blocks
        twiddle_cos, twiddle_sin = _twiddles(twiddle_ptr, ROWS, COLUMNS, COLUMNS)
        position = index * block + tile
        valid = position < length
        offset = (channel * batch + sequence) * length + position
        if SOURCE == "gate":
            x = short_convolve(projected_ptr, offset, position, valid, parameters, channel)
            x *= short_convolve(projected_ptr, offset + 2 * plane, position, valid, parameters, channel + 2 * channels)
            x = x.to(dtype)
        elif SOURCE == "gradient":
            x = short_convolve(projected_ptr, offset + plane, position, valid, parameters, channel + channels)
            x *= tl.load(grad_ptr + offset, mask=valid, other=0.0).to(tl.float32)
            x = x.to(dtype)
        else:
            x = tl.load(input_ptr + offset, mask=valid, other=0.0)
        real, imag = _to_frequency(
            x, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype=dtype, PRECISION=PRECISION
        )
        out = out_ptr + ((channel * batch + sequence) * num_blocks + index) * 2 * block + tile
        tl.store(out, real.to(dtype))
        tl.store(out + block, imag.to(dtype))


@triton.jit
def _combine(
    blocks_ptr, spectrum_ptr, tile, index, num_blocks,
    ADJOINT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum over a sequence's blocks their transforms times the filter's at the distance to block `index`."""
    block: tl.constexpr = ROWS * COLUMNS
    real = tl.zeros([ROWS, COLUMNS], tl.float32)
    imag = tl.zeros([ROWS, COLUMNS], tl.float32)
    for source in range(num_blocks):
        distance = source - index if ADJOINT else index - source
        x_ptr = blocks_ptr + source * 2 * block + tile
        k_ptr = spectrum_ptr + (distance + num_blocks - 1) * 2 * block + tile
        x_real, x_imag = tl.load(x_ptr).to(tl.float32), tl.load(x_ptr + block).to(tl.float32)
        k_real, k_imag = tl.load(k_ptr), tl.load(k_ptr + block)
        if ADJOINT:
            k_imag = -k_imag
        real += x_real * k_real - x_imag * k_imag
        imag += x_real * k_imag + x_imag * k_real
    return real, imag


@triton.jit
def _blocks_forward_kernel(
    projected_ptr, parameters, blocks_ptr, spectrum_ptr, skip_ptr, input_ptr, residual_blocks_ptr,
    residual_spectrum_ptr, residual_skip_ptr, out_ptr, inner_ptr, tables_ptr, twiddle_ptr,
    channels, batch, length, num_blocks, num_parts,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, SAVE_INNER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    block: tl.constexpr = ROWS * COLUMNS
    plane = channels.to(tl.int64) * batch * length
    tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    cos, sin, cos2, sin2, negative2 = _matrices(tables_ptr, ROWS, COLUMNS)
    for item in range(part, batch * num_blocks, num_parts):
        sequence = item // num_blocks
        index = item % num_blocks
        twiddle_cos, twiddle_sin = _twiddles(twiddle_ptr, ROWS, COLUMNS, COLUMNS)
        position = index * block + tile
        valid = position < length
        offset = (channel * batch + sequence) * length + position
        blocks_offset = (channel * batch + sequence) * num_blocks * 2 * block
        spectrum_offset = channel * (2 * num_blocks - 1) * 2 * block
        out = tl.zeros([ROWS, COLUMNS], tl.float32)
        if GATED:
            real, imag = _combine(
                blocks_ptr + blocks_offset, spectrum_ptr + spectrum_offset, tile, index, num_blocks,
                ADJOINT=False, ROWS=ROWS, COLUMNS=COLUMNS,
            )  # fmt: skip
            inner = _to_time(
                real, imag, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, rows=ROWS, dtype=dtype, PRECISION=PRECISION
            )
            z = short_convolve(projected_ptr, offset, position, valid, parameters, channel)
            z *= short_convolve(projected_ptr, offset + 2 * plane, position, valid, parameters, channel + 2 * channels)
            inner += tl.load(skip_ptr + channel) * z
            if SAVE_INNER:
                tl.store(inner_ptr + offset, inner.to(dtype), mask=valid)
            after = short_convolve(projected_ptr, offset + plane, position, valid, parameters, channel + channels)
            out += inner * after
        if RESIDUAL:
            real, imag = _combine(
                residual_blocks_ptr + blocks_offset, residual_spectrum_ptr + spectrum_offset, tile, index, num_blocks,
                ADJOINT=False, ROWS=ROWS, COLUMNS=COLUMNS,
            )  # fmt: skip
            out += _to_time(
                real, imag, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, rows=ROWS, dtype=dtype, PRECISION=PRECISION
            )
            u = tl.load(input_ptr + offset, mask=valid, other=0.0).to(tl.float32)
            out += tl.load(residual_skip_ptr + channel) * u
        tl.store(out_ptr + offset, out.to(dtype), mask=valid)


@triton.jit
def _blocks_backward_kernel(
    projected_ptr, parameters, blocks_ptr, spectrum_ptr, skip_ptr, input_ptr, inner_ptr, grad_ptr,
    grad_short_ptr, grad_input_ptr, grad_skip_ptr, tables_ptr, twiddle_ptr, channels, batch, length, num_blocks, num_parts,
    GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    block: tl.constexpr = ROWS * COLUMNS
    plane = channels.to(tl.int64) * batch * length
    tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    cos, sin, cos2, sin2, negative2 = _matrices(tables_ptr, ROWS, COLUMNS)
    for item in range(part, batch * num_blocks, num_parts):
        sequence = item // num_blocks
        index = item % num_blocks
        twiddle_cos, twiddle_sin = _twiddles(twiddle_ptr, ROWS, COLUMNS, COLUMNS)
        position = index * block + tile
        valid = position < length
        offset = (channel * batch + sequence) * length + position
        real, imag = _combine(
            blocks_ptr + (channel * batch + sequence) * num_blocks * 2 * block,
            spectrum_ptr + channel * (2 * num_blocks - 1) * 2 * block, tile, index, num_blocks,
            ADJOINT=True, ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
        grad_x = _to_time(
            real, imag, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, rows=ROWS, dtype=dtype, PRECISION=PRECISION
        )
        grad = tl.load(grad_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        skip = tl.load(skip_ptr + channel)
        if GATED:
            inner = tl.load(inner_ptr + offset, mask=valid, other=0.0).to(tl.float32)
            tl.store(grad_short_ptr + offset + plane, (grad * inner).to(dtype), mask=valid)
            grad *= short_convolve(projected_ptr, offset + plane, position, valid, parameters, channel + channels)
            grad_x += skip * grad
            before = short_convolve(projected_ptr, offset, position, valid, parameters, channel)
            value = short_convolve(projected_ptr, offset + 2 * plane, position, valid, parameters, channel + 2 * channels)
            tl.store(grad_short_ptr + offset, (grad_x * value).to(dtype), mask=valid)
            tl.store(grad_short_ptr + offset + 2 * plane, (grad_x * before).to(dtype), mask=valid)
            x = before * value
        else:
            tl.store(grad_input_ptr + offset, (grad_x + skip * grad).to(dtype), mask=valid)
            x = tl.load(input_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        tl.store(grad_skip_ptr + (channel * batch + sequence) * num_blocks + index, tl.sum(x * grad))


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
    """Return the matrices (cos, sin of rows; cos, sin, -sin of columns), scaled to keep norms, and the twiddle's cos, sin."""
    rows, columns = FACTORS[block]
    k1 = torch.arange(rows, dtype=torch.float64)[:, None] + 0.5
    n1 = torch.arange(rows, dtype=torch.float64)[None, :]
    first = math.pi * k1 * n1 / rows
    k2 = torch.arange(columns, dtype=torch.float64)
    second = 2 * math.pi * (k2[:, None] * k2[None, :] % columns) / columns
    twiddle = math.pi * k1 * k2[None, :] / block
    matrices = torch.cat(
        [
            *(part.flatten() / math.sqrt(rows) for part in (first.cos(), first.sin())),
            *(part.flatten() / math.sqrt(columns) for part in (second.cos(), second.sin(), -second.sin())),
        ]
    )
    turns = torch.cat([twiddle.cos().flatten(), twiddle.sin().flatten()])
    # Half the memory traffic; with values up to 1 fp16 is eight times finer than the bf16 of the products.
    turns_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    return matrices.to(device, dtype), turns.to(device, turns_dtype)


def block_for(length: int, dtype: torch.dtype) -> int:
    """Return the block of a sequence: the smallest that holds it, or the largest there is."""
    return min(MAX_BLOCK[dtype], max(min(FACTORS), triton.next_power_of_2(length)))


def spectrum(taps: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Transform filters for sequences cut into blocks.

    Args:
        taps: (channels, 2 * length - 1) in fp32, from the most negative lag up.
        block: a key of FACTORS.
        dtype: the dtype the convolution will run in; fp32 makes this exact to fp32 too.

    Returns:
        (channels, 2 * num_blocks - 1, 2, rows, columns) in fp32: by block distance, real and imaginary parts.
    """
    channels, lags = taps.shape
    length = (lags + 1) // 2
    rows, columns = FACTORS[block]
    num_distances = 2 * triton.cdiv(length, block) - 1
    out = empty(channels, num_distances, 2, rows, columns, dtype=torch.float32, device=taps.device)
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
    out = empty(channels, 2 * length - 1, dtype=torch.float32, device=grad_spectrum.device)
    tables, twiddle = _tables(block, torch.float32, grad_spectrum.device)
    _taps_gradient_kernel[(channels, num_distances + 1)](
        grad_spectrum, tables, twiddle, out, length, num_distances, math.sqrt(block),
        ROWS=rows, COLUMNS=columns, PRECISION=_filter_precision(dtype), num_warps=8, num_stages=1,
    )  # fmt: skip
    return out


def _filter_precision(dtype: torch.dtype) -> str:
    return dot_precision(dtype) if dtype == torch.float32 else "tf32"


def _sequences(batch: int, block: int, direction: str) -> int:
    return max(1, min(TILE[direction] // block, triton.next_power_of_2(batch)))


def _block_parts(channels: int, items: int) -> int:
    return max(1, min(items, PROGRAMS["blocks"] // channels))


def forward(
    gated: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    residual: tuple[Tensor, Tensor, Tensor] | None,
    save_inner: bool,
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
    out = empty(channels, batch, length, dtype=like.dtype, device=like.device)
    inner = empty(channels, batch, length, dtype=like.dtype, device=like.device) if save_inner and gated else None
    switches = {"GATED": gated is not None, "RESIDUAL": residual is not None, "SAVE_INNER": inner is not None}
    if num_blocks == 1:
        sequences = _sequences(batch, block, "forward")
        num_parts = max(1, min(triton.cdiv(batch, sequences), PROGRAMS["forward"] // channels))
        _forward_kernel[(channels, num_parts)](
            projected, parameters, filter_spectrum, skip, x, residual_spectrum, residual_skip, out, inner,
            tables, twiddle, channels, batch, length, num_parts,
            **switches, ROWS=rows, COLUMNS=columns, SEQUENCES=sequences, PRECISION=precision,
            num_warps=WARPS["forward"], num_stages=1,
        )  # fmt: skip
        return out, inner
    num_parts = _block_parts(channels, batch * num_blocks)
    blocks = _blocks_to_frequency("gate", gated, None, num_blocks, either) if gated else None
    residual_blocks = _blocks_to_frequency("plain", None, x, num_blocks, either) if residual else None
    _blocks_forward_kernel[(channels, num_parts)](
        projected, parameters, blocks, filter_spectrum, skip, x, residual_blocks, residual_spectrum, residual_skip,
        out, inner, tables, twiddle, channels, batch, length, num_blocks, num_parts,
        **switches, ROWS=rows, COLUMNS=columns, PRECISION=precision, num_warps=WARPS["blocks"], num_stages=1,
    )  # fmt: skip
    return out, inner


def _blocks_to_frequency(
    source: str,
    gated: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    x: Tensor | None,
    num_blocks: int,
    like_spectrum: Tensor,
) -> Tensor:
    """Transform every block; `x` is the input ("plain") or the gradient ("plain", "gradient")."""
    projected, parameters = gated[:2] if gated else (None, None)
    like = x if x is not None else projected
    assert like is not None
    channels = like_spectrum.shape[0]
    rows, columns = like_spectrum.shape[-2:]
    batch, length = like.shape[1:]
    tables, twiddle = _tables(rows * columns, like.dtype, like.device)
    num_parts = _block_parts(channels, batch * num_blocks)
    out = empty(channels, batch, num_blocks, 2, rows, columns, dtype=like.dtype, device=like.device)
    _blocks_to_frequency_kernel[(channels, num_parts)](
        projected, parameters, x, x, out, tables, twiddle, channels, batch, length, num_blocks, num_parts,
        SOURCE=source, ROWS=rows, COLUMNS=columns, PRECISION=dot_precision(like.dtype), num_warps=WARPS["blocks"], num_stages=1,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    gated: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    residual: tuple[Tensor, Tensor, Tensor] | None,
    inner: Tensor | None,
) -> Gradients:
    """Return the gradients; as `toeplitz.backward`, with transforms in place of taps."""
    gradients = Gradients()
    if residual is not None:
        x, spectrum_, skip = residual
        of_x, of_spectrum, of_skip = _convolution_backward(grad, spectrum_, skip, x=x)
        gradients = gradients._replace(x=of_x, residual_operand=of_spectrum, residual_skip=of_skip)
    if gated is not None:
        of_short, of_spectrum, of_skip = _convolution_backward(grad, gated[2], gated[3], gated=gated, inner=inner)
        gradients = gradients._replace(short=of_short, operand=of_spectrum, skip=of_skip)
    return gradients


def _convolution_backward(
    grad: Tensor,
    filter_spectrum: Tensor,
    skip: Tensor,
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
    out = empty(planes * channels, batch, length, dtype=grad.dtype, device=grad.device)
    grad_short, grad_input = (out, None) if gated else (None, out)
    if num_blocks == 1:
        sequences = _sequences(batch, block, "backward")
        num_parts = max(1, min(triton.cdiv(batch, sequences), PROGRAMS["backward"] // channels))
        grad_spectrum = empty(channels, num_parts, 1, 2, rows, columns, dtype=torch.float32, device=grad.device)
        grad_skip = empty(channels, num_parts, dtype=torch.float32, device=grad.device)
        _backward_kernel[(channels, num_parts)](
            projected, parameters, filter_spectrum, skip, x, inner, grad, grad_short, grad_input, grad_spectrum,
            grad_skip, tables, twiddle, channels, batch, length, num_parts,
            GATED=gated is not None, ROWS=rows, COLUMNS=columns, SEQUENCES=sequences, PRECISION=precision,
            num_warps=WARPS["backward"], num_stages=1,
        )  # fmt: skip
        return out, grad_spectrum.sum(1), grad_skip.sum(1)
    num_parts = _block_parts(channels, batch * num_blocks)
    blocks = _blocks_to_frequency("gate" if gated else "plain", gated, x, num_blocks, filter_spectrum)
    grad_blocks = _blocks_to_frequency("gradient" if gated else "plain", gated, grad, num_blocks, filter_spectrum)
    grad_skip = empty(channels, batch * num_blocks, dtype=torch.float32, device=grad.device)
    _blocks_backward_kernel[(channels, num_parts)](
        projected, parameters, grad_blocks, filter_spectrum, skip, x, inner, grad, grad_short, grad_input, grad_skip,
        tables, twiddle, channels, batch, length, num_blocks, num_parts,
        GATED=gated is not None, ROWS=rows, COLUMNS=columns, PRECISION=precision, num_warps=WARPS["blocks"], num_stages=1,
    )  # fmt: skip
    grad_spectrum = empty(channels, num_distances, 2, rows, columns, dtype=torch.float32, device=grad.device)
    piece = min(1024, block)
    _blocks_spectrum_gradient_kernel[(triton.cdiv(block, piece), num_distances, channels)](
        blocks, grad_blocks, grad_spectrum, batch, num_blocks, BLOCK=block, PIECE=piece, num_warps=4
    )
    return out, grad_spectrum, grad_skip.sum(1)
