"""From articles to pairs: what is split off, which split it goes to, and what is wrong with a file of pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bert.data.pairs import main, split_article, split_of, write_pairs
from bert.embeddings.data import Pairs
from bert.errors import DataError

BODY = " is a thing, and more is said of it."


def articles(folder: Path, titles: list[str]) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / f"articles-{len(list(folder.iterdir()))}.jsonl"
    texts = [f"{title}\n\n{title}{BODY}\nSecond paragraph {number}." for number, title in enumerate(titles)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def read(out: Path) -> dict[str, list[dict[str, str]]]:
    names = ("train", "validation", "test")
    return {name: [json.loads(line) for line in (out / f"{name}.jsonl").open(encoding="utf-8")] for name in names}


@pytest.mark.parametrize(
    ("text", "query", "expected"),
    [
        ("Model theory\n\nModel theory is maths.\nMore.", "title", ("Model theory", "is maths.\nMore.")),
        ("Moon\n\nThe MOON, or Luna, is far.", "title", ("Moon", "or Luna, is far.")),
        ("Moon\n\nIts tides move the Moon.", "title", ("Moon", "Its tides move the Moon.")),  # at the beginning only
        ("Moon\n\nThe moon.", "title", None),  # nothing is left
        ("Moon\n\nFirst.\nSecond.\nThird.", "lead", ("First.", "Second.\nThird.")),
        ("Moon\n\nOnly one paragraph.", "lead", None),
        ("Moon", "title", None),
        ("Moon", "lead", None),
        ("", "title", None),
    ],
)
def test_an_article_becomes_query_and_document(text: str, query: str, expected: tuple[str, str] | None) -> None:
    assert split_article(text, query) == expected


def test_splits_are_disjoint_and_do_not_depend_on_files_and_order(tmp_path: Path) -> None:
    titles = [f"Title {number}" for number in range(300)]
    out = tmp_path / "out"
    counts = write_pairs([articles(tmp_path / "a", titles)], out, min_characters=1, validation=100, test=200)
    pairs = read(out)
    assert counts == {name: len(rows) for name, rows in pairs.items()} and sum(counts.values()) == 300
    assert 10 < counts["validation"] < 60 and 30 < counts["test"] < 100  # expected: 30 and 60
    splits = {row["query"]: name for name, rows in pairs.items() for row in rows}
    assert len(splits) == 300
    assert all(row["document"].startswith("is a thing") for rows in pairs.values() for row in rows)

    # Other files and order, and articles of a title that is there already, written otherwise.
    again = [*titles[::-1], *(f" {title.upper()} " for title in titles[:50])]
    sources = [articles(tmp_path / "b", part) for part in (again[:120], again[120:])]
    write_pairs(sources, tmp_path / "again", min_characters=1, validation=100, test=200)
    found = {name: {row["query"].lower() for row in rows} for name, rows in read(tmp_path / "again").items()}
    assert all(splits[title] == name for title in titles for name in found if title.lower() in found[name])
    assert sum(map(len, found.values())) == 300
    assert split_of(" TITLE 7", 100, 200) == splits["Title 7"]


def test_limits_of_number_and_length(tmp_path: Path) -> None:
    source = articles(tmp_path / "a", [f"Title {number}" for number in range(100)])
    limits = {"train": 7, "test": 3}
    counts = write_pairs([source], tmp_path / "out", min_characters=1, max_characters=10, test=200, limits=limits)
    assert (counts["train"], counts["test"]) == (7, 3)
    assert {len(row["document"]) for rows in read(tmp_path / "out").values() for row in rows} == {10}
    before = read(tmp_path / "out")
    with pytest.raises(DataError, match="no article gives a pair"):
        write_pairs([source], tmp_path / "out", min_characters=1000)
    assert read(tmp_path / "out") == before


def test_articles_in_text_files_are_whole_files(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"Title {number}\n\nThe body.\n\nIts end.\n")
    counts = write_pairs([str(tmp_path / "*.txt")], tmp_path / "out", min_characters=1, test=0, validation=0)
    assert counts["train"] == 20
    assert read(tmp_path / "out")["train"][0]["document"].split() == ["The", "body.", "Its", "end."]


@pytest.mark.parametrize(
    ("text", "document"), [("Art\n\nArtists are people.", "Artists are people."), ("Art\n\nArt, is.", "is.")]
)
def test_a_title_is_not_cut_out_of_a_longer_word(text: str, document: str) -> None:
    assert split_article(text, "title") == ("Art", document)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = articles(tmp_path / "a", ["One", "Two"]), str(tmp_path / "out")
    command = ["--source", source, "--out", out, "--min-characters", "1"]
    assert main([*command, "--query", "lead", "--max-train", "1", "--validation", "0", "--test", "0"]) == 0
    assert "train: 1 pairs, validation: 0 pairs, test: 0 pairs" in capsys.readouterr().out
    assert Pairs(tmp_path / "out" / "train.jsonl")[0] == (f"One{BODY}", "Second paragraph 0.")
    assert main([*command, "--validation", "500", "--test", "500"]) == 2
    assert "leave nothing to train on" in capsys.readouterr().err
    (tmp_path / "b.jsonl").write_text('{"body": "Two\\n\\nA text."}\nbroken\n')
    command = ["--source", str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "b"), "--min-characters", "1"]
    assert main(command) == 2
    assert "--text-column" in capsys.readouterr().err
    assert main([*command, "--text-column", "body", "--max-broken", "1", "--validation", "0", "--test", "0"]) == 0
    assert "train: 1 pairs" in capsys.readouterr().out
    assert main(["--source", str(tmp_path / "nothing.jsonl"), "--out", out]) == 2
    assert "nothing.jsonl" in capsys.readouterr().err
    assert not list(Path(out).glob(".*"))  # nor is a temporary file left


GOOD = json.dumps({"query": "one", "document": "two"}).encode()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: it is not JSON"),
        (b"", "line 2: it is not JSON"),
        (b"[1]", "line 2: it needs the strings"),
        (b'{"query": "one"}', "line 2: it needs the strings"),
        (b'{"query": "one", "document": 2}', "line 2: it needs the strings"),
        (b'{"query": " ", "document": "two"}', "line 2: it needs the strings"),
        (b"[" * 100_000, "line 2: it is not JSON"),
        (b"\xff", "cannot be read"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join([GOOD, line, GOOD, b""]))
    with pytest.raises(DataError, match=message) as raised:
        Pairs(path)
    assert str(path) in str(raised.value)


def test_pairs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*none\.jsonl; make it with: python -m bert\.data\.pairs"):
        Pairs(tmp_path / "none.jsonl")
