"""GLUE's files as they are distributed, other formats, labels, tokenising once, batches."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from bert.data.tokenizer import fingerprint, load_tokenizer
from bert.errors import DataError
from bert.glue import data
from bert.glue.data import BatchOrder, Rows, encode, in_file_order, load_split, loader, locate, read_rows
from bert.glue.tasks import TASKS, Task

from .conftest import write


def read(root: Path, name: str, split: str, task: Task | None = None) -> Rows:
    row = task or TASKS[name]
    return read_rows(locate(name, row, split, str(root), None), row)


def test_cola_has_no_header_but_in_its_test_split(tmp_path: Path) -> None:
    write(tmp_path / "CoLA" / "train.tsv", ["gj04\t1\t\tOur \"friends won't buy.", "gj04\t0\t*\tThe cat."])
    write(tmp_path / "CoLA" / "test.tsv", ["index\tsentence", "0\tBill whistled.", '1\t"Quoted'])
    train = read(tmp_path, "cola", "train")
    assert train.texts == [("Our \"friends won't buy.",), ("The cat.",)]
    assert train.labels == [1, 0]
    test = read(tmp_path, "cola", "test")
    assert (test.texts, test.labels) == ([("Bill whistled.",), ('"Quoted',)], None)


def test_mrpc_begins_with_a_byte_order_mark_and_quotes_are_not_quotes(tmp_path: Path) -> None:
    head = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    write(tmp_path / "MRPC" / "dev.tsv", [head, '1\t7\t8\t"The foodservice\tfits "', "0\t9\t10\ta\tb"])
    rows = read(tmp_path, "mrpc", "validation")
    assert rows.texts == [('"The foodservice', 'fits "'), ("a", "b")]
    assert rows.labels == [1, 0]


def test_the_other_files_of_glue(tmp_path: Path) -> None:
    stsb = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    write(tmp_path / "STS-B" / "train.tsv", [stsb, "0\tm\tM\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t5.000"])
    assert read(tmp_path, "stsb", "train").labels == [5.0]
    mnli = "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label"
    write(tmp_path / "MNLI" / "dev_mismatched.tsv", [mnli, "0\t1\t1c\tfiction\tp\th\tneutral\tcontradiction"])
    rows = read(tmp_path, "mnli", "validation_mismatched")
    assert (rows.texts, rows.labels) == ([("p", "h")], [2])
    qqp = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    write(tmp_path / "QQP" / "train.tsv", [qqp, "1\t2\t3\tWhy?\tHow?\t0", "4\t5\t6\ttorn line", "7\t8\t9\tA?\tB?\t1"])
    assert read(tmp_path, "qqp", "train").labels == [0, 1]
    for name, folder in (("qnli", "QNLI"), ("rte", "RTE")):
        first = TASKS[name].text
        write(tmp_path / folder / "dev.tsv", [f"index\t{first[0]}\t{first[1]}\tlabel", "0\tp\tq\tnot_entailment"])
        assert read(tmp_path, name, "validation").labels == [1]
    write(tmp_path / "SST-2" / "train.tsv", ["sentence\tlabel", "hide new secretions \t0"])
    assert read(tmp_path, "sst2", "train").texts == [("hide new secretions ",)]


def test_torn_lines_and_other_row_counts_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "SST-2" / "dev.tsv", ["sentence\tlabel", "a\t0", "torn", "b\t1\tsurplus"])
    with caplog.at_level(logging.WARNING):
        assert len(read(tmp_path, "sst2", "validation")) == 1
    assert "2 rows with missing or surplus fields are left out" in caplog.text
    assert "1 rows, but the data set is known to have 872" in caplog.text


def test_the_first_rows_of_a_longer_file_may_all_be_torn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = ["sentence\tlabel", "torn", "torn", "a\t0"]
    write(tmp_path / "SST-2" / "dev.tsv", lines)
    place = locate("sst2", TASKS["sst2"], "validation", str(tmp_path))
    assert read_rows(place, TASKS["sst2"], first=2).texts == [] and not caplog.text
    write(tmp_path / "SST-2" / "dev.tsv", lines[:2])
    with pytest.raises(DataError, match="has no rows"):
        read_rows(place, TASKS["sst2"], first=2)


def test_a_torn_line_of_a_test_split_would_shift_the_predictions(tmp_path: Path) -> None:
    write(tmp_path / "SST-2" / "test.tsv", ["index\tsentence", "0\ta", "torn"])
    with pytest.raises(DataError, match=r"test\.tsv: 1 rows with missing or surplus fields"):
        read(tmp_path, "sst2", "test")


OWN = Task(text=["{title}: {body}"], label="stars", labels=["bad", "good"], metrics=["accuracy"])


def test_csv_jsonl_and_parquet_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path / "own" / "train.csv", ["title,body,stars", '"A, b","said ""no""",good', "c,d,0"])
    write(tmp_path / "own" / "validation.jsonl", ['{"title": "A", "body": "b", "stars": 1}', ""])
    table = pyarrow.table({"title": ["A"], "body": ["b"], "stars": ["bad"], "unused": [None]})
    pyarrow.parquet.write_table(table, tmp_path / "own" / "test-00000-of-00001.parquet")
    train = read(tmp_path, "own", "train", OWN)
    assert train.texts == [('A, b: said "no"',), ("c: d",)]
    assert train.labels == [1, 0]
    assert read(tmp_path, "own", "validation", OWN).labels == [1]
    assert read(tmp_path, "own", "test", OWN).texts == [("A: b",)]


def test_a_label_that_is_a_name_and_an_id_is_a_name(tmp_path: Path) -> None:
    task = Task(text=["a"], labels=["1", "0"], metrics=["accuracy"])
    write(tmp_path / "own" / "train.tsv", ["a\tlabel", "x\t1"])
    write(tmp_path / "own" / "validation.jsonl", ['{"a": "x", "label": 1}'])
    assert read(tmp_path, "own", "train", task).labels == read(tmp_path, "own", "validation", task).labels == [0]


def test_the_hub_path_on_a_local_data_set_of_its_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "glue"
    (folder / "qqp").mkdir(parents=True)
    readme = (
        "---\nconfigs:\n- config_name: qqp\n  data_files:\n  - split: validation\n    path: qqp/validation-*\n---\n"
    )
    (folder / "README.md").write_text(readme)
    table = pyarrow.table({"question1": ["Why?"], "question2": ["How?"], "label": [1], "idx": [0]})
    pyarrow.parquet.write_table(table, folder / "qqp" / "validation-00000-of-00001.parquet")
    place = locate("qqp", TASKS["qqp"], "validation", f"hub:{folder}", None)
    rows = read_rows(place, TASKS["qqp"])
    assert (rows.texts, rows.labels) == ([("Why?", "How?")], [1])
    assert place.identity() == {"hub": [str(folder), "qqp", None, "validation"]}
    with pytest.raises(DataError, match="cannot be loaded"):
        read_rows(locate("rte", TASKS["rte"], "train", f"hub:{folder}", None), TASKS["rte"])


def test_the_commit_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def answer(self: object, name: str, revision: str | None, timeout: float) -> SimpleNamespace:
        if name == "offline":
            raise ConnectionError("no network")
        return SimpleNamespace(sha=f"commit of {name} at {revision}")

    monkeypatch.setattr(data.HfApi, "dataset_info", answer)
    commit = data.hub_commit("nyu-mll/glue", None)
    assert commit == "commit of nyu-mll/glue at None"
    place = locate("qqp", TASKS["qqp"], "validation", "hub:nyu-mll/glue", {"nyu-mll/glue": commit})
    assert place.identity() == {"hub": ["nyu-mll/glue", "qqp", commit, "validation"]}
    assert data.hub_commit("offline", "main") == "main"
    assert "its commit is not known" in caplog.text


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("2", "row 1: the label '2' is none of 0, 1, nor a number from 0 to 1"),
        ("-1", "the label '-1'"),
        ("maybe", "the label 'maybe'"),
        ("0.5", "the label '0.5'"),
    ],
)
def test_labels_out_of_range(tmp_path: Path, label: str, message: str) -> None:
    write(tmp_path / "SST-2" / "train.tsv", ["sentence\tlabel", f"a\t{label}"])
    with pytest.raises(DataError, match=re.escape(message)):
        read(tmp_path, "sst2", "train")


def test_scores_out_of_range_and_missing_columns(tmp_path: Path) -> None:
    head = "sentence1\tsentence2\tscore"
    write(tmp_path / "STS-B" / "train.tsv", [head, "a\tb\t7.5"])
    with pytest.raises(DataError, match=re.escape("the label 7.5 is outside of 0.0 to 5.0")):
        read(tmp_path, "stsb", "train")
    write(tmp_path / "STS-B" / "train.tsv", ["sentence1\tsentence\tscore", "a\tb\t1"])
    with pytest.raises(DataError, match="has no column sentence2; its columns: sentence1, sentence, label"):
        read(tmp_path, "stsb", "train")
    write(tmp_path / "STS-B" / "train.tsv", [head])
    with pytest.raises(DataError, match="has no rows"):
        read(tmp_path, "stsb", "train")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*hub:nyu-mll/glue"):
        locate("rte", TASKS["rte"], "train", str(tmp_path / "none"), None)
    (tmp_path / "RTE").mkdir()
    with pytest.raises(DataError, match=r"no file for its split validation .*looked for validation and dev as \.tsv"):
        locate("rte", TASKS["rte"], "validation", str(tmp_path), None)


def test_a_split_is_tokenised_once_and_again_when_its_file_changes(
    tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(vocabulary))
    path = tmp_path / "SST-2" / "train.tsv"
    write(path, ["sentence\tlabel", "the cat\t1", "a dog ran\t0"])
    task, encoded = TASKS["sst2"], []
    monkeypatch.setattr(data, "encode", lambda *arguments: encoded.append(1) or encode(*arguments))

    def load(length: int = 16) -> data.EncodedSplit:
        place = locate("sst2", task, "train", str(tmp_path), None)
        return load_split(place, task, tokenizer, fingerprint(tokenizer), length, tmp_path / "cache")

    first, second = load(), load()
    assert len(encoded) == 1
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert first.labels is not None and first.labels.tolist() == [1, 0]
    assert tokenizer.decode(first.tokens[: first.offsets[1]]) == "[CLS] the cat [SEP]"
    load(length=4)
    write(path, ["sentence\tlabel", "the mat\t1"])
    assert len(load()) == 1
    assert len(encoded) == 3
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_batches_are_what_the_tokenizer_itself_pads(vocabulary: Path) -> None:
    tokenizer = load_tokenizer(str(vocabulary))
    texts = [("the cat sat", "a dog"), ("good", "the bad mat ran a good mat"), ("fine", "poor")]
    split = encode(Rows(texts, [0.5, 1.0, 2.0]), TASKS["stsb"], tokenizer, 8)
    for fixed in (None, 16):
        batches, _ = loader(split, 3, pad_id=0, fixed_length=fixed, sort=False)
        (batch,) = list(batches.dataloader)
        expected = tokenizer(
            *map(list, zip(*texts, strict=True)), truncation=True, max_length=8, padding=True, return_tensors="pt"
        )
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            width = batch[name].shape[1]
            assert width == (fixed or 8)
            assert batch[name][:, :8].tolist() == expected[name].tolist()
            assert not batch[name][:, 8:].any()
        assert batch["labels"].tolist() == [0.5, 1.0, 2.0]


def test_batches_are_as_wide_as_their_longest_text_rounded_up() -> None:
    lengths = [3, 5, 17, 40]
    split = data.EncodedSplit(np.ones(sum(lengths), np.int32), np.cumsum([0, *lengths]), np.asarray(lengths), None)
    batches, _ = loader(split, 1, pad_id=0, fixed_length=None)
    assert [batch["input_ids"].shape[1] for batch in batches.dataloader] == [16, 16, 32, 40]  # 48 are not known to fit


def test_order_of_batches() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 1000)

    def epochs(shuffle: bool, seed: int, lengths: np.ndarray | None = lengths) -> list[list[list[int]]]:
        order = BatchOrder(1000, 16, shuffle=shuffle, seed=seed, lengths=lengths)
        return [list(order), list(order)]

    for by_length in (lengths, None):
        first, second = epochs(True, 1, by_length)
        assert first != second  # each epoch anew
        assert epochs(True, 1, by_length) == [first, second]  # by the seed alone
        assert epochs(True, 2, by_length)[0] != first
        for epoch in (first, second):
            assert sorted(row for batch in epoch for row in batch) == list(range(1000))
    first, second = epochs(False, 1, None)
    assert first == second
    assert [row for batch in first for row in batch] == list(range(1000))
    padded = sum(len(batch) * max(lengths[batch]) for batch in epochs(True, 1)[0])
    assert padded < 1.1 * lengths.sum()
    assert padded < 0.65 * sum(len(batch) * max(lengths[batch]) for batch in epochs(True, 1, None)[0])


def test_outputs_come_back_in_the_order_of_the_file() -> None:
    lengths = np.array([5, 3, 9, 1, 4])
    order = BatchOrder(5, 2, shuffle=False, seed=0, lengths=lengths)
    outputs = [np.asarray(batch, dtype=float)[:, None] * 10 for batch in order]
    assert in_file_order(outputs, order)[:, 0].tolist() == [0, 10, 20, 30, 40]
