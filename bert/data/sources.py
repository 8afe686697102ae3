"""Where text comes from: local files, a dataset of the Hugging Face Hub, or the embedded corpus.

A source yields documents always in the same order, and can say where it stands (`state`, plain JSON values) so that
a later process goes on from there.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from bert.data.embedded import embedded_documents
from bert.data.readers import BrokenRecord, ReadProgress, file_kind, read_records, text_field
from bert.errors import DataError

EMBEDDED = "embedded"
HUB_PREFIX = "hub:"
_BROKEN_SHOWN = 20  # records that are named in the log; all are counted

log = logging.getLogger(__name__)

State = dict[str, Any]


class TextSource(ABC):
    """Documents in a fixed order, with a place in them.

    Attributes:
        broken: records skipped so far because they could not be read.
        unit: what `size` and `position` count: "B" or " docs".
    """

    unit = " docs"

    def __init__(self, max_broken: int = 0) -> None:
        """Start with nothing broken; more than `max_broken` records that cannot be read are an error."""
        self.broken = 0
        self._max_broken = max_broken

    def _checked(self, record: str | BrokenRecord, where: str) -> str | None:
        """Return the record's text, or count it as broken and return None.

        Raises:
            DataError: more than the allowed number are broken; names `where`.
        """
        if isinstance(record, str):
            return record
        self.broken += 1
        place = f"{where}, {record.place}" if record.place else where
        if self.broken <= self._max_broken:
            if self.broken <= _BROKEN_SHOWN:
                log.warning("%s: %s: left out (%d of %d allowed)", place, record.reason, self.broken, self._max_broken)
            return None
        raise DataError(
            f"{place}: {record.reason}. Mend it, or allow more than {self._max_broken} broken records to be "
            f"skipped: --max-broken {max(100, 10 * self.broken)} (what was prepared so far is kept)"
        )

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what identifies the source: two that agree yield the same documents."""

    @abstractmethod
    def documents(self, state: State | None = None) -> Iterator[str]:
        """Yield the documents: all of them, or those after the place where another source was in `state`."""

    @abstractmethod
    def state(self) -> State:
        """Return the place after the document yielded last."""

    @property
    def size(self) -> int | None:
        """How much there is to read, in `unit`s, where known beforehand."""
        return None

    @property
    def position(self) -> int:
        """How much was read, in `unit`s."""
        return 0


class EmbeddedSource(TextSource):
    """One split of the embedded corpus (`bert.data.embedded`)."""

    def __init__(self, split: str) -> None:
        super().__init__()
        self._split = split
        self._documents = embedded_documents(split)
        self._next = 0

    def describe(self) -> dict[str, Any]:
        """Return the split and a hash of the text, which differs between versions of Python."""
        text_hash = hashlib.sha256("\0".join(self._documents).encode()).hexdigest()[:16]
        return {"kind": EMBEDDED, "split": self._split, "text_hash": text_hash}

    def documents(self, state: State | None = None) -> Iterator[str]:
        """Yield the documents from `state` on."""
        self._next = state["next"] if state else 0
        while self._next < len(self._documents):
            self._next += 1
            yield self._documents[self._next - 1]

    def state(self) -> State:
        """Return the number of the next document."""
        return {"next": self._next}

    @property
    def size(self) -> int:
        """Documents in the split."""
        return len(self._documents)

    @property
    def position(self) -> int:
        """Documents yielded."""
        return self._next


class FileSource(TextSource):
    """Text, JSONL, Parquet and CSV files, plain or compressed, in sorted order."""

    unit = "B"

    def __init__(
        self,
        patterns: Sequence[str],
        text_column: str = "text",
        text_documents: str = "paragraph",
        max_broken: int = 0,
    ) -> None:
        """Find the files.

        Args:
            patterns: files, folders (searched through, hidden files left out) and globs.
            text_column: the field or column that holds the text; unused in .txt files.
            text_documents: what is a document in a .txt file: "line", "paragraph" or "file".
            max_broken: records (lines, rows) that may be skipped because they cannot be read.

        Raises:
            DataError: a pattern finds nothing, or a file of a kind that is not known.
        """
        super().__init__(max_broken)
        self._patterns = list(patterns)
        self._files = find_files(patterns)
        self._sizes = [path.stat().st_size for path in self._files]
        self._text_column = text_column
        self._text_documents = text_documents
        self._file = 0
        self._record = 0
        self._progress = ReadProgress()

    def describe(self) -> dict[str, Any]:
        """Return the patterns, how they are read, and a hash of the files' names and sizes."""
        listing = "\n".join(f"{path.name}\t{size}" for path, size in zip(self._files, self._sizes, strict=True))
        return {
            "kind": "files",
            "paths": self._patterns,
            "text_column": self._text_column,
            "text_documents": self._text_documents,
            "num_files": len(self._files),
            "bytes": sum(self._sizes),
            "files_hash": hashlib.sha256(listing.encode()).hexdigest()[:16],
        }

    def documents(self, state: State | None = None) -> Iterator[str]:
        """Yield the documents from `state` on; the file in which it stands is read again up to there.

        Raises:
            DataError: more than `max_broken` records cannot be read; names the file and the line or row.
        """
        place = state or {"file": 0, "record": 0, "broken": 0}
        self._file, self._record, self.broken = place["file"], place["record"], place["broken"]
        while self._file < len(self._files):
            path = self._files[self._file]
            records = read_records(path, self._progress, self._text_column, self._text_documents)
            for record in islice(records, self._record, None):
                self._record += 1
                text = self._checked(record, str(path))
                if text is not None:
                    yield text
            self._file, self._record = self._file + 1, 0
            self._progress.bytes_in_file = 0

    def state(self) -> State:
        """Return the file, the record in it, and the broken records up to there."""
        return {"file": self._file, "record": self._record, "broken": self.broken}

    @property
    def size(self) -> int:
        """Bytes of all files as they lie on the disk."""
        return sum(self._sizes)

    @property
    def position(self) -> int:
        """Bytes read from the disk, about."""
        return sum(self._sizes[: self._file]) + self._progress.bytes_in_file


class HubSource(TextSource):
    """A dataset of the Hugging Face Hub (or a local folder that `datasets` reads), streamed."""

    def __init__(
        self, name: str, config: str | None, split: str, text_column: str = "text", max_broken: int = 0
    ) -> None:
        """Name the dataset; it is opened when first read, which raises `DataError` where that fails."""
        super().__init__(max_broken)
        self._name, self._config, self._split, self._text_column = name, config, split, text_column
        self._yielded = 0

    @functools.cached_property
    def _dataset(self) -> Any:
        import datasets  # takes a second; most sources need it not

        where = f"Hub dataset '{self._name}' (config {self._config}, split {self._split})"
        try:
            # `trust_remote_code` is not given: datasets 4 runs no scripts at all, and 3 asks first.
            dataset = datasets.load_dataset(self._name, self._config, split=self._split, streaming=True)
        except Exception as error:
            raise DataError(
                f"{where} cannot be opened: {error}. Check the name, --hub-config, --hub-split and the network"
            ) from error
        columns = dataset.column_names
        if columns is not None and self._text_column not in columns:
            raise DataError(
                f"{where} has no column '{self._text_column}'; it has: {', '.join(columns)} (--text-column)"
            )
        return dataset

    def describe(self) -> dict[str, Any]:
        """Return the dataset's name, configuration, split and column."""
        return {
            "kind": "hub",
            "name": self._name,
            "config": self._config,
            "split": self._split,
            "text_column": self._text_column,
        }

    def documents(self, state: State | None = None) -> Iterator[str]:
        """Yield the documents from `state` on, without downloading again the files before it."""
        dataset = self._dataset
        self._yielded = 0
        if state is not None:
            dataset.load_state_dict(state["dataset"])
            self._yielded, self.broken = state["documents"], state["broken"]
        for row in dataset:
            self._yielded += 1
            where = f"Hub dataset '{self._name}', record {self._yielded}"
            text = self._checked(text_field(row, self._text_column, ""), where)
            if text is not None:
                yield text

    def state(self) -> State:
        """Return the dataset's own place, and the counts up to there."""
        return {"dataset": self._dataset.state_dict(), "documents": self._yielded, "broken": self.broken}

    @property
    def size(self) -> int | None:
        """Documents in the split, where the dataset's card says so."""
        splits = getattr(self._dataset.info, "splits", None) or {}
        return splits[self._split].num_examples or None if self._split in splits else None

    @property
    def position(self) -> int:
        """Documents yielded."""
        return self._yielded


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Return the text files that `patterns` (files, folders, globs) name, each once, sorted within a pattern.

    Raises:
        DataError: a pattern names nothing, or a file whose kind is not known.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_file():
            file_kind(path)  # a file named outright must be of a known kind
            files = [path]
        elif path.is_dir():
            files = [f for f in path.rglob("*") if f.is_file() and not _is_hidden(f, path) and _is_known(f)]
        else:
            files = [Path(f) for f in glob.glob(str(path), recursive=True) if os.path.isfile(f) and _is_known(Path(f))]
        if not files:
            raise DataError(
                f"--source '{pattern}' names no text file (.txt, .jsonl, .json, .parquet, .csv, plain or .gz, .xz, "
                f".zst). For a dataset of the Hub write '{HUB_PREFIX}{pattern}', for the built-in text '{EMBEDDED}'"
            )
        found.update(dict.fromkeys(sorted(files)))
    return list(found)


def is_searched(path: Path, folder: Path) -> bool:
    """Say whether a source that is `folder` would read what is in `path`."""
    path, folder = path.resolve(), folder.resolve()
    return path.is_relative_to(folder) and not _is_hidden(path, folder)


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _is_known(path: Path) -> bool:
    try:
        file_kind(path)
    except DataError:
        return False
    return True
