"""The mixer's way through the kernels against its plain way, on the same weights."""

import copy

import pytest
import torch

from monarch_mixer import MonarchSequenceMixer
from monarch_mixer.filters import two_sided_taps
from monarch_mixer.kernels import support
from tests.monarch_mixer.kernels.support import DTYPES, TOLERANCES, relative_error

CHANNELS = 4
FORMS = [{}, {"layer_norm": True}, {"bidirectional": False}, {"residual_convolution": False}]


def make(length, device, **form):
    mixer = MonarchSequenceMixer(CHANNELS, length, filter_order=8, sine_frequency=2.0, **form).to(device)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer


def through_kernels(mixer, x, taps=None, cache_filters=True, lengths=None):
    return mixer._forward_kernels(x, x.dtype, taps, cache_filters, lengths)


@pytest.mark.parametrize(("form", "length"), [*((form, 20) for form in FORMS), ({"layer_norm": True}, 150)])
def test_outputs_and_gradients(form, length, device):
    mixer = make(length + 3, device, **form)
    x = torch.randn(2, length, CHANNELS, device=device, requires_grad=True)
    out = through_kernels(mixer, x)
    exact = copy.deepcopy(mixer).double().cpu()
    exact_x = x.detach().double().cpu().requires_grad_()
    expected = exact(exact_x)
    assert relative_error(out.cpu(), expected) < 1e-5
    grad = torch.randn_like(expected)
    got = torch.autograd.grad(out, [x, *mixer.parameters()], grad.to(out))
    wanted = torch.autograd.grad(expected, [exact_x, *exact.parameters()], grad)
    for gradient, reference in zip(got, wanted, strict=True):
        assert relative_error(gradient.cpu(), reference) < 1e-5


def test_a_long_sequence_is_mixed_alike_whatever_its_batch_is_padded_to(device, monkeypatch):
    """Exact to fp32: the mixer asks for taps to the end of the last block of the transforms, here a small one."""
    monkeypatch.setattr(support, "LARGEST_EXACT_BLOCK", 256)
    mixer = make(700, device)
    x = torch.randn(1, 600, CHANNELS).to(device)
    padded = through_kernels(mixer, x, lengths=torch.tensor([300], dtype=torch.int32, device=device))[:, :300]
    alone = through_kernels(mixer, x[:, :300])
    assert torch.equal(padded, alone) if device == "cpu" else relative_error(padded, alone) < 5e-7


def test_padding_is_left_out_as_in_the_plain_way(device):
    """In training, and in evaluation with kept filters; each sequence is as if it were alone."""
    mixer = make(20, device, layer_norm=True)
    lengths = torch.tensor([11, 20], dtype=torch.int32, device=device)
    x = torch.randn(2, 20, CHANNELS, device=device, requires_grad=True)
    real = (torch.arange(20, device=device) < lengths[:, None])[..., None]
    out = through_kernels(mixer, x, lengths=lengths)
    exact = copy.deepcopy(mixer).double().cpu()
    exact_x = x.detach().double().cpu().requires_grad_()
    expected = exact(exact_x, lengths=lengths.cpu())
    alone = exact(exact_x[:1, :11])
    assert relative_error(expected[:1, :11], alone) < 1e-12
    assert relative_error(out.cpu(), expected) < 1e-5
    grad = torch.randn(x.shape, device="cpu").to(device) * real
    got = torch.autograd.grad(out, [x, *mixer.parameters()], grad)
    wanted = torch.autograd.grad(expected, [exact_x, *exact.parameters()], grad.double().cpu())
    for gradient, reference in zip(got, wanted, strict=True):
        assert relative_error(gradient.cpu(), reference) < 1e-5
    assert not (got[0] * ~real).any()
    with torch.no_grad():
        assert (
            relative_error(through_kernels(mixer, x[:, :15], lengths=lengths.clamp(max=15))[0, :11].cpu(), alone[0])
            < 1e-5
        )


def test_evaluation_keeps_filters_until_a_weight_changes(device, monkeypatch):
    from monarch_mixer.kernels import sequence_mixer

    evaluations = []

    def counted(*arguments):
        evaluations.append(arguments)
        return two_sided_taps(*arguments)

    monkeypatch.setattr(sequence_mixer, "two_sided_taps", counted)
    mixer = make(12, device).eval()
    x = torch.randn(1, 12, CHANNELS, device=device)
    with torch.no_grad():
        first = through_kernels(mixer, x)
        assert torch.equal(through_kernels(mixer, x), first) and len(evaluations) == 2  # one a filter
        mixer.filter.frequency.mul_(1.5)
        second = through_kernels(mixer, x)
        assert len(evaluations) == 3 and not torch.equal(second, first)
        assert relative_error(second, through_kernels(mixer, x, cache_filters=False).double()) < 1e-6


@pytest.mark.parametrize(("longest", "lengths"), [(60, [60, 7, 33, 60]), (600, [140, 300, 140, 256, 512, 300])])
def test_lengths_that_alternate_share_and_keep_their_filters(longest, lengths, device, monkeypatch):
    from monarch_mixer.kernels import sequence_mixer

    made = []

    def counted(taps, *arguments):
        made.append((taps.shape[1] + 1) // 2)
        return operand(taps, *arguments)

    operand = sequence_mixer.operand
    mixer = make(longest, device, residual_convolution=False).eval()
    with torch.no_grad():
        for length in lengths:
            x = torch.randn(1, length, CHANNELS, device=device)
            expected = through_kernels(mixer, x, cache_filters=False)
            monkeypatch.setattr(sequence_mixer, "operand", counted)
            assert relative_error(through_kernels(mixer, x), expected.double()) < 1e-6
            monkeypatch.undo()
    assert made == ([60] if longest == 60 else [256, 512])


def test_only_so_many_filters_are_kept(device, monkeypatch):
    from monarch_mixer.kernels import sequence_mixer

    monkeypatch.setattr(sequence_mixer, "MAX_KEPT_OPERANDS", 1)
    mixer = make(300, device, residual_convolution=False).eval()
    with torch.no_grad():
        for length in (20, 140, 280):
            through_kernels(mixer, torch.randn(1, length, CHANNELS, device=device))
    assert len(sequence_mixer._kept[mixer.filter.position_features].operands) == 1


def test_channels_first_input_is_not_copied(device):
    from monarch_mixer.kernels.sequence_mixer import channels_first

    x = torch.randn(CHANNELS, 2, 9, device=device)
    assert channels_first(x.permute(1, 2, 0)).data_ptr() == x.data_ptr()
    y = torch.randn(2, 9, CHANNELS, device=device)
    assert torch.equal(channels_first(y), y.permute(2, 0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_poisoned_padding_of_a_tile_stays_out(dtype, device):
    """Positions past the length lie in the same tile: what the memory after the last sequence holds must not matter."""
    mixer = make(140, device)
    x = torch.randn(3, 130, CHANNELS, device=device)
    with torch.no_grad():
        whole = through_kernels(mixer, x.to(dtype))
        part = through_kernels(mixer, x[:1].to(dtype))
    assert relative_error(part, whole[:1]) < TOLERANCES[dtype]
