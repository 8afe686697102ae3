import math

import pytest
import torch

from monarch_mixer import ImplicitFilter, MonarchSequenceMixer, reference


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


def test_a_causal_mixer_sees_no_future_and_a_bidirectional_one_does():
    for bidirectional in (True, False):
        mixer = MonarchSequenceMixer(4, 16, filter_order=8, bidirectional=bidirectional)
        x = torch.randn(1, 16, 4)
        changed = x.clone()
        changed[0, 10] += 1
        same = torch.isclose(mixer(x), mixer(changed), atol=1e-6).all(-1)[0]
        assert same[:10].all().item() is not bidirectional
        assert not same[10:].all()
