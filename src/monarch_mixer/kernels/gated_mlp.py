"""The gated block-diagonal MLP: both products of a gate and its value, GELU and dropout in one kernel; its backward.

With nb blocks, output block j takes its gates from input block j // 2 and its values from input block nb / 2 + j // 2,
rows (j % 2) * inner_block onward of each. Blocks 2p and 2p + 1, "pair" p, so share what they read: two input blocks and
all 2 * inner_block rows of the weights there. Programs work on some tokens and some of those columns of a pair.

Layouts are chosen so that every other product is one `torch.bmm` of views. The intermediate is (num_blocks, tokens,
inner_block); the gradients of gates and values together are (num_blocks, tokens, 2 * inner_block), by *input* block.
The backward pass computes gates and values again from x, so that a training step keeps no intermediate.
"""

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


# Pieces of the batch whose weight gradients are summed apart.
TOKEN_PARTS = 16
# Wider input blocks do not fit the registers whole.
HOLD_MAX_BLOCK = 192


class Config(NamedTuple):
    """How a kernel is cut into programs."""

    variant: str  # forward: "tiles", "hold_x" or "hold_w"; backward: "tiles", "fused" or "hold_x"
    block_t: int  # tokens a tile
    block_n: int  # columns of the intermediate a tile
    block_k: int  # features of the input a step ("tiles" and "fused" only)
    warps: int
    stages: int
    # "hold_x": programs that share the columns of one tile of tokens; "hold_w": those that share the tokens of one tile
    # of columns. Others ignore it.
    splits: int = 1
    gelu: str = "sigmoid"  # how 16-bit dtypes compute it: see `_normal_cdf`


def forward_config(in_block: int, dtype: torch.dtype) -> Config:
    """Return the forward kernel's configuration for input blocks of this width."""
    if dtype == torch.float32:
        return Config("tiles", 64, 64, 32, 4, 2)
    if in_block <= HOLD_MAX_BLOCK:
        return Config("hold_x", 128, 32, 16, 8, 3, 2, _gelu(dtype))
    return Config("tiles", 64, 128, _block_k(in_block, 64), 4, 2, gelu=_gelu(dtype))


def backward_config(in_block: int, dtype: torch.dtype) -> Config:
    """Return the backward kernel's configuration for input blocks of this width."""
    if dtype == torch.float32:
        return Config("tiles", 64, 64, 32, 4, 2)
    return Config("tiles", 64, 64, _block_k(in_block, 64), 4, 2, gelu=_gelu(dtype))


def _gelu(dtype: torch.dtype) -> str:
    """bf16 rounds more coarsely than the hardware's tanh; fp16 does not."""
    return "tanh" if dtype == torch.bfloat16 else "sigmoid"


def _block_k(width: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(width)))


def gated_mlp(x: Tensor, input_weight: Tensor, output_weight: Tensor, dropout: float) -> Tensor:
    """Return `W_out (gelu(gates) * values)`, block by block and without bias.

    Computed in autocast's dtype where it is on, else in that of x. Accumulation is fp32.

    Args:
        x: (..., num_blocks * in_block), any strides.
        input_weight: (num_blocks, 2 * inner_block, in_block), num_blocks even.
        output_weight: (num_blocks, out_block, inner_block).
        dropout: probability with which an intermediate feature is dropped; 0 outside training.

    Returns:
        (num_blocks, tokens, out_block): the layout in which the product makes it and `block_layer_norm` reads it.

    Raises:
        ValueError: the sizes do not fit, or dropout is not a probability.
    """
    num_blocks, wide, in_block = input_weight.shape
    if num_blocks % 2 or output_weight.shape[0] != num_blocks or 2 * output_weight.shape[2] != wide:
        raise ValueError(f"weights do not fit: {tuple(input_weight.shape)} and {tuple(output_weight.shape)}")
    if x.shape[-1] != num_blocks * in_block:
        raise ValueError(f"expected {num_blocks} x {in_block} features, got an input of shape {tuple(x.shape)}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
    dtype = support.compute_dtype(x)
    tokens = x.to(dtype).reshape(-1, x.shape[-1])
    # Drawn out here, on the device, so that torch's generator, compilation and checkpointing know of it.
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device) if dropout else None
    return _gated_mlp(tokens, input_weight.to(dtype), output_weight.to(dtype), seed, dropout)


@torch.library.custom_op(
    "monarch_mixer::gated_mlp",
    mutates_args=(),
    schema="(Tensor x, Tensor input_weight, Tensor output_weight, Tensor? seed, float dropout) -> Tensor",
)
def _gated_mlp(x, input_weight, output_weight, seed, dropout):
    inner = gated_forward(x, input_weight, seed, dropout)
    return torch.bmm(inner, output_weight.transpose(1, 2))


@_gated_mlp.register_fake
def _(x, input_weight, output_weight, seed, dropout):
    return x.new_empty(output_weight.shape[0], x.shape[0], output_weight.shape[1])


@torch.library.custom_op(
    "monarch_mixer::gated_mlp_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor x, Tensor input_weight, Tensor output_weight, Tensor? seed, float dropout)"
        " -> (Tensor, Tensor, Tensor)"
    ),
)
def _gated_mlp_backward(grad, x, input_weight, output_weight, seed, dropout):
    num_blocks, _, in_block = input_weight.shape
    grad_wide, inner = gated_backward(grad, x, input_weight, output_weight, seed, dropout)
    grad_output_weight = torch.bmm(grad.transpose(1, 2), inner)
    grad_input_weight = _input_weight_gradient(grad_wide, x)
    grad_x = support.empty(x.shape[0], num_blocks, in_block, dtype=x.dtype, device=x.device)
    torch.bmm(grad_wide, input_weight, out=grad_x.transpose(0, 1))
    return grad_x.flatten(1), grad_input_weight, grad_output_weight


def _input_weight_gradient(grad_wide: Tensor, x: Tensor) -> Tensor:
    """Return the sum over the tokens of grad_wide (num_blocks, tokens, wide) times x, (num_blocks, wide, in_block).

    So few, so long sums would leave most of a GPU idle: many tokens are summed in parts first.
    """
    num_blocks, tokens = grad_wide.shape[:2]
    blocks = x.unflatten(1, (num_blocks, -1))
    if tokens < 1024 * TOKEN_PARTS or tokens % TOKEN_PARTS:
        return torch.bmm(grad_wide.transpose(1, 2), blocks.transpose(0, 1))
    shape = (TOKEN_PARTS, tokens // TOKEN_PARTS)
    sums = [
        torch.bmm(grad.unflatten(0, shape).transpose(1, 2), blocks[:, block].unflatten(0, shape)).sum(0)
        for block, grad in enumerate(grad_wide)
    ]
    return torch.stack(sums)


@_gated_mlp_backward.register_fake
def _(grad, x, input_weight, output_weight, seed, dropout):
    return (
        x.new_empty(x.shape),
        input_weight.new_empty(input_weight.shape),
        output_weight.new_empty(output_weight.shape),
    )


def _setup_context(ctx, inputs, output):
    x, input_weight, output_weight, seed, dropout = inputs
    ctx.save_for_backward(x, input_weight, output_weight, seed)
    ctx.dropout = dropout


def _backward(ctx, grad):
    x, input_weight, output_weight, seed = ctx.saved_tensors
    gradients = _gated_mlp_backward(grad, x, input_weight, output_weight, seed, ctx.dropout)
    return *gradients, None, None


_gated_mlp.register_autograd(_backward, setup_context=_setup_context)


def gated_forward(
    x: Tensor, input_weight: Tensor, seed: Tensor | None, dropout: float, config: Config | None = None
) -> Tensor:
    """Return `dropout(gelu(gates) * values)`, (num_blocks, tokens, inner_block), without a gradient.

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
    common: dict[str, Any] = {
        **_constants(x.dtype, input_weight, dropout, config),
        "BLOCK_T": config.block_t,
        "BLOCK_N": config.block_n,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    arguments = (x, input_weight.contiguous(), inner, seed, tokens, x.stride(0), x.stride(1))
    token_tiles, column_tiles = triton.cdiv(tokens, config.block_t), 2 * triton.cdiv(inner_block, config.block_n)
    if config.variant == "tiles":
        grid = (token_tiles * pairs * column_tiles,)
        _forward_tiles[grid](*arguments, BLOCK_K=config.block_k, **common)
    else:
        first, second = _pieces(in_block)
        holds_x = config.variant == "hold_x"
        splits = min(config.splits, column_tiles if holds_x else token_tiles)
        grid = (pairs * splits * (token_tiles if holds_x else column_tiles),)
        kernel = _forward_hold_x if holds_x else _forward_hold_w
        kernel[grid](*arguments, K1=first, K2=second, SPLITS=splits, **common)
    return inner


def gated_backward(
    grad: Tensor,
    x: Tensor,
    input_weight: Tensor,
    output_weight: Tensor,
    seed: Tensor | None,
    dropout: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of gates and values, and the intermediate again.

    Args:
        grad: gradient of the output, (num_blocks, tokens, out_block), any strides.
        x: as in `gated_forward`, like `input_weight`, `seed` and `dropout`.
        input_weight: (num_blocks, 2 * inner_block, in_block).
        output_weight: (num_blocks, out_block, inner_block).
        seed: that of the forward pass.
        dropout: that of the forward pass.
        config: how the kernel is cut; by default `backward_config`. In the variant "fused" it also computes the
            intermediate's gradient, which the others read from a product before it.

    Returns:
        (num_blocks, tokens, 2 * inner_block), by input block: gates' gradients in the first half of the blocks, values'
        in the second; and the intermediate (num_blocks, tokens, inner_block).
    """
    num_blocks, wide, in_block = input_weight.shape
    tokens, inner_block = x.shape[0], wide // 2
    config = config or backward_config(in_block, x.dtype)
    fused = config.variant == "fused"
    grad_wide = support.empty(num_blocks, tokens, wide, dtype=x.dtype, device=x.device)
    # Each program reads the gradient of its part of the intermediate, then puts the intermediate there.
    if fused:
        inner = support.empty(num_blocks, tokens, inner_block, dtype=x.dtype, device=x.device)
    else:
        inner = torch.bmm(grad, output_weight)
    if not inner.numel():
        return grad_wide, inner
    common: dict[str, Any] = {
        **_constants(x.dtype, input_weight, dropout, config),
        "BLOCK_T": config.block_t,
        "BLOCK_N": config.block_n,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    arguments = (x, input_weight.contiguous(), inner, seed, tokens, x.stride(0), x.stride(1))
    token_tiles, column_tiles = triton.cdiv(tokens, config.block_t), 2 * triton.cdiv(inner_block, config.block_n)
    pairs = num_blocks // 2
    if config.variant == "hold_x":
        first, second = _pieces(in_block)
        splits = min(config.splits, column_tiles)
        grid = (pairs * splits * token_tiles,)
        _backward_hold_x[grid](*arguments, grad_wide, K1=first, K2=second, SPLITS=splits, **common)
    else:
        grid = (token_tiles * pairs * column_tiles,)
        _backward_tiles[grid](
            *arguments,
            grad,
            *grad.stride(),
            output_weight.contiguous(),
            grad_wide,
            OUT=output_weight.shape[1],
            FUSED=fused,
            BLOCK_K=config.block_k,
            **common,
        )
    return grad_wide, inner


def _pieces(in_block: int) -> tuple[int, int]:
    """Return the widths, powers of two, of one or two pieces in which an input block is held."""
    first = max(16, 1 << (in_block.bit_length() - 1))
    return first, 0 if in_block <= first else max(16, triton.next_power_of_2(in_block - first))


def _constants(dtype: torch.dtype, input_weight: Tensor, dropout: float, config: Config) -> dict[str, Any]:
    num_blocks, wide, in_block = input_weight.shape
    return {
        "PAIRS": num_blocks // 2,
        "INNER": wide // 2,
        "IN": in_block,
        "GELU": "exact" if dtype == torch.float32 else config.gelu,
        # A feature is kept where 32 random bits reach this.
        "DROP_BELOW": min(round(dropout * 2**32), 2**32 - 1),
        "SCALE": 0.0 if dropout == 1 else 1 / (1 - dropout),
        "PRECISION": support.dot_precision(dtype),
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
def _keep(seed_ptr, rows, columns, DROP_BELOW: tl.constexpr):
    """Say which elements dropout keeps: a function of the 64-bit seed, the row (block and token) and the column.

    Two words are drawn for each row; an element then costs one mixing, with the second word let in half-way, so that
    two rows with the same first word differ.
    """
    seed = tl.load(seed_ptr)
    first = _mix(rows.to(tl.uint32) ^ (seed & 0xFFFFFFFF).to(tl.uint32))
    second = _mix(first ^ (seed >> 32).to(tl.uint32))
    bits = first[:, None] ^ columns.to(tl.uint32)[None, :]
    bits = bits ^ (bits >> 16)
    bits = bits * 0x7FEB352D ^ second[:, None]
    bits = bits ^ (bits >> 15)
    bits = bits * 0x846CA68B
    bits = bits ^ (bits >> 16)
    return bits >= DROP_BELOW


@triton.jit
def _normal_cdf(x, GELU: tl.constexpr):
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
def _gelu_slope(x, cdf, GELU: tl.constexpr):
    """Return the derivative of x Phi(x), with Phi(x) given."""
    if GELU == "exact":
        return cdf + x * (INV_SQRT_2PI * tl.math.exp2(-0.5 * LOG2_E * x * x))
    else:
        s = tl.minimum(x * x, GELU_LIMIT)  # beyond it cdf (1 - cdf) is nothing, whatever the polynomial says
        slope = GELU_C0 + s * (3.0 * GELU_C1 + s * (5.0 * GELU_C2))
        return cdf + x * slope * cdf * (1.0 - cdf)


@triton.jit
def _load_tile(pointer, rows, row_stride, columns, column_stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows x columns; rows must be inside, columns from COLUMNS on are zeros."""
    pointers = pointer + rows[:, None] * row_stride + columns[None, :] * column_stride
    if COLUMNS % BLOCK == 0:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(columns < COLUMNS)[None, :], other=0.0)


@triton.jit
def _gates_and_values(
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
        x = _load_tile(gate_x, tokens, x_t, k, x_c, IN, BLOCK_K)
        w = _load_tile(gate_w, columns, IN, k, 1, IN, BLOCK_K)
        gates = dot(x, tl.trans(w), gates, PRECISION)
        x = _load_tile(value_x, tokens, x_t, k, x_c, IN, BLOCK_K)
        w = _load_tile(value_w, columns, IN, k, 1, IN, BLOCK_K)
        values = dot(x, tl.trans(w), values, PRECISION)
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
):
    """Write `dropout(gelu(gates) * values)` of output block `block`; tokens and columns may be beyond the ends."""
    inner = gates * _normal_cdf(gates, GELU) * values
    rows = block.to(tl.int64) * num_tokens + tokens
    if DROP_BELOW > 0:
        inner = tl.where(_keep(seed_ptr, rows, column, DROP_BELOW), inner * SCALE, 0.0)
    mask = (tokens < num_tokens)[:, None] & (column < INNER)[None, :]
    tl.store(inner_ptr + rows[:, None] * INNER + column[None, :], inner.to(inner_ptr.dtype.element_ty), mask=mask)


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
    gates, values = _gates_and_values(
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
    _store_inner(gates, values, inner_ptr, seed_ptr, tokens, num_tokens, column, block, INNER, GELU, DROP_BELOW, SCALE)


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
            gates, values, inner_ptr, seed_ptr, tokens, num_tokens, column, block, INNER, GELU, DROP_BELOW, SCALE
        )


@triton.jit
def _forward_hold_w(
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
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A program keeps the weights of its columns and walks every SPLITS-th tile of tokens."""
    TILES: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    tile = program % (2 * TILES)
    pair = program // (2 * TILES) % PAIRS
    split = program // (2 * TILES * PAIRS)
    half = tile // TILES
    column = tile % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = half * INNER + tl.minimum(column, INNER - 1)
    k1 = tl.arange(0, K1)
    gate_x = x_ptr + pair * IN * x_c
    value_x = gate_x + PAIRS * IN * x_c
    gate_w = w_ptr + pair * (2 * INNER * IN)
    value_w = gate_w + PAIRS * 2 * INNER * IN
    gate_w1 = _load_tile(gate_w, columns, IN, k1, 1, IN, K1)
    value_w1 = _load_tile(value_w, columns, IN, k1, 1, IN, K1)
    if K2 > 0:
        k2 = K1 + tl.arange(0, K2)
        gate_w2 = _load_tile(gate_w, columns, IN, k2, 1, IN, K2)
        value_w2 = _load_tile(value_w, columns, IN, k2, 1, IN, K2)
    for token_tile in range(split, tl.cdiv(num_tokens, BLOCK_T), SPLITS):
        tokens = tl.cast(token_tile, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        rows = tl.minimum(tokens, num_tokens - 1)
        gate_x1 = _load_tile(gate_x, rows, x_t, k1, x_c, IN, K1)
        value_x1 = _load_tile(value_x, rows, x_t, k1, x_c, IN, K1)
        gates = dot(gate_x1, tl.trans(gate_w1), tl.zeros((BLOCK_T, BLOCK_N), tl.float32), PRECISION)
        values = dot(value_x1, tl.trans(value_w1), tl.zeros((BLOCK_T, BLOCK_N), tl.float32), PRECISION)
        if K2 > 0:
            gate_x2 = _load_tile(gate_x, rows, x_t, k2, x_c, IN, K2)
            value_x2 = _load_tile(value_x, rows, x_t, k2, x_c, IN, K2)
            gates = dot(gate_x2, tl.trans(gate_w2), gates, PRECISION)
            values = dot(value_x2, tl.trans(value_w2), values, PRECISION)
        block = 2 * pair + half
        _store_inner(
            gates, values, inner_ptr, seed_ptr, tokens, num_tokens, column, block, INNER, GELU, DROP_BELOW, SCALE
        )


@triton.jit
def _backward_tiles(
    x_ptr,
    w_ptr,
    inner_ptr,  # without FUSED: the intermediate's gradient, and then the intermediate
    seed_ptr,
    num_tokens,
    x_t,
    x_c,
    grad_ptr,
    grad_b,
    grad_t,
    grad_c,
    out_w_ptr,
    grad_wide_ptr,
    PAIRS: tl.constexpr,
    INNER: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    GELU: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    FUSED: tl.constexpr,
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
    gates, values = _gates_and_values(
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
    if FUSED:
        grad = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for start in range(0, OUT, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            dy = _load_tile(grad_ptr + block * grad_b, inside_tokens, grad_t, k, grad_c, OUT, BLOCK_K)
            # Rows beyond the end meet zeros in dy; they are read inside so that they are numbers.
            w = tl.load(
                out_w_ptr + block * OUT * INNER + tl.minimum(k, OUT - 1)[:, None] * INNER + inside_column[None, :]
            )
            grad = dot(dy, w, grad, PRECISION)
    else:
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
    )


@triton.jit
def _backward_hold_x(
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
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """What `_backward_tiles` does, in the manner of `_forward_hold_x`."""
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
        rows = (2 * pair + tile // TILES).to(tl.int64) * num_tokens + tokens
        mask = (tokens < num_tokens)[:, None] & (column < INNER)[None, :]
        grad = tl.load(inner_ptr + rows[:, None] * INNER + column[None, :], mask=mask, other=0.0)
        gates, values = _gates_and_values_of_held(
            gate_x1,
            value_x1,
            gate_x2,
            value_x2,
            w_ptr,
            tile // TILES * INNER + tl.minimum(column, INNER - 1),
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
        _store_gradients(
            gates,
            values,
            grad.to(tl.float32),
            inner_ptr,
            grad_wide_ptr,
            seed_ptr,
            tokens,
            num_tokens,
            column,
            pair,
            tile // TILES,
            PAIRS,
            INNER,
            GELU,
            DROP_BELOW,
            SCALE,
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
):
    """Write gates' and values' gradients and the intermediate, given its gradient; only what is inside."""
    rows = (2 * pair + half).to(tl.int64) * num_tokens + tokens
    mask = (tokens < num_tokens)[:, None] & (column < INNER)[None, :]
    cdf = _normal_cdf(gates, GELU)
    activated = gates * cdf
    inner = activated * values
    if DROP_BELOW > 0:
        keep = _keep(seed_ptr, rows, column, DROP_BELOW)
        inner = tl.where(keep, inner * SCALE, 0.0)
        grad = tl.where(keep, grad * SCALE, 0.0)
    dtype = inner_ptr.dtype.element_ty
    tl.store(inner_ptr + rows[:, None] * INNER + column[None, :], inner.to(dtype), mask=mask)
    wide = (pair.to(tl.int64) * num_tokens + tokens)[:, None] * (2 * INNER) + half * INNER + column[None, :]
    tl.store(grad_wide_ptr + wide, (grad * values * _gelu_slope(gates, cdf, GELU)).to(dtype), mask=mask)
    wide += tl.cast(num_tokens, tl.int64) * (2 * INNER * PAIRS)
    tl.store(grad_wide_ptr + wide, (grad * activated).to(dtype), mask=mask)
