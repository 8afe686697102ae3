"""ONNX: what onnxruntime computes is what the model computes, at any length and batch."""

import copy
import itertools

import onnxruntime
import pytest
import torch

from bert import convert
from bert.configuration import M2BertConfig
from bert.errors import RecipeError
from bert.export import onnx
from bert.modeling import M2BertForMaskedLM, M2BertForSequenceClassification

LIMIT = 19
FIELDS = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": LIMIT,
    "long_conv_l_max": LIMIT,
    "hyena_filter_order": 16,
    "num_labels": 3,
}
MASKED = (M2BertForMaskedLM, {"mask_padding": True})
# Between them: both heads, and what each field of the mixers, the poolers and the MLPs switches.
CAUSAL = (
    M2BertForSequenceClassification,
    {
        "bidirectional": False,
        "residual_long_conv": False,
        "hyena_training_additions": True,
        "use_positional_encodings": False,
        "pool_all": True,
        "hidden_size": 26,  # no multiple of the MLP's blocks
    },
)
CENTERED = (M2BertForMaskedLM, {"mask_padding": True, "short_conv_centered": True})
ATTENTION = (
    M2BertForSequenceClassification,
    {"monarch_mixer_sequence_mixing": False, "use_monarch_mlp": False, "use_glu_mlp": False},
)


def make(kind, fields):
    """A model in which every weight counts, biases too."""
    model = kind(M2BertConfig(**{**FIELDS, **fields})).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def inputs(batch, length):
    """Ids, and the mask of rows that are ever shorter."""
    ids = torch.randint(50, (batch, length))
    real = torch.tensor([max(1, length - 3 * row) for row in range(batch)])
    return ids, (torch.arange(length) < real[:, None]).long()


def logits(model, ids, mask):
    with torch.no_grad():
        return model(ids, mask).logits


def session(path):
    """The file as a function of ids and mask, in onnxruntime without this project's help."""
    graph = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(ids, mask):
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        return torch.from_numpy(graph.run(["logits"], {name: value.numpy() for name, value in given.items()})[0])

    return run


def check_everywhere(graph, model):
    for batch, length in itertools.product((1, 3), (1, 2, 3, 8, LIMIT)):
        ids, mask = inputs(batch, length)
        found, expected = graph(ids, mask), logits(model, ids, mask)
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert found.isfinite().all() and (found - expected).abs().max() < 1e-4, (batch, length)
    # Not because nothing counts:
    assert (logits(model, ids.flip(1), mask) - expected).abs().max() > 1e-3
    assert (logits(model, ids, mask.clamp(min=1)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("direction", [{"bidirectional": False}, {}, {"short_conv_centered": True}], ids=str)
def test_ops_that_export_compute_the_same(masked, residual, direction):
    switches = {"mask_padding": masked, "residual_long_conv": residual, **direction}
    for limit, additions in ((3, False), (40, True)):
        own = {"hyena_training_additions": additions, "max_position_embeddings": limit, "long_conv_l_max": limit}
        model = make(M2BertForMaskedLM, {**switches, **own})
        changed = onnx.exportable(copy.deepcopy(model))
        for length in {1, 2, limit // 2, limit}:
            ids, mask = inputs(4, length)
            torch.testing.assert_close(logits(changed, ids, mask), logits(model, ids, mask), atol=2e-5, rtol=0)


def test_a_masked_model_converts_and_leaves_padding_out(tmp_path, monkeypatch, capsys):
    model = make(*MASKED)
    # As if it were too large for one file: its second one comes along.
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    convert.convert(convert.Source(copy.deepcopy(model)), tmp_path / "model.pt", "original")
    path = tmp_path / "model.onnx"
    assert convert.main([str(tmp_path / "model.pt"), str(path), "--verify"]) == 0
    assert "largest difference" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.glob("*onnx*")) == ["model.onnx", "model.onnx.data"]
    graph = session(path)
    check_everywhere(graph, model)
    ids, mask = inputs(3, LIMIT)
    before, after = graph(ids, mask), graph(torch.where(mask == 1, ids, 49 - ids), mask)
    assert torch.equal(before[mask == 1], after[mask == 1]) and not torch.equal(before, after)


@pytest.mark.parametrize("case", [CAUSAL, CENTERED, ATTENTION], ids=["causal", "centered", "attention"])
def test_every_kind_exports(case, tmp_path):
    model, path = make(*case), tmp_path / "model.onnx"
    onnx.export_onnx(copy.deepcopy(model), path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    graph = session(path)
    check_everywhere(graph, model)
    ids, mask = inputs(1, LIMIT + 1)
    with pytest.raises(ValueError, match="at most"):
        logits(model, ids, mask)
    with pytest.raises(Exception, match="out of data bounds"):  # of onnxruntime's own
        graph(ids, mask)


@pytest.mark.parametrize("which", [0, 2])
def test_a_result_with_nan_is_not_kept(which, tmp_path, monkeypatch, capsys):
    model = make(*MASKED)
    calls = []

    def run(path, ids, mask):
        calls.append(ids)
        found = logits(model, ids, mask)
        if len(calls) == which + 1:
            found[..., -1] = torch.nan
        return found

    monkeypatch.setattr(onnx, "check_installed", lambda: None)
    monkeypatch.setattr(onnx, "export_onnx", lambda model, path: path.write_bytes(b"graph"))
    monkeypatch.setattr(onnx, "run_onnx", run)
    with pytest.raises(RecipeError, match="differs by nan"):
        convert.convert(convert.Source(model), tmp_path / "model.onnx", "onnx", verify=True)
    assert len(calls) == 3 and not list(tmp_path.iterdir())


def test_without_its_packages_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"onnx, onnxscript, onnxruntime: pip install .*\[onnx\]"):
        convert.convert(convert.Source(make(*MASKED)), tmp_path / "model.onnx", "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (M2BertForSequenceClassification, {"gather_sentence_embeddings": True}, "gather_sentence_embeddings"),
        (M2BertForMaskedLM, {"long_conv_l_max": 2}, "at most 2 tokens"),
    ],
)
def test_what_cannot_be_exported_is_refused(kind, fields, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        convert.convert(convert.Source(make(kind, fields)), tmp_path / "model.onnx", "onnx")
    assert not list(tmp_path.iterdir())
