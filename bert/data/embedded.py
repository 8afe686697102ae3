"""The embedded corpus: English prose that every Python installation already carries, for demos and tests.

It is the language reference behind `help()` (`pydoc_data.topics`) and the docstrings of the standard library, read
from the library's source files with `ast`: nothing is imported, run or downloaded. Code examples, tables and
paragraphs that say again what an earlier one said are left out. What remains is one to two megabytes of technical
English, one document a module or topic. It differs a little between versions of Python.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from bert.errors import DataError, nearest

SPLITS = ("train", "validation")
_MINIMUM_CHARACTERS = 1 << 20
_VALIDATION_SHARE = 16  # one document in so many, chosen by a hash of its name
# Test suites, installed packages and generated tables hold little prose that is about Python.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
_TOPICS_FILE = ("pydoc_data", "topics.py")
_MINIMUM_WORDS = 6
_PROSE_SHARE = 0.85  # of a paragraph's characters, that must be letters, spaces or ordinary punctuation

_NOT_LETTERS = re.compile(r"[^a-z]+")
_PROSE_CHARACTERS = re.compile(r"[A-Za-z ,.;:'\n]")
_DOCTEST = re.compile(r"^\s*>>> .*(?:\n\s*\S.*)*", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n\s*\n")


def embedded_documents(split: str) -> tuple[str, ...]:
    """Return the documents of one split of the embedded corpus, always in the same order.

    Args:
        split: "train" or "validation".

    Raises:
        DataError: another split, or a Python without its standard library's sources.
    """
    if split not in SPLITS:
        raise DataError(f"the embedded corpus has no split '{split}': {nearest(split, SPLITS)}")
    wanted = split == "validation"
    return tuple(text for name, text in _corpus() if _is_validation(name) == wanted)


def _is_validation(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % _VALIDATION_SHARE == 0


@functools.cache
def _corpus() -> tuple[tuple[str, str], ...]:
    """Collect (name, text) pairs; a few seconds, so kept for the process's life."""
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[bytes] = set()
    corpus = []
    for name, texts in _raw_documents(library):
        paragraphs = [p for text in texts for p in _prose(text) if _is_new(p, seen)]
        if paragraphs:
            corpus.append((name, "\n\n".join(paragraphs)))
    size = sum(len(text) for _, text in corpus)
    if size < _MINIMUM_CHARACTERS:
        raise DataError(
            f"the embedded corpus has only {size:,} characters: {library} lacks the sources of the standard library "
            "(some minimal installations strip them). Use another Python, or text files as --source"
        )
    return tuple(corpus)


def _raw_documents(library: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the raw texts of each topic, then of each module."""
    topics = library.joinpath(*_TOPICS_FILE)
    if topics.is_file():
        for name, text in sorted(_topics(topics).items()):
            yield f"topic {name}", [text]
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts) and relative.parts != _TOPICS_FILE:
            yield relative.as_posix(), _docstrings(path)


def _topics(path: Path) -> dict[str, str]:
    """Read the one dictionary literal that `pydoc_data/topics.py` assigns."""
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template, or a source for another version of Python
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [text for text in texts if text]


def _prose(text: str) -> Iterator[str]:
    """Yield the paragraphs of `text` that read as sentences, each on one line."""
    for paragraph in _BLANK_LINES.split(_DOCTEST.sub("", text)):
        line = " ".join(paragraph.split())
        share = len(_PROSE_CHARACTERS.findall(line)) / max(len(line), 1)
        if len(line.split()) >= _MINIMUM_WORDS and share >= _PROSE_SHARE:
            yield line


def _is_new(paragraph: str, seen: set[bytes]) -> bool:
    """Say whether no earlier paragraph had the same letters (case, digits and punctuation aside)."""
    key = hashlib.blake2b(_NOT_LETTERS.sub("", paragraph.lower()).encode(), digest_size=16).digest()
    if key in seen:
        return False
    seen.add(key)
    return True
