import pytest
import torch
import torch.nn.functional as F

from monarch_mixer import normalization
from monarch_mixer.kernels import layer_norm as kernels
from monarch_mixer.kernels.layer_norm import Config, block_layer_norm
from tests.monarch_mixer.kernels.support import DTYPES, assert_close, assert_repeatable, in_double, relative_error, run

NAMES = ("output", "weight", "shift", "y", "bias", "x")


def make(width, tokens, dtype, device, num_blocks=4):
    y = torch.randn(num_blocks, tokens, width // num_blocks).to(device, dtype)
    x = torch.randn(tokens, width).to(device, dtype)
    weight, shift, bias = (torch.randn(width, device=device) for _ in range(3))
    return [t.requires_grad_() for t in (weight, shift, y, bias, x)], torch.randn(tokens, width).to(device, dtype)


def reference(weight, shift, y=None, bias=None, x=None, eps=1e-5):
    total = 0 if y is None else y.transpose(0, 1).flatten(1)
    total = total + (0 if bias is None else bias) + (0 if x is None else x)
    return F.layer_norm(total, weight.shape, weight, shift, eps)


def check(inputs, grad, dtype, names=NAMES, eps=1e-5, channels_first=False):
    def select(inputs):
        return dict(zip(names[1:], inputs, strict=True))

    def function(*inputs):
        given = {"y": None, "bias": None, "x": None} | select(inputs)
        return block_layer_norm(**given, eps=eps, channels_first=channels_first)

    results = run(function, inputs, grad)
    expected = run(lambda *copies: reference(**select(copies), eps=eps), in_double(*inputs), grad.double())
    assert results[0].dtype == dtype
    assert (results[0].t() if channels_first else results[0]).is_contiguous()
    for what, result, value in zip(names, results, expected, strict=True):
        assert_close(result, value, dtype, what)
    assert_repeatable(function, inputs, grad, results)


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "tokens"), [(32, 1), (48, 3), (96, 63), (960, 33), (1792, 5)])
def test_outputs_and_gradients(width, tokens, dtype, channels_first, device):
    check(*make(width, tokens, dtype, device), dtype, channels_first=channels_first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 129, 500, 20_000])
@pytest.mark.parametrize("width", [768, 960, 1536, 1792, 8192])
def test_outputs_and_gradients_of_real_sizes(width, tokens, dtype, channels_first):
    check(*make(width, tokens, dtype, "cuda"), dtype, channels_first=channels_first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_of_the_blocks(dtype, device):
    """The blocks' own gradient is that of their product with it."""
    (weight, shift, y, bias, x), grad = make(48, 17, dtype, device)
    inputs = [weight, shift, (y.detach() / 4).requires_grad_(), bias, x]
    results = run(lambda w, s, y, b, x: block_layer_norm(y, b, x, w, s, 1e-5, y_factor=4.0), inputs, grad)
    expected = run(lambda w, s, y, b, x: block_layer_norm(y, b, x, w, s, 1e-5), [weight, shift, y, bias, x], grad)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
@pytest.mark.parametrize("names", [("x",), ("y",), ("y", "bias"), ("y", "x"), ("bias", "x")])
def test_parts_may_be_left_out(names, eps, device):
    inputs, grad = make(48, 17, torch.float32, device)
    chosen = ("output", "weight", "shift", *names)
    inputs = [tensor for name, tensor in zip(NAMES[1:], inputs, strict=True) if name in chosen]
    check(inputs, grad, torch.float32, chosen, eps)


@pytest.mark.parametrize("channels_first", [False, True])
def test_either_layout_comes_in(channels_first, device):
    """The residual and the gradient have their features first in memory."""
    (*others, x), grad = make(48, 40, torch.float32, device)
    x = x.detach().t().contiguous().t().requires_grad_()
    grad = grad.t().contiguous().t()
    check([*others, x], grad, torch.float32, channels_first=channels_first)
    check([*others, x], torch.ones((), device=device).expand(grad.shape), torch.float32, channels_first=channels_first)


@pytest.mark.parametrize("block_t", [1, 4, 16])
def test_programs_with_several_tiles(block_t, device, monkeypatch):
    monkeypatch.setattr(kernels, "BACKWARD_PROGRAMS", 3)
    monkeypatch.setattr(kernels, "backward_config", lambda *_, **__: Config(block_t, 4))
    check(*make(32, 23, torch.float32, device), torch.float32)


def test_constant_and_large_rows(device):
    """A row of equal values has no variance; a row far from zero keeps its digits."""
    weight, shift = torch.rand(64, device=device), torch.rand(64, device=device)
    out = block_layer_norm(None, None, torch.full((2, 64), 3.0, device=device), weight, shift, 1e-12)
    torch.testing.assert_close(out, shift.expand(2, 64))
    x = 1000 + torch.randn(5, 64, device=device)
    assert (
        relative_error(
            block_layer_norm(None, None, x, weight, shift, 1e-5),
            F.layer_norm(x.double(), (64,), weight.double(), shift.double()),
        )
        < 1e-4
    )


def test_no_tokens(device):
    inputs, _ = make(32, 5, torch.float32, device)
    weight, shift, y, bias, x = (t.detach().requires_grad_() for t in inputs)
    out = block_layer_norm(y[:, :0], bias, x[:0], weight, shift, 1e-5, channels_first=True)
    out.sum().backward()
    assert out.shape == (0, 32)
    assert all(t.grad.count_nonzero() == 0 for t in (weight, shift, bias, x, y))


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dispatch(dtype, channels_first, device, monkeypatch):
    x = torch.randn(2, 7, 48, device=device).to(dtype)
    weight, shift = torch.rand(48, device=device), torch.rand(48, device=device)
    expected = F.layer_norm(x.double(), (48,), weight.double(), shift.double(), 1e-5)
    monkeypatch.setattr(normalization, "kernels_apply", lambda *_: True)
    out = normalization.layer_norm(x, weight, shift, 1e-5, channels_first)
    assert out.shape == x.shape and out.dtype == dtype
    assert out.permute(2, 0, 1).is_contiguous() == channels_first
    assert_close(out, expected, dtype)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert normalization.layer_norm(x, weight, shift, 1e-5).dtype == torch.bfloat16
    monkeypatch.setattr(normalization, "kernels_apply", lambda *_: False)
    plain = normalization.layer_norm(x.float(), weight, shift, 1e-5, channels_first)
    assert torch.equal(plain, F.layer_norm(x.float(), (48,), weight, shift, 1e-5))


@pytest.mark.parametrize("channels_first", [False, True])
def test_registration_and_compilation(channels_first, device):
    inputs, grad = make(32, 9, torch.float32, device)
    weight, shift, y, bias, x = inputs
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (y, bias, x, weight, shift, 1e-5, channels_first, torch.float32, 1.0)
    torch.library.opcheck(kernels._layer_norm, arguments, test_utils=checks)

    def function(weight, shift, y, bias, x):
        return block_layer_norm(y, bias, x, weight, shift, 1e-5, channels_first=channels_first).sin()

    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    results, expected = run(compiled, inputs, grad), run(function, inputs, grad)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(results, expected, strict=True))


def test_mistakes_are_named():
    (weight, shift, y, bias, x), _ = make(32, 4, torch.float32, "cpu")
    with pytest.raises(ValueError, match="give y, x or both"):
        block_layer_norm(None, bias, None, weight, shift, 1e-5)
    with pytest.raises(ValueError, match="blocks of 32 features"):
        block_layer_norm(y[:3], bias, x, weight, shift, 1e-5)
    with pytest.raises(ValueError, match="as many tokens"):
        block_layer_norm(y, bias, x[:3], weight, shift, 1e-5)
    with pytest.raises(ValueError, match="at most 8192"):
        block_layer_norm(None, None, torch.ones(1, 9000), torch.ones(9000), torch.ones(9000), 1e-5)
