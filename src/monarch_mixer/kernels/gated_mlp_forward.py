"""The gated MLP's intermediate, `dropout(gelu(gates) * values)`. See `gated_mlp` for the layouts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from monarch_mixer.kernels import support
from monarch_mixer.kernels.gated_mlp_elements import (
    arithmetic,
    for_each_element,
    gates_and_values,
    kept,
    normal_cdf,
    place_of,
)
from monarch_mixer.kernels.products import dot

# Wider input blocks do not fit the registers whole.
FUSED_MAX_BLOCK = 192
# How the fused kernel is cut: tokens and columns of a tile, programs that share the columns of one tile of tokens.
FUSED_TOKENS, FUSED_COLUMNS, FUSED_SPLITS = 128, 32, 2


def gated_forward(
    x: Tensor, input_weight: Tensor, seed: Tensor | None, dropout: float, fused: bool | None = None
) -> Tensor:
    """Return `dropout(gelu(gates) * values)`, (num_blocks, tokens, inner_block), times `stored_share`; no gradient.

    Args:
        x: (tokens, num_blocks * in_block), any strides.
        input_weight: (num_blocks, 2 * inner_block, in_block).
        seed: int64 (1,), what the dropout's mask is a function of; needed where dropout is not 0.
        dropout: probability with which a feature is dropped.
        fused: whether one kernel does it, which knows no dropout; by default in half precision, without dropout, for
            input blocks up to FUSED_MAX_BLOCK.
    """
    in_block = input_weight.shape[2]
    if fused is None:
        fused = dropout == 0 and x.dtype != torch.float32 and in_block <= FUSED_MAX_BLOCK
    assert not (fused and dropout), "the fused kernel drops nothing"
    return _fused(x, input_weight) if fused else _in_two_steps(x, input_weight, seed, dropout)


def _in_two_steps(x: Tensor, input_weight: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    num_blocks, wide, _ = input_weight.shape
    inner = support.empty(num_blocks, len(x), wide // 2, dtype=x.dtype, device=x.device)
    if inner.numel():
        for_each_element(_activate_kernel, gates_and_values(x, input_weight), inner, seed, dropout)
    return inner


@triton.jit
def _activate_kernel(
    both_ptr,
    inner_ptr,
    seed_ptr,
    num_tokens,
    PAIRS: tl.constexpr,
    INNER: tl.constexpr,
    GELU: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    SCALE: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows, columns, inside, place, gates_at, to_values = place_of(num_tokens, PAIRS, INNER, BLOCK_T, BLOCK_N)
    gates = tl.load(both_ptr + gates_at, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(both_ptr + to_values + gates_at, mask=inside, other=0.0).to(tl.float32)
    inner = gates * normal_cdf(gates, GELU) * values
    if DROP_BELOW > 0:
        inner = tl.where(kept(seed_ptr, rows, columns, DROP_BELOW), inner * SCALE, 0.0)
    if STORED != 1.0:
        inner *= STORED
    tl.store(inner_ptr + place, inner.to(inner_ptr.dtype.element_ty), mask=inside)


def _fused(x: Tensor, input_weight: Tensor, splits: int = FUSED_SPLITS) -> Tensor:
    num_blocks, wide, in_block = input_weight.shape
    tokens, inner_block, pairs = len(x), wide // 2, num_blocks // 2
    inner = support.empty(num_blocks, tokens, inner_block, dtype=x.dtype, device=x.device)
    if not inner.numel():
        return inner
    first, second = _pieces(in_block)
    splits = min(splits, 2 * triton.cdiv(inner_block, FUSED_COLUMNS))
    _fused_kernel[(pairs * splits * triton.cdiv(tokens, FUSED_TOKENS),)](
        x,
        input_weight.contiguous(),
        inner,
        tokens,
        x.stride(0),
        x.stride(1),
        PAIRS=pairs,
        INNER=inner_block,
        IN=in_block,
        PRECISION=support.dot_precision(x.dtype),
        BLOCK_T=FUSED_TOKENS,
        BLOCK_N=FUSED_COLUMNS,
        K1=first,
        K2=second,
        SPLITS=splits,
        num_warps=8,
        num_stages=3,
        **arithmetic(x.dtype),
    )
    return inner


def _pieces(in_block: int) -> tuple[int, int]:
    """Return the widths, powers of two, of one or two pieces in which an input block is held."""
    first = max(16, 1 << (in_block.bit_length() - 1))
    return first, 0 if in_block <= first else max(16, triton.next_power_of_2(in_block - first))


@triton.jit
def _fused_kernel(
    x_ptr,
    w_ptr,
    inner_ptr,
    num_tokens,
    x_t,
    x_c,
    PAIRS: tl.constexpr,
    INNER: tl.constexpr,
    IN: tl.constexpr,
    GELU: tl.constexpr,
    STORED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A program keeps the inputs of its tokens and walks a part of the columns: gates and values stay on the chip.

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
        inner = gates * normal_cdf(gates, GELU) * values
        if STORED != 1.0:
            inner *= STORED
        rows = (2 * pair + tile // TILES).to(tl.int64) * num_tokens + tokens
        mask = (tokens < num_tokens)[:, None] & (column < INNER)[None, :]
        tl.store(inner_ptr + rows[:, None] * INNER + column[None, :], inner.to(inner_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _held_x(x_ptr, rows, pair, x_t, x_c, PAIRS: tl.constexpr, IN: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr):
    """Load the pair's two input blocks whole, in pieces of K1 and K2 features; without K2 the first piece twice."""
    gate_x = x_ptr + pair * IN * x_c
    value_x = gate_x + PAIRS * IN * x_c
    k1 = tl.arange(0, K1)
    gate_x1 = _load_tile(gate_x, rows, x_t, k1, x_c, IN, K1)
    value_x1 = _load_tile(value_x, rows, x_t, k1, x_c, IN, K1)
    if K2 > 0:
        k2 = K1 + tl.arange(0, K2)
        gate_x2 = _load_tile(gate_x, rows, x_t, k2, x_c, IN, K2)
        value_x2 = _load_tile(value_x, rows, x_t, k2, x_c, IN, K2)
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
        gate_w2 = _load_tile(gate_w, columns, IN, k2, 1, IN, K2)
        value_w2 = _load_tile(value_w, columns, IN, k2, 1, IN, K2)
        gates = dot(gate_x2, tl.trans(gate_w2), gates, PRECISION)
        values = dot(value_x2, tl.trans(value_w2), values, PRECISION)
    k1 = tl.arange(0, K1)
    gate_w1 = _load_tile(gate_w, columns, IN, k1, 1, IN, K1)
    value_w1 = _load_tile(value_w, columns, IN, k1, 1, IN, K1)
    gates = dot(gate_x1, tl.trans(gate_w1), gates, PRECISION)
    values = dot(value_x1, tl.trans(value_w1), values, PRECISION)
    return gates, values


@triton.jit
def _load_tile(pointer, rows, row_stride, columns, column_stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows x columns; rows must be inside, columns from COLUMNS on are zeros."""
    pointers = pointer + rows[:, None] * row_stride + columns[None, :] * column_stride
    if COLUMNS % BLOCK == 0:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(columns < COLUMNS)[None, :], other=0.0)
