"""The retrieval benchmark's ranks and scores, by hand; the throughput benchmark with a stand-in peer."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from bert.configuration import M2BertConfig
from bert.data.tokenizer import train_wordpiece
from bert.modeling import M2BertForMaskedLM

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "sea"]


@pytest.fixture
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(request.param)


retrieval = pytest.mark.parametrize("module", ["retrieval"], indirect=True)
throughput = pytest.mark.parametrize("module", ["embed_throughput"], indirect=True)


@retrieval
def test_scores_of_ranks(module: ModuleType) -> None:
    # The gain at the first, second, fourth, tenth and eleventh place: 1, 1 / log2(3), 1 / log2(5), 1 / log2(11), none.
    found = module.scores(np.array([0, 1, 3, 9, 10]))
    assert found["ndcg_at_10"] == pytest.approx((1 + 0.63093 + 0.43068 + 0.28906) / 5, abs=1e-5)
    assert found["recall_at_10"] == 0.8
    assert module.scores(np.array([0, 0])) == {"ndcg_at_10": 1.0, "recall_at_10": 1.0}
    assert module.scores(np.array([500])) == {"ndcg_at_10": 0.0, "recall_at_10": 0.0}


@retrieval
def test_ranks_of_similarities(module: ModuleType) -> None:
    documents = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    queries = np.array([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0]])  # similarities: 1 0 .6; .6 .8 1; 1 0 .6
    assert module.dense_ranks(queries, documents).tolist() == [0, 1, 1]
    # Equal scores are no find: a model that gives one vector to all is last everywhere.
    assert module.dense_ranks(np.ones((3, 2)), np.ones((3, 2))).tolist() == [2, 2, 2]


@retrieval
def test_without_bm25s_it_says_what_to_install(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pairs = tmp_path / "test.jsonl"
    pairs.write_text(json.dumps({"query": "cat", "document": "the cat"}) + "\n")
    monkeypatch.setitem(sys.modules, "bm25s", None)
    monkeypatch.setattr(sys, "argv", ["retrieval.py", str(pairs)])
    with pytest.raises(SystemExit, match="pip install bm25s, or leave it out with --no-bm25"):
        module.main()


@retrieval
def test_models_at_each_length(
    module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    rows = [{"query": word, "document": f"{word} {WORDS[i - 1]} " * 3} for i, word in enumerate(WORDS)]
    pairs, output = tmp_path / "test.jsonl", tmp_path / "r.json"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(module, "TRUNCATIONS", (4, 8))
    command = ["retrieval.py", str(pairs), "--no-bm25", "--model", str(folder), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(output)])
    module.main()
    assert "11 queries, as many documents, 0 of over 2,000 tokens" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert [(row["model"], row["tokens"]) for row in found["rows"]] == [("model", 4), ("model", 8), ("model", 32)]
    assert all(0 <= row["ndcg_at_10"] <= row["recall_at_10"] <= 1 for row in found["rows"])
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model"
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    lengths = {"max_position_embeddings": 32, "long_conv_l_max": 32}
    config = M2BertConfig(**sizes, **lengths, hyena_filter_order=4, mask_padding=True)
    M2BertForMaskedLM(config).save_pretrained(path)
    train_wordpiece([" ".join(WORDS)] * 20, 64).save_pretrained(path)
    return path


@throughput
def test_throughput_counts_what_each_reads(
    module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "docs.jsonl"
    lengths = (3, 30, 11, 12, 20, 40, 50)  # words, each a token; [CLS] and [SEP] besides
    texts = [" ".join((WORDS * 5)[:length]) for length in lengths]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked: list[list[str]] = []

    def stand_in(arguments: argparse.Namespace, tokenizer: object, path: str) -> SimpleNamespace:
        assert (arguments.hidden, arguments.layers) == (16, 1)  # those of the model

        def encode(texts: list[str], batch_size: int, show_progress_bar: bool) -> np.ndarray:
            asked.append(texts)
            return np.ones((len(texts), 16), np.float32)

        return SimpleNamespace(encode=encode)

    monkeypatch.setattr(module, "sentence_transformer", stand_in)
    monkeypatch.setattr(module, "BERT_LENGTH", 8)
    options = {"--model": folder, "--documents": source, "--num-documents": 4, "--min-tokens": 14, "--block": 3}
    command = [str(part) for option in options.items() for part in option]
    threads = torch.get_num_threads()
    output = tmp_path / "t.json"
    monkeypatch.setattr(
        sys, "argv", ["embed_throughput.py", *command, "--max-length", "20", "--device", "cpu", "--output", str(output)]
    )
    module.main()
    assert torch.get_num_threads() == threads
    found = json.loads(output.read_text())
    assert found["documents"] == 4  # of 30, 12, 20 and 40 words
    ours, ours_short, short, whole = found["rows"]
    assert (ours["tokens"], ours_short["tokens"], short["tokens"]) == (20 + 14 + 20 + 20, 4 * 8, 4 * 8)
    # 18 words in three pieces of six, 12 in two: each with [CLS] and [SEP].
    assert whole["tokens"] == (18 + 12 + 18 + 18) + 2 * (3 + 2 + 3 + 3)
    assert texts[1] in asked[-1] + asked[-2] + asked[-3] + asked[-4]
    assert [" ".join((WORDS * 5)[begin : begin + 6]) for begin in (0, 6, 12)] in [texts[:3] for texts in asked]
