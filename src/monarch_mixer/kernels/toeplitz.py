"""The gated long convolutions of short sequences as products with Toeplitz matrices on tensor cores.

A channel's matrix, `T[s, t] = taps[t - s]`, is built from its taps inside the program that multiplies by it, once for
the whole batch: 2 * length operations a token and channel, and nothing of size length**2 in memory.
"""

# mypy: disable-error-code="valid-type, index, call-arg"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from monarch_mixer.kernels import support
from monarch_mixer.kernels.gates import Gradients, row_ends, short_convolve
from monarch_mixer.kernels.products import dot
from monarch_mixer.kernels.support import dot_precision

# In fp32 the matrices of longer ones do not fit.
MAX_LENGTH = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}
# Sequences of a tile, warps of a program and the most registers a thread may take (None: any number): what was fastest
# on an H100. Two programs share a processor, one loading while the other multiplies.
ROWS = {"forward": 64, "backward": 32}
WARPS = {"forward": 4, "backward": 8}
REGISTERS: dict[str, int | None] = {"forward": None, "backward": 128}


@triton.jit
def _toeplitz_tile(
    taps_ptr, skip_ptr, channel, length, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr
):
    """Return T[s, t] (or its transpose) of a channel, with its skip weight at lag 0, zero outside the length."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    lag = row - column if TRANSPOSED else column - row
    inside = (row < length) & (column < length)
    base = taps_ptr + channel * (2 * length - 1) + length - 1
    taps = tl.load(base + lag, mask=inside, other=0.0)
    return tl.where((lag == 0) & inside, taps + tl.load(skip_ptr + channel), taps).to(dtype)


@triton.jit
def _forward_kernel(
    projected_ptr, parameters, taps_ptr, skip_ptr, input_ptr, residual_taps_ptr, residual_skip_ptr, out_ptr, inner_ptr,
    lengths_ptr, channels, batch, length, plane, num_parts,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, SAVE_INNER: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    # Pointers to the channel, so that offsets within it are small integers.
    start = channel * batch * length
    if GATED:
        projected_ptr += start
        if SAVE_INNER:
            inner_ptr += start
    if RESIDUAL:
        input_ptr += start
    out_ptr += start
    position = tl.arange(0, BLOCK)[None, :]
    if GATED:
        matrix = _toeplitz_tile(taps_ptr, skip_ptr, channel, length, False, BLOCK, dtype)
    if RESIDUAL:
        residual_matrix = _toeplitz_tile(residual_taps_ptr, residual_skip_ptr, channel, length, False, BLOCK, dtype)
    row = tl.arange(0, ROWS)[:, None]
    run = tl.arange(0, BLOCK // 8)[:, None] * 8
    run_row = tl.arange(0, ROWS)[None, :]
    for block in range(part, tl.cdiv(batch, ROWS), num_parts):
        sequence = block * ROWS + row
        valid = (sequence < batch) & (position < length)
        offset = sequence * length
        if PADDED:
            real = position < row_ends(lengths_ptr, sequence, batch)
        out = tl.zeros([ROWS, BLOCK], tl.float32)
        if GATED:
            run_sequence = block * ROWS + run_row
            in_batch = (run_sequence < batch) & (run >= 0)
            run_place = run_sequence * length + run
            run_position = run + run_row * 0
            z = short_convolve(
                projected_ptr, run_place, run_position, in_batch, length, length, parameters, channel, False
            )
            z *= short_convolve(
                projected_ptr + plane + plane, run_place, run_position, in_batch, length, length, parameters,
                channel + 2 * channels, False,
            )  # fmt: skip
            z = z.to(dtype)
            if PADDED:
                z = tl.where(real, z, 0.0)
            inner = dot(z, matrix, None, PRECISION)
            if SAVE_INNER:
                tl.store(inner_ptr + offset + position, inner.to(dtype), mask=valid)
            after = short_convolve(
                projected_ptr + plane, run_place, run_position, in_batch, length, length, parameters,
                channel + channels, False,
            )  # fmt: skip
            out += inner * after
        if RESIDUAL:
            u = tl.load(input_ptr + offset + position, mask=valid, other=0.0)
            if PADDED:
                u = tl.where(real, u, 0.0)
            out = dot(u, residual_matrix, out, PRECISION)
        tl.store(out_ptr + offset + position, out.to(dtype), mask=valid)


@triton.jit
def _backward_kernel(
    projected_ptr, parameters, taps_ptr, skip_ptr, input_ptr, residual_taps_ptr, residual_skip_ptr, inner_ptr, grad_ptr,
    grad_short_ptr, grad_input_ptr, products_ptr, residual_products_ptr,
    lengths_ptr, channels, batch, length, plane, num_parts,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates and of the inputs, and sum over the batch of input[s] * gradient[t], (BLOCK, BLOCK)."""
    channel = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    # Pointers to the channel, so that offsets within it are small integers.
    start = channel * batch * length
    if GATED:
        projected_ptr += start
        inner_ptr += start
        grad_short_ptr += start
    if RESIDUAL:
        input_ptr += start
        grad_input_ptr += start
    grad_ptr += start
    position = tl.arange(0, BLOCK)[None, :]
    if GATED:
        matrix = _toeplitz_tile(taps_ptr, skip_ptr, channel, length, True, BLOCK, dtype)
        products = tl.zeros([BLOCK, BLOCK], tl.float32)
    if RESIDUAL:
        residual_matrix = _toeplitz_tile(residual_taps_ptr, residual_skip_ptr, channel, length, True, BLOCK, dtype)
        residual_products = tl.zeros([BLOCK, BLOCK], tl.float32)
    row = tl.arange(0, ROWS)[:, None]
    run = tl.arange(0, BLOCK // 8)[:, None] * 8
    run_row = tl.arange(0, ROWS)[None, :]
    for block in range(part, tl.cdiv(batch, ROWS), num_parts):
        sequence = block * ROWS + row
        valid = (sequence < batch) & (position < length)
        offset = sequence * length
        here = offset + position
        grad = tl.load(grad_ptr + here, mask=valid, other=0.0)
        if PADDED:
            real = position < row_ends(lengths_ptr, sequence, batch)
        if RESIDUAL:
            u = tl.load(input_ptr + here, mask=valid, other=0.0)
            if PADDED:
                u = tl.where(real, u, 0.0)
            residual_products = dot(tl.trans(u), grad, residual_products, PRECISION)
            grad_input = dot(grad, residual_matrix, None, PRECISION)
            if PADDED:
                grad_input = tl.where(real, grad_input, 0.0)
            tl.store(grad_input_ptr + here, grad_input.to(dtype), mask=valid)
        if GATED:
            run_sequence = block * ROWS + run_row
            in_batch = (run_sequence < batch) & (run >= 0)
            run_place = run_sequence * length + run
            run_position = run + run_row * 0
            inner = tl.load(inner_ptr + here, mask=valid, other=0.0).to(tl.float32)
            grad_after = grad.to(tl.float32) * inner
            tl.store(grad_short_ptr + plane + here, grad_after.to(dtype), mask=valid)
            after = short_convolve(
                projected_ptr + plane, run_place, run_position, in_batch, length, length, parameters,
                channel + channels, False,
            )  # fmt: skip
            grad_inner = (grad.to(tl.float32) * after).to(dtype)
            before = short_convolve(
                projected_ptr, run_place, run_position, in_batch, length, length, parameters, channel, False
            )
            value = short_convolve(
                projected_ptr + plane + plane, run_place, run_position, in_batch, length, length, parameters,
                channel + 2 * channels, False,
            )  # fmt: skip
            z = (before * value).to(dtype)
            if PADDED:
                z = tl.where(real, z, 0.0)
            products = dot(tl.trans(z), grad_inner, products, PRECISION)
            grad_z = dot(grad_inner, matrix, None, PRECISION)
            if PADDED:
                grad_z = tl.where(real, grad_z, 0.0)
            tl.store(grad_short_ptr + here, (grad_z * value).to(dtype), mask=valid)
            tl.store(grad_short_ptr + plane + plane + here, (grad_z * before).to(dtype), mask=valid)
    tile = ((channel * num_parts + part) * BLOCK + tl.arange(0, BLOCK)[:, None]) * BLOCK + position
    if GATED:
        tl.store(products_ptr + tile, products)
    if RESIDUAL:
        tl.store(residual_products_ptr + tile, residual_products)


@triton.jit
def _diagonal_sums_kernel(
    products_ptr, out_ptr, length, num_parts, BLOCK: tl.constexpr, LAGS: tl.constexpr, STEP: tl.constexpr
):
    """Sum each diagonal of a channel's products: the gradient of its taps."""
    channel = tl.program_id(0).to(tl.int64)
    lag = tl.arange(0, LAGS)[None, :] - (length - 1)
    total = tl.zeros([LAGS], tl.float32)
    for part in range(num_parts):
        tile = products_ptr + (channel * num_parts + part) * BLOCK * BLOCK
        for start in range(0, BLOCK, STEP):
            row = start + tl.arange(0, STEP)[:, None]
            column = row + lag
            inside = (row < length) & (column >= 0) & (column < length)
            total += tl.sum(tl.load(tile + row * BLOCK + column, mask=inside, other=0.0), 0)
    index = tl.arange(0, LAGS)
    tl.store(out_ptr + channel * (2 * length - 1) + index, total, mask=index < 2 * length - 1)


def _block(length: int) -> int:
    return max(16, triton.next_power_of_2(length))


def _rows(batch: int, dtype: torch.dtype, direction: str) -> int:
    most = ROWS[direction] // 4 if dtype == torch.float32 else ROWS[direction]
    return max(16, min(most, triton.next_power_of_2(batch)))


def forward(
    gated: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    residual: tuple[Tensor, Tensor, Tensor] | None,
    save_inner: bool,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the mixed sequences (channels, batch, length) and, on demand, the gated convolution before its last gate.

    Args:
        gated: projection (3 * channels, batch, length), parameters of the short convolution, taps (channels, 2 *
            length - 1) from the most negative lag up, skip (channels,); None for the residual convolution alone.
        residual: input (channels, batch, length), taps and skip; None for none.
        save_inner: whether the second result is wanted, for the backward pass.
        lengths: (batch,) int32, the real positions of each sequence: what follows them enters neither convolution.
            None: all of them.
    """
    projected, parameters, taps, skip = gated or (None,) * 4
    x, residual_taps, residual_skip = residual or (None,) * 3
    like = x if x is not None else projected
    assert like is not None
    batch, length = like.shape[1:]
    channels = (taps if taps is not None else residual_taps).shape[0]  # type: ignore[union-attr]
    out = support.empty(channels, batch, length, dtype=like.dtype, device=like.device)
    inner = (
        support.empty(channels, batch, length, dtype=like.dtype, device=like.device) if save_inner and gated else None
    )
    rows = _rows(batch, like.dtype, "forward")
    num_parts = _num_parts(channels, triton.cdiv(batch, rows))
    _forward_kernel[(channels, num_parts)](
        projected, parameters, taps, skip, x, residual_taps, residual_skip, out, inner,
        lengths, channels, batch, length, channels * batch * length, num_parts,
        GATED=gated is not None, RESIDUAL=residual is not None, SAVE_INNER=inner is not None,
        PADDED=lengths is not None,
        ROWS=rows, BLOCK=_block(length), PRECISION=dot_precision(like.dtype), num_warps=WARPS["forward"], num_stages=1,
        maxnreg=REGISTERS["forward"],
    )  # fmt: skip
    return out, inner


def backward(
    grad: Tensor,
    gated: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    residual: tuple[Tensor, Tensor, Tensor] | None,
    inner: Tensor | None,
    lengths: Tensor | None = None,
) -> Gradients:
    """Return the gradients, those of operands being the taps'.

    Arguments as in `forward`; `grad` is that of its first result, `inner` its second.
    """
    channels, batch, length = grad.shape
    rows = _rows(batch, grad.dtype, "backward")
    block = _block(length)
    num_parts = _num_parts(channels, triton.cdiv(batch, rows))

    def launch(
        gated: tuple[Tensor, Tensor, Tensor, Tensor] | None, residual: tuple[Tensor, Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        projected, parameters, taps, skip = gated or (None,) * 4
        x, residual_taps, residual_skip = residual or (None,) * 3
        planes = 3 if gated else 1
        out = support.empty(planes * channels, batch, length, dtype=grad.dtype, device=grad.device)
        products = support.empty(channels, num_parts, block, block, dtype=torch.float32, device=grad.device)
        _backward_kernel[(channels, num_parts)](
            projected, parameters, taps, skip, x, residual_taps, residual_skip, inner, grad,
            *((out, None, products, None) if gated else (None, out, None, products)),
            lengths, channels, batch, length, channels * batch * length, num_parts,
            GATED=gated is not None, RESIDUAL=residual is not None, PADDED=lengths is not None,
            ROWS=rows, BLOCK=block, PRECISION=dot_precision(grad.dtype), num_warps=WARPS["backward"], num_stages=1,
            maxnreg=REGISTERS["backward"],
        )  # fmt: skip
        return out, _diagonal_sums(products, length)

    gradients = Gradients()
    # One after the other: together their matrices and sums would leave no room for a second program on a processor.
    if residual is not None:
        x, taps = launch(None, residual)
        gradients = gradients._replace(x=x, residual_operand=taps, residual_skip=taps[:, length - 1].clone())
    if gated is not None:
        short, taps = launch(gated, None)
        gradients = gradients._replace(short=short, operand=taps, skip=taps[:, length - 1].clone())
    return gradients


def _num_parts(channels: int, blocks: int) -> int:
    """Split the batch where there are too few channels to fill a GPU; each part builds the matrices anew."""
    return max(1, min(blocks, 512 // channels))


def _diagonal_sums(products: Tensor, length: int) -> Tensor:
    channels, num_parts, block, _ = products.shape
    out = support.empty(channels, 2 * length - 1, dtype=torch.float32, device=products.device)
    _diagonal_sums_kernel[(channels,)](
        products, out, length, num_parts, BLOCK=block, LAGS=2 * block, STEP=16, num_warps=4
    )
    return out
