"""The sequence mixer's kernels against its plain equations in fp64: outputs and every gradient."""

import random

import pytest
import torch
from torch import Tensor

from monarch_mixer import reference

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for CPUs")),
    pytest.param("cuda", marks=on_gpu),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def equations(projected, parameters, taps, skip, x, residual_taps, residual_skip):
    """What `mix` computes; channels first, (channels, batch, length)."""

    def last(tensor):
        return tensor.permute(1, 2, 0)

    def convolve(tensor, two_sided, weight):
        length = tensor.shape[2]
        forward, backward = two_sided[:, length - 1 :].t(), two_sided[:, : length - 1].flip(1).t()
        backward = torch.cat([backward, torch.zeros_like(forward[:1])])
        return reference.long_convolution(last(tensor), forward, backward, weight).permute(2, 0, 1)

    out = 0
    if projected is not None:
        biased = projected + parameters[:, 4, None, None]
        short = reference.short_convolution(last(biased), parameters[:, None, :3], parameters[:, 3]).permute(2, 0, 1)
        before, after, value = short.chunk(3)
        out = after * convolve(before * value, taps, skip)
    if x is not None:
        out = out + convolve(x, residual_taps, residual_skip)
    return out


def make_inputs(channels, batch, length, dtype, device, gated=True, residual=True, causal=False):
    def rounded(*shape, scale=1.0):
        return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).to(device)

    def taps():
        taps = torch.randn(channels, 2 * length - 1) * (0.3 + 1 / (1 + torch.arange(1 - length, length).abs()))
        if causal:
            taps[:, : length - 1] = 0
        return taps.to(device)

    def skip():
        return torch.randn(channels).to(device)

    first = [rounded(3 * channels, batch, length), torch.randn(3 * channels, 5).to(device), taps(), skip()]
    second = [rounded(channels, batch, length), taps(), skip()]
    tensors = (first if gated else [None] * 4) + (second if residual else [None] * 3)
    return [None if t is None else t.requires_grad_() for t in tensors]


def check(inputs, dtype, method=None, tolerance=None):
    from monarch_mixer.kernels.sequence_mixer import mix, operand

    projected, parameters, taps, skip, x, residual_taps, residual_skip = inputs
    gated = None if projected is None else (operand(taps, dtype, method), skip)
    residual = None if x is None else (operand(residual_taps, dtype, method), residual_skip)
    out = mix(projected, parameters, gated, x, residual)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    expected = equations(*exact)
    assert out.dtype == dtype and out.shape == expected.shape
    tolerance = tolerance or TOLERANCE[dtype]
    assert relative_error(out, expected) < tolerance
    grad = torch.randn_like(expected).to(dtype)
    given = [t for t in inputs if t is not None]
    got = torch.autograd.grad(out, given, grad)
    wanted = torch.autograd.grad(expected, [t for t in exact if t is not None], grad.double())
    for gradient, reference_gradient in zip(got, wanted, strict=True):
        assert relative_error(gradient, reference_gradient) < tolerance
    return out, got


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 2), (2, 3), (5, 63), (1, 127), (7, 128)])
def test_short_sequences(device, dtype, batch, length, poison):
    check(make_inputs(3, batch, length, dtype, device), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("batch", "length"), [(2, 129), (5, 250), (3, 500)])
def test_long_sequences(device, dtype, batch, length, poison):
    check(make_inputs(2, batch, length, dtype, device), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [257, 700, 1021])
def test_sequences_of_several_blocks(device, dtype, length, poison):
    check(make_inputs(2, 2, length, dtype, device), dtype, method=256)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", [1024, 2048, 4096, 8192])
def test_every_block(device, block, poison):
    check(make_inputs(1, 2, block // 2 + 5, torch.bfloat16, device), torch.bfloat16, method=block)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("form", [{"residual": False}, {"gated": False}, {"causal": True}])
def test_forms(device, length, form, poison):
    check(make_inputs(2, 3, length, torch.float32, device, **form), torch.float32)
    if length > 256:
        check(make_inputs(2, 3, length, torch.float32, device, **form), torch.float32, method=256)
