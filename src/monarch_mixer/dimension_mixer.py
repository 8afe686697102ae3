"""Monarch Mixer's dimension mixer: a (gated) block-diagonal MLP with residual and LayerNorm (paper, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monarch_mixer import cpu
from monarch_mixer.block_diagonal import BlockDiagonalLinear
from monarch_mixer.kernels.support import compute_dtype, kernels_apply, stored_share
from monarch_mixer.normalization import MAX_KERNEL_WIDTH


def gated_block_diagonal_mlp(
    x: Tensor, input_weight: Tensor, output_weight: Tensor, output_bias: Tensor | None, dropout: float, training: bool
) -> Tensor:
    """Block-diagonal GLU, `W_out (gelu(a) * b) + bias` with (a, b) the halves of `W_in x`; where kernels go.

    The halves are cut across the blocks: with an even number of blocks the first half of them makes the gates and the
    second half the values. Activations stay block by block in memory, so that no step copies the wide intermediate.

    Args:
        x: (..., num_blocks * in_block).
        input_weight: (num_blocks, 2 * intermediate / num_blocks, in_block); num_blocks even.
        output_weight: (num_blocks, out_block, intermediate / num_blocks).
        output_bias: (num_blocks * out_block,) or None.
        dropout: probability with which an intermediate feature is dropped, in training.
        training: whether dropout acts.

    Returns:
        (..., num_blocks * out_block).
    """
    num_blocks, _, in_block = input_weight.shape
    _, out_block, inner_block = output_weight.shape
    if cpu.cpu_path_applies(x, input_weight):
        tokens = x.reshape(-1, num_blocks * in_block)
        y = cpu.gated_block_diagonal_mlp(tokens, input_weight, output_weight, dropout if training else 0.0)
        y = y.view(*x.shape[:-1], num_blocks * out_block)
        return y if output_bias is None else y + output_bias
    if kernels_apply(x, compute_dtype(x)):
        from monarch_mixer.kernels.gated_mlp import gated_mlp

        y = gated_mlp(x, input_weight, output_weight, dropout if training else 0.0)
        y = y.transpose(0, 1).reshape(*x.shape[:-1], num_blocks * out_block)
        return y if output_bias is None else y + output_bias.to(y.dtype)
    blocks = x.reshape(-1, num_blocks, in_block).transpose(0, 1)
    wide = torch.bmm(blocks, input_weight.transpose(1, 2))  # (num_blocks, tokens, 2 * inner_block)
    gates, values = wide.chunk(2)
    inner = F.dropout(F.gelu(gates) * values, dropout, training)  # (num_blocks / 2, tokens, 2 * inner_block)
    # Block j of the output sees inner features j * inner_block onward: half j % 2 of row block j // 2.
    pieces = inner.unflatten(-1, (2, inner_block)).movedim(-2, 1).reshape(num_blocks, -1, inner_block)
    y = torch.bmm(pieces, output_weight.transpose(1, 2))
    y = y.transpose(0, 1).reshape(*x.shape[:-1], num_blocks * out_block)
    return y if output_bias is None else y + output_bias.to(y.dtype)


class DimensionMixer(nn.Module):
    """MLP over the features with residual and LayerNorm after it; block-diagonal or dense, gated or not."""

    def __init__(
        self,
        channels: int,
        intermediate: int,
        *,
        num_blocks: int | None = 4,
        gated: bool = True,
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-12,
    ) -> None:
        """Make the mixer.

        Args:
            channels: width of the model.
            intermediate: width between the two maps (of each half, where gated).
            num_blocks: blocks on the diagonal of both maps; None for dense maps.
            gated: whether it is a GLU with an exact GELU on the gates; otherwise a plain GELU MLP.
            dropout: probability with which an intermediate feature is dropped in training.
            layer_norm_eps: added to the variance.
        """
        super().__init__()
        width = 2 * intermediate if gated else intermediate
        if num_blocks is None:
            self.input: nn.Linear | BlockDiagonalLinear = nn.Linear(channels, width, bias=False)
            self.output: nn.Linear | BlockDiagonalLinear = nn.Linear(intermediate, channels)
        else:
            self.input = BlockDiagonalLinear(channels, width, num_blocks, bias=False)
            self.output = BlockDiagonalLinear(intermediate, channels, num_blocks)
        self.norm = nn.LayerNorm(channels, eps=layer_norm_eps)
        self.gated = gated
        self.dropout = dropout
        self.blocks_align = (
            num_blocks is not None and gated and num_blocks % 2 == 0 and channels % num_blocks == 0
        ) and intermediate % num_blocks == 0

    def mlp(self, x: Tensor) -> Tensor:
        """Return the MLP of x (..., channels) alone, without residual and LayerNorm."""
        if self.blocks_align:
            return gated_block_diagonal_mlp(
                x, self.input.weight, self.output.weight, self.output.bias, self.dropout, self.training
            )
        inner = self.input(x)
        if self.gated:
            gates, values = inner.chunk(2, dim=-1)
            inner = F.gelu(gates) * values
        else:
            inner = F.gelu(inner)
        return self.output(F.dropout(inner, self.dropout, self.training))

    def forward(self, x: Tensor, channels_first: bool = False) -> Tensor:
        """Return `LayerNorm(mlp(x) + x)` of x (..., channels).

        The kernels' result has the dtype they compute in, autocast's where it is on.

        Args:
            x: (..., channels), any strides.
            channels_first: a hint that the reader would like the channels first in memory. Where the kernels run,
                `result.movedim(-1, 0)` is then contiguous; elsewhere the hint is ignored.
        """
        if self.blocks_align and x.shape[-1] <= MAX_KERNEL_WIDTH and kernels_apply(x, compute_dtype(x)):
            from monarch_mixer.kernels.gated_mlp import gated_mlp
            from monarch_mixer.kernels.layer_norm import block_layer_norm

            dropout = self.dropout if self.training else 0.0
            y = gated_mlp(x, self.input.weight, self.output.weight, dropout, as_stored=True)
            return block_layer_norm(
                y,
                self.output.bias,
                x,
                self.norm.weight,
                self.norm.bias,
                self.norm.eps,
                channels_first=channels_first,
                y_factor=1 / stored_share(y.dtype),
            )
        return self.norm(self.mlp(x) + x)
