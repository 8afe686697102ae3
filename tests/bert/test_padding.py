"""Padding changes nothing: outputs and gradients of a padded batch are those of each of its rows alone."""

import pytest
import torch

from bert import modeling
from bert.checkpoint import load_original
from bert.composer_models import build_masked_lm
from bert.modeling import real_lengths
from tests.bert.test_composer_models import FIELDS, RATES
from tests.bert.test_modeling import SMALL

MODELS = {
    "m2": ("m2_bert", {}),
    "m2_additions": ("m2_bert", {"hyena_training_additions": True, "hidden_size": 26}),
    "m2_centered": ("m2_bert", {"short_conv_centered": True, "hidden_size": 26}),
    "m2_causal": ("m2_bert", {"bidirectional": False, "residual_long_conv": False}),
    "attention": ("attention_bert", {"hidden_size": 18}),
    "hugging_face": ("hf_bert", {}),
}
LENGTHS = (13, 1, 8, 19)  # of the rows of a batch
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


def make(name, device="cpu", **changes):
    model_name, own = MODELS[name]
    fields = {**FIELDS[model_name], "attention_probs_dropout_prob": 0.0, **own, **changes}
    return build_masked_lm(model_name, fields, **RATES).model.to(device).train()


def make_rows(lengths, hidden, device="cpu"):
    ids = [torch.randint(1, 50, (length,), device=device) for length in lengths]
    return ids, [torch.randn(length, hidden, device=device) for length in lengths]


def run(model, rows, weights, width, dtype=None):
    """The rows' hidden states and the gradients of a loss on them, as a batch padded with any tokens to `width`."""
    device = rows[0].device
    ids = torch.randint(1, 50, (len(rows), width), device=device)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    model.zero_grad()
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        hidden = model.base_model(input_ids=ids, attention_mask=mask)[0].float()
    hidden = [hidden[index, : len(row)] for index, row in enumerate(rows)]
    torch.stack([(h * w).sum() for h, w in zip(hidden, weights, strict=True)]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat(hidden).detach(), gradients


def run_alone(model, rows, weights, dtype=None):
    """The same of each row in a batch of its own, without padding."""
    parts = [run(model, [row], [weight], len(row), dtype) for row, weight in zip(rows, weights, strict=True)]
    gradients = {}
    for _, of_row in parts:
        for name, gradient in of_row.items():
            gradients[name] = gradients.get(name, 0) + gradient
    return torch.cat([hidden for hidden, _ in parts]), gradients


def error(value, expected):
    return ((value - expected).norm() / expected.norm().clamp(min=1e-6)).item()


def assert_same(found, expected, tolerance):
    """The largest difference of a hidden state, and the norms of each gradient's and of all, by those expected."""
    assert (found[0] - expected[0]).abs().max() <= tolerance * expected[0].abs().max()
    assert found[1].keys() == expected[1].keys()
    total = torch.cat([gradient.flatten() for gradient in expected[1].values()]).norm()
    differences = [(found[1][name] - gradient).flatten() for name, gradient in expected[1].items()]
    assert torch.cat(differences).norm() <= tolerance * total
    for name, gradient in expected[1].items():  # those that cancel to nothing are judged beside the others
        difference = (found[1][name] - gradient).norm()
        assert difference <= tolerance * max(gradient.norm(), 0.01 * total), name


def assert_same_but_for_rounding(draws):
    """As far from fp32 as half precision is without padding too: of each draw, (found, alone, exact).

    The filters' first layers carry most of the gradients' squared error, in 10 to 20 directions: of two draws of
    one rounding's noise, one is over twice the other once in 20 to 100 times. So it is summed over several.
    """
    of_found = of_alone = 0.0
    for found, alone, exact in draws:
        assert error(found[0], exact[0]) < 1.5 * error(alone[0], exact[0]) < 0.1
        for name, gradient in exact[1].items():
            of_found += (found[1][name] - gradient).norm().item() ** 2
            of_alone += (alone[1][name] - gradient).norm().item() ** 2
    assert of_found < 2 * of_alone  # also where one is not a number


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_a_padded_batch_is_its_rows(name, device):
    model = make(name, device)
    rows, weights = make_rows(LENGTHS, model.config.hidden_size, device)
    expected = run_alone(model, rows, weights)
    for width in (19, 20):
        assert_same(run(model, rows, weights, width), expected, 1e-5)
    assert_same(run(model, rows[:1], weights[:1], 17), run(model, rows[:1], weights[:1], 13), 1e-5)


def test_a_long_padded_batch_is_its_rows():
    """Where convolutions are FFTs, here of 2,048, 1,536 and 1,024 numbers. (1e-5 would hold for fp32 FFTs too.)"""
    length = 1021
    model = make("m2_additions", max_position_embeddings=length, long_conv_l_max=length, hidden_size=48)
    rows, weights = make_rows((length, 3 * length // 4, length // 2), model.config.hidden_size)
    assert_same(run(model, rows, weights, length), run_alone(model, rows, weights), 4e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["m2", "m2_centered", "attention", "hugging_face"])
def test_in_bf16_up_to_its_own_rounding(name, device):
    model = make(name, device)
    rows, weights = make_rows(LENGTHS, model.config.hidden_size, device)
    exact = run_alone(model, rows, weights)
    alone = run_alone(model, rows, weights, torch.bfloat16)
    assert_same_but_for_rounding([(run(model, rows, weights, 20, torch.bfloat16), alone, exact)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [60, 100, 128, 130, 509, 1021, 4097, 9001])
def test_long_batches_on_a_gpu(length, dtype):
    """Both families of kernels, sequences of several blocks, and in fp32 gradients with and without kernels."""
    fields = {"max_position_embeddings": length, "long_conv_l_max": length, "hidden_size": 48}
    lengths = (length - 3, length // 2, 1, length // 3 + 1)
    draws = []
    for _ in range(1 if dtype is None else 4):
        model = make("m2_additions", "cuda", **fields)
        rows, weights = make_rows(lengths, 48, "cuda")
        exact, found = run_alone(model, rows, weights), run(model, rows, weights, length, dtype)
        draws.append((found, exact if dtype is None else run_alone(model, rows, weights, dtype), exact))
    if dtype is None:
        assert_same(found, exact, 1e-5)
    else:
        assert_same_but_for_rounding(draws)
    model.eval()
    with torch.inference_mode():  # through the kept filters
        padded = model.base_model(
            input_ids=torch.nn.functional.pad(rows[1], (0, 7), value=3)[None],
            attention_mask=torch.nn.functional.pad(torch.ones_like(rows[1]), (0, 7))[None],
        )[0][:, :-7]
        alone = model.base_model(input_ids=rows[1][None])[0]
    assert error(padded, alone) < 1e-5


def test_the_encoder_evaluates_filters_to_the_end_of_a_block(monkeypatch):
    """Of all layers together, for the kernels, which run on a GPU alone."""
    monkeypatch.setattr(modeling, "kernels_apply", lambda *arguments: True)
    encoder = make("m2", max_position_embeddings=1500, long_conv_l_max=1500).base_model.encoder
    for length, positions in ((512, 512), (700, 1024), (1200, 1500)):
        taps = encoder._evaluate_filters(torch.zeros(1, length, encoder.layers[0].sequence_mixer.filter.channels))
        assert {t.shape[-1] for of_layer in taps for t in of_layer} == {2 * positions - 1}


def test_without_the_mask_padding_is_text():
    """The default, as published: the same outputs with and without a mask, and others with other padding."""
    model = make("m2", mask_padding=False).eval()
    rows, _ = make_rows((13,), 24)
    with torch.no_grad():
        alone = model.base_model(input_ids=rows[0][None])[0]
        ids = torch.nn.functional.pad(rows[0], (0, 6))[None]
        masked = model.base_model(input_ids=ids, attention_mask=(ids != 0).long())[0]
        assert torch.equal(masked, model.base_model(input_ids=ids)[0])
    assert error(masked[:, :13], alone) > 0.05


def test_a_published_checkpoint_keeps_to_its_padding(goldens):
    config, tensors, weights = goldens("tiny_a")
    assert "mask_padding" not in config
    model = load_original(weights, config, "mlm")
    assert not model.config.mask_padding and not model.config.leaves_padding_out
    assert load_original(weights, {**config, "mask_padding": True}, "mlm").config.leaves_padding_out
    assert tensors["in.attention_mask"].min() == 0  # so that the golden logits (test_checkpoint.py) show it


def test_real_lengths():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]])
    assert real_lengths(mask).tolist() == real_lengths(mask.bool()).tolist() == [2, 0, 3]
    assert real_lengths(mask.float()).dtype == torch.int32
    assert real_lengths(torch.ones(2, 3)) is None
    with pytest.raises(ValueError, match="padding on the right"):
        real_lengths(torch.tensor([[0, 1, 1]]))


def test_gradient_checkpointing_passes_the_lengths_on():
    model = make("m2")
    rows, weights = make_rows(LENGTHS, SMALL["hidden_size"])
    expected = run(model, rows, weights, 20)
    model.gradient_checkpointing_enable()
    assert_same(run(model, rows, weights, 20), expected, 1e-6)


def test_with_gradient_checkpointing_the_forward_pass_is_as_exact():
    length = 300  # an FFT
    model = make("m2", max_position_embeddings=length, long_conv_l_max=length)
    rows, weights = make_rows((length, 270), SMALL["hidden_size"])
    expected = run(model, rows, weights, length)[0]
    model.gradient_checkpointing_enable()
    assert torch.equal(run(model, rows, weights, length)[0], expected)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert not torch.equal(run(model, rows, weights, length)[0], expected)
