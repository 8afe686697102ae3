import pytest
import torch

from monarch_mixer import cpu, reference

SIZES = [(1, 8, 12, 4), (7, 12, 36, 6), (1025, 8, 8, 2), (2100, 16, 24, 4)]  # tokens, channels, intermediate, blocks


def gradients(y, parameters):
    cotangent = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    return torch.autograd.grad((y * cotangent).sum(), parameters)


def plain_mlp(x, input_weight, output_weight, kept=None):
    wide = x @ reference.block_diagonal_matrix(input_weight).t()
    gates, values = wide.chunk(2, -1)
    inner = torch.nn.functional.gelu(gates) * values
    if kept is not None:
        inner = inner * kept
    return inner @ reference.block_diagonal_matrix(output_weight).t()


def make_mlp(size, dtype):
    tokens, channels, intermediate, blocks = size
    shapes = [
        (tokens, channels),
        (blocks, 2 * intermediate // blocks, channels // blocks),
        (blocks, channels // blocks, intermediate // blocks),
    ]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", SIZES)
def test_gated_mlp_and_every_gradient(size, dtype, tolerance):
    inputs = make_mlp(size, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y, expected = cpu.gated_block_diagonal_mlp(*inputs, 0.0), plain_mlp(*exact)
    for actual, wanted in zip((y, *gradients(y, inputs)), (expected, *gradients(expected, exact)), strict=True):
        assert (actual - wanted).norm() / wanted.norm() < tolerance


def test_gated_mlp_with_dropout_and_every_gradient():
    inputs = make_mlp((1500, 8, 12, 4), torch.float64)
    torch.manual_seed(3)
    y = cpu.gated_block_diagonal_mlp(*inputs, 0.25)
    torch.manual_seed(3)
    dropped = cpu.draw_dropped((4, 1500, 3), 0.25)
    kept = (~dropped).transpose(0, 1).flatten(1).double() / 0.75
    expected = plain_mlp(*inputs, kept)
    for actual, wanted in zip((y, *gradients(y, inputs)), (expected, *gradients(expected, inputs)), strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_drops_the_right_share_and_follows_the_seed(probability):
    torch.manual_seed(0)
    dropped = cpu.draw_dropped((3, 1001, 67), probability)
    assert dropped.float().mean().item() == pytest.approx(probability, abs=0.005)
    shares = dropped.float().mean((0, 1))
    assert shares.min() > probability - 0.06 and shares.max() < probability + 0.06
    assert not torch.equal(dropped, cpu.draw_dropped((3, 1001, 67), probability))
    torch.manual_seed(0)
    assert torch.equal(dropped, cpu.draw_dropped((3, 1001, 67), probability))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 7), (2, 1, 1, 7), (0, 7)])
def test_linear_and_every_gradient(shape, bias):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(11, 7, requires_grad=True)
    parameters = [x, weight] + ([torch.randn(11, requires_grad=True)] if bias else [])
    y, expected = cpu.linear(*parameters), torch.nn.functional.linear(*parameters)
    assert y.shape == expected.shape
    for actual, wanted in zip(
        (y, *gradients(y, parameters)), (expected, *gradients(expected, parameters)), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


def test_other_dtypes_devices_and_autocast_take_the_plain_form():
    x, weight = torch.randn(2, 7), torch.randn(3, 7)
    assert cpu.cpu_path_applies(x, weight)
    assert not cpu.cpu_path_applies(x.bfloat16(), weight.bfloat16())
    assert not cpu.cpu_path_applies(x.bfloat16(), weight)
    assert not cpu.cpu_path_applies(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not cpu.cpu_path_applies(x, weight)
        assert cpu.linear(x, weight).dtype == torch.bfloat16
