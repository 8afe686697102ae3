from __future__ import annotations

import csv
import gzip
import json
import lzma
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from bert.data.embedded import embedded_documents
from bert.data.sources import EmbeddedSource, FileSource, HubSource, TextSource, is_searched
from bert.errors import DataError

TEXTS = ["A first text.", "Zwei\nZeilen, “quoted”, and a comma", "третий", "", "日本語 🙂", 'say "six"', "seven"]


def pyarrow_zstd(data: bytes) -> bytes:
    half = len(data) // 2  # two frames, as `zstd a b > c` or a parallel compressor makes
    return b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in (data[:half], data[half:]))


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": pyarrow_zstd,
}


def json_lines(texts: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()


def write_csv(path: Path, texts: list[str]) -> bytes:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
    return path.read_bytes()


def write_files(folder: Path, kind: str, compression: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    for name, texts in (("b", TEXTS[4:]), ("a", TEXTS[:4])):
        path = folder / f"{name}.{kind}{compression}"
        if kind == "parquet":
            pyarrow.parquet.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=2)
        else:
            data = json_lines(texts) if kind != "csv" else write_csv(folder / "plain", texts)
            path.write_bytes(COMPRESSIONS[compression](data))
    return folder


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_every_compression_of_every_kind(tmp_path: Path, kind: str, compression: str) -> None:
    source = FileSource([str(write_files(tmp_path / "corpus", kind, compression))])
    assert list(source.documents()) == TEXTS
    assert source.position == source.size > 0


def test_parquet_and_globs(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "corpus", "parquet")
    assert list(FileSource([f"{folder}/*.parquet"]).documents()) == TEXTS
    assert list(FileSource([f"{folder}/b.parquet", f"{folder}/a.parquet"]).documents()) == TEXTS[4:] + TEXTS[:4]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(
    ("documents", "wanted"),
    [
        ("line", ["one", "two", "", "three"]),
        ("paragraph", ["one\ntwo", "three"]),
        ("file", ["one\ntwo\n \nthree\n"]),
    ],
)
def test_documents_of_text_files(tmp_path: Path, compression: str, documents: str, wanted: list[str]) -> None:
    path = tmp_path / f"text.txt{compression}"
    path.write_bytes(COMPRESSIONS[compression](b"one\ntwo\n \nthree\n"))
    got = list(FileSource([str(path)], text_documents=documents).documents())
    assert [text for text in got if text.strip()] == [text for text in wanted if text]


def hub_folder(tmp_path: Path) -> str:
    folder = tmp_path / "dataset"
    folder.mkdir(exist_ok=True)
    (folder / "train-0.jsonl").write_bytes(json_lines(TEXTS[:4]))
    (folder / "train-1.jsonl").write_bytes(json_lines(TEXTS[4:]))
    return str(folder)


def make_source(kind: str, tmp_path: Path) -> TextSource:
    if kind == "hub":
        return HubSource(hub_folder(tmp_path), None, "train")
    if kind == "embedded":
        return EmbeddedSource("validation")
    return FileSource([str(write_files(tmp_path / "corpus", kind))])


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "hub", "embedded"])
def test_every_place_can_be_gone_on_from(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    everything = list(islice(make_source(kind, tmp_path).documents(), 20))
    if kind != "embedded":
        assert everything == TEXTS
    first = make_source(kind, tmp_path)
    for count, _ in enumerate(islice(first.documents(), 20), 1):
        state = json.loads(json.dumps(first.state()))
        assert list(islice(make_source(kind, tmp_path).documents(state), 20 - count)) == everything[count:]


def test_hub_dataset_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no column 'content'; it has: id, text"):
        list(HubSource(hub_folder(tmp_path), None, "train", "content").documents())
    with pytest.raises(DataError, match=r"cannot be opened.*--hub-split"):
        list(HubSource(hub_folder(tmp_path), None, "test").documents())


BROKEN_LINES = [
    (b'{"text": "cut of', "it is not JSON"),
    (b'{"text": "\xff\xfe"}', "it is not UTF-8"),
    (b'["a list"]', "it is a JSON list"),
    (b'{"text": null}', "holds no text but NoneType"),
    (b'{"id": 1, "body": "x"}', "no column 'text'; it has: id, body"),
    (b'{"text": "lone \\ud800 surrogate"}', "not valid Unicode"),
    (b'"' + b"[" * 100_000, "it is not JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN_LINES)
def test_a_broken_line_is_named_or_skipped(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(json_lines(["one"]) + line + b"\n" + json_lines(["two"]))
    with pytest.raises(DataError, match=reason) as caught:
        list(FileSource([str(path)]).documents())
    assert str(path) in str(caught.value) and " 2" in str(caught.value) and "--max-broken" in str(caught.value)
    source = FileSource([str(path)], max_broken=1)
    assert list(source.documents()) == ["one", "two"]
    assert source.broken == 1


def test_broken_records_are_counted_once_over_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(json_lines(["one"]) + b"{\n" + json_lines(["two"]) + b"{\n" + json_lines(["three"]))
    first = FileSource([str(path)], max_broken=2)
    assert list(islice(first.documents(), 2)) == ["one", "two"]
    second = FileSource([str(path)], max_broken=2)
    assert list(second.documents(first.state())) == ["three"]
    assert second.broken == 2


def test_bytes_that_are_not_utf8_in_text_and_csv(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\nbad \xff\n\nfine\n")
    (tmp_path / "b.csv").write_bytes(b"text,id\ngood,1\nbad \xff,2\nfine,3\n")
    for name, place in (("a.txt", "line 4: it is not UTF-8"), ("b.csv", "not valid Unicode")):
        with pytest.raises(DataError, match=place):
            list(FileSource([str(tmp_path / name)]).documents())
        assert list(FileSource([str(tmp_path / name)], max_broken=1).documents()) == ["good", "fine"]


def test_rows_of_csv_that_would_lose_text_are_broken(tmp_path: Path) -> None:
    """Commas that are not quoted, and a quote that is left open."""
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,Hello there, unquoted\n2,fine\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2: it has more fields than the header"):
        list(FileSource([str(path)]).documents())
    assert list(FileSource([str(path)], max_broken=1).documents()) == ["fine"]
    path.write_text('id,text\n1,fine\n2,"left open\n' + "3,text\n" * 50, encoding="utf-8")
    with pytest.raises(DataError, match="it is no CSV: unexpected end of data"):
        list(FileSource([str(path)]).documents())
    assert list(FileSource([str(path)], max_broken=1).documents()) == ["fine"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, kind: str) -> None:
    folder = write_files(tmp_path / "corpus", kind)
    with pytest.raises(DataError, match="no column 'content'; it has: id, text"):
        list(FileSource([str(folder)], text_column="content").documents())


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_damaged_files_are_an_error(tmp_path: Path, name: str, damage: str) -> None:
    data = json_lines([f"text number {i}" for i in range(3000)])
    whole = COMPRESSIONS["." + name.split(".")[-1]](data) if name != "a.parquet" else b"PAR1" + bytes(5000)
    data = whole[: len(whole) // 3] if damage == "cut" else whole[:6] + b"noise" * 20 + whole[106:]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=name):
        list(FileSource([str(tmp_path / name)], max_broken=3).documents())


def test_long_csv_fields(tmp_path: Path) -> None:
    text = "long " * 100_000
    write_csv(tmp_path / "long.csv", [text])
    assert list(FileSource([str(tmp_path / "long.csv")]).documents()) == [text]


@pytest.mark.parametrize("pattern", ["nothing.txt", "*.jsonl", "empty", "allenai/c4", "picture.png"])
def test_sources_that_name_no_text(tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.hidden.txt").write_text("x", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"\.jsonl"):
        FileSource([pattern])


def test_source_descriptions_tell_texts_apart(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "corpus", "jsonl")
    before = FileSource([str(folder)]).describe()
    assert before == FileSource([str(folder)]).describe()
    with open(folder / "b.jsonl", "ab") as file:
        file.write(json_lines(["more"]))
    assert FileSource([str(folder)]).describe() != before


def test_embedded_corpus_is_large_english_and_split() -> None:
    train, validation = embedded_documents("train"), embedded_documents("validation")
    text = "\n".join(train + validation)
    assert len(text) > 1 << 20
    assert 0.02 < sum(map(len, validation)) / len(text) < 0.15
    assert not set(train) & set(validation)
    words = text.lower().split()
    assert words.count("the") > 0.04 * len(words), "English prose"
    assert ">>> " not in text
    paragraphs = [p for document in train + validation for p in document.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    with pytest.raises(DataError, match="did you mean 'validation'"):
        embedded_documents("validatoin")


def test_what_a_folder_as_source_reads(tmp_path: Path) -> None:
    inside, hidden = tmp_path / "new" / "out", tmp_path / ".new" / "out"
    assert is_searched(inside, tmp_path) and is_searched(tmp_path, tmp_path)
    assert not is_searched(hidden, tmp_path) and not is_searched(tmp_path, inside)
    for folder in (inside, hidden):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text("text")
    assert FileSource([str(tmp_path)]).describe()["num_files"] == 1  # of `inside`
