"""The gated MLP's intermediate: gates, values, GELU and dropout in one kernel. See `gated_mlp` for the layouts."""

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
    kept,
    launch_options,
    load_tile,
    normal_cdf,
)
from monarch_mixer.kernels.products import dot

# Wider input blocks do not fit the registers whole.
HOLD_MAX_BLOCK = 192


def forward_config(in_block: int, dtype: torch.dtype) -> Config:
    """Return the kernel's configuration for input blocks of this width."""
    if dtype == torch.float32:
        return Config(64, 64, 32, 4, 2)
    if in_block <= HOLD_MAX_BLOCK:
        return Config(128, 32, 0, 8, 3, splits=2)
    return Config(64, 128, block_k_for(in_block), 4, 2)


def gated_forward(
    x: Tensor, input_weight: Tensor, seed: Tensor | None, dropout: float, config: Config | None = None
) -> Tensor:
    """Return `dropout(gelu(gates) * values)`, (num_blocks, tokens, inner_block), times `stored_share`; no gradient.

    Args:
        x: (tokens, num_blocks * in_block), any strides.
        input_weight: (num_blocks, 2 * inner_block, in_block).
        seed: int64 (1,), what the dropout's mask is a function of; needed where dropout is not 0.
        dropout: probability with which a feature is dropped.
        config: how the kernel is cut; by default `forward_config`.
    """
    num_blocks, wide, in_block = input_weight.shape
    tokens, inner_block, pairs = x.shape[0], wide // 2, num_blocks // 2
    config = config or forward_config(in_block, x.dtype)
    inner = support.empty(num_blocks, tokens, inner_block, dtype=x.dtype, device=x.device)
    if not inner.numel():
        return inner
    options = launch_options(input_weight, dropout, config)
    arguments = (x, input_weight.contiguous(), inner, seed, tokens, x.stride(0), x.stride(1))
    token_tiles, column_tiles = triton.cdiv(tokens, config.block_t), 2 * triton.cdiv(inner_block, config.block_n)
    if config.block_k:
        grid = (token_tiles * pairs * column_tiles,)
        _forward_tiles[grid](*arguments, BLOCK_K=config.block_k, **options)
    else:
        first, second = _pieces(in_block)
        splits = min(config.splits, column_tiles)
        grid = (pairs * splits * token_tiles,)
        _forward_hold_x[grid](*arguments, K1=first, K2=second, SPLITS=splits, **options)
    return inner


def _pieces(in_block: int) -> tuple[int, int]:
    """Return the widths, powers of two, of one or two pieces in which an input block is held."""
    first = max(16, 1 << (in_block.bit_length() - 1))
    return first, 0 if in_block <= first else max(16, triton.next_power_of_2(in_block - first))


@triton.jit
def _forward_tiles(
    x_ptr,
    w_ptr,
    inner_ptr,
    seed_ptr,
    num_tokens,
    x_t,
    x_c,
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
    """One tile of tokens and columns a program. Programs that run together share tokens, and all weights fit in L2."""
    TILES: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    tile = program % (2 * TILES)
    pair = program // (2 * TILES) % PAIRS
    tokens = (program // (2 * TILES * PAIRS)).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tile % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    half = tile // TILES
    gates, values = gates_and_values(
        x_ptr,
        w_ptr,
        tl.minimum(tokens, num_tokens - 1),
        half * INNER + tl.minimum(column, INNER - 1),
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
    block = 2 * pair + half
    _store_inner(
        gates, values, inner_ptr, seed_ptr, tokens, num_tokens, column, block, INNER, GELU, DROP_BELOW, SCALE, STORED
    )


@triton.jit
def _forward_hold_x(
    x_ptr,
    w_ptr,
    inner_ptr,
    seed_ptr,
    num_tokens,
    x_t,
    x_c,
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
    K1: tl.constexpr,
    K2: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A program keeps the inputs of its tokens and walks a part of the columns: half the traffic of tiles.

    Starting a tile's products before the last tile's GELU was tried: ptxas then serialises the products (C7514).
    """
    TILES: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (2 * TILES + SPLITS - 1) // SPLITS
    program = tl.program_id(0)
    split = program % SPLITS
    pair = program // SPLITS % PAIRS
    tokens = (program // (SPLITS * PAIRS)).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    gate_x1, value_x1, gate_x2, value_x2 = _held_x(
        x_ptr, tl.minimum(tokens, num_tokens - 1), pair, x_t, x_c, PAIRS, IN, K1, K2
    )
    lanes = tl.arange(0, BLOCK_N)
    for tile in range(split * STEPS, min((split + 1) * STEPS, 2 * TILES)):
        column = tile % TILES * BLOCK_N + lanes
        columns = tile // TILES * INNER + tl.minimum(column, INNER - 1)
        gates, values = _gates_and_values_of_held(
            gate_x1,
            value_x1,
            gate_x2,
            value_x2,
            w_ptr,
            columns,
            pair,
            PAIRS,
            INNER,
            IN,
            PRECISION,
            BLOCK_T,
            BLOCK_N,
            K1,
            K2,
        )
        block = 2 * pair + tile // TILES
        _store_inner(
            gates,
            values,
            inner_ptr,
            seed_ptr,
            tokens,
            num_tokens,
            column,
            block,
            INNER,
            GELU,
            DROP_BELOW,
            SCALE,
            STORED,
        )


@triton.jit
def _held_x(x_ptr, rows, pair, x_t, x_c, PAIRS: tl.constexpr, IN: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr):
    """Load the pair's two input blocks whole, in pieces of K1 and K2 features; without K2 the first piece twice."""
    gate_x = x_ptr + pair * IN * x_c
    value_x = gate_x + PAIRS * IN * x_c
    k1 = tl.arange(0, K1)
    gate_x1 = load_tile(gate_x, rows, x_t, k1, x_c, IN, K1)
    value_x1 = load_tile(value_x, rows, x_t, k1, x_c, IN, K1)
    if K2 > 0:
        k2 = K1 + tl.arange(0, K2)
        gate_x2 = load_tile(gate_x, rows, x_t, k2, x_c, IN, K2)
        value_x2 = load_tile(value_x, rows, x_t, k2, x_c, IN, K2)
    else:
        gate_x2, value_x2 = gate_x1, value_x1
    return gate_x1, value_x1, gate_x2, value_x2


@triton.jit
def _gates_and_values_of_held(
    gate_x1,
    value_x1,
    gate_x2,
    value_x2,
    w_ptr,
    columns,
    pair,
    PAIRS: tl.constexpr,
    INNER: tl.constexpr,
    IN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
):
    """Return gates and values (BLOCK_T, BLOCK_N) of what `_held_x` loaded."""
    gate_w = w_ptr + pair * (2 * INNER * IN)
    value_w = gate_w + PAIRS * 2 * INNER * IN
    gates = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    values = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if K2 > 0:
        k2 = K1 + tl.arange(0, K2)
        gate_w2 = load_tile(gate_w, columns, IN, k2, 1, IN, K2)
        value_w2 = load_tile(value_w, columns, IN, k2, 1, IN, K2)
        gates = dot(gate_x2, tl.trans(gate_w2), gates, PRECISION)
        values = dot(value_x2, tl.trans(value_w2), values, PRECISION)
    k1 = tl.arange(0, K1)
    gate_w1 = load_tile(gate_w, columns, IN, k1, 1, IN, K1)
    value_w1 = load_tile(value_w, columns, IN, k1, 1, IN, K1)
    gates = dot(gate_x1, tl.trans(gate_w1), gates, PRECISION)
    values = dot(value_x1, tl.trans(value_w1), values, PRECISION)
    return gates, values


@triton.jit
def _store_inner(
    gates,
    values,
    inner_ptr,
    seed_ptr,
    tokens,
    num_tokens,
    column,
    block,
    INNER: tl.constexpr,
    GELU: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    SCALE: tl.constexpr,
    STORED: tl.constexpr,
):
    """Write STORED times `dropout(gelu(gates) * values)` of output block `block`, up to the ends of both axes."""
    inner = gates * normal_cdf(gates, GELU) * values
    rows = block.to(tl.int64) * num_tokens + tokens
    if DROP_BELOW > 0:
        inner = tl.where(kept(seed_ptr, rows, column, DROP_BELOW), inner * SCALE, 0.0)
    if STORED != 1.0:
        inner *= STORED
    mask = (tokens < num_tokens)[:, None] & (column < INNER)[None, :]
    tl.store(inner_ptr + rows[:, None] * INNER + column[None, :], inner.to(inner_ptr.dtype.element_ty), mask=mask)
