"""Whatever text, table or recipe is given: it is read, or refused with a message that names the file, line or key."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from streaming import StreamingDataset

from bert.checkpoint import load_original, to_original
from bert.configuration import M2BertConfig
from bert.convert import read_source
from bert.data.masking import IGNORED_LABEL
from bert.data.metadata import DatasetMetadata
from bert.data.packing import ConcatPacker, PackingSpec, TokenChunk, TruncatePacker
from bert.data.preparation import PrepareSettings, prepare
from bert.data.prepare import main as prepare_main
from bert.data.shared_memory import alone_on_this_host
from bert.data.streaming_text import MaskingCollator, TextSample
from bert.data.tokenizer import load_tokenizer
from bert.errors import DataError, RecipeError
from bert.glue.data import Place, read_rows
from bert.glue.tasks import Task
from bert.modeling import M2BertForMaskedLM
from bert.recipe.builders import check_config
from bert.recipe.schema import TrainConfig, load_config
from tests.bert.recipe.conftest import SPECIAL, VOCAB_SIZE

# In `make test` few examples, in `make test-faults` many.
AMOUNTS = [8, pytest.param(400, marks=pytest.mark.faults)]
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def holds(amount: int, strategy: st.SearchStrategy, check: Callable[[Any], None], *examples: Any) -> None:
    """Try `check` on `examples`, and on `amount` values of `strategy`."""
    options = {"max_examples": amount, "deadline": None, "database": None, "derandomize": True}
    test = given(strategy)(check)
    for value in examples:
        test = example(value)(test)
    settings(**options, suppress_health_check=list(HealthCheck))(test)()  # type: ignore[arg-type]


# Text


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["\u05e9", "\u05dc", "\u05d5", "\u05dd", "🙂", "🎉"]
    path.write_text("\n".join([*SPECIAL_TOKENS, *letters, *(f"##{c}" for c in letters)]) + "\n", encoding="utf-8")
    return str(path)


DOCUMENTS = {
    "empty": ["", " ", "\n\t"],
    "null bytes": ["a\0b\0", "\0"],
    "emoji": ["🙂🎉🙂", "👩‍👩‍👧‍👦" * 30],
    "right to left": ["\u05e9\u05dc\u05d5\u05dd \u202e\u05e9\u05dc\u05d5\u05dd", "\u05e9\u05dc\u05d5\u05dd"],
    "a million characters": ["ab " * 333_334],
    "one word of a million": ["a" * 1_000_000],
    "control characters": ["".join(map(chr, range(32))), "\u2028\u2029\ufeff"],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.faults] * ("million" in name)) for name in DOCUMENTS]
)
def test_strange_documents_are_prepared(tmp_path: Path, vocabulary: str, name: str) -> None:
    corpus = tmp_path / "corpus.jsonl"
    documents = [*DOCUMENTS[name], "abc def ghi jkl"]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    metadata = prepare(PrepareSettings([str(corpus)], str(tmp_path / "out"), vocabulary, seq_len=8, workers=0))
    with alone_on_this_host():
        dataset = StreamingDataset(local=str(tmp_path / "out" / "train"), shuffle=False, batch_size=1)
    assert len(dataset) == metadata.num_samples > 0
    assert metadata.num_documents + metadata.num_skipped_documents == len(documents)
    tokens = np.concatenate([dataset[i]["input_ids"] for i in range(min(len(dataset), 500))])
    assert tokens.max() < metadata.vocab_size


def test_broken_lines_are_counted_reported_and_limited(
    tmp_path: Path, vocabulary: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "out"
    broken = [
        b'{"text": "cut of',
        b'{"text": "\xff\xfe"}',
        b'{"text": "a", "text": "b"}',
        b'{"id": ' + b"1" * 5000 + b', "text": "a"}',
        b'{"text": "lone \\ud800"}',
        b"\0\0\0",
    ]
    good = b'{"text": "abc def", "meta": {"text": "an inner key of that name"}}'
    corpus.write_bytes(b"\n".join([*broken, *[good] * 20]) + b"\n")
    command = ["--source", str(corpus), "--tokenizer", vocabulary, "--out", str(out), "--seq-len", "8"]
    command += ["--workers", "0"]
    assert prepare_main([*command, "--max-broken", "5"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"corpus\.jsonl, line 6: .*--max-broken", error) and "Traceback" not in error
    with caplog.at_level(logging.WARNING):
        assert prepare_main([*command, "--max-broken", "6"]) == 0
    assert "line 3: it has the key 'text' twice: left out (3 of 6 allowed)" in caplog.text
    assert DatasetMetadata.load(out / "train").num_skipped_documents == 6


@pytest.mark.parametrize("lacking", SPECIAL_TOKENS)
def test_a_vocabulary_without_a_special_token_is_refused(tmp_path: Path, lacking: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(token for token in [*SPECIAL_TOKENS, "a"] if token != lacking))
    with pytest.raises(DataError, match=rf"vocab\.txt.*{re.escape(lacking)}"):
        load_tokenizer(str(path))


# Tables

TABLES = [b"sentence\tlabel\na\t0\tx\nb\n", b"3\n", b"[1]\n", b'{"a": {}}\n']
TASK = Task(text=["sentence"], label="label", labels=["0", "1"], metrics=["accuracy"])


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "parquet", "tsv.gz"])
def test_any_table_is_read_or_refused(tmp_path: Path, ending: str, amount: int) -> None:
    path = tmp_path / f"train.{ending}"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            rows = read_rows(Place("own", "train", file=path), TASK)
        except DataError as error:
            assert str(path) in str(error)
            return
        assert rows.labels is not None and len(rows.labels) == len(rows.texts)

    lines = st.lists(st.text(max_size=20), max_size=6).map("\n".join)
    table = lines.map(lambda text: f"sentence\tlabel\n{text}".encode("utf-8", "surrogatepass"))
    holds(
        amount,
        st.binary(max_size=80) | table,
        check,
        b"sentence\tlabel\na\t0\tx\nb\n",
        b"3\n",
        b"[1]\n",
        b'{"a": {}}\n',
    )


# Recipes

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
KEYS = [field.name for field in dataclasses.fields(TrainConfig)]


@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_value_of_any_key_is_taken_or_named(recipe: Callable[..., Path], amount: int) -> None:
    good = yaml.safe_load(recipe().read_text())
    path = recipe()

    def check(change: tuple[list[str], object]) -> None:
        keys, value = change
        values: Any = json.loads(json.dumps(good))
        section = values
        for key in keys[:-1]:
            section = section.setdefault(key, {}) if isinstance(section.get(key, {}), dict) else values
        section[keys[-1]] = value
        path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        try:
            check_config(load_config(path))
        except RecipeError as error:
            assert str(error)

    places = st.lists(
        st.sampled_from([*KEYS, *good["train_loader"], "dataset", "config", "name"]), min_size=1, max_size=3
    )
    holds(amount, st.tuples(places, VALUES), check, (["max_duration"], None), (["optimizer"], {"name": ["adamw"]}))


@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_text_is_a_recipe_or_refused(tmp_path: Path, amount: int) -> None:
    path = tmp_path / "any.yaml"

    def check(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(RecipeError, match=r"any\.yaml"):
            load_config(path)

    pieces = st.lists(st.sampled_from([*"[]{}:,&*!|>%@`'\"-?#\n\t ", "${", "}", "a", "seed", ": "]), max_size=12)
    examples = ["null: 1", "run_name: ${", "a: &a [*a]", "? [1]\n: 2", "base: [1]", "\0", "1: 2"]
    holds(amount, pieces.map("".join) | st.text(max_size=20), check, *examples)


# Batches and packing


def metadata() -> DatasetMetadata:
    counts = {"num_samples": 1, "num_tokens": 1, "num_documents": 1, "num_skipped_documents": 0}
    names = {"tokenizer_name": "toy", "tokenizer_fingerprint": "x", "source": {}, "unigram_entropy_nats": 1.0}
    shape = {"layout": "truncate", "seq_len": 12, "token_dtype": "uint16"}
    return DatasetMetadata(**shape, **names, **counts, vocab_size=VOCAB_SIZE, special_token_ids=SPECIAL)  # type: ignore[arg-type]


@pytest.mark.parametrize("amount", AMOUNTS)
def test_what_a_batch_has_in_common_with_its_samples(amount: int) -> None:
    collate = MaskingCollator(metadata(), max_seq_len=12, mlm_probability=0.4, seed=1)

    def check(rows: list[tuple[int, list[int]]]) -> None:
        samples = [TextSample(number, 3, np.array(tokens, np.uint16)) for number, tokens in rows]
        lengths = [len(tokens) for _, tokens in rows]
        if max(lengths) > 12 or any(token >= VOCAB_SIZE for _, tokens in rows for token in tokens):
            with pytest.raises(DataError, match="sample"):
                collate(samples)
            return
        batch = collate(samples)
        ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
        assert mask.sum(1).tolist() == lengths
        chosen = labels != IGNORED_LABEL
        assert batch["num_masked"] == chosen.sum() and not (chosen & (mask == 0)).any()
        restored = torch.where(chosen, labels, ids)
        for row, (_, tokens) in zip(restored, rows, strict=True):
            assert row.tolist() == tokens + [SPECIAL["pad"]] * (12 - len(tokens))
        alone = collate(samples[:1])  # a row depends on its own sample only
        assert torch.equal(alone["input_ids"][0], ids[0]) and torch.equal(alone["labels"][0], labels[0])

    tokens = st.lists(st.integers(0, VOCAB_SIZE + 1), min_size=1, max_size=14)
    holds(amount, st.lists(st.tuples(st.integers(0, 1 << 40), tokens), min_size=1, max_size=5), check)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_packing_does_not_depend_on_how_the_text_is_cut(amount: int) -> None:
    spec = PackingSpec("", "concat", seq_len=5, dtype="uint16", cls=2, sep=3)

    def chunk(documents: list[list[int]]) -> TokenChunk:
        stream = [token for document in documents for token in document]
        return TokenChunk(np.array(stream, np.uint16), np.array([len(d) for d in documents], np.int64), 0)

    def check(chunks: list[list[list[int]]]) -> None:
        packer, windows = ConcatPacker(spec, []), []
        for documents in chunks:
            windows += packer.pack(chunk(documents))
            packer = ConcatPacker(spec, packer.carry)  # as after a kill
        stream = [token for documents in chunks for document in documents for token in document]
        assert all(len(window) == 5 and window[0] == 2 for window in windows)
        assert [token for window in windows for token in window[1:].tolist()] + packer.carry == stream
        assert len(packer.carry) < 4
        for documents in chunks:
            assert [row.tolist() for row in TruncatePacker().pack(chunk(documents))] == documents

    documents = st.lists(st.lists(st.integers(5, 39), min_size=1, max_size=9), max_size=4)
    holds(amount, st.lists(documents, max_size=4), check)


# Checkpoints

FIELDS = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
LENGTHS = {"max_position_embeddings": 4, "long_conv_l_max": 4, "hyena_filter_order": 4}


def original_files(state: dict[str, torch.Tensor]) -> M2BertForMaskedLM:
    return load_original(state, {**FIELDS, **LENGTHS}, "mlm")  # type: ignore[return-value]


def published_folders(state: dict[str, torch.Tensor]) -> M2BertForMaskedLM:
    with tempfile.TemporaryDirectory() as name:
        Path(name, "config.json").write_text(json.dumps({**FIELDS, **LENGTHS}))
        torch.save(state, Path(name, "pytorch_model.bin"))
        return read_source(Path(name), task="mlm").model  # type: ignore[return-value]


# What reads another program's state dict.
READERS: list[Callable[[dict[str, torch.Tensor]], torch.nn.Module]] = [original_files, published_folders]


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_a_state_dict_is_loaded_whole_or_refused(read: Callable[..., M2BertForMaskedLM], amount: int) -> None:
    good = to_original(M2BertForMaskedLM(M2BertConfig(**FIELDS, **LENGTHS)))

    def check(changes: list[tuple[str, str]]) -> None:
        state = dict(good)
        for kind, name in changes:
            if name not in state:
                continue
            value = state[name]
            if kind == "drop":
                del state[name]
            elif kind == "rename":
                state[name + ".x"] = state.pop(name)
            elif kind == "grow":
                state[name] = torch.cat([value, value])
            elif kind == "flatten":
                state[name] = value.flatten()
            else:
                state[name] = value[:0]
        try:
            loaded = to_original(read(state))
        except RecipeError as error:
            assert str(error)
            return
        assert all(torch.equal(loaded[name], value) for name, value in state.items())

    kinds = st.sampled_from(["drop", "rename", "grow", "flatten", "empty"])
    holds(amount, st.lists(st.tuples(kinds, st.sampled_from(sorted(good))), max_size=3), check, [])
