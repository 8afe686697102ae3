from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from monarch_mixer import long_convolution, reference, short_convolution
from monarch_mixer.long_convolution import (
    _next_smooth_size,
    direct_convolution,
    fft_convolution,
)
from tests.conftest import FIXTURES

LENGTHS = [1, 2, 3, 7, 16, 63, 64, 127, 129, 300, 509]


def make_inputs(length, channels=5, batch=3, bidirectional=True, dtype=torch.float64, surplus=0):
    shapes = [(batch, length, channels), (length + surplus, channels), (length + surplus, channels), (channels,)]
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return tensors if bidirectional else [tensors[0], tensors[1], None, tensors[3]]


def outputs_and_gradients(function, inputs):
    leaves = [tensor.detach().clone().requires_grad_() if tensor is not None else None for tensor in inputs]
    y = function(*leaves)
    cotangent = torch.sin(torch.arange(y.numel(), dtype=y.dtype).view_as(y))
    given = [leaf for leaf in leaves if leaf is not None]
    return [y, *torch.autograd.grad((y * cotangent).sum(), given)]


@pytest.mark.parametrize("bidirectional", [True, False], ids=["both_ways", "causal"])
@pytest.mark.parametrize("method", [long_convolution, fft_convolution, direct_convolution])
@pytest.mark.parametrize("length", LENGTHS)
def test_outputs_and_every_gradient_equal_the_toeplitz_product(length, method, bidirectional):
    inputs = make_inputs(length, bidirectional=bidirectional, surplus=length % 3)
    expected = outputs_and_gradients(reference.long_convolution, inputs)
    for actual, wanted in zip(outputs_and_gradients(method, inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bidirectional", [True, False], ids=["both_ways", "causal"])
@pytest.mark.parametrize("length", [2, 300, 509])
def test_an_exact_forward_pass_has_gradients_of_fp32(length, bidirectional):
    inputs = make_inputs(length, bidirectional=bidirectional, dtype=torch.float32)
    in_double = [None if tensor is None else tensor.double() for tensor in inputs]
    expected = outputs_and_gradients(reference.long_convolution, in_double)
    actual = outputs_and_gradients(partial(fft_convolution, exact=True), inputs)
    errors = [((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)]
    assert errors[0] < 1e-7  # that of the sum with the skipped input, in fp32
    assert max(errors) < 1e-6
    x, forward, *others = inputs
    cotangent = torch.ones_like(x)
    both = torch.autograd.grad(fft_convolution(*inputs, exact=True), (x, forward), cotangent)
    of_input = fft_convolution(x, *(None if tensor is None else tensor.detach() for tensor in inputs[1:]), exact=True)
    of_taps = fft_convolution(x.detach(), forward, *others, exact=True)
    assert torch.equal(torch.autograd.grad(of_input, x, cotangent)[0], both[0])
    assert torch.equal(torch.autograd.grad(of_taps, forward, cotangent)[0], both[1])


def test_a_compiled_exact_forward_pass():
    compiled = torch.compile(partial(fft_convolution, exact=True), backend="aot_eager", dynamic=True, fullgraph=True)
    for length in (300, 511):
        inputs = make_inputs(length, dtype=torch.float32)
        expected = outputs_and_gradients(reference.long_convolution, [tensor.double() for tensor in inputs])
        actual = outputs_and_gradients(compiled, inputs)
        errors = [((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)]
        assert errors[0] < 1e-7
        assert max(errors) < 2e-6


def test_the_forward_pass_is_exact_where_all_else_is_and_gradients_are_wanted():
    x, *filters = make_inputs(300, dtype=torch.float32)
    exact = fft_convolution(x, *filters, exact=True)
    plain = fft_convolution(x, *filters)
    assert not torch.equal(exact, plain)
    assert torch.equal(long_convolution(x, *filters), exact)
    with torch.no_grad():
        assert torch.equal(long_convolution(x, *filters), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(long_convolution(x, *filters), plain)
    half = x.bfloat16()
    assert torch.equal(long_convolution(half, *filters), fft_convolution(half.float(), *filters).bfloat16())


def test_transforms_have_the_smallest_even_size_of_small_factors():
    sizes = [n for n in range(2, 1101, 2) if 2**9 * 3**7 * 5**5 % n == 0 or n == 1024]
    for size in range(1, 1100):
        expected = next((n for n in sizes if n >= size), None)
        assert expected is None or _next_smooth_size(size) == expected
    assert _next_smooth_size(2 * 9001) == 18432


def test_reversed_taps_start_at_lag_one():
    x = torch.zeros(1, 4, 1)
    x[0, 2] = 1
    forward, backward = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([[10.0], [20.0], [30.0], [40.0]])
    y = long_convolution(x, forward, backward, torch.tensor([100.0]))
    torch.testing.assert_close(y.flatten(), torch.tensor([20.0, 10.0, 101.0, 2.0]))


@pytest.mark.parametrize("length", [40, 400])  # either side of the dispatch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_taken_in_the_precision_of_the_taps(dtype, length):
    inputs = make_inputs(length)
    expected = reference.long_convolution(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = long_convolution(inputs[0].to(dtype), *(tensor.float() for tensor in inputs[1:]))
    assert y.dtype == dtype
    error = (y.double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_any_memory_layout(layout):
    inputs = make_inputs(50)
    x = torch.randn(3, 5, 50, dtype=torch.float64).transpose(1, 2)
    if layout == "sliced":
        x = torch.randn(3, 50, 11, dtype=torch.float64)[..., 3:8]
    expected = reference.long_convolution(x, *inputs[1:])
    torch.testing.assert_close(direct_convolution(x, *inputs[1:]), expected)
    torch.testing.assert_close(fft_convolution(x, *inputs[1:]), expected)


def test_too_few_taps_are_an_error():
    x, forward, backward, skip = make_inputs(8)
    for arguments in (
        (x, forward[:7], backward, skip),
        (x, forward, backward[:7], skip),
        (x, forward[:, :4], backward, skip),
        (x, forward, backward, skip[:4]),
    ):
        with pytest.raises(ValueError, match="shape"):
            long_convolution(*arguments)


@pytest.mark.parametrize("length", [1, 2, 3, 17, 50])
@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("compiled", [False, True])
def test_short_convolution_outputs_and_gradients(length, ahead, compiled, monkeypatch):
    if compiled:  # the branch a compiler traces
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    inputs = [torch.randn(s, dtype=torch.float64) for s in ((2, length, 7), (7, 1, 3), (7,))]
    expected = outputs_and_gradients(lambda *given: reference.short_convolution(*given, ahead), inputs)
    found = outputs_and_gradients(lambda *given: short_convolution(*given, ahead), inputs)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("convolution", [short_convolution, reference.short_convolution])
def test_short_convolution_reads_what_it_says(convolution):
    x = torch.tensor([1.0, 10.0, 100.0, 1000.0])[None, :, None]
    taps, bias = torch.tensor([[[2.0, 3.0, 5.0]]]), torch.tensor([0.5])
    assert convolution(x, taps, bias).flatten().tolist() == [5.5, 53.5, 532.5, 5320.5]
    assert convolution(x, taps, bias, 1).flatten().tolist() == [53.5, 532.5, 5320.5, 3200.5]


@pytest.mark.parametrize("case", ["fftconv0", "fftconv1"])
def test_golden_causal_convolution(case):
    ops = load_file(FIXTURES / "goldens" / "ops" / "mm_ops.safetensors")
    u, taps, skip = (ops[f"{case}.{name}"] for name in ("u", "k_fwd", "D"))
    y = long_convolution(u.transpose(1, 2), taps.t(), None, skip.flatten())
    torch.testing.assert_close(y.transpose(1, 2), ops[f"{case}.out_causal"], rtol=1e-5, atol=1e-5)
