import errno
import json
import os
from pathlib import Path

import pytest
import torch

from bert import fill_mask, load
from bert.composer_models import build_masked_lm
from bert.data.tokenizer import fingerprint, train_wordpiece
from bert.errors import CheckpointError, DataError
from bert.trained import LATEST_NAME, TrainedModel, load_trained

SENTENCES = Path(__file__).parents[2] / "yamls" / "studies" / "sentences.txt"
TEXTS = ["the cat sat on the mat", "a dog ran to the cat", "the mat is on the floor"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(TEXTS, 60)


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """A checkpoint as Composer writes it, with the record that the recipe's callback adds, and its data's tokenizer."""
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "max_position_embeddings": 12,
        "long_conv_l_max": 12,
        "hyena_filter_order": 4,
    }
    model = build_masked_lm("m2_bert", config, train_mask_rate=0.3, eval_mask_rate=0.15)
    tokenizer.save_pretrained(tmp_path / "data" / "train" / "tokenizer")
    record = {
        "recipe": f"train_loader: {{dataset: {{local: '{tmp_path / 'data'}', split: train, streams: {{}}}}}}",
        "model": {"name": "m2_bert", "config": config},
        "tokenizer_name": "test",
        "tokenizer_fingerprint": fingerprint(tokenizer),
    }
    state = {"model": model.state_dict(), "callbacks": {"RecipeRecord": {"record": json.dumps(record)}}}
    torch.save({"state": state, "rng": []}, tmp_path / LATEST_NAME)
    return tmp_path, model


def test_a_checkpoint_or_its_folder_gives_the_model_back(checkpoint):
    folder, model = checkpoint
    for path in (folder, folder / LATEST_NAME):
        loaded = load_trained(path).model
        assert not loaded.training
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)


def test_the_tokenizer_is_beside_the_first_stream_that_has_one(tokenizer, tmp_path):
    """A stream without a split of its own has the dataset's."""
    tokenizer.save_pretrained(tmp_path / "long" / "train" / "tokenizer")
    streams = f"{{short: {{local: {tmp_path / 'short'}, split: null}}, long: {{local: {tmp_path / 'long'}}}}}"
    recipe = f"train_loader: {{dataset: {{local: null, split: train, streams: {streams}}}}}"
    record = {"recipe": recipe, "tokenizer_name": "gone", "tokenizer_fingerprint": fingerprint(tokenizer)}
    model = TrainedModel(model=None, record=record, file=tmp_path / "runs" / LATEST_NAME)
    assert model.tokenizer_folder() == str(tmp_path / "long" / "train" / "tokenizer")
    assert fingerprint(model.tokenizer()) == fingerprint(tokenizer)


def test_predictions_are_the_likeliest_words_at_each_mask(checkpoint):
    loaded = load(checkpoint[0], device="cpu")
    tokenizer = loaded.tokenizer
    (predictions,) = loaded.fill_mask(["the [MASK] sat on the [MASK]"], top=3)
    encoded = tokenizer("the [MASK] sat on the [MASK]", padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        logits = loaded.network(encoded["input_ids"]).logits[encoded["input_ids"] == tokenizer.mask_token_id]
    assert len(predictions) == 2
    for prediction, row in zip(predictions, logits, strict=True):
        best = row[: len(tokenizer)].softmax(-1).sort(descending=True)
        assert [word for word, _ in prediction] == [tokenizer.decode([i]) for i in best.indices[:3].tolist()]
        assert [p for _, p in prediction] == pytest.approx(best.values[:3].tolist(), rel=1e-4)


def test_texts_are_padded_for_models_that_see_padding_only(checkpoint):
    loaded = load(checkpoint[0])
    lengths = []
    loaded.network.bert.register_forward_hook(lambda _, __, output: lengths.append(output[0].shape[1]))
    padded = loaded.fill_mask(["the [MASK] sat"])
    loaded.network.config.mask_padding = True
    assert loaded.fill_mask(["the [MASK] sat"]) != padded
    assert lengths == [12, 5]


def test_command_line(checkpoint, capsys):
    assert fill_mask.main([str(checkpoint[0]), "the [MASK] sat", "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "the [MASK] sat" and len(lines) == 2
    assert fill_mask.main([str(checkpoint[0]), "no mask here"]) == 2
    assert "there is no [MASK]" in capsys.readouterr().err


def test_predictions_are_written_too(checkpoint, tmp_path, capsys):
    folder, _ = checkpoint
    (tmp_path / "texts.txt").write_text("a dog ran to the [MASK]\n\n  the mat is on [MASK] floor \n")
    output = tmp_path / "results" / "filled.json"
    options = ["--texts", str(tmp_path / "texts.txt"), "--output", str(output), "--device", "cpu", "--top", "2"]
    assert fill_mask.main([str(folder), *options, "the [MASK] sat on the [MASK]"]) == 0
    written = json.loads(output.read_text())
    assert written["kind"] == "fill_mask" and written["model"] == folder.name
    assert {"command", "date", "machine", "versions"} < set(written)
    texts = ["the [MASK] sat on the [MASK]", "a dog ran to the [MASK]", "the mat is on [MASK] floor"]
    assert [row["text"] for row in written["texts"]] == texts
    predictions = load(folder, device="cpu").fill_mask(texts, top=2)
    for row, masks in zip(written["texts"], predictions, strict=True):
        found = [[(item["word"], item["probability"]) for item in mask] for mask in row["masks"]]
        assert found == [[(word, pytest.approx(share)) for word, share in mask] for mask in masks]
    assert len(capsys.readouterr().out.splitlines()) == 3 + 4  # what is printed stays as it is
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_nothing_is_written_half(checkpoint, tmp_path, capsys, monkeypatch):
    model, output = str(checkpoint[0]), tmp_path / "results" / "filled.json"
    command = [model, "the [MASK] sat", "--output", str(output)]
    assert fill_mask.main([model, "the [MASK] sat", "no mask here", "--output", str(output)]) == 2
    assert not output.exists()
    assert fill_mask.main([model]) == 2
    assert "--texts" in capsys.readouterr().err
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 [MASK]")
    for name, message in (("absent.txt", "No such file"), ("blank.txt", "no text"), ("latin.txt", "utf-8")):
        assert fill_mask.main([model, "--texts", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert fill_mask.main([model, "the [MASK] sat", "--output", str(tmp_path / "blank.txt" / "filled.json")]) == 2
    assert "blank.txt" in capsys.readouterr().err

    assert fill_mask.main(command) == 0
    before = output.read_text()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert fill_mask.main([*command, "--top", "1"]) == 4
    assert "No space left" in capsys.readouterr().err
    assert output.read_text() == before and [path.name for path in output.parent.iterdir()] == [output.name]


def test_the_sentences_of_the_studies_have_a_mask_each():
    sentences = fill_mask.read_texts(SENTENCES)
    assert len(set(sentences)) == 10 and all(text.count("[MASK]") == 1 for text in sentences)


def test_mistakes_are_named(checkpoint, tmp_path, tokenizer):
    folder, _ = checkpoint
    trained = load_trained(folder)
    with pytest.raises(DataError, match="takes 12"):
        load(folder, device="cpu").fill_mask(["the cat [MASK] " * 9])
    train_wordpiece([text.upper() + " other words" for text in TEXTS], 70).save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="not the model's tokenizer"):
        trained.tokenizer(str(tmp_path / "other"))
    (folder / "data" / "train" / "tokenizer").rename(tmp_path / "moved")
    with pytest.raises(DataError, match="--tokenizer"):
        trained.tokenizer()
    assert len(trained.tokenizer(str(tmp_path / "moved"))) == len(tokenizer)
    with pytest.raises(CheckpointError, match="there is no file"):
        load_trained(tmp_path / "absent.pt")
    torch.save({"state": {"model": {}}}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="no record of a recipe"):
        load_trained(tmp_path / "foreign.pt")
