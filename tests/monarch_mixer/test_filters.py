import copy
import math

import pytest
import torch

from monarch_mixer import ImplicitFilter, MonarchSequenceMixer, filters, reference, sequence_mixer
from monarch_mixer.filters import evaluation_dtype, taps_for_training, two_sided_taps
from monarch_mixer.kernels import support
from tests.monarch_mixer.kernels.support import relative_error


def test_position_grid_and_decay():
    implicit = ImplicitFilter(6, 9, num_position_features=5, order=4)
    features = implicit.position_features
    for position in range(9):
        for band, frequency in enumerate((1e-4, 1.0)):
            angle = 2 * math.pi * position / 9 * frequency
            assert features[position, 1 + band].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert features[position, 3 + band].item() == pytest.approx(-math.sin(angle), abs=1e-6)
        assert features[position, 0].item() == pytest.approx(position / 8)
    assert implicit.decay_rates[0].item() == pytest.approx(-3.0701, abs=1e-4)
    assert implicit.decay_rates[-1].item() == pytest.approx(-15.3506, abs=1e-4)


def test_a_shorter_sequence_gets_the_first_taps():
    implicit = ImplicitFilter(4, 16, order=8)
    for whole, first in zip(implicit(16), implicit(7), strict=True):
        torch.testing.assert_close(whole[:7], first)
    with pytest.raises(ValueError, match="17 positions"):
        implicit(17)


def test_sines_are_evaluated_in_fp64_where_all_else_is_exact(monkeypatch):
    """And nowhere else: it costs time, and half precision or tf32 show nothing of it."""
    for device, tf32, exact in (
        ("cpu", True, True),
        ("cuda", False, True),
        ("cuda", True, False),
        ("mps", False, False),
    ):
        monkeypatch.setattr(support, "tf32_allowed", lambda device_type, tf32=tf32: tf32 and device_type == "cuda")
        expected = torch.float64 if exact else torch.float32
        assert evaluation_dtype(torch.float32, torch.device(device)) == expected
        assert evaluation_dtype(torch.bfloat16, torch.device(device)) == torch.float32


def test_taps_in_fp32_are_exact_where_their_sines_are():
    """A mixer in fp32 asks for that; under autocast it does not."""
    mixer = MonarchSequenceMixer(8, 64, filter_order=128).train()
    exact = copy.deepcopy(mixer.filter).double()(64)[0]
    assert relative_error(mixer.filter(64, dtype=torch.float64)[0], exact) < 3e-7
    assert relative_error(mixer.filter(64)[0], exact) > 1e-6
    asked = []
    mixer.filter.register_forward_hook(lambda module, arguments, taps: asked.append(arguments[2]))
    mixer(torch.randn(2, 64, 8))
    with torch.autocast("cpu", torch.bfloat16):
        mixer(torch.randn(2, 64, 8))
    assert asked == [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_taps_ignore_autocast(dtype):
    implicit = ImplicitFilter(4, 16, order=8)
    expected = implicit(16)
    with torch.autocast("cpu", dtype=dtype):
        taps = implicit(16)
    for actual, wanted in zip(taps, expected, strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, wanted)


def test_positions_stay_distinct_when_the_model_runs_in_bf16():
    implicit = ImplicitFilter(4, 8192, order=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert implicit(8192)[0].unique(dim=0).shape[0] == 8192


@pytest.mark.parametrize(("length", "positions"), [(512, 512), (513, 1024), (1024, 1024), (1025, 1500), (1500, 1500)])
def test_exact_long_sequences_get_taps_to_the_end_of_their_last_block(length, positions):
    implicit = ImplicitFilter(3, 1500, order=8)
    taps = taps_for_training([implicit.tensors()], length, 1.0, torch.float32)
    assert taps.shape == (1, 3, 2 * positions - 1)
    expected = two_sided_taps([implicit.tensors()], length, 1.0, torch.float64)
    unmet = positions - length
    torch.testing.assert_close(taps[..., unmet : unmet + 2 * length - 1], expected, rtol=1e-6, atol=1e-7)
    if unmet:
        assert taps[..., :unmet].any() and taps[..., -unmet:].any()
    taps.square().sum().backward()
    assert implicit.position_features.grad[:length].any(1).all()
    assert not implicit.position_features.grad[length:].any()


def test_other_taps_are_for_the_sequence_alone(monkeypatch):
    implicit = ImplicitFilter(3, 1500, order=8)
    assert taps_for_training([implicit.tensors()], 700, 1.0, torch.bfloat16).shape == (1, 3, 1399)
    monkeypatch.setattr(filters, "exact_in_fp32", lambda dtype, device: False)  # as where fp32 products may be tf32
    assert taps_for_training([implicit.tensors()], 700, 1.0, torch.float32).shape == (1, 3, 1399)


def test_last_weights_of_filters_in_training_get_exact_sums_over_positions() -> None:
    torch.manual_seed(1)
    implicit = ImplicitFilter(8, 4096, bidirectional=False)
    weight = implicit.forward_network.layers[-1].weight
    upstream = torch.randn(1, 8, 2 * 4096 - 1)
    (exact,) = torch.autograd.grad(taps_for_training([implicit.tensors()], 4096, 1.0, torch.float32), weight, upstream)
    double = copy.deepcopy(implicit).double()
    taps = two_sided_taps([double.tensors()], 4096, 1.0, torch.float64)
    (expected,) = torch.autograd.grad(taps, double.forward_network.layers[-1].weight, upstream.double())
    error = (exact - expected).norm() / expected.norm()
    assert error < 1.5e-7  # 2.7e-7 with sums in fp32 on a CPU


def test_cached_taps_follow_every_change_of_the_weights():
    implicit = ImplicitFilter(4, 16, order=8).eval()

    def is_fresh(length=16):
        with torch.no_grad():
            kept = implicit(length)
        with torch.enable_grad():
            fresh = implicit(length)
        return all(torch.equal(a, b) for a, b in zip(kept, fresh, strict=True))

    with torch.no_grad():
        assert implicit(16)[0] is implicit(16)[0]
        implicit.frequency.mul_(2)
    assert is_fresh()
    optimizer = torch.optim.SGD(implicit.parameters(), lr=0.1)
    implicit(16)[0].sum().backward()
    optimizer.step()
    assert is_fresh()
    implicit.load_state_dict(ImplicitFilter(4, 16, order=8).state_dict())
    assert is_fresh()
    implicit.decay_rates = implicit.decay_rates * 2
    assert is_fresh() and is_fresh(5)
    implicit.double()
    assert is_fresh()
    implicit.train()
    with torch.no_grad():
        assert implicit(16)[0] is not implicit(16)[0]


def test_a_filter_made_in_inference_mode_keeps_no_taps():
    with torch.inference_mode():
        implicit = ImplicitFilter(4, 16, order=8).eval()
        before = implicit(16)[0]
        implicit.decay_rates.mul_(2)  # which no version tells
        assert not torch.equal(implicit(16)[0], before)


def test_fixed_positions_are_a_buffer():
    implicit = ImplicitFilter(4, 16, learn_positions=False)
    assert "position_features" in dict(implicit.named_buffers())
    assert "position_features" in implicit.state_dict()
    with pytest.raises(ValueError, match="odd"):
        ImplicitFilter(4, 16, num_position_features=4)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("length", [1, 5, 31])
def test_mixer_equals_its_parts_by_the_reference(length, bidirectional, residual):
    mixer = MonarchSequenceMixer(
        6, 31, filter_order=8, bidirectional=bidirectional, residual_convolution=residual, layer_norm=True
    ).double()
    x = torch.randn(2, length, 6, dtype=torch.float64)
    u = torch.nn.functional.layer_norm(x, (6,), eps=1e-5)
    p = reference.short_convolution(mixer.input_projection(u), mixer.short_weight, mixer.short_bias)
    y = reference.long_convolution(p[..., 12:] * p[..., :6], *mixer.filter(length), mixer.filter.skip) * p[..., 6:12]
    if residual:
        y = y + reference.long_convolution(u, *mixer.residual_filter(length), mixer.residual_filter.skip)
    torch.testing.assert_close(mixer(x), mixer.output_projection(y))


def assert_near(found, expected):
    """Within 1e-5 of the norm; zeros, such as gradients of what a single position does not reach, are zeros."""
    expected = expected.detach().double()
    assert (found.detach().double() - expected).norm() <= 1e-5 * expected.norm()


def centered_mixer_equations(mixer, x):
    """The mixer with a centered short convolution as sums over positions, from its weights and its filters' taps."""
    length, channels = x.shape[1:]

    def convolve(u, implicit):
        ahead, back = implicit(length)
        rows = [
            sum((ahead[t - s] if s <= t else back[s - t - 1]) * u[:, s] for s in range(length)) for t in range(length)
        ]
        return torch.stack(rows, 1) + implicit.skip * u

    u = x
    if mixer.norm is not None:
        u = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
        u = u * mixer.norm.weight + mixer.norm.bias
    p = u @ mixer.input_projection.weight.t() + mixer.input_projection.bias
    left, here, right = mixer.short_weight[:, 0].unbind(1)
    rows = []
    for t in range(length):
        row = mixer.short_bias + here * p[:, t]
        row = row + left * p[:, t - 1] if t > 0 else row
        rows.append(row + right * p[:, t + 1] if t + 1 < length else row)
    before, after, value = torch.stack(rows, 1).split(channels, -1)
    y = after * convolve(before * value, mixer.filter)
    if mixer.residual_filter is not None:
        y = y + convolve(u, mixer.residual_filter)
    return y @ mixer.output_projection.weight.t() + mixer.output_projection.bias


@pytest.mark.parametrize("form", [{}, {"layer_norm": True}, {"residual_convolution": False}], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 17])
def test_a_centered_mixer_follows_its_equations(length, form):
    """Outputs and every gradient, in fp64 and, nearly, in fp32, which takes other methods."""
    mixer = MonarchSequenceMixer(5, 17, filter_order=7, short_convolution_centered=True, **form).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, length, 5, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(x)
    leaves = [x, *mixer.parameters()]
    expected = centered_mixer_equations(mixer, x)
    wanted = torch.autograd.grad(expected, leaves, cotangent, allow_unused=True, materialize_grads=True)
    y = mixer(x)
    got = torch.autograd.grad(y, leaves, cotangent, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(y, expected)
    for gradient, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-9)
    single, single_x = copy.deepcopy(mixer).float(), x.detach().float().requires_grad_()
    y = single(single_x)
    assert_near(y, expected)
    got = torch.autograd.grad(
        y, [single_x, *single.parameters()], cotangent.float(), allow_unused=True, materialize_grads=True
    )
    for gradient, exact in zip(got, wanted, strict=True):
        assert_near(gradient, exact)


def test_a_centered_mixer_has_the_same_parameters_and_is_another_function():
    causal = MonarchSequenceMixer(4, 16, filter_order=8)
    centered = MonarchSequenceMixer(4, 16, filter_order=8, short_convolution_centered=True)
    assert [(name, value.shape) for name, value in causal.state_dict().items()] == [
        (name, value.shape) for name, value in centered.state_dict().items()
    ]
    centered.load_state_dict(causal.state_dict())
    x = torch.randn(2, 9, 4)
    assert relative_error(centered(x), causal(x).double()) > 1e-2


def test_a_causal_mixer_has_no_centered_short_convolution():
    with pytest.raises(ValueError, match="next position"):
        MonarchSequenceMixer(4, 16, bidirectional=False, short_convolution_centered=True)


@pytest.mark.parametrize("length", [1, 2, 3, 17])
def test_a_centered_mixer_leaves_padding_out(length):
    """Whatever it holds: outputs at real positions, and gradients of a loss on them, are those of each row alone."""
    mixer = MonarchSequenceMixer(5, 20, filter_order=8, layer_norm=True, short_convolution_centered=True)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    lengths = [length, max(1, length - 2), 1]
    rows = [torch.randn(1, n, 5) for n in lengths]
    cotangents = [torch.randn_like(row) for row in rows]
    leaves = list(mixer.parameters())

    def gradients(outputs):
        total = sum((y * c).sum() for y, c in zip(outputs, cotangents, strict=True))
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    alone = [mixer(row) for row in rows]
    expected = gradients(alone)
    for width in (length, length + 1, length + 3):
        x = 30 * torch.randn(3, width, 5)
        for index, row in enumerate(rows):
            x[index, : row.shape[1]] = row[0]
        x.requires_grad_()
        y = mixer(x, lengths=torch.tensor(lengths, dtype=torch.int32))
        outputs = [y[index : index + 1, :n] for index, n in enumerate(lengths)]
        for found, wanted in zip(outputs, alone, strict=True):
            assert_near(found, wanted)
        for found, wanted in zip(gradients(outputs), expected, strict=True):
            assert_near(found, wanted)
    # Taken for text it shows, of the first row in its last position too.
    assert relative_error(mixer(x)[:1, length - 1 : length], alone[0][:, -1:].double()) > 1e-2


def test_a_centered_mixer_runs_without_kernels_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(support, "_logged", set())
    asked = support._supported
    # As on a GPU, which is what the first two conditions of the dispatch ask.
    monkeypatch.setattr(sequence_mixer, "kernels_apply", lambda x, dtype, lacking=None: asked(0, dtype, lacking))
    taken = []
    monkeypatch.setattr(MonarchSequenceMixer, "_forward_kernels", lambda self, x, *_: taken.append(1) or x)
    x = torch.randn(2, 9, 4)
    MonarchSequenceMixer(4, 16, filter_order=8)(x)
    assert taken == [1] and not caplog.records
    for _ in range(2):
        MonarchSequenceMixer(4, 16, filter_order=8, short_convolution_centered=True)(x)
    assert taken == [1] and len(caplog.records) == 1
    assert "without its Triton kernels" in caplog.text and "causal short convolution alone" in caplog.text


def test_a_causal_mixer_sees_no_future_and_a_bidirectional_one_does():
    for bidirectional in (True, False):
        mixer = MonarchSequenceMixer(4, 16, filter_order=8, bidirectional=bidirectional)
        x = torch.randn(1, 16, 4)
        changed = x.clone()
        changed[0, 10] += 1
        same = torch.isclose(mixer(x), mixer(changed), atol=1e-6).all(-1)[0]
        assert same[:10].all().item() is not bidirectional
        assert not same[10:].all()
