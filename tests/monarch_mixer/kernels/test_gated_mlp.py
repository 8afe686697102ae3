from functools import partial

import pytest
import torch
import torch.nn.functional as F

from monarch_mixer import DimensionMixer
from monarch_mixer.kernels import gated_mlp_forward
from monarch_mixer.kernels.gated_mlp import _gated_mlp, gated_mlp
from monarch_mixer.kernels.gated_mlp_backward import gated_backward
from monarch_mixer.kernels.gated_mlp_forward import _fused, gated_forward
from monarch_mixer.kernels.support import stored_share
from tests.monarch_mixer.kernels.support import DTYPES, assert_close, assert_repeatable, in_double, relative_error, run

MASK32 = 0xFFFFFFFF


def make(width, tokens, dtype, device, inner_block=None, out_block=None, num_blocks=4):
    in_block = width // num_blocks
    inner_block, out_block = inner_block or 4 * in_block, out_block or in_block
    x = torch.randn(tokens, width)
    input_weight = torch.randn(num_blocks, 2 * inner_block, in_block) / in_block**0.5
    output_weight = torch.randn(num_blocks, out_block, inner_block) / inner_block**0.5
    grad = torch.randn(num_blocks, tokens, out_block)
    x, input_weight, output_weight, grad = (t.to(device, dtype) for t in (x, input_weight, output_weight, grad))
    return [t.requires_grad_() for t in (x, input_weight, output_weight)], grad


def reference(x, input_weight, output_weight, scaled_keep=None):
    num_blocks, wide, _ = input_weight.shape
    blocks = x.unflatten(-1, (num_blocks, -1)).transpose(0, 1)
    gates, values = (blocks @ input_weight.mT).unflatten(-1, (2, wide // 2)).chunk(2)
    inner = (F.gelu(gates) * values).movedim(-2, 1).flatten(0, 1)  # (num_blocks, tokens, inner_block)
    return (inner if scaled_keep is None else inner * scaled_keep) @ output_weight.mT


def check(inputs, grad, dtype, function=lambda *inputs: gated_mlp(*inputs, 0.0), scaled_keep=None):
    results = run(function, inputs, grad)
    expected = run(lambda *copies: reference(*copies, scaled_keep), in_double(*inputs), grad.double())
    for what, result, value in zip(("output", "x", "input_weight", "output_weight"), results, expected, strict=True):
        assert result.dtype == dtype
        assert_close(result, value, dtype, what)
    assert_repeatable(function, inputs, grad, results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "tokens"), [(32, 63), (48, 3), (96, 65), (32, 1)])
def test_outputs_and_gradients(width, tokens, dtype, device):
    check(*make(width, tokens, dtype, device), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 129, 500])
@pytest.mark.parametrize("width", [32, 96, 768, 960, 1536, 1792])
def test_outputs_and_gradients_of_real_sizes(width, tokens, dtype):
    check(*make(width, tokens, dtype, "cuda"), dtype)


@pytest.mark.parametrize(("inner_block", "out_block", "num_blocks"), [(20, 7, 2), (33, 24, 6)])
def test_odd_blocks(inner_block, out_block, num_blocks, device):
    inputs, grad = make(48, 21, torch.float32, device, inner_block, out_block, num_blocks)
    check(inputs, grad, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_forward_and_the_backward_pass_make_one_intermediate(dtype, device):
    """In blocks whose width is no power of two, of which the last tiles are not full."""
    (x, input_weight, output_weight), grad = make(48, 140, dtype, device, inner_block=40, num_blocks=2)
    inner = gated_forward(x, input_weight, None, 0.0, fused=False)
    assert_close(gated_forward(x, input_weight, None, 0.0, fused=True), inner, dtype)
    for splits in (1, 3):
        assert_close(_fused(x, input_weight, splits), inner, dtype, f"{splits} splits")
    assert_close(gated_backward(grad, x, input_weight, output_weight, None, 0.0)[1], inner, dtype)
    seed = torch.tensor([2**40 + 5], device=device)
    dropped = gated_forward(x, input_weight, seed, 0.3)
    assert 0 < dropped.count_nonzero() < 0.8 * dropped.numel()
    assert_close(gated_backward(grad, x, input_weight, output_weight, seed, 0.3)[1], dropped, dtype)


def test_one_kernel_makes_the_intermediate_where_that_is_faster(device, monkeypatch):
    """In half precision, without dropout, for input blocks up to 192 features: M2-BERT-base in evaluation."""
    ways = []
    for way in ("_fused", "_in_two_steps"):
        monkeypatch.setattr(gated_mlp_forward, way, lambda *_, way=way: ways.append(way))
    for dtype, in_block, dropout in (
        (torch.bfloat16, 192, 0.0),
        (torch.bfloat16, 192, 0.1),
        (torch.bfloat16, 240, 0.0),
        (torch.float32, 192, 0.0),
    ):
        weight = torch.zeros(2, 4, in_block, dtype=dtype, device=device)
        gated_forward(torch.zeros(1, 2 * in_block, dtype=dtype, device=device), weight, None, dropout)
    assert ways == ["_fused", *3 * ["_in_two_steps"]]


def test_strided_inputs_need_no_copy(device):
    inputs, grad = make(32, 20, torch.float32, device)
    x = inputs[0].detach().t().contiguous().t().requires_grad_()  # features first in memory
    wide_grad = torch.zeros(20, 4, 8, device=device)
    wide_grad.transpose(0, 1).copy_(grad)
    check([x, *inputs[1:]], wide_grad.transpose(0, 1), torch.float32)
    check(inputs, torch.ones((), device=device).expand(grad.shape), torch.float32)


def test_no_tokens(device):
    (x, *weights), _ = make(32, 5, torch.float32, device)
    empty = x.detach()[:0].requires_grad_()
    out = gated_mlp(empty, *weights, 0.1)
    out.sum().backward()
    assert out.shape == (4, 0, 8)
    assert empty.grad.shape == (0, 32)
    assert all(weight.grad.count_nonzero() == 0 for weight in weights)


def mix(bits):
    bits = (bits ^ bits >> 16) * 0x7FEB352D & MASK32
    bits = (bits ^ bits >> 15) * 0x846CA68B & MASK32
    return bits ^ bits >> 16


def keep_mask(seed, rows, columns, dropout):
    """The kernel's mask, in Python's integers' arithmetic on int64 tensors."""
    rows, columns = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    first = mix(rows ^ seed & MASK32)
    second = mix(first ^ seed >> 32)
    bits = first ^ columns
    bits = ((bits ^ bits >> 16) * 0x7FEB352D & MASK32) ^ second
    bits = (bits ^ bits >> 15) * 0x846CA68B & MASK32
    return (bits ^ bits >> 16) >= round(dropout * 2**32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_is_the_seeds_mask_in_both_directions(dtype, device, monkeypatch):
    inputs, grad = make(32, 35, dtype, device)
    seed = 0x1234_5678_9ABC_DEF0
    monkeypatch.setattr(torch, "randint", lambda *_, device, **__: torch.tensor([seed], device=device))
    keep = keep_mask(seed, 4 * 35, 32, 0.25).view(4, 35, 32).to(device)
    check(inputs, grad, dtype, lambda *inputs: gated_mlp(*inputs, 0.25), keep / 0.75)
    inner = gated_forward(inputs[0], inputs[1], torch.tensor([seed], device=device), 0.25)
    assert torch.equal(inner != 0, keep & (inner != 0)) and (inner != 0).sum() > 0.99 * keep.sum()


@pytest.mark.parametrize("dropout", [0.1, 0.6])
def test_dropout_drops_at_its_rate_and_differs_between_seeds(dropout, device):
    (x, *weights), _ = make(48, 100, torch.float32, device)
    kept = []
    for seed in (0, 1, 2**32):
        inner = gated_forward(x, weights[0], torch.tensor([seed], device=device), dropout)
        kept.append((inner != 0).double())
        for axis in ((0, 1), (0, 2), (1, 2), (0, 1, 2)):
            share = kept[-1].mean(axis)
            count = inner.numel() / share.numel()
            assert ((share - (1 - dropout)).abs() < 6 * (dropout * (1 - dropout) / count) ** 0.5).all()
    for i, mask in enumerate(kept):
        # Neither other seeds' masks nor the same one a row or a column further say anything about a mask.
        shifted = [mask.roll(1, axis) for axis in range(3)]
        for other in [*kept[:i], *shifted]:
            correlation = torch.corrcoef(torch.stack((mask.flatten(), other.flatten())))[0, 1]
            assert abs(correlation) < 6 / mask.numel() ** 0.5


def test_dropout_follows_torchs_seed(device):
    inputs, _ = make(32, 30, torch.float32, device)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(gated_mlp(*inputs, 0.2))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(gated_mlp(*inputs, 0.2), gated_mlp(*inputs, 0.2))
    assert gated_mlp(*inputs, 1.0).count_nonzero() == 0


def test_cheap_gelu_is_near_the_exact_one(device):
    """The stated errors, far tails included: gates are x itself, and the values 1."""
    gates = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -100.0, 100.0, 1e4])))
    x = torch.stack((gates, torch.ones_like(gates)), 1).to(device, torch.float16)
    weight = torch.zeros(2, 2, 1, device=device, dtype=torch.float16)
    weight[:, 0] = 1
    share = stored_share(torch.float16)
    inner = gated_forward(x, weight, None, 0.0)[0, :, 0].double() / share
    expected = F.gelu(x[:, 0].double())
    # fp16 rounds what is stored, by 2**-11 of it, and by 2**-25 below its normal numbers.
    assert ((inner - expected).abs() <= 2.6e-5 + 2**-25 / share + expected.abs() * 2**-11 * 1.01).all()


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dimension_mixer_through_the_kernels(dtype, channels_first, device, monkeypatch):
    mixer = DimensionMixer(32, 64).to(device)
    with torch.no_grad():
        mixer.norm.weight.uniform_(0.5, 1.5)
        mixer.norm.bias.normal_()
    x = torch.randn(3, 21, 32, device=device).to(dtype).requires_grad_()
    grad = torch.randn(3, 21, 32, device=device).to(dtype)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    double = DimensionMixer(32, 64).to(device).double()
    double.load_state_dict(mixer.state_dict())
    expected = run(lambda x, *_: double(x), [*in_double(x), *double.parameters()], grad.double())
    monkeypatch.setattr("monarch_mixer.dimension_mixer.kernels_apply", lambda *_: True)

    def forward(x, *_):
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            return mixer(x, channels_first)

    results = run(forward, [x, *parameters], grad)
    assert results[0].dtype == dtype
    assert results[0].permute(2, 0, 1).is_contiguous() == channels_first
    for name, result, value in zip(("output", "x", *names), results, expected, strict=True):
        assert_close(result, value, dtype, name)


def test_inputs_of_long_convolutions_stay_within_the_range_of_fp16(device, monkeypatch):
    """Where features are in the thousands the intermediate and the output are over 65,504, beside features of size 1.

    Such tokens' gradients are as small as their deviations are large: the loss is scaled, as fp16 training does. The
    weights are fp16's, since gates in the thousands would carry their rounding across GELU's bend.
    """
    mixer = DimensionMixer(32, 64).to(device).half().float()
    size = torch.tensor([1.0, 30.0, 1000.0, 2000.0])[torch.arange(21) % 4, None]
    x = (size * torch.randn(21, 32)).to(device, torch.float16).requires_grad_()
    grad = (2**10 * torch.randn(21, 32)).to(device, torch.float16)
    double = DimensionMixer(32, 64).to(device).double()
    double.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        gates, values = double.input(x.double()).chunk(2, dim=-1)
        assert (F.gelu(gates) * values).abs().max() > 5e5 and double.mlp(x.double()).abs().max() > 1e5
    parameters = list(mixer.parameters())
    expected = run(lambda x, *_: double(x), [*in_double(x), *double.parameters()], grad.double())
    monkeypatch.setattr("monarch_mixer.dimension_mixer.kernels_apply", lambda *_: True)

    def forward(x, *_):
        with torch.autocast(device, dtype=torch.float16):
            return mixer(x)

    results = run(forward, [x, *parameters], grad)
    names = ("output", "x", *(name for name, _ in mixer.named_parameters()))
    for name, result, value in zip(names, results, expected, strict=True):
        assert_close(result, value, torch.float16, name)


def test_registration(device):
    inputs, _ = make(32, 6, torch.float32, device)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_gated_mlp, (*inputs, torch.tensor([3], device=device), 0.1, False), test_utils=checks)


def test_compiled_in_one_graph(device):
    inputs, grad = make(32, 12, torch.float32, device)

    def function(dropout, *inputs):
        return gated_mlp(*inputs, dropout).sin()

    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for dropout in (0.4, 0.0) if device == "cuda" else (0.4,):
        results = []
        for version in (compiled, compiled, function):
            torch.manual_seed(3)
            results.append(run(partial(version, dropout), inputs, grad))
        assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
        if device == "cpu" or not dropout:  # Inductor draws other seeds than eager PyTorch
            assert all(relative_error(a, b) < 1e-5 for a, b in zip(*results[1:], strict=True))


def test_mistakes_are_named():
    (x, input_weight, output_weight), _ = make(32, 4, torch.float32, "cpu")
    with pytest.raises(ValueError, match="weights do not fit"):
        gated_mlp(x, input_weight[:3], output_weight[:3], 0.0)
    with pytest.raises(ValueError, match="4 x 8 features"):
        gated_mlp(x[:, 1:], input_weight, output_weight, 0.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        gated_mlp(x, input_weight, output_weight, -0.1)
