"""What the gated MLP's forward and backward kernels share: how they are cut, GELU, dropout, and the two products."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from monarch_mixer.kernels import support
from monarch_mixer.kernels.products import dot

# Cheap GELU for 16-bit dtypes: Phi(x) = sigmoid(x (C0 + C1 s + C2 s^2)), s = min(x^2, LIMIT), where the polynomial is
# still positive, so that far tails stay right. Minimax fit of x Phi(x): the largest absolute error is 2.6e-5, and
# 1.1e-4 in the derivative. bf16 rounds at 2e-3 and fp16 at 2.4e-4 near 1.
GELU_C0 = tl.constexpr(1.59501577)
GELU_C1 = tl.constexpr(0.0740112923)
GELU_C2 = tl.constexpr(-0.000703033605)
GELU_LIMIT = tl.constexpr(49.0)
LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
# The interpreter has no assembly.
INTERPRETING = tl.constexpr(support.interpreting())


class Config(NamedTuple):
    """How a kernel is cut into programs."""

    block_t: int  # tokens a tile
    block_n: int  # columns of the intermediate a tile
    block_k: int  # features of the input a step; 0: input blocks are held whole (forward only)
    warps: int
    stages: int
    splits: int = 1  # where they are held: programs that share the columns of one tile of tokens


def block_k_for(in_block: int) -> int:
    """Return the features a step for 16-bit input blocks of this width."""
    return max(16, min(64, triton.next_power_of_2(in_block)))


def launch_options(input_weight: Tensor, dropout: float, config: Config) -> dict[str, Any]:
    """Return the keyword arguments that every kernel here takes."""
    num_blocks, wide, in_block = input_weight.shape
    dtype = input_weight.dtype
    return {
        "PAIRS": num_blocks // 2,
        "INNER": wide // 2,
        "IN": in_block,
        # bf16 rounds more coarsely than the hardware's tanh; fp16 does not.
        "GELU": {torch.float32: "exact", torch.bfloat16: "tanh"}.get(dtype, "sigmoid"),
        # A feature is kept where 32 random bits reach this.
        "DROP_BELOW": min(round(dropout * 2**32), 2**32 - 1),
        "SCALE": 0.0 if dropout == 1 else 1 / (1 - dropout),
        "STORED": support.stored_share(dtype),
        "PRECISION": support.dot_precision(dtype),
        "BLOCK_T": config.block_t,
        "BLOCK_N": config.block_n,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


@triton.jit
def _mix(bits):
    """Mix 32 bits: the integer hash "lowbias32" of C. Wellons, github.com/skeeto/hash-prospector."""
    bits = bits ^ (bits >> 16)
    bits = bits * 0x7FEB352D
    bits = bits ^ (bits >> 15)
    bits = bits * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def kept(seed_ptr, rows, columns, DROP_BELOW: tl.constexpr):
    """Say which elements dropout keeps: a function of the 64-bit seed, the row (block and token) and the column.

    Two words are drawn for each row; an element then costs one mixing, `_mix` but for its last step, which the upper
    half of the bits does not see. The first step is the row's, since columns have 16 bits. The second word is let in
    half-way, so that two rows with the same first word differ.
    """
    seed = tl.load(seed_ptr)
    first = _mix(rows.to(tl.uint32) ^ (seed & 0xFFFFFFFF).to(tl.uint32))
    second = _mix(first ^ (seed >> 32).to(tl.uint32))
    first = first ^ (first >> 16)
    bits = (first[:, None] ^ columns.to(tl.uint32)[None, :]) * 0x7FEB352D ^ second[:, None]
    bits = bits ^ (bits >> 15)
    return bits * 0x846CA68B >= DROP_BELOW


@triton.jit
def normal_cdf(x, GELU: tl.constexpr):
    """Return Phi(x): "exact", or as a "sigmoid" of a polynomial, or that with the hardware's "tanh" (error 2.5e-4)."""
    if GELU == "exact":
        return 0.5 * (1.0 + tl.math.erf(x * SQRT_HALF))
    else:
        s = tl.minimum(x * x, GELU_LIMIT)
        if GELU == "tanh":
            half = x * (0.5 * GELU_C0 + s * (0.5 * GELU_C1 + s * (0.5 * GELU_C2)))
            return 0.5 + 0.5 * _tanh(half)
        else:
            minus_z = x * (-LOG2_E * GELU_C0 + s * (-LOG2_E * GELU_C1 + s * (-LOG2_E * GELU_C2)))
            return 1.0 / (1.0 + tl.math.exp2(minus_z))


@triton.jit
def _tanh(x):
    if INTERPRETING:
        return 1.0 - 2.0 / (1.0 + tl.math.exp2(2.0 * LOG2_E * x))
    else:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def gelu_slope(x, cdf, GELU: tl.constexpr):
    """Return the derivative of x Phi(x), with Phi(x) given."""
    if GELU == "exact":
        return cdf + x * (INV_SQRT_2PI * tl.math.exp2(-0.5 * LOG2_E * x * x))
    else:
        s = tl.minimum(x * x, GELU_LIMIT)  # beyond it cdf (1 - cdf) is nothing, whatever the polynomial says
        slope = GELU_C0 + s * (3.0 * GELU_C1 + s * (5.0 * GELU_C2))
        return cdf + x * slope * cdf * (1.0 - cdf)


@triton.jit
def load_tile(pointer, rows, row_stride, columns, column_stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows x columns; rows must be inside, columns from COLUMNS on are zeros."""
    pointers = pointer + rows[:, None] * row_stride + columns[None, :] * column_stride
    if COLUMNS % BLOCK == 0:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(columns < COLUMNS)[None, :], other=0.0)


@triton.jit
def gates_and_values(
    x_ptr,
    w_ptr,
    tokens,
    columns,
    pair,
    x_t,
    x_c,
    PAIRS: tl.constexpr,
    INNER: tl.constexpr,
    IN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return gates and values (BLOCK_T, BLOCK_N) of tokens and columns, all inside the tensors, in fp32."""
    gates = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    values = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    gate_x = x_ptr + pair * IN * x_c
    value_x = gate_x + PAIRS * IN * x_c
    gate_w = w_ptr + pair * (2 * INNER * IN)
    value_w = gate_w + PAIRS * 2 * INNER * IN
    for start in range(0, IN, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = load_tile(gate_x, tokens, x_t, k, x_c, IN, BLOCK_K)
        w = load_tile(gate_w, columns, IN, k, 1, IN, BLOCK_K)
        gates = dot(x, tl.trans(w), gates, PRECISION)
        x = load_tile(value_x, tokens, x_t, k, x_c, IN, BLOCK_K)
        w = load_tile(value_w, columns, IN, k, 1, IN, BLOCK_K)
        values = dot(x, tl.trans(w), values, PRECISION)
    return gates, values
