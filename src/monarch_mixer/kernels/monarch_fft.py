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

This module launches the convolutions' kernels: `monarch_fft_one_block` has those of sequences that fit a block,
`monarch_fft_blocks` those of longer ones, `monarch_fft_tiles` what all of them are made of. `monarch_fft_filters`
transforms the filters, and `monarch_fft_tables` says how a transform is factored.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from monarch_mixer.kernels import support
from monarch_mixer.kernels.gates import Gradients
from monarch_mixer.kernels.monarch_fft_blocks import (
    blocks_backward_kernel,
    blocks_forward_kernel,
    blocks_spectrum_gradient_kernel,
    blocks_to_frequency_kernel,
)
from monarch_mixer.kernels.monarch_fft_one_block import backward_kernel, forward_kernel
from monarch_mixer.kernels.monarch_fft_tables import SHAPES, transform_tables
from monarch_mixer.kernels.support import dot_precision

# The batch is split where that makes at most so many programs.
PROGRAMS = {"forward": 1536, "backward": 1536, "blocks": 3072}


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
    tables, twiddle = transform_tables(block, like.dtype, like.device)
    precision = dot_precision(like.dtype)
    out = support.empty(channels, batch, length, dtype=like.dtype, device=like.device)
    inner = (
        support.empty(channels, batch, length, dtype=like.dtype, device=like.device) if save_inner and gated else None
    )
    switches = {"GATED": gated is not None, "RESIDUAL": residual is not None, "SAVE_INNER": inner is not None}
    if num_blocks == 1:
        sequences = min(SHAPES[block].sequences, triton.next_power_of_2(batch))
        num_parts = max(1, min(triton.cdiv(batch, sequences), PROGRAMS["forward"] // channels))
        forward_kernel[(channels, num_parts)](
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
    blocks_forward_kernel[(channels, num_parts)](
        projected, parameters, blocks, filter_spectrum, skip, residual_blocks, residual_spectrum, residual_skip,
        out, inner, tables, twiddle, channels, batch, length, channels * batch * length, num_blocks, num_parts,
        **switches, ROWS=rows, COLUMNS=columns, MASKED=length % block != 0, PRECISION=precision,
        num_warps=SHAPES[block].warps, num_stages=1,
    )  # fmt: skip
    return out, inner


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
        x, spectrum, skip = residual
        of_x, of_spectrum, of_skip = _convolution_backward(grad, spectrum, skip, lengths, x=x)
        gradients = gradients._replace(x=of_x, residual_operand=of_spectrum, residual_skip=of_skip)
    if gated is not None:
        of_short, of_spectrum, of_skip = _convolution_backward(
            grad, gated[2], gated[3], lengths, gated=gated, inner=inner
        )
        gradients = gradients._replace(short=of_short, operand=of_spectrum, skip=of_skip)
    return gradients


def _block_parts(channels: int, items: int) -> int:
    return max(1, min(items, PROGRAMS["blocks"] // channels))


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
    tables, twiddle = transform_tables(block, like.dtype, like.device)
    num_parts = _block_parts(channels, batch * num_blocks)
    out = support.empty(channels, batch, num_blocks, 2, rows, columns, dtype=like.dtype, device=like.device)
    blocks_to_frequency_kernel[(channels, num_parts)](
        projected, parameters, x, x, out, tables, twiddle, lengths, channels, batch, length,
        channels * batch * length, num_blocks, num_parts,
        SOURCE=source, PADDED=lengths is not None, ROWS=rows, COLUMNS=columns, MASKED=length % block != 0,
        PRECISION=dot_precision(like.dtype), num_warps=SHAPES[block].warps, num_stages=1,
    )  # fmt: skip
    return out


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
    tables, twiddle = transform_tables(block, grad.dtype, grad.device)
    precision = dot_precision(grad.dtype)
    planes = 3 if gated else 1
    out = support.empty(planes * channels, batch, length, dtype=grad.dtype, device=grad.device)
    grad_short, grad_input = (out, None) if gated else (None, out)
    if num_blocks == 1:
        sequences = min(SHAPES[block].sequences, triton.next_power_of_2(batch))
        num_parts = max(1, min(triton.cdiv(batch, sequences), PROGRAMS["backward"] // channels))
        grad_spectrum = support.empty(channels, num_parts, 1, 2, rows, columns, dtype=torch.float32, device=grad.device)
        grad_skip = support.empty(channels, num_parts, dtype=torch.float32, device=grad.device)
        backward_kernel[(channels, num_parts)](
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
    blocks_backward_kernel[(channels, num_parts)](
        projected, parameters, grad_blocks, filter_spectrum, skip, x, inner, grad, grad_short, grad_input, grad_skip,
        tables, twiddle, lengths, channels, batch, length, channels * batch * length, num_blocks, num_parts,
        GATED=gated is not None, PADDED=lengths is not None,
        ROWS=rows, COLUMNS=columns, MASKED=length % block != 0, PRECISION=precision,
        num_warps=SHAPES[block].warps, num_stages=1,
    )  # fmt: skip
    grad_spectrum = support.empty(channels, num_distances, 2, rows, columns, dtype=torch.float32, device=grad.device)
    piece = min(1024, block)
    blocks_spectrum_gradient_kernel[(triton.cdiv(block, piece), num_distances, channels)](
        blocks, grad_blocks, grad_spectrum, batch, num_blocks, BLOCK=block, PIECE=piece, num_warps=4
    )
    return out, grad_spectrum, grad_skip.sum(1)
