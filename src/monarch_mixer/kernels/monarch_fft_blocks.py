"""Kernels of sequences of several blocks: each block's transform goes through memory. Launched by `monarch_fft`."""

# mypy: disable-error-code="valid-type, index, call-arg"

from __future__ import annotations

import triton
import triton.language as tl

from monarch_mixer.kernels.monarch_fft_tiles import matrices, runs, stream, to_frequency, to_time, twiddles


@triton.jit
def blocks_to_frequency_kernel(
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
    cos, sin, cos2, sin2, negative2 = matrices(tables_ptr, ROWS, COLUMNS)
    for item in range(part, batch * num_blocks, num_parts):
        sequence = item // num_blocks
        begin = item % num_blocks * block
        twiddle_cos, twiddle_sin = twiddles(twiddle_ptr, ROWS, COLUMNS, COLUMNS)
        _, run = runs(0, ROWS, COLUMNS, 1)
        run += begin
        valid = run < length
        start = sequence * length
        offset = start + begin + tile
        end = tl.load(lengths_ptr + sequence) if PADDED else length
        inside = begin + tile < length
        if SOURCE == "gate":
            x = stream(
                projected_ptr, 0, channel, channels, start + run, run, valid, length, end, plane, parameters,
                MASKED or PADDED,
            )  # fmt: skip
            x *= stream(
                projected_ptr, 2, channel, channels, start + run, run, valid, length, end, plane, parameters,
                MASKED or PADDED,
            )  # fmt: skip
            x = x.to(dtype)
        elif SOURCE == "gradient":
            x = stream(
                projected_ptr, 1, channel, channels, start + run, run, valid, length, length, plane, parameters, MASKED
            )
            x *= tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            x = x.to(dtype)
        else:
            x = tl.load(input_ptr + offset, mask=inside, other=0.0)
            if PADDED:
                x = tl.where(begin + tile < end, x, 0.0)
        real, imag = to_frequency(x, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype, PRECISION)
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
def blocks_forward_kernel(
    projected_ptr, parameters, blocks_ptr, spectrum_ptr, skip_ptr, residual_blocks_ptr,
    residual_spectrum_ptr, residual_skip_ptr, out_ptr, inner_ptr, tables_ptr, twiddle_ptr,
    channels, batch, length, plane, num_blocks, num_parts,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, SAVE_INNER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both convolutions of a part of a channel's blocks, from the transforms of all blocks of their sequence."""
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
    cos, sin, cos2, sin2, negative2 = matrices(tables_ptr, ROWS, COLUMNS)
    for item in range(part, batch * num_blocks, num_parts):
        sequence = item // num_blocks
        index = item % num_blocks
        twiddle_cos, twiddle_sin = twiddles(twiddle_ptr, ROWS, COLUMNS, COLUMNS)
        start = sequence * length
        offset = start + index * block + tile
        inside = index * block + tile < length
        out = tl.zeros([ROWS, COLUMNS], tl.float32)
        if GATED:
            real, imag = _combine(
                blocks_ptr, spectrum_ptr, skip_ptr, channel, sequence, index, batch, num_blocks, False, ROWS, COLUMNS
            )
            inner = to_time(
                real, imag, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, ROWS, dtype, PRECISION
            )
            if SAVE_INNER:
                tl.store(inner_ptr + offset, inner.to(dtype), mask=inside)
            _, run = runs(0, ROWS, COLUMNS, 1)
            run += index * block
            after = stream(
                projected_ptr, 1, channel, channels, start + run, run, run < length, length, length, plane, parameters,
                MASKED,
            )  # fmt: skip
            out += inner * after
        if RESIDUAL:
            real, imag = _combine(
                residual_blocks_ptr, residual_spectrum_ptr, residual_skip_ptr, channel, sequence, index, batch,
                num_blocks, False, ROWS, COLUMNS,
            )  # fmt: skip
            out += to_time(
                real, imag, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, ROWS, dtype, PRECISION
            )
        tl.store(out_ptr + offset, out.to(dtype), mask=inside)


@triton.jit
def blocks_backward_kernel(
    projected_ptr, parameters, blocks_ptr, spectrum_ptr, skip_ptr, input_ptr, inner_ptr, grad_ptr,
    grad_short_ptr, grad_input_ptr, grad_skip_ptr, tables_ptr, twiddle_ptr, lengths_ptr,
    channels, batch, length, plane, num_blocks, num_parts,
    GATED: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one convolution's input (or gates) and skip weight, from the transforms of the gradient's blocks."""
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
    cos, sin, cos2, sin2, negative2 = matrices(tables_ptr, ROWS, COLUMNS)
    grad_skip = 0.0
    for item in range(part, batch * num_blocks, num_parts):
        sequence = item // num_blocks
        index = item % num_blocks
        twiddle_cos, twiddle_sin = twiddles(twiddle_ptr, ROWS, COLUMNS, COLUMNS)
        start = sequence * length
        offset = start + index * block + tile
        inside = index * block + tile < length
        real, imag = _combine(
            blocks_ptr, spectrum_ptr, skip_ptr, channel, sequence, index, batch, num_blocks, True, ROWS, COLUMNS
        )
        grad_x = to_time(real, imag, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, ROWS, dtype, PRECISION)
        grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            inner = tl.load(inner_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_short_ptr + plane + offset, (grad * inner).to(dtype), mask=inside)
            _, run = runs(0, ROWS, COLUMNS, 1)
            run += index * block
            valid = run < length
            grad *= stream(
                projected_ptr, 1, channel, channels, start + run, run, valid, length, length, plane, parameters, MASKED
            )
            # Where both are zero, so are their gradients.
            end = tl.load(lengths_ptr + sequence) if PADDED else length
            before = stream(
                projected_ptr, 0, channel, channels, start + run, run, valid, length, end, plane, parameters,
                MASKED or PADDED,
            )  # fmt: skip
            value = stream(
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
def blocks_spectrum_gradient_kernel(
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
