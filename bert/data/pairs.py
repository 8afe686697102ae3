"""Pairs for retrieval from articles: `python -m bert.data.pairs --source articles.jsonl.xz --out data/pairs`."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bert.data.sources import FileSource
from bert.errors import DataError, RecipeError

SPLITS = ("train", "validation", "test")
QUERIES = ("title", "lead")
_BUCKETS = 1000


def split_article(text: str, query: str) -> tuple[str, str] | None:
    """Split an article whose first line is its title into a query and a document.

    Args:
        text: the article, its first line the title, a blank line, then paragraphs one a line.
        query: "title": the title, and the body as the document; "lead": the first paragraph, and what follows it.

    Returns:
        Query and document; None where either would be empty. A body that repeats the title at its beginning ("Model
        theory is ...") loses it there (also after "The"): otherwise finding the document is matching its first words.
    """
    title, _, body = text.strip().partition("\n")
    title, body = title.strip(), body.strip()
    if query == "lead":
        title, _, body = body.partition("\n")
        title, body = title.strip(), body.strip()
        return (title, body) if title and body else None
    words = body
    for article in ("", "the ", "a ", "an "):
        end = len(article) + len(title)
        if words.lower().startswith(f"{article}{title.lower()}") and not words[end : end + 1].isalnum():
            words = words[end:].lstrip(" ,:;.-")
            break
    return (title, words) if title and words else None


def split_of(title: str, validation: int, test: int) -> str:
    """Return the split of an article by a hash of its title: the same in any order, and two of one title together.

    `validation` and `test` are shares, in thousandths.
    """
    bucket = int.from_bytes(hashlib.sha256(title.strip().lower().encode()).digest()[:8], "big") % _BUCKETS
    if bucket < test:
        return "test"
    return "validation" if bucket < test + validation else "train"


def article_pairs(
    source: FileSource, query: str, min_characters: int, validation: int, test: int
) -> Iterator[tuple[str, str, str]]:
    """Yield (split, query, document) of every article of a source that is long enough and can be split."""
    for text in source.documents():
        pair = split_article(text, query)
        if pair is not None and len(pair[1]) >= min_characters:
            yield split_of(text.strip().partition("\n")[0], validation, test), *pair


def write_pairs(
    sources: Sequence[str],
    out: Path,
    *,
    query: str = "title",
    min_characters: int = 1000,
    max_characters: int | None = None,
    validation: int = 10,
    test: int = 150,
    limits: dict[str, int] | None = None,
    text_column: str = "text",
    max_broken: int = 0,
) -> dict[str, int]:
    """Write train.jsonl, validation.jsonl and test.jsonl, from disjoint articles; return their numbers of pairs.

    Args:
        sources: files, folders or globs of articles, as `bert.data.prepare --source`.
        out: folder.
        query: see `split_article`.
        min_characters: shorter documents are left out.
        max_characters: documents are cut to so many; None: whole.
        validation: share of that split, in thousandths of the articles.
        test: share of that split.
        limits: most pairs of a split, by name.
        text_column: the field or column with the article; a .txt file is one.
        max_broken: records that may be left out because they cannot be read.

    Raises:
        DataError: a source cannot be read, or has no article that can be split; earlier files are kept.
    """
    source = FileSource(sources, text_column, "file", max_broken)
    out.mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(SPLITS, 0)
    limits = limits or {}
    temporary = {name: out / f".{name}.jsonl.tmp" for name in SPLITS}
    try:
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(open(path, "w", encoding="utf-8")) for name, path in temporary.items()}
            for split, question, document in article_pairs(source, query, min_characters, validation, test):
                if counts[split] >= limits.get(split, sys.maxsize):
                    if all(counts[name] >= limits.get(name, sys.maxsize) for name in SPLITS):
                        break
                    continue
                counts[split] += 1
                record = {"query": question, "document": document[:max_characters]}
                files[split].write(json.dumps(record, ensure_ascii=False) + "\n")
        if not any(counts.values()):
            raise DataError(
                "no article gives a pair: the first line is the title, then paragraphs; a document has at least "
                f"{min_characters} characters (--min-characters); in .txt an article is a file"
            )
        for name, path in temporary.items():
            os.replace(path, out / f"{name}.jsonl")
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bert.data.pairs",
        description="Make pairs of query and document from articles whose first line is their title. Articles are "
        "divided by a hash of the title: the splits are disjoint, and the same every time.",
    )
    parser.add_argument("--source", nargs="+", required=True, help="files, folders or globs, as of bert.data.prepare")
    parser.add_argument("--out", type=Path, required=True, help="folder for train, validation and test .jsonl")
    parser.add_argument("--query", choices=QUERIES, default="title", help="title, or first paragraph (%(default)s)")
    parser.add_argument("--min-characters", type=int, default=1000, help="of a document (%(default)s)")
    parser.add_argument("--max-characters", type=int, help="cut documents to so many (default: whole)")
    parser.add_argument("--validation", type=int, default=10, help="thousandths of the articles (%(default)s)")
    parser.add_argument("--test", type=int, default=150, help="thousandths of the articles (%(default)s)")
    parser.add_argument("--text-column", default="text", help="field or column with the article (%(default)s)")
    parser.add_argument("--max-broken", type=int, default=0, help="records that may be left out (%(default)s)")
    for split in SPLITS:
        parser.add_argument(f"--max-{split}", type=int, help=f"pairs of {split} at most (default: all)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(message)s")
    given = {split: getattr(arguments, f"max_{split}") for split in SPLITS}
    limits = {split: limit for split, limit in given.items() if limit is not None}
    try:
        if arguments.validation + arguments.test >= _BUCKETS:
            raise DataError("--validation and --test are thousandths, and leave nothing to train on")
        if min(arguments.validation, arguments.test, arguments.min_characters, *limits.values()) < 0:
            raise DataError("numbers of pairs, characters and thousandths are not negative")
        counts = write_pairs(
            arguments.source,
            arguments.out,
            query=arguments.query,
            min_characters=arguments.min_characters,
            max_characters=arguments.max_characters,
            validation=arguments.validation,
            test=arguments.test,
            limits=limits,
            text_column=arguments.text_column,
            max_broken=arguments.max_broken,
        )
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    sys.stdout.write(", ".join(f"{name}: {count:,} pairs" for name, count in counts.items()) + f" in {arguments.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
