"""LayerNorm of a sum: blocks of a block-diagonal product, its bias and a residual, in one kernel each way.

The sum is computed again in the backward pass, in fp32, from the same inputs, which others keep anyway; only each
token's mean and deviation are kept.

Channels-first output is a (width, tokens) buffer, written along tokens: what the next sequence mixer reads. In the
backward pass the gradient may come in either layout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from monarch_mixer.kernels import support
from monarch_mixer.normalization import MAX_KERNEL_WIDTH

# Programs of the backward kernel, each with its own sums of the weights' gradients: four for each processor of an H100
# or H200. A fixed number, so that results do not depend on the device's size.
BACKWARD_PROGRAMS = 528


class Config(NamedTuple):
    """How a kernel is cut into programs."""

    block_t: int  # tokens a tile
    warps: int


def forward_config(width: int, channels_first: bool) -> Config:
    """Return the forward kernel's configuration."""
    block = triton.next_power_of_2(width)
    if channels_first:  # as many tokens as registers allow: that is how far writes are contiguous
        return Config(max(1, min(16, 16384 // block)), 8 if block <= 4096 else 16)
    return _rows_config(block)


def backward_config(width: int, channels_first: bool) -> Config:
    """Return the backward kernel's configuration; `channels_first` is the layout of the gradient that comes in."""
    block = triton.next_power_of_2(width)
    if channels_first:
        return Config(max(1, min(8, 8192 // block)), 4 if block <= 4096 else 16)
    return _rows_config(block)


def _rows_config(block: int) -> Config:
    return Config(max(1, min(16, 4096 // block)), 4 if block <= 4096 else 8)


def block_layer_norm(
    y: Tensor | None,
    bias: Tensor | None,
    x: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    eps: float,
    *,
    channels_first: bool = False,
    dtype: torch.dtype | None = None,
    y_factor: float = 1.0,
) -> Tensor:
    """Return `LayerNorm(y_factor * concat_blocks(y) + bias + x)`; statistics and arithmetic are fp32.

    Args:
        y: (num_blocks, tokens, out_block), or None.
        bias: (width,), or None.
        x: (..., width), any strides, or None where y is given; read in the dtype of y, else in the compute dtype.
        weight: LayerNorm's weight (width,).
        shift: LayerNorm's bias (width,).
        eps: added to the variance.
        channels_first: whether the channels come first in memory: then `result.movedim(-1, 0)` is contiguous.
        dtype: of the result; by default autocast's where it is on, else that of the inputs.
        y_factor: what undoes the scale in which y is stored (see `gated_mlp`). The gradient that y gets is that of the
            product with it, the same as that of x.

    Returns:
        (..., width), shaped as x, or (tokens, width) without x.

    Raises:
        ValueError: neither y nor x is given, sizes do not fit, or the width is over MAX_KERNEL_WIDTH.
    """
    width = weight.shape[0]
    if width > MAX_KERNEL_WIDTH:
        raise ValueError(f"the width is at most {MAX_KERNEL_WIDTH}, got {width}")
    if y is not None and y.shape[0] * y.shape[2] != width:
        raise ValueError(f"expected blocks of {width} features in all, got {tuple(y.shape)}")
    if x is not None:
        shape = tuple(x.shape)
        x = x.to(support.compute_dtype(x) if y is None else y.dtype).reshape(-1, shape[-1])
        if shape[-1] != width or (y is not None and y.shape[1] != x.shape[0]):
            raise ValueError(f"expected {width} features and as many tokens as y has, got {shape}")
        dtype = dtype or support.compute_dtype(x)
    elif y is not None:
        shape = (y.shape[1], width)
        dtype = dtype or support.compute_dtype(y)
    else:
        raise ValueError("give y, x or both")
    out, _, _ = _layer_norm(
        y,
        None if bias is None else bias.float(),
        x,
        weight.float(),
        shift.float(),
        eps,
        channels_first,
        dtype,
        y_factor,
    )
    if channels_first:
        return out.view(width, *shape[:-1]).movedim(0, -1)
    return out.view(shape)


@torch.library.custom_op(
    "monarch_mixer::layer_norm",
    mutates_args=(),
    schema=(
        "(Tensor? y, Tensor? bias, Tensor? x, Tensor weight, Tensor shift, float eps, bool channels_first,"
        " ScalarType dtype, float y_factor) -> (Tensor, Tensor, Tensor)"
    ),
)
def _layer_norm(y, bias, x, weight, shift, eps, channels_first, dtype, y_factor):
    return layer_norm_forward(y, bias, x, weight, shift, eps, channels_first, dtype, y_factor)


@_layer_norm.register_fake
def _(y, bias, x, weight, shift, eps, channels_first, dtype, y_factor):
    tokens, width = _tokens(y, x), weight.shape[0]
    out = weight.new_empty((width, tokens) if channels_first else (tokens, width), dtype=dtype)
    return out, weight.new_empty(tokens), weight.new_empty(tokens)


@torch.library.custom_op(
    "monarch_mixer::layer_norm_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor? y, Tensor? bias, Tensor? x, Tensor weight, Tensor mean, Tensor inverse_deviation,"
        " float y_factor) -> (Tensor, Tensor)"
    ),
)
def _layer_norm_backward(grad, y, bias, x, weight, mean, inverse_deviation, y_factor):
    grad_sum, partial = layer_norm_backward(grad, y, bias, x, weight, mean, inverse_deviation, y_factor)
    return grad_sum, partial.sum(0)


@_layer_norm_backward.register_fake
def _(grad, y, bias, x, weight, mean, inverse_deviation, y_factor):
    source = x if y is None else y
    grad_sum = source.new_empty(_tokens(y, x), weight.shape[0])
    return grad_sum, weight.new_empty(2 if bias is None else 3, weight.shape[0])


def _setup_context(ctx, inputs, output):
    y, bias, x, weight, _, _, channels_first, _, ctx.y_factor = inputs
    _, mean, inverse_deviation = output
    ctx.save_for_backward(y, bias, x, weight, mean, inverse_deviation)
    ctx.channels_first = channels_first


def _backward(ctx, grad, *_):
    y, bias, x, weight, mean, inverse_deviation = ctx.saved_tensors
    grad = grad.t() if ctx.channels_first else grad
    grad_sum, grad_vectors = _layer_norm_backward(grad, y, bias, x, weight, mean, inverse_deviation, ctx.y_factor)
    grad_y = None if y is None else grad_sum.unflatten(1, (y.shape[0], y.shape[2])).transpose(0, 1)
    grad_bias = None if bias is None else grad_vectors[2]
    grad_x = None if x is None else grad_sum
    return grad_y, grad_bias, grad_x, grad_vectors[0], grad_vectors[1], None, None, None, None


_layer_norm.register_autograd(_backward, setup_context=_setup_context)


def layer_norm_forward(
    y: Tensor | None,
    bias: Tensor | None,
    x: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    eps: float,
    channels_first: bool,
    dtype: torch.dtype,
    y_factor: float = 1.0,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, (width, tokens) if `channels_first` else (tokens, width), and each token's statistics.

    Arguments are those of `block_layer_norm`, with x (tokens, width) and the vectors in fp32. The statistics are the
    mean and the inverse of the standard deviation, both (tokens,).
    """
    tokens, width = _tokens(y, x), weight.shape[0]
    device = weight.device
    out = support.empty(*((width, tokens) if channels_first else (tokens, width)), dtype=dtype, device=device)
    mean = support.empty(tokens, dtype=torch.float32, device=device)
    inverse_deviation = support.empty(tokens, dtype=torch.float32, device=device)
    if tokens:
        config = config or forward_config(width, channels_first)
        _forward[(triton.cdiv(tokens, config.block_t),)](
            *_inputs(y, bias, x),
            weight.contiguous(),
            shift.contiguous(),
            out,
            *((1, tokens) if channels_first else (width, 1)),
            mean,
            inverse_deviation,
            tokens,
            eps,
            **_constants(y, y_factor, width, config),
        )
    return out, mean, inverse_deviation


def layer_norm_backward(
    grad: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    x: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    y_factor: float = 1.0,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the sum, and partial sums of those of the vectors.

    Args:
        grad: gradient of the result, (tokens, width), any strides.
        y: as in the forward pass, like `bias`, `x` and `weight`.
        bias: (width,) or None.
        x: (tokens, width) or None.
        weight: (width,).
        mean: (tokens,), from the forward pass, like `inverse_deviation`.
        inverse_deviation: (tokens,).
        y_factor: as in the forward pass.
        config: how the kernel is cut.

    Returns:
        (tokens, width), contiguous; and (programs, 2, width) in fp32, whose sum over the programs is the gradient of
        LayerNorm's weight and bias, or (programs, 3, width), with that of the summed bias.
    """
    tokens, width = grad.shape
    source = x if y is None else y
    assert source is not None
    config = config or backward_config(width, channels_first=abs(grad.stride(0)) < abs(grad.stride(1)))
    tiles = triton.cdiv(tokens, config.block_t)
    tiles_each = max(1, triton.cdiv(tiles, BACKWARD_PROGRAMS))
    programs = triton.cdiv(tiles, tiles_each)
    grad_sum = support.empty(tokens, width, dtype=source.dtype, device=grad.device)
    vectors = 2 if bias is None else 3
    partial = support.empty(programs, vectors, width, dtype=torch.float32, device=grad.device)
    if tokens:
        _backward_kernel[(programs,)](
            *_inputs(y, bias, x),
            weight.contiguous(),
            grad,
            grad.stride(0),
            grad.stride(1),
            mean,
            inverse_deviation,
            grad_sum,
            partial,
            tokens,
            tiles_each,
            **_constants(y, y_factor, width, config),
        )
    return grad_sum, partial


def _tokens(y: Tensor | None, x: Tensor | None) -> int:
    if y is not None:
        return y.shape[1]
    assert x is not None
    return x.shape[0]


def _inputs(y: Tensor | None, bias: Tensor | None, x: Tensor | None) -> tuple:
    y_strides = (0, 0, 0) if y is None else y.stride()
    x_strides = (0, 0) if x is None else x.stride()
    return y, *y_strides, None if bias is None else bias.contiguous(), x, *x_strides


def _constants(y: Tensor | None, y_factor: float, width: int, config: Config) -> dict[str, int | float]:
    return {
        "Y_FACTOR": y_factor,
        "WIDTH": width,
        "OUT_BLOCK": width if y is None else y.shape[2],
        "BLOCK_T": config.block_t,
        "BLOCK_W": triton.next_power_of_2(width),
        "num_warps": config.warps,
    }


@triton.jit
def _load_sum(
    y_ptr,
    y_b,
    y_t,
    y_c,
    bias_ptr,
    x_ptr,
    x_t,
    x_c,
    tokens,
    channels,
    mask,
    Y_FACTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Return the sum that is normalised, (BLOCK_T, BLOCK_W) in fp32, zero outside the mask."""
    total = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
    if y_ptr is not None:
        offsets = (channels // OUT_BLOCK).to(tl.int64) * y_b + channels % OUT_BLOCK * y_c
        y = tl.load(y_ptr + tokens[:, None] * y_t + offsets[None, :], mask=mask, other=0.0).to(tl.float32)
        if Y_FACTOR != 1.0:
            y *= Y_FACTOR
        total += y
    if x_ptr is not None:
        pointers = x_ptr + tokens[:, None] * x_t + channels.to(tl.int64)[None, :] * x_c
        total += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channels, mask=channels < WIDTH, other=0.0)[None, :]
    return total


@triton.jit
def _forward(
    y_ptr,
    y_b,
    y_t,
    y_c,
    bias_ptr,
    x_ptr,
    x_t,
    x_c,
    weight_ptr,
    shift_ptr,
    out_ptr,
    out_t,
    out_c,
    mean_ptr,
    inverse_deviation_ptr,
    num_tokens,
    eps,
    Y_FACTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channels = tl.arange(0, BLOCK_W)
    mask = (tokens < num_tokens)[:, None] & (channels < WIDTH)[None, :]
    total = _load_sum(
        y_ptr, y_b, y_t, y_c, bias_ptr, x_ptr, x_t, x_c, tokens, channels, mask,
        Y_FACTOR, WIDTH, OUT_BLOCK, BLOCK_T, BLOCK_W,
    )  # fmt: skip
    mean = tl.sum(total, 1) / WIDTH
    centred = tl.where(mask, total - mean[:, None], 0.0)
    inverse_deviation = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    tl.store(mean_ptr + tokens, mean, mask=tokens < num_tokens)
    tl.store(inverse_deviation_ptr + tokens, inverse_deviation, mask=tokens < num_tokens)
    weight = tl.load(weight_ptr + channels, mask=channels < WIDTH, other=0.0)
    shift = tl.load(shift_ptr + channels, mask=channels < WIDTH, other=0.0)
    out = centred * inverse_deviation[:, None] * weight[None, :] + shift[None, :]
    pointers = out_ptr + tokens[:, None] * out_t + channels.to(tl.int64)[None, :] * out_c
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles_each"])  # else some batch sizes would compile it again
def _backward_kernel(
    y_ptr,
    y_b,
    y_t,
    y_c,
    bias_ptr,
    x_ptr,
    x_t,
    x_c,
    weight_ptr,
    grad_ptr,
    grad_t,
    grad_c,
    mean_ptr,
    inverse_deviation_ptr,
    grad_sum_ptr,
    partial_ptr,
    num_tokens,
    tiles_each,
    Y_FACTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A program takes `tiles_each` tiles of tokens, one after the other, and adds up the vectors' gradients."""
    program = tl.program_id(0)
    channels = tl.arange(0, BLOCK_W)
    inside = channels < WIDTH
    weight = tl.load(weight_ptr + channels, mask=inside, other=0.0)
    grad_weight = tl.zeros((BLOCK_W,), tl.float32)
    grad_shift = tl.zeros((BLOCK_W,), tl.float32)
    grad_bias = tl.zeros((BLOCK_W,), tl.float32)
    for index in range(tiles_each):
        tile = program.to(tl.int64) * tiles_each + index
        tokens = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (tokens < num_tokens)[:, None] & inside[None, :]
        pointers = grad_ptr + tokens[:, None] * grad_t + channels.to(tl.int64)[None, :] * grad_c
        grad = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        total = _load_sum(
            y_ptr, y_b, y_t, y_c, bias_ptr, x_ptr, x_t, x_c, tokens, channels, mask,
            Y_FACTOR, WIDTH, OUT_BLOCK, BLOCK_T, BLOCK_W,
        )  # fmt: skip
        mean = tl.load(mean_ptr + tokens, mask=tokens < num_tokens, other=0.0)
        inverse_deviation = tl.load(inverse_deviation_ptr + tokens, mask=tokens < num_tokens, other=0.0)
        normalised = tl.where(mask, (total - mean[:, None]) * inverse_deviation[:, None], 0.0)
        weighted = grad * weight[None, :]
        along = tl.sum(weighted * normalised, 1) / WIDTH
        average = tl.sum(weighted, 1) / WIDTH
        grad_sum = (weighted - average[:, None] - normalised * along[:, None]) * inverse_deviation[:, None]
        tl.store(
            grad_sum_ptr + tokens[:, None] * WIDTH + channels[None, :],
            grad_sum.to(grad_sum_ptr.dtype.element_ty),
            mask=mask,
        )
        grad_weight += tl.sum(grad * normalised, 0)
        grad_shift += tl.sum(grad, 0)
        if bias_ptr is not None:
            grad_bias += tl.sum(grad_sum, 0)
    if bias_ptr is not None:
        partials = partial_ptr + program * (3 * WIDTH) + channels
        tl.store(partials + 2 * WIDTH, grad_bias, mask=inside)
    else:
        partials = partial_ptr + program * (2 * WIDTH) + channels
    tl.store(partials, grad_weight, mask=inside)
    tl.store(partials + WIDTH, grad_shift, mask=inside)
