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

from monarch_mixer.kernels import support


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
def row_ends(lengths_ptr, sequence, batch):
    """Load the real positions of sequences, in the shape of `sequence`; 0 for those from `batch` on."""
    return tl.load(lengths_ptr + sequence, mask=sequence < batch, other=0)


@triton.jit
def short_convolve(ptr, offset, position, valid, length, end, parameters, row, MASKED: tl.constexpr):
    """Return the causal three-tap convolution of one of the projected streams.

    A thread holds eight neighbours and loads two more, rather than everything three times.

    Args:
        ptr: the channel's first sequence.
        offset: where runs of eight positions begin, (runs, rows): runs first, since Triton lets the threads of a warp
            follow the first of two axes that are not contiguous, and the runs of a row are neighbours.
        position: their first positions.
        valid: whether a run belongs to a sequence.
        length: positions of a sequence.
        end: `length`, or what of it is real, where all runs are of one sequence. Loads go by the length:
            up to any other position they would be of single elements.
        parameters: (3 * channels, 5), a row for each channel: three taps, the bias of the convolution, and that of the
            linear map before it, which exists at real positions only and so is not added left of the first.
        row: of `parameters`.
        MASKED: whether positions from `end` on, and what is not valid, are to be zeros; they are finite else.

    Returns:
        (rows, 8 * runs) in fp32.
    """
    runs: tl.constexpr = offset.shape[0]
    rows: tl.constexpr = offset.shape[1]
    parameters += row * 5
    past2, past1, now = tl.load(parameters), tl.load(parameters + 1), tl.load(parameters + 2)
    bias, input_bias = tl.load(parameters + 3), tl.load(parameters + 4)
    step = tl.arange(0, 8)[None, None, :]
    inside = valid[:, :, None] & (position[:, :, None] + step < length)
    x = tl.load(ptr + (offset[:, :, None] + step), mask=inside, other=0.0).to(tl.float32)
    pair = tl.arange(0, 2)[None, None, :] - 2
    before = position[:, :, None] + pair
    real = valid[:, :, None] & (before >= 0) & (before < length)
    halo = tl.load(ptr + (offset[:, :, None] + pair), mask=real, other=0.0).to(tl.float32)
    halo_even, halo_odd = tl.split(tl.where(before >= 0, halo, -input_bias))
    even, odd = tl.split(tl.reshape(x, (runs, rows, 4, 2)))
    past_odd = _delay(odd, halo_odd)
    constant = input_bias * (now + past1 + past2) + bias
    y_even = now * even + past1 * past_odd + past2 * _delay(even, halo_even) + constant
    y_odd = now * odd + past1 * even + past2 * past_odd + constant
    y = tl.reshape(tl.join(y_even, y_odd), (runs, rows, 8))
    if MASKED:
        y = tl.where(valid[:, :, None] & (position[:, :, None] + step < end), y, 0.0)
    return tl.reshape(tl.permute(y, (1, 0, 2)), (rows, 8 * runs))


@triton.jit
def _advance(x, last):
    """Move x (..., 4) one place back along its last axis, with `last` (...) coming in at its end."""
    rows: tl.constexpr = x.shape[0]
    columns: tl.constexpr = x.shape[1]
    even, odd = tl.split(tl.reshape(x, (rows, columns, 2, 2)))
    _, x2 = tl.split(even)
    return tl.reshape(tl.join(odd, tl.join(x2, last)), (rows, columns, 4))


@triton.jit
def _short_convolution_backward_kernel(
    grad_ptr, projected_ptr, parameters, out_ptr, sums_ptr, batch, length, num_parts,
    ROWS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Gradient of the projection, and of the taps and biases summed over this program's share of a channel."""
    channel = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = parameters + channel * 5
    past2, past1, now = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    input_bias = tl.load(row + 4)
    start = channel * batch * length
    grad_ptr += start
    projected_ptr += start
    out_ptr += start
    sum_now = tl.zeros([RUNS, ROWS, 4], tl.float32)
    sum_past1 = tl.zeros([RUNS, ROWS, 4], tl.float32)
    sum_past2 = tl.zeros([RUNS, ROWS, 4], tl.float32)
    sum_grad = tl.zeros([RUNS, ROWS, 4], tl.float32)
    sum_out = tl.zeros([RUNS, ROWS, 4], tl.float32)
    steps = tl.cdiv(length, 8 * RUNS)
    step8 = tl.arange(0, 8)[None, None, :]
    pair = tl.arange(0, 2)[None, None, :] + 8
    for item in range(part, tl.cdiv(batch, ROWS) * steps, num_parts):
        sequence = item // steps * ROWS + tl.arange(0, ROWS)[None, :]
        position = ((item % steps) * RUNS + tl.arange(0, RUNS)[:, None]) * 8
        offset = sequence * length + position
        valid = (sequence < batch) & (position < length)
        inside = valid[:, :, None] & (position[:, :, None] + step8 < length)
        here = offset[:, :, None] + step8
        grad = tl.load(grad_ptr + here, mask=inside, other=0.0).to(tl.float32)
        beyond = valid[:, :, None] & (position[:, :, None] + pair < length)
        halo = tl.load(grad_ptr + (offset[:, :, None] + pair), mask=beyond, other=0.0).to(tl.float32)
        x = tl.load(projected_ptr + here, mask=inside, other=0.0).to(tl.float32) + input_bias
        halo_even, halo_odd = tl.split(halo)
        even, odd = tl.split(tl.reshape(grad, (RUNS, ROWS, 4, 2)))
        x_even, x_odd = tl.split(tl.reshape(x, (RUNS, ROWS, 4, 2)))
        next_even = _advance(even, halo_even)
        next_odd = _advance(odd, halo_odd)
        out_even = now * even + past1 * odd + past2 * next_even
        out_odd = now * odd + past1 * next_even + past2 * next_odd
        out = tl.reshape(tl.join(out_even, out_odd), (RUNS, ROWS, 8))
        tl.store(out_ptr + here, out.to(out_ptr.dtype.element_ty), mask=inside)
        # The product of the gradient at t with the input at t - j is that of the gradient at t + j with the input at t.
        sum_now += even * x_even + odd * x_odd
        sum_past1 += odd * x_even + next_even * x_odd
        sum_past2 += next_even * x_even + next_odd * x_odd
        sum_grad += even + odd
        sum_out += out_even + out_odd
    sums = sums_ptr + (channel * num_parts + part) * 5
    tl.store(sums, tl.sum(sum_past2))
    tl.store(sums + 1, tl.sum(sum_past1))
    tl.store(sums + 2, tl.sum(sum_now))
    tl.store(sums + 3, tl.sum(sum_grad))
    tl.store(sums + 4, tl.sum(sum_out))


def short_convolution_backward(grad: Tensor, projected: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the projection (3 * channels, batch, length) and of `parameters` (3 * channels, 5).

    Args:
        grad: gradient of the convolution's output, in the projection's shape and dtype.
        projected: the projection without its bias.
        parameters: see `short_convolve`.
    """
    rows, batch, length = projected.shape
    out = support.empty(rows, batch, length, dtype=projected.dtype, device=projected.device)
    runs = min(256, triton.next_power_of_2(triton.cdiv(length, 8)))
    sequences = 256 // runs
    items = triton.cdiv(batch, sequences) * triton.cdiv(length, 8 * runs)
    # Enough programs for any GPU, and each with work enough to make its sums cheap.
    num_parts = max(1, min(triton.cdiv(items, 4), 8))
    sums = support.empty(rows, num_parts, 5, dtype=torch.float32, device=projected.device)
    _short_convolution_backward_kernel[(rows, num_parts)](
        grad, projected, parameters, out, sums, batch, length, num_parts, ROWS=sequences, RUNS=runs, num_warps=4
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
    out = support.empty(columns, rows, dtype=x.dtype, device=x.device)
    if x.numel():
        grid = (triton.cdiv(rows, 64), triton.cdiv(columns, 64))
        _transpose_kernel[grid](x, out, rows, columns, BLOCK_R=64, BLOCK_C=64, num_warps=4)
    return out
