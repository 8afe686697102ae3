"""Plain, slow, obvious versions that every fast path is tested against.

They build the matrices they stand for, run in the dtype of their inputs (use fp64 in tests) and have no dispatch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def toeplitz_matrix(forward_taps: Tensor, backward_taps: Tensor | None, length: int) -> Tensor:
    """Return the matrices T of a long convolution, of shape (channels, length, length): y_t = sum_s T[t, s] x_s.

    Args:
        forward_taps: (at least length, channels); row j multiplies the input j steps before.
        backward_taps: (at least length, channels) or None; row j multiplies the input j + 1 steps after.
        length: length of the sequence.
    """
    position = torch.arange(length, device=forward_taps.device)
    lag = position[:, None] - position[None, :]
    matrix = forward_taps[lag.clamp(min=0)] * (lag >= 0)[..., None]
    if backward_taps is not None:
        matrix = matrix + backward_taps[(-lag - 1).clamp(min=0)] * (lag < 0)[..., None]
    return matrix.permute(2, 0, 1)


def long_convolution(x: Tensor, forward_taps: Tensor, backward_taps: Tensor | None, skip: Tensor) -> Tensor:
    """Long convolution by its Toeplitz matrices; shapes as in `monarch_mixer.long_convolution`."""
    matrix = toeplitz_matrix(forward_taps, backward_taps, x.shape[1])
    return torch.einsum("cts,bsc->btc", matrix, x) + skip * x


def short_convolution(x: Tensor, weight: Tensor, bias: Tensor, ahead: int = 0) -> Tensor:
    """Short depthwise convolution, tap by tap; arguments as in `monarch_mixer.short_convolution`."""
    y = bias.expand_as(x)
    taps = weight.shape[-1]
    for tap in range(taps):
        delay = taps - 1 - tap - ahead
        shifted = torch.zeros_like(x)
        if delay >= 0:
            shifted[:, delay:] = x[:, : x.shape[1] - delay]
        else:
            shifted[:, :delay] = x[:, -delay:]
        y = y + weight[:, 0, tap] * shifted
    return y


def block_diagonal_matrix(weight: Tensor) -> Tensor:
    """Return the dense matrix of the blocks (num_blocks, out_block, in_block)."""
    return torch.block_diag(*weight)
