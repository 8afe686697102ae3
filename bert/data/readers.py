"""Records of one text file: .txt, .jsonl/.json, .csv, .parquet; plain, or .gz, .xz, .zst."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

from bert.errors import DataError

TEXT_DOCUMENTS = ("line", "paragraph", "file")
_KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
_COMPRESSIONS = {".gz", ".xz", ".zst"}
_PARQUET_BATCH_ROWS = 1000


@dataclass(frozen=True)
class BrokenRecord:
    """A record that could not be read: where in its file, and why."""

    place: str
    reason: str


# What reads a column of a record: of its name and the place to name in a `BrokenRecord`.
Field: TypeAlias = Callable[[dict[str, Any], str, str], "str | BrokenRecord"]


@dataclass
class ReadProgress:
    """How many bytes of the current file were read from the disk (compressed bytes, if it is compressed)."""

    bytes_in_file: int = 0


def file_kind(path: Path) -> tuple[str, str | None]:
    """Return the kind ("text", "json", "csv", "parquet") and the compression (".gz", ".xz", ".zst" or None).

    Raises:
        DataError: the name's ending says neither.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSIONS else None
    kind = _KINDS.get(suffixes[-1] if suffixes else "")
    if kind is None or (kind == "parquet" and compression):
        raise DataError(
            f"{path}: not a kind of text file that can be read: {', '.join(_KINDS)} can, and all but .parquet may "
            f"be compressed ({', '.join(sorted(_COMPRESSIONS))})"
        )
    return kind, compression


def read_records(
    path: Path, progress: ReadProgress, text_column: str, text_documents: str, *, identifiers: bool = False
) -> Iterator[str | BrokenRecord]:
    """Yield each record's text in the order of the file, and a `BrokenRecord` for each that has none.

    Args:
        path: the file.
        progress: kept up to date while reading.
        text_column: the field or column that holds the text; unused in .txt files.
        text_documents: what is a document in a .txt file: "line", "paragraph" or "file".
        identifiers: the column holds no texts but identifiers: an integer counts as its digits.

    Raises:
        DataError: the file as a whole cannot be read (damaged compression, not Parquet, missing column).
    """
    kind, compression = file_kind(path)
    field = identifier_field if identifiers else text_field
    # A damaged file shows itself as one of many exceptions of its library; all mean the same to the user.
    try:
        if kind == "parquet":
            yield from _parquet(path, progress, text_column, field)
            return
        with _opened(path, compression) as (raw, stream):
            if kind == "text":
                records = _text(stream, text_documents)
            elif kind == "json":
                records = _json_lines(stream, text_column, field)
            else:
                records = _csv(stream, path, text_column, field)
            for record in records:
                progress.bytes_in_file = raw.tell()
                yield record
    except (OSError, EOFError, lzma.LZMAError, zlib.error, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error or type(error).__name__}") from error


@contextmanager
def _opened(path: Path, compression: str | None) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open `path`; give the file as it lies on the disk, whose place is the progress, and its text's bytes."""
    with open(path, "rb") as raw:
        if compression == ".gz":
            yield raw, cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
        elif compression == ".xz":
            yield raw, cast("IO[bytes]", lzma.LZMAFile(raw))  # noqa: SIM115  `raw` is the file
        elif compression == ".zst":
            import pyarrow  # reads zstd as a stream, and is needed for Parquet in any case

            with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd") as stream:
                yield raw, cast("IO[bytes]", io.BufferedReader(stream, 1 << 20))
        else:
            yield raw, raw


def _decoded(data: bytes, place: str) -> str | BrokenRecord:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return BrokenRecord(place, f"it is not UTF-8 ({error.reason} at byte {error.start})")


def _text(stream: IO[bytes], documents: str) -> Iterator[str | BrokenRecord]:
    if documents == "file":
        yield _decoded(stream.read(), "the whole file")
        return
    paragraph: list[bytes] = []
    number = 0
    for number, line in enumerate(stream, 1):
        blank = not line.strip()
        if not blank:
            paragraph.append(line)
        if paragraph and (blank or documents == "line"):
            yield _decoded(b"".join(paragraph).rstrip(b"\r\n"), f"line {number}")
            paragraph = []
    if paragraph:
        yield _decoded(b"".join(paragraph).rstrip(b"\r\n"), f"line {number}")


def _json_lines(stream: IO[bytes], column: str, field: Field) -> Iterator[str | BrokenRecord]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield _json_text(line, f"line {number}", column, field)


def _json_text(line: bytes, place: str, column: str, field: Field) -> str | BrokenRecord:
    try:
        # Python keeps the last of two equal keys, without a word. Looking at each object takes time, so only where
        # the column's name is there twice.
        twice = line.count(f'"{column}"'.encode()) > 1
        record = json.loads(line, object_pairs_hook=_without_duplicates if twice else None)
    except UnicodeDecodeError as error:
        return BrokenRecord(place, f"it is not UTF-8 ({error.reason} at byte {error.start})")
    except _DuplicateKeyError as error:
        return BrokenRecord(place, f"it has the key {error} twice")
    except (ValueError, RecursionError) as error:
        return BrokenRecord(place, f"it is not JSON, one object a line ({error})")
    if not isinstance(record, dict):
        return BrokenRecord(place, f"it is a JSON {type(record).__name__}; one object a line is read")
    return field(record, column, place)


class _DuplicateKeyError(Exception):
    """A JSON object with two equal keys."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _DuplicateKeyError(repr(key))
        values[key] = value
    return values


def text_field(record: dict[str, Any], column: str, place: str) -> str | BrokenRecord:
    """Return the text in `column` of one record, or what is wrong with it."""
    if column not in record:
        return BrokenRecord(place, f"there is no column '{column}'; it has: {', '.join(record)} (--text-column)")
    text = record[column]
    if not isinstance(text, str):
        return BrokenRecord(place, f"column '{column}' holds no text but {type(text).__name__}")
    return text if text.isascii() or _is_unicode(text) else BrokenRecord(place, "its text is not valid Unicode")


def identifier_field(record: dict[str, Any], column: str, place: str) -> str | BrokenRecord:
    """Return the identifier in `column` of one record: a text, or an integer's digits."""
    if column not in record:
        return BrokenRecord(place, f"there is no column '{column}'; it has: {', '.join(record)} (--id-column)")
    value = record[column]
    if type(value) is int:  # True is none
        return str(value)
    if not isinstance(value, str):
        return BrokenRecord(place, f"column '{column}' holds neither text nor an integer but {type(value).__name__}")
    return text_field(record, column, place)


def _is_unicode(text: str) -> bool:
    """Say whether `text` can be encoded; a lone surrogate, which JSON can bring, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv(stream: IO[bytes], path: Path, column: str, field: Field) -> Iterator[str | BrokenRecord]:
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is less than a long document
    # Bytes that are not UTF-8 become lone surrogates, which `text_field` finds, row by row.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.DictReader(text, restval=None, strict=True)  # else a quote that is left open takes the rest of the file
    columns = [str(name) for name in rows.fieldnames or []]
    _require_column(path, column, columns, field)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield BrokenRecord(f"line {rows.line_num}", f"it is no CSV: {error}")
            continue
        if None in row:  # as where a text with commas is not quoted: its rest would be lost
            yield BrokenRecord(f"line {rows.line_num}", "it has more fields than the header")
        else:
            yield field(row, column, f"line {rows.line_num}")


def _parquet(path: Path, progress: ReadProgress, column: str, field: Field) -> Iterator[str | BrokenRecord]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require_column(path, column, file.schema_arrow.names, field)
            size, rows, number = path.stat().st_size, max(file.metadata.num_rows, 1), 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[column]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    progress.bytes_in_file = size * number // rows
                    yield field({column: text}, column, f"row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _require_column(path: Path, column: str, columns: list[str], field: Field) -> None:
    if column not in columns:
        option = "--id-column" if field is identifier_field else "--text-column"
        raise DataError(f"{path} has no column '{column}'; it has: {', '.join(columns) or 'none'} ({option})")
