import copy
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from bert.checkpoint import load_original, save_original, to_original
from bert.errors import CheckpointError
from bert.modeling import M2BertForMaskedLM, M2BertForSequenceClassification
from tests.bert.test_modeling import CONFIGURATIONS, make_batch, make_config

CASES = {"tiny_a": "mlm", "tiny_b": "classification"}
TOLERANCE = 1e-5


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(params=CASES)
def golden(request, goldens):
    config, tensors, weights = goldens(request.param)
    return load_original(weights, config, CASES[request.param]), tensors, weights


def inputs_of(tensors):
    return {"input_ids": tensors["in.input_ids"], "attention_mask": tensors["in.attention_mask"]}


def test_golden_outputs(golden):
    model, tensors, _ = golden
    with torch.no_grad():
        output = model(**inputs_of(tensors), output_hidden_states=True)
    assert relative_error(output.logits, tensors["logits"]) < TOLERANCE
    assert relative_error(output.hidden_states[0], tensors["hidden.embeddings"]) < TOLERANCE
    for layer in range(model.config.num_hidden_layers):
        assert relative_error(output.hidden_states[layer + 1], tensors[f"hidden.layer{layer}"]) < TOLERANCE


def test_golden_pooled_output(goldens):
    config, tensors, weights = goldens("tiny_b")
    model = load_original(weights, config, "classification")
    encoded = model.bert(**inputs_of(tensors))
    assert relative_error(encoded.last_hidden_state, tensors["sequence_output"]) < TOLERANCE
    assert relative_error(encoded.pooler_output, tensors["pooled_output"]) < TOLERANCE


def test_golden_loss_and_gradients(golden):
    model, tensors, _ = golden
    output = model(**inputs_of(tensors), labels=tensors["in.labels"])
    assert output.loss.item() == pytest.approx(tensors["loss"].item(), rel=TOLERANCE)
    output.loss.backward()
    # Through the same map as the weights: a model that holds its gradients instead.
    holder = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, source in zip(holder.parameters(), model.parameters(), strict=True):
            parameter.copy_(source.grad)
    gradients = to_original(holder)
    names = [name[len("grad.") :] for name in tensors if name.startswith("grad.")]
    assert len(names) >= 25
    for name in names:
        assert relative_error(gradients[name], tensors[f"grad.{name}"]) < TOLERANCE, name


def test_golden_modules(golden):
    model, tensors, _ = golden
    layer = model.bert.encoder.layers[0]
    mixer, mlp = layer.sequence_mixer, layer.dimension_mixer
    for index in range(model.config.num_hidden_layers):
        filters = model.bert.encoder.layers[index].sequence_mixer
        for name, module in (("filter_fn", filters.filter), ("filter_fn2", filters.residual_filter)):
            for direction, taps in zip(("k_fwd", "k_rev"), module(model.config.long_conv_l_max), strict=True):
                assert relative_error(taps, tensors[f"module.layer{index}.{name}.{direction}"][0]) < TOLERANCE
    u = tensors["module.u"].clone().requires_grad_()
    for name, module in (("mixer", mixer), ("mlp", mlp)):
        out = module(u)
        assert relative_error(out, tensors[f"module.{name}.out"]) < TOLERANCE
        (gradient,) = torch.autograd.grad((out * tensors["module.cotangent"]).sum(), u)
        assert relative_error(gradient, tensors[f"module.{name}.du"]) < TOLERANCE
    assert relative_error(mlp.input(tensors["module.u"][:1]), tensors["module.gated_layers.out"]) < TOLERANCE


def test_golden_weights_come_back_bit_for_bit(golden):
    model, _, weights = golden
    original, back = load_file(weights), to_original(model)
    assert back.keys() == original.keys()
    for name, value in original.items():
        assert torch.equal(back[name], value) and back[name].dtype == value.dtype, name


def test_composer_checkpoint_and_plain_files_load_alike(goldens, tmp_path):
    config, _, weights = goldens("tiny_a")
    state = load_file(weights)
    torch.save(state, tmp_path / "state.bin")
    torch.save({"state": {"model": {f"model.module.{k}": v for k, v in state.items()}}}, tmp_path / "wrapped.pt")
    expected = load_original(weights, config, "mlm").state_dict()
    for source in (
        weights.with_name("composer_checkpoint.pt"),
        tmp_path / "state.bin",
        str(tmp_path / "wrapped.pt"),
        state,
        {"state": {"model": {f"model.{name}": value for name, value in state.items()}}},
    ):
        loaded = load_original(source, config, "mlm").state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in expected.items())


@pytest.mark.parametrize("task", ["mlm", "classification"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_there_and_back(name, task):
    config = make_config({**CONFIGURATIONS[name], "num_labels": 3})
    model = {"mlm": M2BertForMaskedLM, "classification": M2BertForSequenceClassification}[task](config).eval()
    ids, mask = make_batch(config, 15)
    state = to_original(model)
    for fields in (
        config.to_dict(),
        {"hyena_w_mod": config.hyena_w_mod, "num_attention_heads": config.num_attention_heads},
    ):
        # What the second leaves out is seen from the weights, the intermediate size of padded blocks apart.
        loaded = load_original(
            state, {**fields, "intermediate_size": config.intermediate_size, "use_glu_mlp": config.use_glu_mlp}, task
        )
        assert torch.equal(loaded(ids, mask).logits, model(ids, mask).logits)
        assert all(torch.equal(a, b) for a, b in zip(to_original(loaded).values(), state.values(), strict=True))


def test_the_map_has_the_original_number_of_names():
    with torch.device("meta"):
        models = {
            720: M2BertForMaskedLM(make_config({"num_hidden_layers": 12})),
            718: M2BertForSequenceClassification(make_config({"num_hidden_layers": 12})),
            744: M2BertForMaskedLM(make_config({"num_hidden_layers": 12, "hyena_training_additions": True})),
            432: M2BertForMaskedLM(make_config({"num_hidden_layers": 12, "residual_long_conv": False})),
            480: M2BertForMaskedLM(make_config({"num_hidden_layers": 12, "bidirectional": False})),
            142: M2BertForMaskedLM(make_config({**CONFIGURATIONS["attention_as_published"], "num_hidden_layers": 12})),
        }
        for count, model in models.items():
            assert len(to_original(model)) == count


def test_differences_are_listed_and_nothing_is_loaded(goldens):
    config, _, weights = goldens("tiny_a")
    state = load_file(weights)
    del state["bert.encoder.layer.1.mlp.wo.bias"]
    state["bert.encoder.layer.0.extra"] = torch.zeros(3)
    state["cls.predictions.decoder.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as error:
        load_original(state, config, "mlm")
    message = str(error.value)
    assert "missing     bert.encoder.layer.1.mlp.wo.bias (32,)" in message
    assert "unexpected  bert.encoder.layer.0.extra (3,)" in message
    assert "cls.predictions.decoder.bias: checkpoint (7,), model (64,)" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"hyena_training_additions": True},
        {"residual_long_conv": False},
        {"bidirectional": False},
        {"use_positional_encodings": False},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"long_conv_l_max": 8},
        {"use_monarch_mlp": False},
        {"monarch_mixer_sequence_mixing": False},
    ],
)
def test_a_wrong_configuration_is_an_error(goldens, changes):
    config, _, weights = goldens("tiny_a")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_original(weights, {**config, **changes}, "mlm")


def test_a_centered_short_convolution_is_not_the_originals(goldens, tmp_path):
    """Whose names and shapes it has: neither writing nor reading may take one for the other."""
    config, _, weights = goldens("tiny_a")
    model = M2BertForMaskedLM(make_config({"short_conv_centered": True}))
    for refused in (
        lambda: to_original(model),
        lambda: save_original(model, tmp_path / "model.pt"),
        lambda: load_original(weights, {**config, "short_conv_centered": True}, "mlm"),
    ):
        with pytest.raises(CheckpointError, match=r"short_conv_centered .* the original code's short convolution"):
            refused()
    assert not list(tmp_path.iterdir())
    attention = make_config({"short_conv_centered": True, "monarch_mixer_sequence_mixing": False})
    assert to_original(M2BertForMaskedLM(attention))  # which has none


def test_copies_of_a_shared_tensor_must_agree(goldens):
    config, _, weights = goldens("tiny_a")
    for name in (
        "bert.encoder.layer.1.attention.filter_fn2.implicit_filter_rev.5.freq",
        "cls.predictions.decoder.weight",
    ):
        state = load_file(weights)
        state[name] = state[name] + 1
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            load_original(state, config, "mlm")


def test_a_masked_lm_checkpoint_becomes_a_classifier_only_when_asked(goldens, caplog):
    config, tensors, weights = goldens("tiny_a")
    with pytest.raises(CheckpointError, match=r"missing     bert\.pooler\.dense\.weight"):
        load_original(weights, config, "classification")
    model = load_original(weights, config, "classification", allow_new_head=True)
    assert "classifier.weight" in caplog.text
    with torch.no_grad():
        hidden = model.bert(**inputs_of(tensors)).last_hidden_state
    assert relative_error(hidden, tensors["hidden.layer1"]) < TOLERANCE


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused(tmp_path, goldens):
    config, _, _ = goldens("tiny_a")
    trace = tmp_path / "ran"
    torch.save({"state": {"model": {"model.x": Harmful(trace)}}}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="would run code"):
        load_original(tmp_path / "bad.pt", config, "mlm")
    assert not trace.exists()


def test_unreadable_files_are_named(tmp_path, goldens):
    config, _, weights = goldens("tiny_a")
    torn = tmp_path / "torn.pt"
    torn.write_bytes(weights.with_name("composer_checkpoint.pt").read_bytes()[:5000])
    torn_safe = tmp_path / "torn.safetensors"
    torn_safe.write_bytes(weights.read_bytes()[:5000])
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    for path in (tmp_path / "absent.pt", tmp_path / "absent.safetensors", torn, torn_safe, tmp_path / "list.pt"):
        with pytest.raises(CheckpointError, match=str(path)):
            load_original(path, config, "mlm")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_original(tmp_path / "other.safetensors", config, "mlm")


def test_unknown_task():
    with pytest.raises(CheckpointError, match="did you mean 'mlm'"):
        load_original({}, {}, "mln")
