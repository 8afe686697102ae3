"""What the gated MLP's forward and backward kernels share: gates and values, a walk over elements, GELU, dropout."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from monarch_mixer.kernels import support

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


def gates_and_values(x: Tensor, input_weight: Tensor) -> Tensor:
    """Return what gates and values are made of: x's blocks times their weights, (num_blocks, tokens, 2 * inner_block).

    Args:
        x: (tokens, num_blocks * in_block), any strides.
        input_weight: (num_blocks, 2 * inner_block, in_block).
    """
    return torch.bmm(x.unflatten(1, (len(input_weight), -1)).transpose(0, 1), input_weight.transpose(1, 2))


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """Return the keyword arguments, of every kernel here, that say how an intermediate of this dtype is made."""
    return {
        # bf16 rounds more coarsely than the hardware's tanh; fp16 does not.
        "GELU": {torch.float32: "exact", torch.bfloat16: "tanh"}.get(dtype, "sigmoid"),
        "STORED": support.stored_share(dtype),
    }


def for_each_element(kernel: Any, both: Tensor, inner: Tensor, seed: Tensor | None, dropout: float) -> None:
    """Start a kernel that works through an intermediate element by element, a program a tile of one output block.

    Args:
        kernel: takes both, inner, seed and tokens, then what `place_of`, GELU and dropout take.
        both: what `gates_and_values` returned.
        inner: the intermediate, (num_blocks, tokens, inner_block), not empty.
        seed: int64 (1,), what the dropout's mask is a function of; needed where dropout is not 0.
        dropout: probability with which a feature is dropped.
    """
    num_blocks, tokens, inner_block = inner.shape
    # A run of each row that loads well, and some rows.
    columns = max(16, min(256, triton.next_power_of_2(inner_block)))
    rows = 1024 // columns
    kernel[(triton.cdiv(tokens, rows) * num_blocks * triton.cdiv(inner_block, columns),)](
        both,
        inner,
        seed,
        tokens,
        PAIRS=num_blocks // 2,
        INNER=inner_block,
        # A feature is kept where 32 random bits reach this.
        DROP_BELOW=min(round(dropout * 2**32), 2**32 - 1),
        SCALE=0.0 if dropout == 1 else 1 / (1 - dropout),
        BLOCK_T=rows,
        BLOCK_N=columns,
        num_warps=4,
        **arithmetic(inner.dtype),
    )


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
def place_of(
    num_tokens, PAIRS: tl.constexpr, INNER: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Return where this program's tile is: in the intermediate, and, of the gates, in `gates_and_values`.

    Returns:
        Rows of the intermediate (blocks and tokens) and columns of a block, for dropout; the mask of what is inside;
        offsets of the intermediate, of the gates, and from those to the values.
    """
    TILES: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    half = program // TILES % 2
    pair = program // (2 * TILES) % PAIRS
    tokens = (program // (2 * TILES * PAIRS)).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = program % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (tokens < num_tokens)[:, None] & (columns < INNER)[None, :]
    rows = (2 * pair + half).to(tl.int64) * num_tokens + tokens
    gates = (pair.to(tl.int64) * num_tokens + tokens)[:, None] * (2 * INNER) + half * INNER + columns[None, :]
    values = tl.cast(num_tokens, tl.int64) * (2 * INNER * PAIRS)
    return rows, columns, inside, rows[:, None] * INNER + columns[None, :], gates, values
