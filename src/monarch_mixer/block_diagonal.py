"""Block-diagonal linear maps: the dense half of a Monarch matrix (one factor, no permutation)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def block_diagonal_multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply by a block-diagonal matrix.

    Args:
        x: input of shape (..., num_blocks * in_block).
        weight: the blocks, of shape (num_blocks, out_block, in_block).

    Returns:
        `concat_j(x_j @ weight[j].T)`, of shape (..., num_blocks * out_block).

    Raises:
        ValueError: the last axis of `x` is not num_blocks * in_block.
    """
    num_blocks, out_block, in_block = weight.shape
    if x.shape[-1] != num_blocks * in_block:
        raise ValueError(f"expected {num_blocks} x {in_block} features, got an input of shape {tuple(x.shape)}")
    blocks = x.reshape(-1, num_blocks, in_block).transpose(0, 1)
    product = torch.bmm(blocks, weight.transpose(1, 2))
    return product.transpose(0, 1).reshape(*x.shape[:-1], num_blocks * out_block)


def block_diagonal_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_features: int, out_features: int
) -> Tensor:
    """Apply a block-diagonal linear map between any two widths.

    Where a width does not divide by the number of blocks the input is padded with zeros, and the surplus outputs are
    dropped.

    Args:
        x: input of shape (..., in_features).
        weight: (num_blocks, ceil(out_features / num_blocks), ceil(in_features / num_blocks)).
        bias: (out_features,) or None.
        in_features: width of the input.
        out_features: width of the output.

    Returns:
        Output of shape (..., out_features).
    """
    if x.shape[-1] != in_features:
        raise ValueError(f"expected {in_features} features, got an input of shape {tuple(x.shape)}")
    surplus = weight.shape[0] * weight.shape[2] - in_features
    y = block_diagonal_multiply(F.pad(x, (0, surplus)) if surplus else x, weight)
    y = y[..., :out_features]
    return y if bias is None else y + bias.to(y.dtype)


class BlockDiagonalLinear(nn.Module):
    """A linear layer whose weight is block-diagonal: `num_blocks` times fewer weights and operations.

    Monarch Mixer's dimension mixer uses two of these, without a permutation between them (paper, section 3.2): in
    M2-BERT the dense projections of the sequence mixer carry features from block to block.
    """

    def __init__(self, in_features: int, out_features: int, num_blocks: int, bias: bool = True) -> None:
        """Make the layer.

        Args:
            in_features: width of the input, padded to a multiple of `num_blocks`.
            out_features: width of the output, cut from a multiple of `num_blocks`.
            num_blocks: blocks on the diagonal.
            bias: whether to add one.

        Raises:
            ValueError: a size is not positive.
        """
        super().__init__()
        if min(in_features, out_features, num_blocks) < 1:
            raise ValueError(f"sizes must be positive, got {in_features=}, {out_features=}, {num_blocks=}")
        self.in_features = in_features
        self.out_features = out_features
        self.num_blocks = num_blocks
        self.weight = nn.Parameter(
            torch.empty(num_blocks, math.ceil(out_features / num_blocks), math.ceil(in_features / num_blocks))
        )
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights uniformly in ±1/sqrt(in_block), and the bias in ±1/sqrt(out_features).

        The bound of the bias uses the output width because the published models' code does.
        """
        bound = 1 / math.sqrt(self.weight.shape[2])
        self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.out_features)
            self.bias.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return block_diagonal_linear(x, self.weight, self.bias, self.in_features, self.out_features)

    def extra_repr(self) -> str:
        """Return the sizes, for printing."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_blocks={self.num_blocks}, "
            f"bias={self.bias is not None}"
        )
