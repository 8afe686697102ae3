"""The long convolution of the sequence mixer: as long as the sequence, one filter a channel.

    y_t = sum_{s <= t} f[t - s] x_s  +  sum_{s > t} r[s - t - 1] x_s  +  skip * x_t

Lag 0 belongs to the forward taps f alone: the backward taps r start at lag 1, unlike the usual bidirectional formula.
The product with this Toeplitz matrix is what the paper writes as Monarch · diagonal · inverse Monarch (section 3.1).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from monarch_mixer.kernels.support import LARGEST_EXACT_BLOCK, compute_dtype, exact_in_fp32, kernels_apply

# On two AVX-512 cores the direct product took 2.0 ms and the FFT 3.0 at 8 x 128 x 768; at 4 x 256 x 768 both took 4.
CPU_DIRECT_MAX_LENGTH = 256


def long_convolution(x: Tensor, forward_taps: Tensor, backward_taps: Tensor | None, skip: Tensor) -> Tensor:
    """Convolve each channel with its own long filter; the one entry point, which picks the method.

    The sum is taken in the taps' precision (fp32 in the models), whatever autocast says: a sum over thousands of taps
    does not survive bf16. The GPU's kernels sum in fp32 too; their products take half-precision inputs as they come.

    Args:
        x: input of shape (batch, length, channels).
        forward_taps: (at least length, channels); row j multiplies the input j steps before.
        backward_taps: (at least length, channels), row j multiplying the input j + 1 steps after; None for a causal
            convolution.
        skip: (channels,), the weight of the input itself (D in the paper's code).

    Returns:
        Output of the shape and dtype of `x`; from the GPU's kernels channels-first in memory, as they take `x` without
        a copy.

    Raises:
        ValueError: there are fewer taps than positions, or the channels differ.
    """
    _check(x, forward_taps, backward_taps, skip)
    exact = exact_in_fp32(compute_dtype(x), x.device) and forward_taps.dtype == torch.float32
    # Alone, the kernels' transforms depend on the length; the mixer gives them taps to the end of the last block.
    rounds = exact and x.shape[1] > LARGEST_EXACT_BLOCK // 2 and _gradients_wanted(x, forward_taps, skip)
    if not rounds and kernels_apply(x, x.dtype):
        return _kernel_convolution(x, forward_taps, backward_taps, skip)
    with torch.autocast(x.device.type, enabled=False):
        inputs = x.to(forward_taps.dtype)
        if _direct_is_faster(inputs):
            y = direct_convolution(inputs, forward_taps, backward_taps, skip)
        else:
            y = fft_convolution(inputs, forward_taps, backward_taps, skip, exact=exact)
    return y.to(x.dtype)


def _kernel_convolution(x: Tensor, forward_taps: Tensor, backward_taps: Tensor | None, skip: Tensor) -> Tensor:
    from monarch_mixer.kernels.sequence_mixer import channels_first, mix, operand

    length = x.shape[1]
    forward = forward_taps[:length].float()
    past = torch.zeros_like(forward) if backward_taps is None else backward_taps[:length].float()
    taps = torch.cat([past[: length - 1].flip(0), forward]).t()
    y = mix(None, None, None, channels_first(x), (operand(taps, x.dtype), skip.float()))
    return y.permute(1, 2, 0)


def _check(x: Tensor, forward_taps: Tensor, backward_taps: Tensor | None, skip: Tensor) -> None:
    length, channels = x.shape[1:]
    for name, taps in (("forward_taps", forward_taps), ("backward_taps", backward_taps)):
        if taps is not None and (taps.shape[0] < length or taps.shape[1] != channels):
            raise ValueError(
                f"{name} of shape {tuple(taps.shape)} cannot filter {length} positions of {channels} channels: "
                f"a model's filters are as long as its long_conv_l_max"
            )
    if skip.shape != (channels,):
        raise ValueError(f"skip must have shape ({channels},), got {tuple(skip.shape)}")


def _direct_is_faster(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[1] <= CPU_DIRECT_MAX_LENGTH
        and not torch.compiler.is_compiling()
    )


def _two_sided_taps(forward_taps: Tensor, backward_taps: Tensor | None, skip: Tensor, length: int) -> Tensor:
    """Return the taps of lags length - 1 ... 0, -1 ... -(length - 1), of shape (2 * length - 1, channels)."""
    past = forward_taps[1:length].flip(0)
    present = forward_taps[:1] + skip
    future = torch.zeros_like(past) if backward_taps is None else backward_taps[: length - 1]
    return torch.cat([past, present, future])


def fft_convolution(
    x: Tensor, forward_taps: Tensor, backward_taps: Tensor | None, skip: Tensor, *, exact: bool = False
) -> Tensor:
    """Long convolution through real FFTs of twice the length or a little more; O(length log length).

    Shapes as `long_convolution`. `exact`, for fp32: with fp64 transforms in the forward pass where there will be a
    backward pass, see `_ConvolutionExactForward`.
    """
    length = x.shape[1]
    size = _transform_size(length)
    # Circular filter of `size`: lag j at index j, lag -j at index size - j, so nothing wraps.
    gap = forward_taps.new_zeros(size - 2 * length + 1, forward_taps.shape[1])
    past = torch.zeros_like(forward_taps[: length - 1]) if backward_taps is None else backward_taps[: length - 1]
    kernel = torch.cat([forward_taps[:length], gap, past.flip(0)])
    # Channels first: the transform then runs over contiguous memory.
    inputs, kernel = x.transpose(1, 2), kernel.t()
    if exact and _gradients_wanted(x, kernel):
        y = _ConvolutionExactForward.apply(inputs, kernel)
    else:
        spectrum = torch.fft.rfft(inputs, n=size) * torch.fft.rfft(kernel, n=size)
        y = torch.fft.irfft(spectrum, n=size)[..., :length]
    return y.transpose(1, 2) + skip * x


def _gradients_wanted(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _ConvolutionExactForward(torch.autograd.Function):
    """The circular convolution of (batch, channels, length) with (channels, size), forward in fp64, backward in fp32.

    An fp32 transform's rounding is of the size of its largest values, everywhere, and differs with the transform's
    length. Gradients take up that of the forward pass layer by layer: a padded batch's, at 2,048 tokens in M2-BERT-base
    as the recipe starts it, were off by up to 1.2e-5 with it and are by 1.6e-6 without (1.5e-6 with fp64 for the
    input's gradient too). There is no second derivative.
    """

    @staticmethod
    def forward(ctx, x: Tensor, kernel: Tensor) -> Tensor:
        size = kernel.shape[-1]
        spectra = [torch.fft.rfft(tensor.double(), n=size) for tensor in (x, kernel)]
        ctx.save_for_backward(*(spectrum.to(torch.complex64) for spectrum in spectra))
        ctx.shape, ctx.size = x.shape, size
        return torch.fft.irfft(spectra[0] * spectra[1], n=size)[..., : x.shape[-1]].to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, kernel = ctx.saved_tensors
        outputs = torch.fft.rfft(grad, n=ctx.size)
        grad_x = grad_kernel = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.fft.irfft(outputs * kernel.conj(), n=ctx.size)[..., : ctx.shape[-1]]
        if ctx.needs_input_grad[1]:
            grad_kernel = torch.fft.irfft((outputs * x.conj()).sum(0), n=ctx.size)
        return grad_x, grad_kernel


def _transform_size(length: int) -> int:
    """Return the length of the FFTs: at least 2 * length, and on the way to a compiled graph exactly that.

    There lengths may be symbols. Elsewhere a size with the factors 2, 3 and 5 alone takes 0.3 to 0.7 of the time on two
    AVX-512 cores, where 2 * length has others (509 to 9,001), and has less rounding error, down to half.
    """
    return 2 * length if torch.compiler.is_compiling() else _next_smooth_size(2 * length)


@functools.lru_cache(maxsize=1024)
def _next_smooth_size(size: int) -> int:
    """The smallest even number from `size` on with no prime factors but 2, 3 and 5."""
    best = max(2, 1 << (size - 1).bit_length())
    power_of_5 = 1
    while power_of_5 < best:
        odd = power_of_5
        while odd < best:
            power_of_2 = 1 << max(1, (-(-size // odd) - 1).bit_length())
            best = min(best, odd * power_of_2)
            odd *= 3
        power_of_5 *= 5
    return best


def direct_convolution(x: Tensor, forward_taps: Tensor, backward_taps: Tensor | None, skip: Tensor) -> Tensor:
    """Long convolution by the Toeplitz product itself, O(length^2); fastest at short lengths on a CPU.

    Shapes as `long_convolution`.
    """
    return _DirectConvolution.apply(x, _two_sided_taps(forward_taps, backward_taps, skip, x.shape[1]))


def _depthwise(x: Tensor, taps: Tensor) -> Tensor:
    """Correlate x (batch, length, channels) with taps (2 * length - 1, channels), channels last in memory."""
    length, channels = x.shape[1:]
    # As an image of height 1 whose channels are contiguous, which the CPU's depthwise kernel vectorises over.
    image = x.contiguous().transpose(1, 2).unsqueeze(2)
    weight = taps.t().reshape(channels, 1, 1, -1)
    y = F.conv2d(image, weight, padding=(0, length - 1), groups=channels)
    return y.squeeze(2).transpose(1, 2)


class _DirectConvolution(torch.autograd.Function):
    """The depthwise convolution, with a filter gradient by FFT: the CPU library's own is ten times slower."""

    @staticmethod
    def forward(ctx, x: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps)
        return _depthwise(x, taps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, taps = ctx.saved_tensors
        length = x.shape[1]
        grad_x = _depthwise(grad, taps.flip(0)) if ctx.needs_input_grad[0] else None
        grad_taps = None
        if ctx.needs_input_grad[1]:
            size = _transform_size(length)
            inputs = torch.fft.rfft(x.transpose(1, 2), n=size)
            outputs = torch.fft.rfft(grad.transpose(1, 2), n=size)
            # Index j of the circular correlation is the gradient of lag j.
            lags = torch.fft.irfft((inputs.conj() * outputs).sum(0), n=size).t()
            grad_taps = torch.cat([lags[:length].flip(0), lags[size - length + 1 :].flip(0)])
        return grad_x, grad_taps


def short_convolution(x: Tensor, weight: Tensor, bias: Tensor, ahead: int = 0) -> Tensor:
    """Depthwise convolution over a few taps, zeros beyond both ends; the one entry point, which picks the method.

    Args:
        x: input of shape (batch, length, channels).
        weight: (channels, 1, taps), the last tap multiplying the latest position that is read (the layout of
            nn.Conv1d).
        bias: (channels,).
        ahead: how far that position is after the present one, at most taps - 1; 0: causal.

    Returns:
        Output of the shape and dtype of `x`.
    """
    taps = weight.shape[-1]
    length = x.shape[1]
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        image = x.contiguous().transpose(1, 2).unsqueeze(2)
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        y = F.conv2d(image, weight.unsqueeze(2), bias, padding=(0, taps - 1), groups=x.shape[2])
        return y[..., ahead : ahead + length].squeeze(2).transpose(1, 2)
    # Shifted sums: a compiler fuses them with what stands before and after.
    padded = F.pad(x, (0, 0, taps - 1 - ahead, ahead))
    y = bias + sum(weight[:, 0, tap] * padded[:, tap : tap + length] for tap in range(taps))
    return y.to(x.dtype)
