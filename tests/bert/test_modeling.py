import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from bert.checkpoint import to_original
from bert.configuration import M2BertConfig
from bert.errors import RecipeError
from bert.modeling import M2BertForMaskedLM, M2BertForSequenceClassification, M2BertModel
from tests.bert import original_equations

SMALL = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "long_conv_l_max": 20,
    "hyena_filter_order": 8,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
}

CONFIGURATIONS = {
    "paper": {},
    "training_additions": {"hyena_training_additions": True},
    "causal": {"bidirectional": False},
    "no_residual": {"residual_long_conv": False},
    "causal_no_residual": {"bidirectional": False, "residual_long_conv": False},
    "no_positions": {"use_positional_encodings": False},
    "plain_mlp": {"use_glu_mlp": False},
    "dense_mlp": {"use_monarch_mlp": False},
    "plain_dense_mlp": {"use_glu_mlp": False, "use_monarch_mlp": False},
    "five_blocks": {"monarch_mlp_nblocks": 5},
    "three_blocks": {"monarch_mlp_nblocks": 3},
    "two_blocks": {"monarch_mlp_nblocks": 2},
    "blocks_do_not_divide": {"hidden_size": 30, "num_attention_heads": 5, "intermediate_size": 43},
    "three_features": {"hyena_emb_dim": 3},
    "seven_features_slow": {"hyena_emb_dim": 7, "hyena_w": 1, "hyena_w_mod": 2},
    "odd_maximum": {"long_conv_l_max": 19, "max_position_embeddings": 23},
    "attention": {"monarch_mixer_sequence_mixing": False},
    "attention_as_published": {
        "monarch_mixer_sequence_mixing": False,
        "use_glu_mlp": False,
        "use_monarch_mlp": False,
        "use_positional_encodings": False,
    },
}


def make_config(changes: dict) -> M2BertConfig:
    return M2BertConfig(**{**SMALL, **changes})


def make_batch(config: M2BertConfig, length: int, batch: int = 3):
    ids = torch.randint(1, config.vocab_size, (batch, length))
    mask = torch.ones_like(ids)
    mask[1, max(1, length - 4) :] = 0
    return ids, mask


@pytest.mark.parametrize("length", [1, 2, 7, 16, 19])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_follow_the_original_equations(name, length):
    config = make_config(CONFIGURATIONS[name])
    model = M2BertForMaskedLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1, which would hide them
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids, mask = make_batch(config, length)
    expected = original_equations.masked_lm_logits(to_original(model), config.to_dict(), ids, mask)
    with torch.no_grad():
        logits = model(ids, mask).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("length", [1, 2, 3, 17])
@pytest.mark.parametrize("additions", [False, True])
def test_logits_with_a_centered_short_convolution(additions, length):
    """Which the original has not: its equations with one position ahead."""
    config = make_config({"short_conv_centered": True, "hyena_training_additions": additions, "hidden_size": 26})
    model = M2BertForMaskedLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids, mask = make_batch(config, length)
    causal = M2BertForMaskedLM(make_config({**config.to_dict(), "short_conv_centered": False})).double().eval()
    causal.load_state_dict(model.state_dict())
    state = to_original(causal)
    expected, others = (
        original_equations.masked_lm_logits(state, config.to_dict(), ids, mask, ahead=ahead) for ahead in (1, 0)
    )
    with torch.no_grad():
        logits = model(ids, mask).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
        torch.testing.assert_close(causal(ids, mask).logits, others, rtol=1e-5, atol=1e-6 * others.abs().max().item())
    assert (expected - others).abs().max() > 1e-2


@pytest.mark.parametrize(
    "changes", [{}, {"pool_all": True}, {"use_cls_token": True}], ids=["first", "mean", "cls_token"]
)
def test_classification_follows_the_original_equations(changes):
    config = make_config({"num_labels": 4, **changes})
    model = M2BertForSequenceClassification(config).double().eval()
    ids, mask = make_batch(config, 13)
    expected = original_equations.classification_logits(to_original(model), config.to_dict(), ids, mask)
    torch.testing.assert_close(model(ids, mask).logits, expected, rtol=1e-6, atol=1e-8)


def test_sentence_embeddings_are_pooled_and_normalised():
    config = make_config({"gather_sentence_embeddings": True, "use_normalized_embeddings": True})
    model = M2BertForSequenceClassification(config).eval()
    ids, mask = make_batch(config, 10)
    embedding = model(ids, mask).sentence_embedding
    pooled = model.bert(ids, mask).pooler_output
    torch.testing.assert_close(embedding, pooled / pooled.norm(dim=-1, keepdim=True))


def test_pad_row_gets_no_gradient_through_the_embedding_but_does_through_the_decoder():
    config = make_config({})
    ids, mask = make_batch(config, 12)
    ids[0, 3] = config.pad_token_id
    model = M2BertModel(config, add_pooling_layer=False)
    model(ids, mask).last_hidden_state.square().sum().backward()
    assert model.embeddings.word_embeddings.weight.grad[config.pad_token_id].abs().max() == 0
    masked_lm = M2BertForMaskedLM(config)
    masked_lm(ids, mask, labels=ids).loss.backward()
    assert masked_lm.bert.embeddings.word_embeddings.weight.grad[config.pad_token_id].abs().max() > 0


def test_loss_counts_every_label_but_minus_100():
    config = make_config({})
    model = M2BertForMaskedLM(config).eval()
    ids, mask = make_batch(config, 12)
    labels = torch.full_like(ids, -100)
    labels[0, 2], labels[1, 5], labels[2, 0] = 0, 7, 49
    output = model(ids, mask, labels=labels)
    logits = model(ids, mask).logits
    rows = [(0, 2), (1, 5), (2, 0)]
    expected = -torch.stack([logits[r].log_softmax(-1)[labels[r]] for r in rows]).mean()
    torch.testing.assert_close(output.loss, expected)
    assert output.logits.shape == (3, config.vocab_size)
    torch.testing.assert_close(output.logits, torch.stack([logits[r] for r in rows]))


def test_no_masked_token_gives_zero_loss_and_zero_gradients():
    model = M2BertForMaskedLM(make_config({}))
    ids, mask = make_batch(model.config, 12)
    loss = model(ids, mask, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("labels", "num_labels", "reference"),
    [
        (torch.tensor([0, 2, 1]), 3, nn.functional.cross_entropy),
        (torch.tensor([0.5, -1.0, 2.0]), 1, lambda x, y: ((x[:, 0] - y) ** 2).mean()),
        (
            torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]),
            2,
            lambda x, y: -(y * x.sigmoid().log() + (1 - y) * (1 - x.sigmoid()).log()).mean(),
        ),
    ],
    ids=["classes", "regression", "multi_label"],
)
def test_classification_losses(labels, num_labels, reference):
    model = M2BertForSequenceClassification(make_config({"num_labels": num_labels})).eval()
    ids, mask = make_batch(model.config, 9)
    output = model(ids, mask, labels=labels)
    torch.testing.assert_close(output.loss, reference(output.logits, labels))


def test_longer_input_than_the_filters_is_an_error():
    model = M2BertForMaskedLM(make_config({"use_positional_encodings": False}))
    with pytest.raises(ValueError, match="21 tokens, but this model was made for at most 20"):
        model(torch.ones(1, 21, dtype=torch.long))


def test_hidden_states_and_tuple_output():
    model = M2BertForMaskedLM(make_config({})).eval()
    ids, mask = make_batch(model.config, 10)
    output = model(ids, mask, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(model.predict(output.hidden_states[-1]), output.logits)
    (logits,) = model(ids, mask, return_dict=False)
    torch.testing.assert_close(logits, output.logits)


@pytest.mark.parametrize("name", ["paper", "attention"])
def test_gradient_checkpointing_changes_no_gradient(name):
    config = make_config({**CONFIGURATIONS[name], "hidden_dropout_prob": 0.1})
    model = M2BertForMaskedLM(config).train()
    ids, mask = make_batch(config, 16)

    def gradients():
        model.zero_grad()
        torch.manual_seed(1)
        model(ids, mask, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    calls = []
    model.gradient_checkpointing_enable()
    inner = model.bert.encoder._gradient_checkpointing_func
    model.bert.encoder._gradient_checkpointing_func = lambda *args: (calls.append(1), inner(*args))[1]
    for expected, actual in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(actual, expected)
    assert len(calls) == config.num_hidden_layers


@pytest.mark.parametrize("name", ["paper", "attention", "no_positions", "dense_mlp"])
@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModelForSequenceClassification])
def test_save_and_load_through_hugging_face(tmp_path, name, auto):
    model = auto.from_config(make_config(CONFIGURATIONS[name])).eval()
    model.save_pretrained(tmp_path)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    ids, mask = make_batch(model.config, 11)
    # Not bit for bit: the loaded tensors stand at other alignments, which changes the order of sums.
    torch.testing.assert_close(loaded.eval()(ids, mask).logits, model(ids, mask).logits, rtol=1e-3, atol=1e-3)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), M2BertConfig)


def test_a_published_config_file_loads(tmp_path, goldens):
    config, _, _ = goldens("tiny_b")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForMaskedLM"], **config}))
    loaded = M2BertConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in config} == config


def layer_tensors(model, layer):
    return dict(model.bert.encoder.layers[layer].named_parameters())


def test_legacy_initialisation_shares_what_the_original_copied_and_nothing_else():
    config = make_config({"initialization": "legacy", "initializer_range": 0.02, "hyena_training_additions": True})
    model = M2BertForMaskedLM(config)
    first, second = (layer_tensors(model, layer) for layer in (0, 1))
    constant = {n for n in first if n.endswith(("frequency", "position_features")) or ".norm." in n}
    zero = {n for n in first if n.endswith(".bias") and "dimension_mixer" not in n and ".norm." not in n}
    shared = {f"sequence_mixer.{n}" for n in ("short_weight", "short_bias", "filter.skip", "residual_filter.skip")} | {
        f"dimension_mixer.{n}" for n in ("input.weight", "output.weight", "output.bias")
    }
    assert {n for n in first if torch.equal(first[n], second[n])} == constant | zero | shared


def test_per_layer_initialisation_draws_everything_anew():
    model = M2BertForMaskedLM(make_config({}))
    assert model.config.initialization == "per_layer"
    first, second = (layer_tensors(model, layer) for layer in (0, 1))
    random = {n for n, p in first.items() if p.unique().numel() > 1 and not n.endswith("position_features")}
    assert not [n for n in random if torch.equal(first[n], second[n])]
    assert "sequence_mixer.filter.skip" in random


def test_initial_scales_are_the_original_ones():
    config = M2BertConfig(num_hidden_layers=1, vocab_size=1000, initialization="legacy")
    model = M2BertForMaskedLM(config)
    layer = model.bert.encoder.layers[0]
    mixer, mlp = layer.sequence_mixer, layer.dimension_mixer
    for weight in (
        mixer.input_projection.weight,
        mixer.filter.forward_network.layers[1].weight,
        mixer.filter.backward_network.layers[3].weight,
        model.head.dense.weight,
        model.bert.embeddings.word_embeddings.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(weight.mean().item()) < 1e-3
    for tensor, bound in (
        (mixer.short_weight, 3**-0.5),
        (mixer.short_bias, 3**-0.5),
        (mlp.input.weight, 192**-0.5),
        (mlp.output.weight, 768**-0.5),
        (mlp.output.bias, 768**-0.5),
    ):
        assert tensor.abs().max().item() <= bound
        assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert mixer.filter.skip.std().item() == pytest.approx(1, rel=0.1)
    assert mixer.filter.frequency.unique().item() == 10
    assert model.bert.embeddings.word_embeddings.weight[0].abs().max() > 0  # the pad row too
    taps, _ = mixer.filter(128)
    # Specification, section 10: at most 0.6, rms 0.13 over the first 8 taps.
    assert taps.abs().max().item() < 0.9
    assert taps[:8].square().mean().sqrt().item() == pytest.approx(0.13, rel=0.35)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["paper", "training_additions", "dense_mlp", "five_blocks", "attention"])
def test_autocast_stays_near_full_precision(name, dtype):
    config = make_config({**CONFIGURATIONS[name], "initializer_range": 0.1})
    model = M2BertForMaskedLM(config)
    ids, mask = make_batch(config, 16)
    expected = model(ids, mask, labels=ids)
    with torch.autocast("cpu", dtype=dtype):
        output = model(ids, mask, labels=ids)
    output.loss.backward()
    assert output.logits.dtype == dtype
    error = (output.logits.float() - expected.logits).norm() / expected.logits.norm()
    assert error < 0.03
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_model_held_in_bf16_runs():
    model = M2BertForMaskedLM(make_config({"initializer_range": 0.1})).eval()
    ids, mask = make_batch(model.config, 16)
    expected = model(ids, mask).logits
    logits = model.bfloat16()(ids, mask).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(
    "changes",
    [CONFIGURATIONS["paper"], {"short_conv_centered": True}, CONFIGURATIONS["attention_as_published"]],
    ids=["paper", "centered", "attention_as_published"],
)
def test_compiles_to_one_graph_and_only_once(changes):
    config = make_config({**changes, "mask_padding": True})
    model = M2BertForMaskedLM(config)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            torch.manual_seed(seed)
            ids, mask = make_batch(config, 16)
            labels = torch.where(torch.rand(ids.shape) < 0.3, ids, -100)
            torch.testing.assert_close(compiled(ids, mask, labels=labels).loss, model(ids, mask, labels=labels).loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_sise": 3}, "did you mean 'hidden_size'"),
        ({"initialization": "legcay"}, "did you mean 'legacy'"),
        ({"hyena_emb_dim": 4}, "odd"),
        ({"hidden_dropout_prob": 1.0}, r"\[0, 1\)"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"hidden_act": "relu"}, "gelu"),
        ({"short_conv_centred": True}, "did you mean 'short_conv_centered'"),
        ({"short_conv_centered": "yes"}, "short_conv_centered must be bool"),
        ({"short_conv_centered": True, "bidirectional": False}, "short_conv_centered reads the next position"),
    ],
)
def test_mistakes_in_a_recipe_are_named(changes, message):
    with pytest.raises(RecipeError, match=message):
        M2BertConfig.from_recipe({**SMALL, **changes})


def test_experiments_that_never_worked_are_refused():
    with pytest.raises(ValueError, match="sequence_token_planting"):
        M2BertConfig(sequence_token_planting=True)
