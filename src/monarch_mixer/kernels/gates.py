"""The short convolution and the gates of the sequence mixer, inside the kernels of the long convolutions and by itself.

Activations are channels-first in memory: `projected` (3 * channels, batch, length), the others (channels, batch,
length), so that the positions of a sequence are neighbours.
"""

# mypy: disable-error-code="valid-type, index, call-arg"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from monarch_mixer.kernels.support import empty


class Gradients(NamedTuple):
    """Gradients of what a kernel of the gated (first three) and residual convolutions was given; None: it was not."""

    short: Tensor | None = None  # (3 * channels, batch, length), of the short convolution's output
    operand: Tensor | None = None
    skip: Tensor | None = None  # (channels,)
    x: Tensor | None = None  # (channels, batch, length)
    residual_operand: Tensor | None = None
    residual_skip: Tensor | None = None  # (channels,)


@triton.jit
def _delay(x, first):
    """Move x (..., 4) one place along its last axis, with `first` (...) coming in."""
    rows: tl.constexpr = x.shape[0]
    columns: tl.constexpr = x.shape[1]
    even, odd = tl.split(tl.reshape(x, (rows, columns, 2, 2)))
    x1, _ = tl.split(odd)
    return tl.reshape(tl.join(tl.join(first, x1), even), (rows, columns, 4))


@triton.jit
def short_convolve(ptr, offset, position, valid, length, parameters, channel):
    """Return the causal three-tap convolution of one of the projected streams; 0 where not valid.

    A thread holds eight neighbours and loads two more, rather than everything three times.

    Args:
        ptr, offset: where runs of eight positions begin, (rows, runs).
        position: their first positions; negative ones and those from `length` on are zeros.
        valid: whether a run belongs to a sequence.
        length: positions of a sequence.
        parameters: (3 * channels, 5), a row for each channel: three taps, the bias of the convolution, and that of the
            linear map before it, which exists at real positions only and so is not added left of the first.
        channel: the row of `parameters`.

    Returns:
        (rows, 8 * runs) in fp32.
    """
    rows: tl.constexpr = offset.shape[0]
    runs: tl.constexpr = offset.shape[1]
    row = parameters + channel * 5
    past2, past1, now = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    bias, input_bias = tl.load(row + 3), tl.load(row + 4)
    step = tl.arange(0, 8)[None, None, :]
    place = position[:, :, None] + step
    inside = valid[:, :, None] & (place < length)
    x = tl.load(ptr + (offset[:, :, None] + step), mask=inside, other=0.0).to(tl.float32)
    pair = tl.arange(0, 2)[None, None, :] - 2
    before = position[:, :, None] + pair
    halo = tl.load(
        ptr + (offset[:, :, None] + pair), mask=valid[:, :, None] & (before >= 0) & (before < length), other=0.0
    )
    halo_even, halo_odd = tl.split(halo.to(tl.float32))
    even, odd = tl.split(tl.reshape(x, (rows, runs, 4, 2)))
    past_odd = _delay(odd, halo_odd)
    y_even = now * even + past1 * past_odd + past2 * _delay(even, halo_even)
    y_odd = now * odd + past1 * even + past2 * past_odd
    y = tl.reshape(tl.join(y_even, y_odd), (rows, runs, 8)) + (input_bias * (now + past1 + past2) + bias)
    missing = tl.where(place == 0, past1 + past2, tl.where(place == 1, past2, 0.0))
    y = tl.where(inside, y - input_bias * missing, 0.0)
    return tl.reshape(y, (rows, 8 * runs))


@triton.jit
def _short_convolution_backward_kernel(
    grad_ptr, projected_ptr, parameters, out_ptr, sums_ptr, batch, length, num_parts, BLOCK: tl.constexpr
):
    """Gradient of the projection, and of the taps and biases summed over this program's share of (batch, length).

    The positions of all sequences of a channel are one row; a program walks every `num_parts`-th block of it.
    """
    channel = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = parameters + channel * 5
    past2, past1, now = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    input_bias = tl.load(row + 4)
    total = batch * length
    base = channel * total
    sum0 = tl.zeros([BLOCK], tl.float32)
    sum1 = tl.zeros([BLOCK], tl.float32)
    sum2 = tl.zeros([BLOCK], tl.float32)
    sum_bias = tl.zeros([BLOCK], tl.float32)
    sum_out = tl.zeros([BLOCK], tl.float32)
    for block in range(part, tl.cdiv(total, BLOCK), num_parts):
        index = block * BLOCK + tl.arange(0, BLOCK)
        position = index % length
        valid = index < total
        offset = base + index
        grad = tl.load(grad_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        next1 = tl.load(grad_ptr + offset + 1, mask=valid & (position + 1 < length), other=0.0).to(tl.float32)
        next2 = tl.load(grad_ptr + offset + 2, mask=valid & (position + 2 < length), other=0.0).to(tl.float32)
        out = now * grad + past1 * next1 + past2 * next2
        tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=valid)
        x0 = tl.load(projected_ptr + offset, mask=valid, other=0.0).to(tl.float32) + input_bias
        # The product of the gradient at t with the input at t - j is that of the gradient at t + j with the input at t.
        sum0 += grad * x0
        sum1 += next1 * x0
        sum2 += next2 * x0
        sum_bias += grad
        sum_out += out
    sums = sums_ptr + (channel * num_parts + part) * 5
    tl.store(sums, tl.sum(sum2))
    tl.store(sums + 1, tl.sum(sum1))
    tl.store(sums + 2, tl.sum(sum0))
    tl.store(sums + 3, tl.sum(sum_bias))
    tl.store(sums + 4, tl.sum(sum_out))


def short_convolution_backward(grad: Tensor, projected: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the projection (3 * channels, batch, length) and of `parameters` (3 * channels, 5).

    Args:
        grad: gradient of the convolution's output, in the projection's shape and dtype.
        projected: the projection without its bias.
        parameters: see `short_convolve`.
    """
    rows, batch, length = projected.shape
    out = empty(rows, batch, length, dtype=projected.dtype, device=projected.device)
    # Enough programs for any GPU, and each with work enough to make its sums cheap.
    block = 1024
    num_parts = max(1, min(triton.cdiv(batch * length, 4 * block), 16))
    sums = empty(rows, num_parts, 5, dtype=torch.float32, device=projected.device)
    _short_convolution_backward_kernel[(rows, num_parts)](
        grad, projected, parameters, out, sums, batch, length, num_parts, BLOCK=block, num_warps=4
    )
    return out, sums.sum(1)


@triton.jit
def _transpose_kernel(in_ptr, out_ptr, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    tile = tl.load(in_ptr + row[:, None] * columns + column[None, :], mask=mask)
    tl.store(out_ptr + column[:, None] * rows + row[None, :], tl.trans(tile), mask=tl.trans(mask))


def transpose(x: Tensor) -> Tensor:
    """Return the contiguous transpose (columns, rows) of a contiguous matrix x (rows, columns)."""
    rows, columns = x.shape
    out = empty(columns, rows, dtype=x.dtype, device=x.device)
    if x.numel():
        grid = (triton.cdiv(rows, 64), triton.cdiv(columns, 64))
        _transpose_kernel[grid](x, out, rows, columns, BLOCK_R=64, BLOCK_C=64, num_warps=4)
    return out
