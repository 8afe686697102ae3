"""The sequence mixer's kernels against its plain equations in fp64: outputs and every gradient.

What kernels are given to write is filled with NaN first (conftest.py).
"""

import random

import pytest
import torch

from monarch_mixer import reference
from monarch_mixer.long_convolution import fft_convolution
from tests.monarch_mixer.kernels.support import DTYPES, TOLERANCES, relative_error


def equations(convolution, projected, parameters, taps, skip, x, residual_taps, residual_skip, lengths=None):
    """What `mix` computes, by a long convolution with the interface of `reference.long_convolution`."""

    def real(tensor):
        if lengths is None:
            return tensor
        return tensor * (torch.arange(tensor.shape[2], device=lengths.device) < lengths[:, None])

    def last(tensor):
        return tensor.permute(1, 2, 0)

    def convolve(tensor, two_sided, weight):
        length = tensor.shape[2]
        forward, backward = two_sided[:, length - 1 :].t(), two_sided[:, : length - 1].flip(1).t()
        backward = torch.cat([backward, torch.zeros_like(forward[:1])])
        return convolution(last(tensor), forward, backward, weight).permute(2, 0, 1)

    out = 0
    if projected is not None:
        biased = projected + parameters[:, 4, None, None]
        short = reference.short_convolution(last(biased), parameters[:, None, :3], parameters[:, 3]).permute(2, 0, 1)
        before, after, value = short.chunk(3)
        out = after * convolve(real(before * value), taps, skip)
    if x is not None:
        out = out + convolve(real(x), residual_taps, residual_skip)
    return out


def make_inputs(channels, batch, length, dtype, device, gated=True, residual=True, causal=False):
    """Draw what `equations` takes; on the CPU, so that a GPU is given the same."""

    def draw(*shape):
        return torch.randn(shape, device="cpu" if channels < 16 else device).to(device)

    def taps():
        lag = torch.arange(1 - length, length, device=device)
        taps = draw(channels, 2 * length - 1) * (0.3 + 1 / (1 + lag.abs()))
        return taps * (lag >= 0) if causal else taps

    first = [draw(3 * channels, batch, length).to(dtype), draw(3 * channels, 5), taps(), draw(channels)]
    second = [draw(channels, batch, length).to(dtype), taps(), draw(channels)]
    tensors = (first if gated else [None] * 4) + (second if residual else [None] * 3)
    return [None if t is None else t.requires_grad_() for t in tensors]


def check(inputs, dtype, method=None, convolution=reference.long_convolution, lengths=None):
    from monarch_mixer.kernels.sequence_mixer import mix, operand

    projected, parameters, taps, skip, x, residual_taps, residual_skip = inputs
    gated = None if projected is None else (operand(taps, dtype, method), skip)
    residual = None if x is None else (operand(residual_taps, dtype, method), residual_skip)
    out = mix(projected, parameters, gated, x, residual, lengths)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    expected = equations(convolution, *exact, lengths)
    assert out.dtype == dtype and out.shape == expected.shape
    assert relative_error(out, expected) < TOLERANCES[dtype]
    grad = torch.randn(expected.shape, device="cpu" if len(expected) < 16 else out.device).to(out)
    given = [t for t in inputs if t is not None]
    got = torch.autograd.grad(out, given, grad, retain_graph=True)
    wanted = torch.autograd.grad(expected, [t for t in exact if t is not None], grad.double())
    for gradient, reference_gradient in zip(got, wanted, strict=True):
        assert relative_error(gradient, reference_gradient) < TOLERANCES[dtype]
    again = torch.autograd.grad(out, given, grad)
    assert all(torch.equal(first, second) for first, second in zip(got, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 2), (5, 63), (1, 127), (7, 128)])
def test_short_sequences(device, dtype, batch, length):
    check(make_inputs(5, batch, length, dtype, device), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length"), [(2, 129), (5, 500)])
def test_long_sequences(device, dtype, batch, length):
    check(make_inputs(3, batch, length, dtype, device), dtype)


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 257), (torch.bfloat16, 520), (torch.float16, 400)])
def test_sequences_of_several_blocks(device, dtype, length):
    check(make_inputs(2, 2, length, dtype, device), dtype, method=256)


@pytest.mark.parametrize("block", [1024, 2048, 4096, 8192])
def test_every_block(device, block):
    channels = 4096 // block + 2  # gradients of a few sums alone would be judged by how they cancel
    inputs = make_inputs(channels, 1, block // 2 + 5, torch.bfloat16, device)
    check(inputs, torch.bfloat16, method=block, convolution=fft_convolution)


@pytest.mark.parametrize(("length", "method"), [(2100, 4096), (2100, 2048)])
def test_a_mean_stays_within_the_range_of_fp16(device, length, method):
    """Among the frequencies it is tens of times larger than among the results."""
    inputs = make_inputs(2, 1, length, torch.float16, device, gated=False)
    x, taps = inputs[4].detach().fill_(3), inputs[5].detach().fill_(1.5)
    inputs[4], inputs[5] = x.requires_grad_(), taps.requires_grad_()
    check(inputs, torch.float16, method=method)


@pytest.mark.parametrize(("length", "method"), [(40, None), (300, None), (300, 256)])
@pytest.mark.parametrize("form", [{"residual": False}, {"gated": False}, {"causal": True}])
def test_forms(device, length, method, form):
    check(make_inputs(2, 3, length, torch.float32, device, **form), torch.float32, method=method)


def draw_lengths(batch, length, device):
    """Real lengths of sequences: some, all, and (from the third on) none of one and any of the others."""
    drawn = torch.randint(1, length, (batch,), dtype=torch.int32)
    drawn[1:3] = torch.tensor([length, 0])[: batch - 1]
    return drawn.to(device)


@pytest.mark.parametrize(
    ("dtype", "length", "method", "batch"),
    [
        (torch.float32, 37, None, 4),
        (torch.bfloat16, 100, None, 4),
        (torch.float32, 150, None, 2),
        (torch.bfloat16, 131, None, 2),
        (torch.bfloat16, 2100, 4096, 2),
        (torch.float32, 300, 256, 1),
    ],
)
def test_padding_enters_no_convolution(device, dtype, length, method, batch):
    """Outputs and gradients everywhere, those at padding included, are those of the masked equations."""
    inputs = make_inputs(2 if batch > 1 else 1, batch, length, dtype, device)
    convolution = fft_convolution if length > 1000 else reference.long_convolution
    check(inputs, dtype, method, convolution, lengths=draw_lengths(batch, length, device))


@pytest.mark.parametrize(("form", "length"), [({"residual": False}, 37), ({"gated": False}, 150)])
def test_padding_enters_neither_convolution_alone(device, length, form):
    inputs = make_inputs(2, 2, length, torch.float32, device, **form)
    check(inputs, torch.float32, lengths=draw_lengths(2, length, device))


@pytest.mark.parametrize(("dtype", "length"), [(torch.bfloat16, 37), (torch.float32, 131)])
def test_what_padding_holds_changes_no_bit(device, dtype, length):
    """With a loss on real positions; other padding, and other sequences of the batch, leave every bit as it is."""
    from monarch_mixer.kernels.sequence_mixer import mix, operand

    lengths = draw_lengths(3, length, device)
    real = torch.arange(length, device=device) < lengths[:, None]
    inputs = make_inputs(1, 3, length, dtype, device)
    grad = torch.randn(1, 3, length, device="cpu").to(device, dtype) * real

    def run(given):
        projected, parameters, taps, skip, x, residual_taps, residual_skip = given
        gated, residual = (operand(taps, dtype), skip), (operand(residual_taps, dtype), residual_skip)
        out = mix(projected, parameters, gated, x, residual, lengths)
        return [out.detach() * real, *torch.autograd.grad(out, given, grad)]

    expected = run(inputs)
    poisoned = [torch.where(real, t, 30).to(t.dtype) if t.ndim == 3 else t for t in inputs]
    for value, reference_value in zip(run(poisoned), expected, strict=True):
        assert torch.equal(value, reference_value)
    assert not (expected[1] * ~real).any() and not (expected[5] * ~real).any()


def test_exact_to_fp32_a_long_text_has_the_same_bits_whatever_the_batch_is_padded_to(device, monkeypatch):
    """Outputs, and gradients of the inputs; those of the taps are sums over the batch. Blocks are small to be fast."""
    from monarch_mixer import filters
    from monarch_mixer.kernels import support
    from monarch_mixer.kernels.sequence_mixer import mix, operand

    monkeypatch.setattr(support, "LARGEST_EXACT_BLOCK", 256)
    channels, longest = 2, 900
    torch.manual_seed(3)
    implicit = [filters.ImplicitFilter(channels, longest, order=8, sine_frequency=1.0).to(device) for _ in range(2)]
    given = [f.tensors() for f in implicit]
    projected, x, grad = (torch.randn(k * channels, 2, longest).to(device) for k in (3, 1, 1))
    parameters, skips = torch.randn(3 * channels, 5).to(device), torch.randn(2, channels).to(device)
    lengths = torch.tensor([300, 611], dtype=torch.int32, device=device)

    def run(rows, width, real):
        inputs = [t[:, rows, :width].contiguous().requires_grad_() for t in (projected, x)]
        taps = filters.taps_for_training(given, width, 1.0, torch.float32)
        gated, residual = ((operand(t, torch.float32), skip) for t, skip in zip(taps, skips, strict=True))
        out = mix(inputs[0], parameters, gated, inputs[1], residual, real)
        mask = torch.arange(width, device=device) < (width if real is None else real[:, None])
        own = [p for f in implicit for p in f.parameters() if p is not f.skip]
        got = torch.autograd.grad(out, [*inputs, *own], grad[:, rows, :width] * mask)
        return [out.detach(), *got[:2]], got[2:]

    batch, of_filters = run([0, 1], 700, lengths)
    alone = [run([row], length, None) for row, length in enumerate(lengths.tolist())]
    for row, (tensors, _) in enumerate(alone):
        for padded, expected in zip(batch, tensors, strict=True):
            length = expected.shape[2]
            found = padded[:, row : row + 1, :length]
            # A GPU's library may multiply more positions' taps in another order.
            assert torch.equal(found, expected) if device == "cpu" else relative_error(found, expected) < 5e-7
    assert not batch[1][:, 0, 300:].any() and not batch[2][:, 0, 300:].any()
    for found, *parts in zip(of_filters, *(gradients for _, gradients in alone), strict=True):
        assert relative_error(found, sum(parts)) < 2e-6


@pytest.mark.parametrize("channels", [32, 48, 96, 768, 960, 1536, 1792])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_model_widths_at_random_lengths(channels, dtype):
    generator = random.Random(f"{channels} {dtype}")
    for length in [generator.randint(1, 128), generator.choice([131, 509, 1021, 2039, 4093]), 4097]:
        batch = generator.randint(1, 7) if length < 3000 else 1
        check(make_inputs(channels, batch, length, dtype, "cuda"), dtype, convolution=fft_convolution)
        lengths = torch.randint(1, length + 1, (batch,), dtype=torch.int32, device="cuda")
        inputs = make_inputs(channels, batch, length, dtype, "cuda")
        check(inputs, dtype, convolution=fft_convolution, lengths=lengths)
