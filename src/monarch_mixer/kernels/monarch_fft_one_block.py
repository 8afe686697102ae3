"""Kernels of sequences that fit one block: everything stays on the chip. Launched by `monarch_fft`."""

# mypy: disable-error-code="valid-type, index, call-arg"

from __future__ import annotations

import triton
import triton.language as tl

from monarch_mixer.kernels.gates import row_ends
from monarch_mixer.kernels.monarch_fft_tiles import (
    before_and_value,
    filter_tile,
    is_real,
    matrices,
    places,
    runs,
    stream,
    to_frequency,
    to_time,
    twiddles,
)


@triton.jit
def forward_kernel(
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
    # the cache for each transform: a long block has no registers for them beside its own values. The barriers keep the
    # compiler from taking two loads of the same for one.
    cos, sin, cos2, sin2, negative2 = matrices(tables_ptr, ROWS, COLUMNS)
    if KEEP:
        twiddle_cos, twiddle_sin = twiddles(twiddle_ptr, ROWS, COLUMNS, width)
        if GATED:
            k_real, k_imag = filter_tile(spectrum_ptr, skip_ptr, channel, ROWS, COLUMNS, SEQUENCES)
        if RESIDUAL:
            r_real, r_imag = filter_tile(residual_spectrum_ptr, residual_skip_ptr, channel, ROWS, COLUMNS, SEQUENCES)
    for group in range(part, tl.cdiv(batch, SEQUENCES), num_parts):
        if not KEEP:
            twiddle_cos, twiddle_sin = twiddles(twiddle_ptr, ROWS, COLUMNS, width)
        sequence, position = places(group * SEQUENCES, ROWS, COLUMNS, SEQUENCES)
        valid = (sequence < batch) & (position < length)
        offset = sequence * length + position
        if PADDED:
            end = tl.load(lengths_ptr + group) if SEQUENCES == 1 else row_ends(lengths_ptr, sequence, batch)
        out = tl.zeros([ROWS, width], tl.float32)
        if GATED:
            run_sequence, run = runs(group * SEQUENCES, ROWS, COLUMNS, SEQUENCES)
            run_valid = (run_sequence < batch) & (run >= 0)
            run_offset = run_sequence * length + run
            before, value = before_and_value(
                projected_ptr, channel, channels, run_offset, run, run_valid, length, plane, parameters
            )
            # Both gates are masked at once: each by itself takes registers that long blocks do not have.
            z = (before * value).to(dtype)
            if PADDED:
                z = tl.where(is_real(end, ROWS, COLUMNS, SEQUENCES), z, 0.0)
            elif MASKED:
                z = tl.where(valid, z, 0.0)
            real, imag = to_frequency(z, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype, PRECISION)
            if not KEEP:
                k_real, k_imag = filter_tile(spectrum_ptr, skip_ptr, channel, ROWS, COLUMNS, SEQUENCES)
                tl.debug_barrier()
                twiddle_cos, twiddle_sin = twiddles(twiddle_ptr, ROWS, COLUMNS, width)
            inner = to_time(
                real * k_real - imag * k_imag, real * k_imag + imag * k_real,
                cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, ROWS, dtype, PRECISION,
            )  # fmt: skip
            if SAVE_INNER:
                tl.store(inner_ptr + offset, inner.to(dtype), mask=valid)
            after = stream(
                projected_ptr, 1, channel, channels, run_offset, run, run_valid, length, length, plane, parameters,
                MASKED,
            )  # fmt: skip
            out += inner * after
        if RESIDUAL:
            u = tl.load(input_ptr + offset, mask=valid, other=0.0)
            if PADDED:
                u = tl.where(is_real(end, ROWS, COLUMNS, SEQUENCES), u, 0.0)
            if not KEEP:
                tl.debug_barrier()
                twiddle_cos, twiddle_sin = twiddles(twiddle_ptr, ROWS, COLUMNS, width)
            real, imag = to_frequency(u, cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype, PRECISION)
            if not KEEP:
                r_real, r_imag = filter_tile(
                    residual_spectrum_ptr, residual_skip_ptr, channel, ROWS, COLUMNS, SEQUENCES
                )
                tl.debug_barrier()
                twiddle_cos, twiddle_sin = twiddles(twiddle_ptr, ROWS, COLUMNS, width)
            out += to_time(
                real * r_real - imag * r_imag, real * r_imag + imag * r_real,
                cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, ROWS, dtype, PRECISION,
            )  # fmt: skip
        tl.store(out_ptr + offset, out.to(dtype), mask=valid)


@triton.jit
def backward_kernel(
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
    cos, sin, cos2, sin2, negative2 = matrices(tables_ptr, ROWS, COLUMNS)
    if KEEP:
        twiddle_cos, twiddle_sin = twiddles(twiddle_ptr, ROWS, COLUMNS, width)
        k_real, k_imag = filter_tile(spectrum_ptr, skip_ptr, channel, ROWS, COLUMNS, SEQUENCES)
    for group in range(part, tl.cdiv(batch, SEQUENCES), num_parts):
        if not KEEP:
            twiddle_cos, twiddle_sin = twiddles(twiddle_ptr, ROWS, COLUMNS, width)
        sequence, position = places(group * SEQUENCES, ROWS, COLUMNS, SEQUENCES)
        valid = (sequence < batch) & (position < length)
        offset = sequence * length + position
        run_sequence, run = runs(group * SEQUENCES, ROWS, COLUMNS, SEQUENCES)
        run_valid = (run_sequence < batch) & (run >= 0)
        run_offset = run_sequence * length + run
        if GATED:
            before, value = before_and_value(
                projected_ptr, channel, channels, run_offset, run, run_valid, length, plane, parameters
            )
            x = before * value
            if MASKED and not PADDED:
                x = tl.where(valid, x, 0.0)
        else:
            x = tl.load(input_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        if PADDED:
            end = tl.load(lengths_ptr + group) if SEQUENCES == 1 else row_ends(lengths_ptr, sequence, batch)
            x = tl.where(is_real(end, ROWS, COLUMNS, SEQUENCES), x, 0.0)
        real, imag = to_frequency(
            x.to(dtype), cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, dtype, PRECISION
        )
        if not KEEP:
            tl.debug_barrier()
        grad = tl.load(grad_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        if GATED:
            inner = tl.load(inner_ptr + offset, mask=valid, other=0.0).to(tl.float32)
            tl.store(grad_short_ptr + plane + offset, (grad * inner).to(dtype), mask=valid)
            grad *= stream(
                projected_ptr, 1, channel, channels, run_offset, run, run_valid, length, length, plane, parameters,
                MASKED,
            )  # fmt: skip
        # From the frequencies, as that of lag 0, this would carry the transforms' rounding, large against a small sum.
        grad_skip += tl.sum(x * grad)
        if not KEEP:
            tl.debug_barrier()
            twiddle_cos, twiddle_sin = twiddles(twiddle_ptr, ROWS, COLUMNS, width)
        grad_real, grad_imag = to_frequency(
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
        if not KEEP:
            k_real, k_imag = filter_tile(spectrum_ptr, skip_ptr, channel, ROWS, COLUMNS, SEQUENCES)
            twiddle_cos, twiddle_sin = twiddles(twiddle_ptr, ROWS, COLUMNS, width)
        grad_x = to_time(
            grad_real * k_real + grad_imag * k_imag, grad_imag * k_real - grad_real * k_imag,
            cos, sin, twiddle_cos, twiddle_sin, cos2, sin2, negative2, ROWS, dtype, PRECISION,
        )  # fmt: skip
        if PADDED:
            grad_x = tl.where(is_real(end, ROWS, COLUMNS, SEQUENCES), grad_x, 0.0)
        if GATED:
            if not KEEP:  # kept through three transforms, they would be spilled
                before, value = before_and_value(
                    projected_ptr, channel, channels, run_offset, run, run_valid, length, plane, parameters
                )
            tl.store(grad_short_ptr + offset, (grad_x * value).to(dtype), mask=valid)
            tl.store(grad_short_ptr + plane + plane + offset, (grad_x * before).to(dtype), mask=valid)
        else:
            tl.store(grad_input_ptr + offset, grad_x.to(dtype), mask=valid)
    tl.store(grad_skip_ptr + channel * num_parts + part, grad_skip)
