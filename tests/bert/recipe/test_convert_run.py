"""What a conversion makes of a run of ours: its model, its tokenizer, and a card of what its checkpoint says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bert import convert
from bert.data.tokenizer import fingerprint, load_tokenizer
from bert.export.card import data_sentence
from bert.export.folder import load_exported
from bert.recipe.schema import load_config
from bert.recipe.train import train
from bert.trained import load_trained, open_model
from tests.bert.recipe.conftest import SEQ_LEN, VOCAB_SIZE, write_split


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Shards with their tokenizer beside them, from a dataset of the Hub as they say."""
    folder = tmp_path / "data"
    vocabulary = tmp_path / "vocab.txt"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(VOCAB_SIZE - 5))]
    vocabulary.write_text("\n".join(words) + "\n")
    tokenizer = load_tokenizer(str(vocabulary))
    for split, samples in (("train", 48), ("validation", 16)):
        write_split(folder / split, samples, samples, fingerprint=fingerprint(tokenizer))
        path = folder / split / "metadata.json"
        source = {"kind": "hub", "name": "allenai/c4", "config": "en", "split": split}
        path.write_text(json.dumps({**json.loads(path.read_text()), "source": source}))
    tokenizer.save_pretrained(folder / "train" / "tokenizer")
    return folder


def test_a_run_is_converted_with_what_its_checkpoint_says(
    recipe: Callable[..., Path], tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe()
    train(load_config(path))
    run = tmp_path / "runs" / "tiny"
    evaluations = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"eval"' in line]
    assert [line["batch"] for line in evaluations] == [4, 8]
    for source, evaluation in ((run / "ep0-ba4-rank0.pt", evaluations[0]), (run, evaluations[1])):
        assert convert.main([str(source), str(tmp_path / "hf"), "--verify", "--overwrite"]) == 0
        card = (tmp_path / "hf" / "README.md").read_text()
        assert f"- batch: {evaluation['batch']}\n" in card
        assert f"- MaskedCrossEntropy: {evaluation['metrics/eval/MaskedCrossEntropy']:.6g}\n" in card
        tokens = 48 * SEQ_LEN
        assert f"Hugging Face dataset allenai/c4 (en, train): 48 documents, 48 samples, {tokens} tokens." in card
        assert "name: decoupled_adamw" in card and f"- torch: {torch.__version__.split('+')[0]}" in card
        assert "Weights: Not stated by the source." in card
    ids = torch.arange(SEQ_LEN)[None]
    with torch.inference_mode():
        ours = load_trained(run).model.model(ids).logits
        torch.testing.assert_close(load_exported(tmp_path / "hf", "M2BertForMaskedLM")(ids).logits, ours)
        torch.testing.assert_close(open_model(tmp_path / "hf").network(ids).logits, ours)
    copy = load_tokenizer(str(tmp_path / "hf"))
    assert fingerprint(copy) == fingerprint(load_tokenizer(str(data / "train" / "tokenizer")))
    # Another's tokenizer is refused; without one there is a note.
    (tmp_path / "other.txt").write_text((tmp_path / "vocab.txt").read_text().replace("w7", "x7"))
    assert convert.main([str(run), str(tmp_path / "no"), "--tokenizer", str(tmp_path / "other.txt")]) == 2
    (data / "train" / "tokenizer").rename(tmp_path / "away")
    capsys.readouterr()
    assert convert.main([str(run), str(tmp_path / "model.pt"), "--verify"]) == 0
    assert "--tokenizer" in capsys.readouterr().err


FILES = {"kind": "files", "num_files": 2, "paths": ["/home/me/*.txt"]}
STREAMS = {"kind": "streams", "a": {"kind": "hub", "name": "x/y"}, "b": {"kind": "z"}}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({}, "A source of kind None."),
        ({"source": FILES, "tokens": 5}, "2 files (`*.txt`): 5 tokens."),
        ({"source": STREAMS, "samples": "many"}, "Hugging Face dataset x/y; A source of kind z."),
    ],
    ids=str,
)
def test_the_sentence_on_the_data(data: dict, sentence: str) -> None:
    assert data_sentence(data) == sentence
