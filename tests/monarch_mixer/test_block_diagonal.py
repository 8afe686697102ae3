import pytest
import torch
from safetensors.torch import load_file

from monarch_mixer import (
    BlockDiagonalLinear,
    DimensionMixer,
    block_diagonal_linear,
    block_diagonal_multiply,
    gated_block_diagonal_mlp,
    reference,
)
from tests.conftest import FIXTURES

OPS = load_file(FIXTURES / "goldens" / "ops" / "mm_ops.safetensors")


SHUFFLED = "linear3"  # the original's shuffle=True, which no model uses


def cases(prefix):
    return sorted({key.split(".")[0] for key in OPS if key.startswith(prefix)} - {SHUFFLED})


def tensors_of(case):
    return {key.split(".", 1)[1]: value for key, value in OPS.items() if key.startswith(f"{case}.")}


@pytest.mark.parametrize("case", cases("blockdiag"))
def test_golden_multiply(case):
    tensors = tensors_of(case)
    x, weight = tensors["x"].requires_grad_(), tensors["w"].requires_grad_()
    y = block_diagonal_multiply(x, weight)
    gradients = torch.autograd.grad(y, (x, weight), tensors["cotangent"])
    for actual, name in zip((y, *gradients), ("out", "dx", "dw"), strict=True):
        torch.testing.assert_close(actual, tensors[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", cases("linear"))
def test_golden_linear(case):
    tensors = tensors_of(case)
    layer = BlockDiagonalLinear(
        tensors["x"].shape[-1], tensors["out"].shape[-1], len(tensors["weight"]), bias="bias" in tensors
    )
    layer.load_state_dict({name: tensors[name] for name in ("weight", "bias") if name in tensors})
    x = tensors["x"].requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y, (x, *layer.parameters()), tensors["cotangent"])
    wanted = [tensors[name] for name in ("out", "dx", "dweight", "dbias") if name in tensors]
    for actual, golden in zip((y, *gradients), wanted, strict=True):
        torch.testing.assert_close(actual, golden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("features", [(32, 64, 4), (10, 7, 3), (9, 31, 4), (8, 8, 1), (5, 3, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_its_dense_matrix(features, bias):
    inputs, outputs, blocks = features
    layer = BlockDiagonalLinear(inputs, outputs, blocks, bias=bias).double()
    dense = reference.block_diagonal_matrix(layer.weight)[:outputs, :inputs]
    x = torch.randn(2, 3, inputs, dtype=torch.float64, requires_grad=True)
    expected = x @ dense.t() + (layer.bias if bias else 0)
    parameters = [x, *layer.parameters()]
    torch.testing.assert_close(layer(x), expected)
    for actual, wanted in zip(
        torch.autograd.grad(layer(x).square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


def test_wrong_width_is_an_error():
    layer = BlockDiagonalLinear(8, 8, 2)
    with pytest.raises(ValueError, match="expected 8 features"):
        layer(torch.randn(2, 7))
    with pytest.raises(ValueError, match="positive"):
        BlockDiagonalLinear(8, 0, 2)


@pytest.mark.parametrize("blocks", [2, 4, 6])
def test_fast_glu_equals_the_plain_composition(blocks):
    channels, inner = 12, 24
    mixer = DimensionMixer(channels, inner, num_blocks=blocks).double()
    assert mixer.blocks_align
    x = torch.randn(2, 5, channels, dtype=torch.float64, requires_grad=True)

    def plain(x):
        wide = block_diagonal_linear(x, mixer.input.weight, None, channels, 2 * inner)
        gates, values = wide.chunk(2, -1)
        middle = torch.nn.functional.gelu(gates) * values
        return block_diagonal_linear(middle, mixer.output.weight, mixer.output.bias, inner, channels)

    parameters = [x, mixer.input.weight, mixer.output.weight, mixer.output.bias]
    torch.testing.assert_close(mixer.mlp(x), plain(x))
    for actual, wanted in zip(
        torch.autograd.grad(mixer.mlp(x).square().sum(), parameters),
        torch.autograd.grad(plain(x).square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    weight_in, weight_out = torch.randn(4, 8, 4), torch.randn(4, 4, 4)
    x, bias = torch.randn(1, 16), torch.zeros(16)
    plain = gated_block_diagonal_mlp(x, weight_in, weight_out, bias, 0.5, False)
    torch.testing.assert_close(plain, gated_block_diagonal_mlp(x, weight_in, weight_out, bias, 0.0, True))
    many = gated_block_diagonal_mlp(x.expand(20000, 16), weight_in, weight_out, bias, 0.5, True)
    assert not torch.equal(many[0], many[1])
    torch.testing.assert_close(many.mean(0), plain[0], rtol=0.1, atol=0.15 * plain.abs().max().item())


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("blocks", [None, 4, 3])
def test_dimension_mixer_is_residual_and_normalised(gated, blocks):
    mixer = DimensionMixer(16, 30, num_blocks=blocks, gated=gated)
    x = torch.randn(2, 3, 16)
    expected = torch.nn.functional.layer_norm(mixer.mlp(x) + x, (16,), eps=1e-12)
    torch.testing.assert_close(mixer(x), expected)
    assert not torch.allclose(mixer.mlp(x), torch.zeros_like(x))
