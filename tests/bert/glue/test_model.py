"""What a classifier starts from: whole, or an error with the difference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertForSequenceClassification

from bert.checkpoint import load_original, read_state_dict
from bert.composer_models import build_masked_lm
from bert.data.tokenizer import fingerprint, load_tokenizer
from bert.errors import CheckpointError, DataError, RecipeError
from bert.glue.model import SequenceClassifier, Start, build_classifier, check_fits, save_finetuned
from bert.modeling import M2BertForMaskedLM

from .conftest import MAX_LENGTH, MODEL

FIXTURES = Path(__file__).parents[2] / "fixtures" / "goldens"
TINY_HF = {
    "vocab_size": 24,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 32,
}


@pytest.fixture
def run(tmp_path: Path, vocabulary: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder as main.py leaves it, and the weights in it."""
    model = build_masked_lm("m2_bert", MODEL, train_mask_rate=0.3, eval_mask_rate=0.15)
    tokenizer = load_tokenizer(str(vocabulary))
    tokenizer.save_pretrained(tmp_path / "data" / "train" / "tokenizer")
    record = {
        "recipe": f"train_loader: {{dataset: {{local: '{tmp_path / 'data'}', split: train, streams: {{}}}}}}",
        "model": {"name": "m2_bert", "config": MODEL},
        "tokenizer_name": "test",
        "tokenizer_fingerprint": fingerprint(tokenizer),
    }
    content = {"state": {"model": model.state_dict(), "callbacks": {"RecipeRecord": {"record": json.dumps(record)}}}}
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "latest-rank0.pt")
    return tmp_path / "run", model.model.state_dict()


def assert_encoder(model: SequenceClassifier, weights: dict[str, torch.Tensor]) -> None:
    encoder = {name: value for name, value in weights.items() if name.startswith("bert.")}
    state = model.model.state_dict()
    assert len(encoder) > 10
    for name, value in encoder.items():
        assert torch.equal(state[name], value), name


def test_a_run_of_ours(run: tuple[Path, dict[str, torch.Tensor]], vocabulary: Path) -> None:
    folder, weights = run
    for path in (folder, folder / "latest-rank0.pt"):
        start = Start(None, {}, str(path))
        assert start.kind() == "ours"
        model = start.build(3, "mean")
        assert_encoder(model, weights)
        assert model.training
        assert model.model.config.pool_all
        assert model.model.classifier.out_features == 3
    assert start.tokenizer_name(None) == str(folder.parent / "data" / "train" / "tokenizer")
    assert start.tokenizer_name(str(vocabulary)) == str(vocabulary)
    dropout = Start("m2_bert", {"hidden_dropout_prob": 0.5, "hidden_size": 16}, str(folder)).build(2, "first")
    assert dropout.model.dropout.p == 0.5


def test_another_tokenizer_is_refused(run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "other"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    with pytest.raises(DataError, match="not the model's tokenizer"):
        Start(None, {}, str(run[0])).tokenizer_name(str(tmp_path / "vocab.txt"))


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("attention_bert", {}, "holds a model 'm2_bert', not model.name 'attention_bert'"),
        ("m2_bert", {"hidden_size": 32}, "hidden_size: 16 in the checkpoint, 32 in model.config"),
        ("m2_bert", {"hyena_w_mod": 2}, "hyena_w_mod: 1 in the checkpoint, 2 in model.config"),
        ("m2_bert", {"hiden_size": 16}, "did you mean 'hidden_size'"),
    ],
)
def test_another_model_is_refused(
    run: tuple[Path, dict[str, torch.Tensor]], name: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        Start(name, config, str(run[0])).build(2, "first")


def test_a_checkpoint_that_lacks_a_weight_is_refused(run: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path = run[0] / "latest-rank0.pt"
    content = torch.load(path)
    del content["state"]["model"]["model.bert.encoder.layers.0.dimension_mixer.input.weight"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit .*dimension_mixer\.input\.weight"):
        Start(None, {}, str(path)).build(2, "first")


def test_an_original_m2_checkpoint() -> None:
    path = FIXTURES / "tiny_a" / "composer_checkpoint.pt"
    config = json.loads((FIXTURES / "tiny_a" / "config.json").read_text())["model_config"]
    start = Start("m2_bert", config, str(path))
    assert start.kind() == "original"
    model = start.build(2, "mean")
    expected = load_original(path, config, "mlm")
    assert_encoder(model, {k: v for k, v in expected.state_dict().items() if k.startswith("bert.")})
    assert model.model.config.pool_all and model.training
    with pytest.raises(CheckpointError, match="shape"):
        Start("m2_bert", {**config, "hidden_size": 2 * config["hidden_size"]}, str(path)).build(2, "first")
    assert set(read_state_dict(path))  # the map of old names is bert.checkpoint's


def test_hugging_face_folders(tmp_path: Path) -> None:
    bert = BertForMaskedLM(BertConfig(**TINY_HF))
    bert.save_pretrained(tmp_path / "hf")
    start = Start("hf_bert", {}, str(tmp_path / "hf"))
    assert start.kind() == "hugging_face"
    model = start.build(3, "first")
    assert_encoder(model, bert.state_dict())
    assert (model.fixed_length, model.max_length) == (None, 32)
    with pytest.raises(RecipeError, match="first token only"):
        start.build(3, "mean")
    ours = build_masked_lm("m2_bert", MODEL, train_mask_rate=0.3, eval_mask_rate=0.15).model
    assert isinstance(ours, M2BertForMaskedLM)
    ours.save_pretrained(tmp_path / "m2")
    for name, config, message in (
        ("m2_bert", {}, "holds a model 'bert', not model.name 'm2_bert'"),
        ("hf_bert", {"hidden_size": 4}, "hidden_size: 8 in the checkpoint, 4 in model.config"),
        ("hf_bert", {"hiden_size": 8}, "did you mean 'hidden_size'"),
    ):
        with pytest.raises(RecipeError, match=message):
            Start(name, config, str(tmp_path / "hf")).build(3, "first")
    dropout = Start("hf_bert", {"hidden_dropout_prob": 0.5}, str(tmp_path / "hf")).build(3, "first")
    assert dropout.model.dropout.p == 0.5
    assert Start("m2_bert", {"mask_padding": True}, str(tmp_path / "m2")).build(1, "mean").fixed_length is None
    model = Start("m2_bert", {"hidden_size": 16}, str(tmp_path / "m2")).build(1, "mean")
    assert_encoder(model, ours.state_dict())
    assert model.model.config.pool_all
    assert model.fixed_length == MAX_LENGTH


def test_another_tokenizer_than_that_of_a_hugging_face_folder(tmp_path: Path, vocabulary: Path) -> None:
    BertForMaskedLM(BertConfig(**TINY_HF)).save_pretrained(tmp_path / "hf")
    start = Start("hf_bert", {}, str(tmp_path / "hf"))
    words = vocabulary.read_text().split()
    other = tmp_path / "vocab.txt"
    other.write_text("\n".join([*words[:5], *reversed(words[5:])]) + "\n")
    assert start.tokenizer_name(str(other)) == str(other)  # the folder has none to compare with
    load_tokenizer(str(vocabulary)).save_pretrained(tmp_path / "hf")
    assert start.tokenizer_name(str(vocabulary)) == str(vocabulary)
    assert start.tokenizer_name(None) == str(tmp_path / "hf")
    with pytest.raises(DataError, match="is not the tokenizer of the checkpoint"):
        start.tokenizer_name(str(other))


def test_a_model_without_token_types() -> None:
    config = DistilBertConfig(vocab_size=24, dim=8, n_layers=1, n_heads=2, hidden_dim=8, max_position_embeddings=32)
    ids = torch.ones(2, 4, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids}
    assert SequenceClassifier(DistilBertForSequenceClassification(config), 2).forward(batch).shape == (2, 2)


def test_a_hugging_face_folder_without_an_encoder_is_no_random_encoder(tmp_path: Path) -> None:
    bert = BertForMaskedLM(BertConfig(**TINY_HF))
    state = {name: value for name, value in bert.state_dict().items() if "layer.0.output" not in name}
    bert.save_pretrained(tmp_path / "hf", state_dict=state)
    with pytest.raises(CheckpointError, match=r"missing     bert\.encoder\.layer\.0\.output\.dense\.weight"):
        Start(None, {}, str(tmp_path / "hf")).build(2, "first")


@pytest.mark.parametrize("checkpoint", ["runs/none.pt", "./none", "a/b/c", "none.safetensors"])
def test_a_checkpoint_that_is_not_there(checkpoint: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Start("m2_bert", MODEL, checkpoint).kind()


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (print, ("executed",))

    torch.save({"state": Hostile()}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="would run code"):
        Start(None, {}, str(tmp_path / "bad.pt")).build(2, "first")


def test_a_finetuned_model_is_taken_over_but_for_its_classifier(tmp_path: Path) -> None:
    for name, config in (("m2_bert", MODEL), ("hf_bert", TINY_HF)):
        start = Start(name, config)
        first = start.build(3, "first")
        save_finetuned(tmp_path / "model.pt", first, start, {"task": "mnli"})
        second = Start(name, config, str(tmp_path / "model.pt"))
        assert second.kind() == "finetuned"
        model = second.build(1, "first")
        assert_encoder(model, first.model.state_dict())  # the pooler too
        assert model.model.classifier.out_features == 1
    # The sizes are those of the model, whatever the section says that its checkpoint was loaded with.
    BertForMaskedLM(BertConfig(**TINY_HF)).save_pretrained(tmp_path / "hf")
    start = Start("hf_bert", {}, str(tmp_path / "hf"))
    first = start.build(3, "first")
    save_finetuned(tmp_path / "model.pt", first, start, {})
    assert_encoder(Start("hf_bert", {}, str(tmp_path / "model.pt")).build(2, "first"), first.model.state_dict())


def test_length_padding_and_vocabulary_are_checked(vocabulary: Path) -> None:
    m2 = build_classifier("m2_bert", MODEL, num_labels=2, pooling="first")
    assert check_fits(m2, MAX_LENGTH, "auto", str(vocabulary)) == fingerprint(load_tokenizer(str(vocabulary)))
    with pytest.raises(RecipeError, match="set max_seq_len=16"):
        check_fits(m2, 8, "auto", str(vocabulary))
    with pytest.raises(RecipeError, match="padding: dynamic changes the results"):
        check_fits(m2, MAX_LENGTH, "dynamic", str(vocabulary))
    masked = build_classifier("m2_bert", {**MODEL, "mask_padding": True}, num_labels=2, pooling="first")
    assert masked.fixed_length is None
    assert check_fits(masked, 8, "auto", str(vocabulary)) == check_fits(masked, 8, "dynamic", str(vocabulary))
    with pytest.raises(RecipeError, match="takes 16 tokens at most"):
        check_fits(masked, 17, "auto", str(vocabulary))
    hf = build_classifier("hf_bert", TINY_HF, num_labels=2, pooling="first")
    assert check_fits(hf, 8, "dynamic", str(vocabulary))
    with pytest.raises(RecipeError, match="takes 32 tokens at most"):
        check_fits(hf, 33, "auto", str(vocabulary))
    small = build_classifier("hf_bert", {**TINY_HF, "vocab_size": 10}, num_labels=2, pooling="first")
    with pytest.raises(RecipeError, match="has 18 tokens, the model 10"):
        check_fits(small, 8, "auto", str(vocabulary))


def test_loss_is_cross_entropy_or_the_squared_error() -> None:
    batch = {"labels": torch.tensor([1, 0])}
    outputs = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    classifier = build_classifier("m2_bert", MODEL, num_labels=2, pooling="first")
    expected = -outputs.log_softmax(-1)[[0, 1], [1, 0]].mean()
    assert float(classifier.loss(outputs, batch)) == pytest.approx(float(expected))
    regressor = build_classifier("m2_bert", MODEL, num_labels=1, pooling="first")
    batch = {"labels": torch.tensor([1.0, 3.0, 5.0])}
    assert float(regressor.loss(torch.tensor([[1.0], [2.0], [2.0]]), batch)) == pytest.approx(10 / 3)
    one = {"labels": torch.tensor([4.0])}
    assert float(regressor.loss(torch.tensor([[1.0]]), one)) == 9.0  # a last batch of one row
