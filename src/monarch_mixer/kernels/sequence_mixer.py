"""The sequence mixer between its two linear maps as PyTorch operators, with gradients, on channels-first memory.

A filter reaches the kernels as an *operand*: its taps where sequences are short, their transform where they are long.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from monarch_mixer.filters import evaluation_dtype, two_sided_taps
from monarch_mixer.kernels import monarch_fft, toeplitz
from monarch_mixer.kernels.gates import short_convolution_backward, transpose
from monarch_mixer.kernels.monarch_fft_filters import spectrum, taps_gradient
from monarch_mixer.kernels.monarch_fft_tables import SHAPES, block_for
from monarch_mixer.kernels.support import outside_graphs

TOEPLITZ = 0  # in the place of a block


def method_for(length: int, dtype: torch.dtype) -> int:
    """Return how sequences of a length are convolved: TOEPLITZ, or the block of a transform."""
    return TOEPLITZ if length <= toeplitz.MAX_LENGTH[dtype] else block_for(length, dtype)


def operand(taps: Tensor, dtype: torch.dtype, method: int | None = None) -> Tensor:
    """Return what the kernels multiply by, from two-sided taps (channels, 2 * length - 1); differentiable.

    Args:
        taps: in fp32, from the most negative lag up.
        dtype: the dtype the convolution will run in.
        method: see `method_for`, the default.
    """
    if method is None:
        method = method_for((taps.shape[1] + 1) // 2, dtype)
    return taps.contiguous() if method == TOEPLITZ else _spectrum(taps.contiguous(), method, dtype == torch.float32)


# Exact: to fp32 rather than tf32, which is what a convolution in half precision is worth.
@torch.library.custom_op("monarch_mixer::spectrum", mutates_args=())
def _spectrum(taps: Tensor, block: int, exact: bool) -> Tensor:
    return spectrum(taps, block, torch.float32 if exact else torch.bfloat16)


@_spectrum.register_fake
def _(taps: Tensor, block: int, exact: bool) -> Tensor:
    channels, lags = taps.shape
    distances = 2 * (-(-(lags + 1) // (2 * block))) - 1
    return taps.new_empty(channels, distances, 2, *SHAPES[block][:2])


@torch.library.custom_op("monarch_mixer::taps_gradient", mutates_args=())
def _taps_gradient(grad: Tensor, length: int, exact: bool) -> Tensor:
    return taps_gradient(grad.contiguous(), length, torch.float32 if exact else torch.bfloat16)


@_taps_gradient.register_fake
def _(grad: Tensor, length: int, exact: bool) -> Tensor:
    return grad.new_empty(grad.shape[0], 2 * length - 1)


def _save_spectrum(ctx: Any, inputs: tuple, output: Tensor) -> None:
    taps, _, ctx.exact = inputs
    ctx.length = (taps.shape[1] + 1) // 2


def _spectrum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _taps_gradient(grad, ctx.length, ctx.exact), None, None


_spectrum.register_autograd(_spectrum_backward, setup_context=_save_spectrum)


def channels_first(x: Tensor) -> Tensor:
    """Return x (batch, length, channels) as contiguous (channels, batch, length); copied unless its memory is that."""
    permuted = x.permute(2, 0, 1)
    if permuted.is_contiguous():
        return permuted
    return _transpose(x.reshape(-1, x.shape[2])).view(permuted.shape)


@torch.library.custom_op("monarch_mixer::transpose", mutates_args=())
def _transpose(x: Tensor) -> Tensor:
    return transpose(x.contiguous())


@_transpose.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], x.shape[0])


_transpose.register_autograd(lambda ctx, grad: _transpose(grad))


def mix(
    projected: Tensor | None,
    parameters: Tensor | None,
    gated_filter: tuple[Tensor, Tensor] | None,
    x: Tensor | None,
    residual_filter: tuple[Tensor, Tensor] | None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Return `after * convolution(before * value) + residual convolution(x)`, (channels, batch, length); see below.

    Args:
        projected: (3 * channels, batch, length), the linear map's output without its bias; its short convolution gives
            before, after and value. None for no gated part.
        parameters: (3 * channels, 5) in fp32: taps and bias of the short convolution, bias of the linear map.
        gated_filter: operand (see `operand`) and skip weights (channels,) in fp32.
        x: (channels, batch, length) in the dtype of `projected`; None for no residual part.
        residual_filter: as `gated_filter`.
        lengths: (batch,) int32, the real positions of each sequence. What follows them is padding: `before * value` and
            `x` count as zeros there, so that outputs at real positions do not see it. None: there is no padding.
    """
    gated = (projected, parameters, *gated_filter) if gated_filter is not None else (None,) * 4
    residual = (x, *residual_filter) if residual_filter is not None else (None,) * 3
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*gated, *residual))
    return _mix(*gated, *residual, lengths, needs_grad)[0]


@torch.library.custom_op("monarch_mixer::mix", mutates_args=())
def _mix(
    projected: Tensor | None,
    parameters: Tensor | None,
    gated_operand: Tensor | None,
    skip: Tensor | None,
    x: Tensor | None,
    residual_operand: Tensor | None,
    residual_skip: Tensor | None,
    lengths: Tensor | None,
    save_inner: bool,
) -> tuple[Tensor, Tensor]:
    gated, residual, kernels = _arguments(
        projected, parameters, gated_operand, skip, x, residual_operand, residual_skip
    )
    out, inner = kernels.forward(gated, residual, save_inner, lengths)
    return out, out.new_empty(0) if inner is None else inner


@_mix.register_fake
def _(projected, parameters, gated_operand, skip, x, residual_operand, residual_skip, lengths, save_inner):
    like = projected if x is None else x
    channels = (residual_operand if gated_operand is None else gated_operand).shape[0]
    out = like.new_empty(channels, *like.shape[1:])
    return out, like.new_empty(out.shape if save_inner and projected is not None else (0,))


@torch.library.custom_op("monarch_mixer::mix_backward", mutates_args=())
def _mix_backward(
    grad: Tensor,
    inner: Tensor,
    projected: Tensor | None,
    parameters: Tensor | None,
    gated_operand: Tensor | None,
    skip: Tensor | None,
    x: Tensor | None,
    residual_operand: Tensor | None,
    residual_skip: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gated, residual, kernels = _arguments(
        projected, parameters, gated_operand, skip, x, residual_operand, residual_skip
    )
    got = kernels.backward(grad.contiguous(), gated, residual, inner, lengths)
    of_gated: tuple[Tensor | None, ...] = (None,) * 4
    if gated is not None:
        of_gated = (*short_convolution_backward(got.short, gated[0], gated[1]), got.operand, got.skip)
    gradients = (*of_gated, got.x, got.residual_operand, got.residual_skip)
    return tuple(grad.new_empty(0) if g is None else g for g in gradients)  # type: ignore[return-value]


@_mix_backward.register_fake
def _(grad, inner, *inputs):
    return tuple(grad.new_empty(0) if t is None else torch.empty_like(t) for t in inputs[:-1])  # none of the lengths


def _save_mix(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:-1])
    ctx.mark_non_differentiable(output[1])


def _backward_of_mix(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    inner, *inputs, lengths = ctx.saved_tensors
    grads = _mix_backward(grad, inner, *inputs, lengths)
    return (*(None if t is None else g for t, g in zip(inputs, grads, strict=True)), None, None)


_mix.register_autograd(_backward_of_mix, setup_context=_save_mix)


def _arguments(
    projected: Tensor | None,
    parameters: Tensor | None,
    gated_operand: Tensor | None,
    skip: Tensor | None,
    x: Tensor | None,
    residual_operand: Tensor | None,
    residual_skip: Tensor | None,
) -> tuple[Any, Any, Any]:
    """Group the tensors as the kernels take them, and say which kernels those are."""
    gated = None
    if projected is not None:
        gated = (projected.contiguous(), parameters, gated_operand, skip)
    residual = None if x is None else (x.contiguous(), residual_operand, residual_skip)
    either = residual_operand if gated_operand is None else gated_operand
    assert either is not None
    return gated, residual, toeplitz if either.ndim == 2 else monarch_fft


# --- evaluation: operands are made once, until a weight changes

# Lengths that alternate (documents of many lengths, by blocks of the transform) each keep their operands.
MAX_KEPT_OPERANDS = 4


class _Kept:
    """What is kept of one filter: operands of its present weights by length, and those that CUDA graphs read."""

    def __init__(self) -> None:
        self.weights: object = None
        self.operands: OrderedDict[object, Tensor] = OrderedDict()
        self.captured: list[Tensor] = []


# By the first tensor of a filter. Weak: a model takes its entries along.
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def mix_cached(
    projected: Tensor,
    parameters: Tensor,
    gated_filter: tuple[Sequence[Tensor], Tensor],
    x: Tensor,
    residual_filter: tuple[Sequence[Tensor], Tensor] | None,
    frequency_scale: float,
    lengths: Tensor | None = None,
) -> Tensor:
    """Do what `mix` does, without gradients, from the filters' tensors: operands are kept until one of them changes.

    In a CUDA graph (`torch.compile(mode="reduce-overhead")`, or one captured by hand after a call outside it) every
    replay makes the operands anew where a weight requires a gradient; the weights of a model without gradients
    (`model.requires_grad_(False)`) are constants of the graph, as its operands then are.

    Args:
        projected: as in `mix`.
        parameters: as in `mix`.
        x: as in `mix`.
        gated_filter: the tensors (see `monarch_mixer.filters.two_sided_taps`) and the skip weights.
        residual_filter: the same, or None.
        frequency_scale: of the filters.
        lengths: as in `mix`.
    """
    tensors, residual_skip = residual_filter if residual_filter is not None else ([], None)
    gated_tensors, skip = gated_filter
    return _mix_cached(
        projected, parameters, list(gated_tensors), skip, x, list(tensors), residual_skip, frequency_scale, lengths
    )


@torch.library.custom_op("monarch_mixer::mix_cached", mutates_args=())
def _mix_cached(
    projected: Tensor,
    parameters: Tensor,
    gated_tensors: Sequence[Tensor],
    skip: Tensor,
    x: Tensor,
    residual_tensors: Sequence[Tensor],
    residual_skip: Tensor | None,
    frequency_scale: float,
    lengths: Tensor | None,
) -> Tensor:
    def kept(tensors: Sequence[Tensor]) -> Tensor:
        return _cached_operand(tensors, x.shape[2], x.dtype, frequency_scale)

    gated = (projected.contiguous(), parameters, kept(gated_tensors), skip)
    residual = None if residual_skip is None else (x.contiguous(), kept(residual_tensors), residual_skip)
    kernels = toeplitz if gated[2].ndim == 2 else monarch_fft
    return kernels.forward(gated, residual, save_inner=False, lengths=lengths)[0]


@_mix_cached.register_fake
def _(projected, parameters, gated_tensors, skip, x, residual_tensors, residual_skip, frequency_scale, lengths):
    return torch.empty_like(x)


def _cached_operand(tensors: Sequence[Tensor], length: int, dtype: torch.dtype, frequency_scale: float) -> Tensor:
    # One operand serves all lengths that take the same blocks: the lags over a sequence's length meet no input.
    method = method_for(length, dtype)
    unit = toeplitz.MAX_LENGTH[dtype] if method == TOEPLITZ else method
    longest = min(-(-length // unit) * unit, tensors[0].shape[0])
    filter_dtype = evaluation_dtype(dtype, tensors[0].device)

    def make(evaluated: int) -> Tensor:
        taps = two_sided_taps([tensors], evaluated, frequency_scale, filter_dtype)[0]
        made = operand(taps[:, evaluated - longest : evaluated + longest - 1], dtype, method)
        # Without a gradient to carry, a transform is worth no more than the products' own precision.
        return made if method == TOEPLITZ else made.to(dtype)

    capturing = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing and any(t.requires_grad for t in tensors):
        return _first_lags(make(longest), longest, length, method)
    kept = _kept.setdefault(tensors[0], _Kept())
    # In-place updates raise a tensor's version, replacements change its address.
    weights = tuple((t.data_ptr(), t._version) for t in tensors)
    if kept.weights != weights:
        kept.weights = weights
        kept.operands.clear()
    key = (longest, method, dtype, filter_dtype, frequency_scale)
    if key not in kept.operands:
        # At all positions: whatever the length, the same taps to the last bit.
        kept.operands[key] = outside_graphs(lambda: make(tensors[0].shape[0]), tensors[0].device)
        if len(kept.operands) > MAX_KEPT_OPERANDS:
            kept.operands.popitem(last=False)
    kept.operands.move_to_end(key)
    found = kept.operands[key]
    if capturing:
        kept.captured.append(found)
    return _first_lags(found, longest, length, method)


def _first_lags(made: Tensor, longest: int, length: int, method: int) -> Tensor:
    """Cut an operand for `longest` positions to what sequences of `length` take."""
    if method != TOEPLITZ or longest == length:
        return made
    return made[:, longest - length : longest + length - 1].contiguous()
