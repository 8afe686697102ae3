import math

import pytest
import torch

from bert.composer_models import MODELS, build_masked_lm, count_parameters, forward_flops_per_token
from bert.errors import RecipeError
from bert.masked_lm import row_bound, select_masked_rows
from monarch_mixer import cpu
from tests.bert.test_modeling import SMALL

RATES = {"train_mask_rate": 0.3, "eval_mask_rate": 0.15}
FIELDS = {
    "m2_bert": {**SMALL, "mask_padding": True},
    "attention_bert": SMALL,
    "hf_bert": {k: SMALL[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    | {"vocab_size": 50, "hidden_dropout_prob": 0.0},
}


def make_batch(rate=0.3, batch=4, length=20):
    ids = torch.randint(1, 50, (batch, length))
    labels = torch.where(torch.rand(ids.shape) < rate, ids, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_metrics_are_those_of_full_logits(name):
    model = build_masked_lm(name, FIELDS[name], **RATES).eval()
    metrics = model.get_metrics()
    logits, labels = [], []
    for _ in range(3):
        batch = make_batch()
        outputs = model.eval_forward(batch)
        for metric in metrics.values():
            model.update_metric(batch, outputs, metric)
        hidden = model.model.base_model(batch["input_ids"], batch["attention_mask"])[0]
        masked = batch["labels"] != -100
        logits.append(model.model.predict(hidden)[masked])
        labels.append(batch["labels"][masked])
        expected = torch.nn.functional.cross_entropy(logits[-1], labels[-1])
        torch.testing.assert_close(model.loss(outputs, batch), expected)
    logits, labels = torch.cat(logits), torch.cat(labels)
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels).item()
    assert metrics["MaskedCrossEntropy"].compute().item() == pytest.approx(cross_entropy, rel=1e-5)
    assert metrics["MaskedPerplexity"].compute().item() == pytest.approx(2.718281828**cross_entropy, rel=1e-4)
    accuracy = (logits.argmax(-1) == labels).float().mean().item()
    assert metrics["MaskedAccuracy"].compute().item() == pytest.approx(accuracy)


def test_metrics_of_nothing_masked_are_finite():
    model = build_masked_lm("m2_bert", SMALL, **RATES)
    outputs = model(make_batch(rate=0.0))
    for metric in model.get_metrics().values():
        metric.update(outputs)
        assert torch.isfinite(metric.compute())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_static_selection_equals_exact_selection(share):
    hidden = torch.randn(5, 13, 4)
    labels = torch.where(torch.rand(5, 13) < share, torch.randint(0, 9, (5, 13)), -100)
    rows, row_labels = select_masked_rows(hidden, labels)
    count = len(row_labels)
    for bound in (count, count + 7, 65, 100):
        static, static_labels = select_masked_rows(hidden, labels, bound)
        assert len(static) == len(static_labels) == min(bound, 65)
        assert torch.equal(static[:count], rows) and torch.equal(static_labels[:count], row_labels)
        assert (static_labels[count:] == -100).all()
    if count > 2:
        static, static_labels = select_masked_rows(hidden, labels, 2)
        assert torch.equal(static, rows[:2]) and torch.equal(static_labels, row_labels[:2])


def test_row_bound_holds_and_is_tight():
    for num_tokens, rate in ((128, 0.15), (16384, 0.3)):
        bound = row_bound(num_tokens, rate)
        counts = (torch.rand(200, num_tokens) < rate).sum(1)
        assert counts.max() <= bound <= num_tokens
    assert bound < 1.1 * 0.3 * 16384
    assert row_bound(10, 0.0) == 0
    assert row_bound(10, 1.0) == 10


@pytest.mark.parametrize("name", MODELS)
def test_compiled_step_equals_eager_without_recompiling(name):
    model = build_masked_lm(name, {**FIELDS[name], "attention_probs_dropout_prob": 0.0}, **RATES)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            batch = make_batch()
            model.zero_grad()
            model(batch)["loss"].backward()
            expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            model.zero_grad()
            outputs = compiled(batch)
            outputs["loss"].backward()
            assert outputs["num_masked"] == (batch["labels"] != -100).sum()
            for parameter, gradient in zip(
                [p for p in model.parameters() if p.grad is not None], expected, strict=True
            ):
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "fields", "parameters"),
    [
        ("m2_bert", {"vocab_size": 30522}, 80_267_328),
        (
            "attention_bert",
            {"use_glu_mlp": False, "use_monarch_mlp": False, "use_positional_encodings": False},
            109_088_832,
        ),
        ("attention_bert", {"use_monarch_mlp": False, "use_positional_encodings": False}, 137_400_384),
        ("hf_bert", {"vocab_size": 30522}, 109_514_298),
    ],
)
def test_parameter_counts(name, fields, parameters):
    with torch.device("meta"):
        assert count_parameters(build_masked_lm(name, fields, **RATES)) == parameters


@pytest.mark.parametrize("name", MODELS)
def test_operations_agree_with_those_torch_counts(name, monkeypatch):
    monkeypatch.setattr(cpu, "cpu_path_applies", lambda *_: False)  # torch does not count oneDNN's own products
    from torch.utils.flop_counter import FlopCounterMode

    width, length = 64, 32
    fields = {**FIELDS[name], "hidden_size": width, "intermediate_size": 128, "num_attention_heads": 4}
    if name != "hf_bert":
        fields |= {"max_position_embeddings": length, "long_conv_l_max": length, "hyena_filter_order": 1}
    model = build_masked_lm(name, fields, train_mask_rate=0.5, eval_mask_rate=0.5).eval()
    ids = torch.randint(1, 50, (8, length))
    labels = torch.full_like(ids, -100)
    labels[:, ::2] = 3
    with FlopCounterMode(display=False) as counter:
        model({"input_ids": ids, "labels": labels})
    counts = counter.get_flop_counts()["Global"]
    # Torch counts the direct convolutions it ran, and no FFT: compare all the rest.
    counted = sum(flops for op, flops in counts.items() if "conv" not in str(op)) / ids.numel()
    ours = forward_flops_per_token(model, length)
    if name == "m2_bert":
        fft = 5 * 2 * math.log2(2 * length) + 6  # two transforms of 2.5 N log2 N, N = 2 * length, and the product
        ours -= 2 * (2 * width * fft + 3 * width * 2 * 3)
    if name == "hf_bert":
        ours -= 2 * 4 * length * width  # nor the fused attention of the CPU
    assert ours == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("m2_brt", {}, "did you mean 'm2_bert'"),
        ("m2_bert", {"hiden_size": 5}, "did you mean 'hidden_size'"),
        ("hf_bert", {"hiden_size": 5}, "did you mean 'hidden_size'"),
        ("hf_bert", {"hidden_size": 5, "num_attention_heads": 3}, "multiple"),
        ("attention_bert", {"monarch_mixer_sequence_mixing": True}, "contradicts"),
    ],
)
def test_mistakes_are_named(name, fields, message):
    with pytest.raises(RecipeError, match=message):
        build_masked_lm(name, fields, **RATES)
