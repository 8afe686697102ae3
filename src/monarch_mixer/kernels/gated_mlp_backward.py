"""The gradients of the gated MLP's gates and values, which are computed again. See `gated_mlp` for the layouts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from monarch_mixer.kernels import support
from monarch_mixer.kernels.gated_mlp_tiles import (
    Config,
    block_k_for,
    gates_and_values,
    gelu_slope,
    kept,
    launch_options,
    normal_cdf,
)


def backward_config(in_block: int, dtype: torch.dtype) -> Config:
    """Return the kernel's configuration for input blocks of this width."""
    return Config(64, 64, 32 if dtype == torch.float32 else block_k_for(in_block), 4, 2)


def gated_backward(
    grad: Tensor, x: Tensor, input_weight: Tensor, output_weight: Tensor, seed: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of gates and values, and the intermediate again.

    Args:
        grad: gradient of the output, (num_blocks, tokens, out_block), any strides.
        x: (tokens, num_blocks * in_block), any strides.
        input_weight: (num_blocks, 2 * inner_block, in_block).
        output_weight: (num_blocks, out_block, inner_block).
        seed: that of the forward pass.
        dropout: that of the forward pass.

    Returns:
        (num_blocks, tokens, 2 * inner_block), by input block: gates' gradients in the first half of the blocks, values'
        in the second; and the intermediate (num_blocks, tokens, inner_block), times `support.stored_share`.
    """
    num_blocks, wide, in_block = input_weight.shape
    tokens, inner_block = x.shape[0], wide // 2
    config = backward_config(in_block, x.dtype)
    grad_wide = support.empty(num_blocks, tokens, wide, dtype=x.dtype, device=x.device)
    # Each program reads the gradient of its part of the intermediate, then puts the intermediate there.
    inner = torch.bmm(grad, output_weight)
    if not inner.numel():
        return grad_wide, inner
    token_tiles, column_tiles = triton.cdiv(tokens, config.block_t), 2 * triton.cdiv(inner_block, config.block_n)
    grid = (token_tiles * (num_blocks // 2) * column_tiles,)
    _backward_tiles[grid](
        x,
        input_weight.contiguous(),
        inner,
        seed,
        tokens,
        x.stride(0),
        x.stride(1),
        grad_wide,
        BLOCK_K=config.block_k,
        **launch_options(input_weight, dropout, config),
    )
    return grad_wide, inner


@triton.jit
def _backward_tiles(
    x_ptr,
    w_ptr,
    inner_ptr,  # the intermediate's gradient, and then the intermediate
    seed_ptr,
    num_tokens,
    x_t,
    x_c,
    grad_wide_ptr,
    PAIRS: tl.constexpr,
    INNER: tl.constexpr,
    IN: tl.constexpr,
    GELU: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    SCALE: tl.constexpr,
    STORED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradients of gates and values of one tile of tokens and columns, and the intermediate itself."""
    TILES: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    tile = program % (2 * TILES)
    pair = program // (2 * TILES) % PAIRS
    tokens = (program // (2 * TILES * PAIRS)).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tile % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    half = tile // TILES
    block = 2 * pair + half
    inside_tokens = tl.minimum(tokens, num_tokens - 1)
    inside_column = tl.minimum(column, INNER - 1)
    gates, values = gates_and_values(
        x_ptr,
        w_ptr,
        inside_tokens,
        half * INNER + inside_column,
        pair,
        x_t,
        x_c,
        PAIRS,
        INNER,
        IN,
        PRECISION,
        BLOCK_T,
        BLOCK_N,
        BLOCK_K,
    )
    rows = block.to(tl.int64) * num_tokens + tokens
    mask = (tokens < num_tokens)[:, None] & (column < INNER)[None, :]
    pointers = inner_ptr + rows[:, None] * INNER + column[None, :]
    grad = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    _store_gradients(
        gates,
        values,
        grad,
        inner_ptr,
        grad_wide_ptr,
        seed_ptr,
        tokens,
        num_tokens,
        column,
        pair,
        half,
        PAIRS,
        INNER,
        GELU,
        DROP_BELOW,
        SCALE,
        STORED,
    )


@triton.jit
def _store_gradients(
    gates,
    values,
    grad,
    inner_ptr,
    grad_wide_ptr,
    seed_ptr,
    tokens,
    num_tokens,
    column,
    pair,
    half,
    PAIRS: tl.constexpr,
    INNER: tl.constexpr,
    GELU: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    SCALE: tl.constexpr,
    STORED: tl.constexpr,
):
    """Write gates' and values' gradients and the intermediate, given its gradient; only what is inside."""
    rows = (2 * pair + half).to(tl.int64) * num_tokens + tokens
    mask = (tokens < num_tokens)[:, None] & (column < INNER)[None, :]
    cdf = normal_cdf(gates, GELU)
    activated = gates * cdf
    inner = activated * values
    if DROP_BELOW > 0:
        keep = kept(seed_ptr, rows, column, DROP_BELOW)
        inner = tl.where(keep, inner * SCALE, 0.0)
        grad = tl.where(keep, grad * SCALE, 0.0)
    if STORED != 1.0:
        inner *= STORED
    dtype = inner_ptr.dtype.element_ty
    tl.store(inner_ptr + rows[:, None] * INNER + column[None, :], inner.to(dtype), mask=mask)
    wide = (pair.to(tl.int64) * num_tokens + tokens)[:, None] * (2 * INNER) + half * INNER + column[None, :]
    tl.store(grad_wide_ptr + wide, (grad * values * gelu_slope(gates, cdf, GELU)).to(dtype), mask=mask)
    wide += tl.cast(num_tokens, tl.int64) * (2 * INNER * PAIRS)
    tl.store(grad_wide_ptr + wide, (grad * activated).to(dtype), mask=mask)
