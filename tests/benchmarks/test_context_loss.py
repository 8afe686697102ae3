"""Masked-token loss by context: the same tokens in every context, and the loss of a document by hand."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from bert import load
from bert.configuration import M2BertConfig
from bert.data.tokenizer import train_wordpiece
from bert.inference import LoadedModel
from bert.modeling import M2BertForMaskedLM

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "sea"]
CONTEXTS = (16, 32, 64)
RATE = 0.15


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("context_loss")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of an M2-BERT that takes 64 tokens, and of Hugging Face's BERT that takes 32; one tokenizer."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
    large = {"initializer_range": 0.3}  # so that the context shows in the losses
    monarch = {"long_conv_l_max": 64, "max_position_embeddings": 64, "hyena_filter_order": 4, "mask_padding": True}
    M2BertForMaskedLM(M2BertConfig(**sizes, **large, **monarch)).save_pretrained(root / "m2")
    config = BertConfig(**sizes, **large, num_attention_heads=2, max_position_embeddings=32)
    BertForMaskedLM(config).save_pretrained(root / "hf")
    for name in ("m2", "hf"):
        train_wordpiece([" ".join(WORDS)] * 20, 60).save_pretrained(root / name)
    return root


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Documents of 70, 63, 64, 10, 90 and 80 tokens; the last one has unknown words too."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, length)) for length in (70, 63, 64, 10, 90)]
    texts.append(" ".join(rng.choice([*WORDS, "文"], 80)))
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def arguments(source: Path) -> Callable[..., argparse.Namespace]:
    def make(**changes: object) -> argparse.Namespace:
        values = {"documents": [source], "text_column": "body", "text_documents": "paragraph", "mask_rate": RATE}
        return argparse.Namespace(**{**values, "seed": 3, "num_documents": 500, **changes})

    return make


def test_documents_are_cut_and_masked_by_their_number(
    benchmark: ModuleType, models: Path, arguments: Callable[..., argparse.Namespace]
) -> None:
    tokenizer = load(models / "m2", device="cpu").tokenizer
    found = benchmark.read_documents(arguments(), tokenizer, 64)
    assert found.ids.shape == found.chosen.shape == (4, 64)
    assert found.chosen[:3].sum(1).tolist() == [round(RATE * 64)] * 3
    assert tokenizer.unk_token_id in found.ids[3]
    assert not np.isin(found.ids[found.chosen], tokenizer.all_special_ids).any()
    assert len({row.tobytes() for row in found.chosen}) == 4

    fewer = benchmark.read_documents(arguments(num_documents=2), tokenizer, 64)
    np.testing.assert_array_equal(fewer.ids, found.ids[:2])
    np.testing.assert_array_equal(fewer.chosen, found.chosen[:2])
    other = benchmark.read_documents(arguments(seed=4), tokenizer, 64)
    np.testing.assert_array_equal(other.ids, found.ids)
    assert (other.chosen != found.chosen).any(1).all()


def test_every_context_predicts_the_same_tokens(
    benchmark: ModuleType,
    models: Path,
    arguments: Callable[..., argparse.Namespace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load(models / "m2", device="cpu")
    found = benchmark.read_documents(arguments(), model.tokenizer, 64)
    seen: list[np.ndarray] = []
    places: list[np.ndarray] = []
    original = LoadedModel.logits_at

    def spy(self: LoadedModel, rows: np.ndarray, asked: np.ndarray) -> torch.Tensor:
        seen.append(rows)
        places.append(asked)
        return original(self, rows, asked)

    monkeypatch.setattr(LoadedModel, "logits_at", spy)
    losses = []
    for context in CONTEXTS:
        seen.clear()
        places.clear()
        losses.append(benchmark.predict(model, found, context, 2 * context)[0])
        assert all(rows.shape == (2, context) for rows in seen)
        masked = np.concatenate(seen).reshape(4, 64)
        np.testing.assert_array_equal(masked == model.tokenizer.mask_token_id, found.chosen)
        np.testing.assert_array_equal(masked[~found.chosen], found.ids[~found.chosen])
        asked = [rows[tuple(where.T)] for rows, where in zip(seen, places, strict=True)]
        assert (np.concatenate(asked) == model.tokenizer.mask_token_id).all()
        assert len(losses[-1]) == found.chosen.sum()
    assert np.abs(losses[0] - losses[-1]).max() > 1e-3  # what is further away changes the predictions


@pytest.mark.parametrize(("name", "context"), [("m2", 16), ("m2", 64), ("hf", 32)])
def test_the_loss_of_a_document_by_hand(
    benchmark: ModuleType, models: Path, arguments: Callable[..., argparse.Namespace], name: str, context: int
) -> None:
    model = load(models / name, device="cpu")
    found = benchmark.read_documents(arguments(num_documents=1), model.tokenizer, 64)
    chosen, entries = found.chosen[0], len(model.tokenizer)
    expected, right, by_place = [], [], {}
    for place in np.flatnonzero(chosen):
        begin = place // context * context
        window = [
            model.tokenizer.mask_token_id if chosen[at] else int(found.ids[0, at])
            for at in range(begin, begin + context)
        ]
        with torch.no_grad():
            hidden = model.network.base_model(input_ids=torch.tensor([window]))[0]
            logits = model.network.predict(hidden)[0, place - begin, :entries].double()
        word = int(found.ids[0, place])
        expected.append(-(logits[word] - logits.exp().sum().log()).item())
        right.append(logits.argmax().item() == word)
        by_place.setdefault((place - begin) // (context // 16), []).append(expected[-1])

    for batch_tokens in (1, 32, 1000):
        losses, hits = benchmark.predict(model, found, context, batch_tokens)
        np.testing.assert_allclose(losses, expected, atol=1e-4)
        assert hits.tolist() == right
    row = benchmark.summary(losses, hits, found.chosen, context)
    assert row["loss"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert row["accuracy"] == np.mean(right)
    assert row["standard_error"] is None  # of one document
    assert row["by_position"]["edges"] == [context / 16 * edge for edge in range(17)]
    for number, loss in enumerate(row["by_position"]["loss"]):
        wanted = by_place.get(number)
        assert loss is None if wanted is None else loss == pytest.approx(np.mean(wanted), abs=1e-4)


def test_the_standard_error_is_over_documents(benchmark: ModuleType) -> None:
    chosen = np.zeros((3, 32), bool)
    chosen[:, [1, 30]] = True
    losses = np.array([1, 2, 3, 4, 5, 6], np.float32)
    row = benchmark.summary(losses, losses > 4, chosen, 32)
    assert (row["loss"], row["documents"], row["masked_tokens"]) == (3.5, 3, 6)
    assert row["accuracy"] == pytest.approx(1 / 3)
    assert row["standard_error"] == pytest.approx(2 / 3**0.5)  # of 1.5, 3.5 and 5.5
    assert row["by_position"]["loss"] == [3.0, *[None] * 14, 4.0]
    half = benchmark.summary(losses, losses > 4, chosen, 16)["by_position"]
    assert half["edges"][-1] == 16 and half["loss"][1] == 3.0 and half["loss"][14] == 4.0


def test_json_and_picture_and_what_is_left_out(
    benchmark: ModuleType, models: Path, source: Path, tmp_path: Path, capsys, caplog
) -> None:
    output = tmp_path / "results" / "context.json"
    command = [str(models / "m2"), str(models / "hf"), "--documents", str(source), "--text-column", "body"]
    command += ["--contexts", "64,16,32", "--device", "cpu", "--output", str(output)]
    assert benchmark.main(command) == 0
    assert "hf takes 32 tokens: left out at a context of 64" in caplog.text
    assert "4 documents of 64 tokens" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert found["kind"] == "context_loss" and found["mask_rate"] == RATE and "versions" in found
    rows = found["rows"]
    wanted = [("m2", 16), ("m2", 32), ("m2", 64), ("hf", 16), ("hf", 32)]
    assert [(row["model"], row["context"]) for row in rows] == wanted
    assert found["left_out"] == [{"model": "hf", "context": 64, "max_length": 32}]
    assert len({(row["documents"], row["masked_tokens"]) for row in rows}) == 1
    for row in rows:
        assert row["loss"] > 0 and 0 <= row["accuracy"] <= 1 and row["standard_error"] > 0
        assert len(row["by_position"]["edges"]) == 17 and len(row["by_position"]["loss"]) == 16
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.parent.iterdir()) == ["context.json", "context.png"]


def test_mistakes_are_named(benchmark: ModuleType, models: Path, source: Path, tmp_path: Path, capsys) -> None:
    def error(*options: str, model: str = "m2") -> str:
        command = [str(models / model), "--documents", str(source), "--text-column", "body", "--device", "cpu"]
        assert benchmark.main([*command, *options]) == 2
        return capsys.readouterr().err

    assert "none of the 6 documents in documents.jsonl has 128 tokens" in error("--contexts", "64,128")
    assert "no model takes 64 tokens" in error("--contexts", "64", model="hf")
    assert "48 does not divide the longest, 64" in error("--contexts", "48,64")
    assert "8 is less than 16" in error("--contexts", "8,64")
    assert "such as 128,512,2048" in error("--contexts", "64;16")
    assert "such as 0.15" in error("--mask-rate", "15")
    assert "--num-documents must be at least 1" in error("--num-documents", "0")
    assert "there is no such file" in error("--documents", str(tmp_path / "absent.jsonl"))
    assert "there is no column 'text'" in error("--text-column", "text", "--contexts", "16")
    assert "must end in .json" in error("--output", str(tmp_path / "context.png"))
    assert "its folder cannot be made" in error("--output", str(source / "context.json"))


def test_models_of_one_name_are_told_apart(benchmark: ModuleType) -> None:
    assert benchmark.names_of(["runs/a", "runs/b"]) == ["a", "b"]
    assert benchmark.names_of(["runs/a/latest.pt", "runs/b/latest.pt"]) == ["a/latest.pt", "b/latest.pt"]
