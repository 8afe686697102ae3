"""Embed a file of documents: `python -m bert.embed MODEL --input docs.jsonl --output vectors.parquet`."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from tqdm import tqdm

from bert.data.readers import TEXT_DOCUMENTS, BrokenRecord, ReadProgress, file_kind, read_records
from bert.data.tokenizer import fingerprint
from bert.errors import DataError, RecipeError, exit_code, nearest
from bert.files import write_json, written_whole
from bert.inference import BATCH_TOKENS, POOLINGS, LoadedModel, load
from bert.trained import OWN_POOLING

log = logging.getLogger(__name__)

OUTPUTS = (".parquet", ".npy")
SETTINGS = "settings.json"
_EDGE_BYTES = 1 << 20  # of the input's two ends, which are hashed
_EXAMPLES = """\
examples:
  python -m bert.embed runs/m2-base-2k --input docs.jsonl.zst --output vectors.parquet --id-column id
  python -m bert.embed exported/ --input docs.txt --text-documents paragraph --output vectors.npy --no-normalize

A Parquet file has the columns id (that of --id-column, else the record's number from 0) and vector; a .npy file holds
the vectors in the order of the records. OUTPUT.json beside it says what made it. A run that was stopped, in any way,
goes on when the same command is given again, and the result is the same file.
"""


def embed_file(
    model: LoadedModel,
    source: Path,
    output: Path,
    *,
    text_column: str = "text",
    id_column: str | None = None,
    text_documents: str = "paragraph",
    pooling: str | None = None,
    normalize: bool = True,
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    chunk: int = 4096,
    restart: bool = False,
    progress_bar: bool = False,
) -> str:
    """Write the vectors of a file's documents, and go on where an earlier call was stopped.

    Finished chunks lie in the folder OUTPUT.parts, each written under a temporary name and renamed, until the output is
    whole; the folder knows the settings that made them.

    Args:
        model: what embeds.
        source: a file that `bert.data.readers` knows.
        output: a .parquet or .npy file.
        text_column: the field or column with the text; unused in .txt files.
        id_column: one with an identifier, a string or an integer (Parquet output only, as text); None: the record's
            number.
        text_documents: what is a document in a .txt file: "line", "paragraph" or "file".
        pooling: see `LoadedModel.encode`, also for `normalize`, `max_length` and `batch_tokens`.
        normalize: whether vectors get the length 1.
        max_length: tokens that a document is cut to.
        batch_tokens: most tokens of a batch.
        chunk: documents that are sorted by length together, and that a killed run loses at most.
        restart: remove what is there of another run or other settings.
        progress_bar: show one.

    Returns:
        What was done and how fast, one line.

    Raises:
        DataError: the input cannot be read, a record is broken (with its file and line), the output lies below a file,
            or the output or its parts were made with other settings (which are named).
        RecipeError: a pooling or length that the model does not take; then nothing was made or removed.
        OSError: the disk is full, for one; what was embedded is kept.
    """
    if output.suffix not in OUTPUTS:
        raise DataError(f"--output {output}: its name must end in {' or '.join(OUTPUTS)}")
    if id_column is not None and output.suffix == ".npy":
        raise DataError(
            "a .npy file holds vectors only, in the order of the input: leave --id-column out, or use .parquet"
        )
    if chunk < 1 or batch_tokens < 1:
        raise DataError("--chunk and --batch-tokens must be at least 1")
    if text_documents not in TEXT_DOCUMENTS:
        raise DataError(f"text_documents '{text_documents}': {nearest(text_documents, TEXT_DOCUMENTS)}")
    pooling, max_length = model.checked(pooling, max_length)
    if not source.is_file():
        raise DataError(f"--input {source}: there is no such file")
    file_kind(source)
    settings = {
        "model": _sha256(model.file),
        "tokenizer": fingerprint(model.tokenizer),
        "device": model.device.type,  # a GPU computes in bf16
        "input": {"name": source.name, "bytes": source.stat().st_size, "sha256_of_ends": _sha256_of_ends(source)},
        "text_column": text_column,
        "id_column": id_column,
        "text_documents": text_documents,
        "pooling": pooling,
        "normalize": normalize,
        "max_length": max_length,
        "batch_tokens": batch_tokens,
        "chunk": chunk,
    }
    parts = output.with_name(f"{output.name}.parts")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"--output {output}: it lies below a file, which is no folder; give another name") from None
    try:
        with FileLock(output.with_name(f".{output.name}.lock"), timeout=0):
            _remove_hidden(parts)
            if restart:
                _remove(parts)
                for path in (output, _sidecar(output)):
                    path.unlink(missing_ok=True)
            if not parts.exists() and output.exists():
                _compare(_sidecar(output), settings, output)
                return f"{output} is already there, made with these settings"
            parts.mkdir(exist_ok=True)
            if any(parts.glob("part-*")):
                _compare(parts / SETTINGS, settings, parts)
            else:  # nothing is lost with an earlier command's settings, such as one that named a missing column
                write_json(parts / SETTINGS, settings)
            begin, documents, tokens = time.perf_counter(), 0, model.encoded_tokens
            records = _records(source, text_column, id_column, text_documents)
            with tqdm(unit=" docs", desc="embedding", disable=not progress_bar) as bar:
                number = 0
                while rows := list(islice(records, chunk)):
                    if not (part := _part(parts, number)).exists():
                        vectors = model.encode(
                            [text for _, text in rows],
                            pooling=pooling,
                            normalize=normalize,
                            max_length=max_length,
                            batch_tokens=batch_tokens,
                            progress=bar.update,
                        )
                        with written_whole(part) as temporary:
                            pq.write_table(_table([name for name, _ in rows], vectors), temporary)
                        documents += len(rows)
                    else:
                        bar.update(len(rows))
                    number += 1
            seconds = time.perf_counter() - begin
            total = _join(parts, number, output, model.hidden_size)
            write_json(_sidecar(output), settings)
            _remove(parts)
    except Timeout:
        raise DataError(f"another process is writing {output}") from None
    tokens = model.encoded_tokens - tokens
    speed = (
        f"{documents / seconds:,.1f} documents/s, {tokens / seconds:,.0f} tokens/s" if documents else "nothing to do"
    )
    return f"{output}: {total:,} vectors of {model.hidden_size}; {documents:,} made now, {speed} ({model.device.type})"


def _records(
    source: Path, text_column: str, id_column: str | None, text_documents: str
) -> Iterator[tuple[str | int, str]]:
    """Yield identifier and text of each record; DataError for the first broken one."""
    texts = read_records(source, ReadProgress(), text_column, text_documents)
    if id_column is None or file_kind(source)[0] == "text":
        for number, text in enumerate(texts):
            yield number, _whole(text, source)
        return
    names = read_records(source, ReadProgress(), id_column, text_documents, identifiers=True)
    for name, text in zip(names, texts, strict=True):
        yield _whole(name, source), _whole(text, source)


def _whole(record: str | BrokenRecord, source: Path) -> str:
    if isinstance(record, BrokenRecord):
        raise DataError(f"{source}, {record.place}: {record.reason}. What was embedded so far is kept")
    return record


def _hidden(parts: Path) -> Path:
    return parts.with_name(f".{parts.name}.removed")


def _remove_hidden(parts: Path) -> None:
    """Remove what a kill in the middle of `_remove` has left."""
    if _hidden(parts).exists():
        shutil.rmtree(_hidden(parts))


def _remove(parts: Path) -> None:
    """Remove the parts, their name first: a kill in the middle must not leave some of them without their settings."""
    if parts.exists():
        os.rename(parts, _hidden(parts))
        _remove_hidden(parts)


def _part(parts: Path, number: int) -> Path:
    return parts / f"part-{number:06d}.parquet"


def _table(names: Sequence[str | int], vectors: np.ndarray) -> pa.Table:
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    return pa.table({"id": pa.array(names), "vector": column})


def _join(parts: Path, count: int, output: Path, width: int) -> int:
    """Put the parts together and return the number of vectors."""
    files = [_part(parts, number) for number in range(count)]
    total = sum(pq.read_metadata(file).num_rows for file in files)
    with written_whole(output) as temporary:
        if output.suffix == ".npy":
            with open(temporary, "wb") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": (total, width)}
                np.lib.format.write_array_header_1_0(file, header)
                for part in files:
                    vectors = pq.read_table(part)["vector"].combine_chunks()
                    file.write(vectors.values.to_numpy().astype("<f4").tobytes())
        else:
            schema = pq.read_schema(files[0]) if files else _table([], np.empty((0, width), np.float32)).schema
            with pq.ParquetWriter(temporary, schema) as writer:
                for part in files:
                    writer.write_table(pq.read_table(part))
    return total


def _sidecar(output: Path) -> Path:
    return output.with_name(f"{output.name}.json")


def _compare(path: Path, settings: dict[str, Any], what: Path) -> None:
    """Raise DataError, naming the differences, unless `path` holds these settings."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{what} is there, and nothing says what made it; --restart makes it anew")
    changed = [f"{key} was {found.get(key)}, now {value}" for key, value in settings.items() if found.get(key) != value]
    if changed:
        raise DataError(
            f"{what} was made with other settings: {'; '.join(changed)}. --restart removes it and starts over"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(_EDGE_BYTES):
        digest.update(block)
    return digest.hexdigest()


def _sha256_of_ends(path: Path) -> str:
    """Hash the first and the last MiB: an input may be far larger than what is worth reading twice."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(_EDGE_BYTES))
        file.seek(max(0, path.stat().st_size - _EDGE_BYTES))
        digest.update(file.read())
    return digest.hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 2 for a mistake in what was given, 4 for a full disk, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m bert.embed",
        description="Embed the documents of a file.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a run's folder or checkpoint, or a Hugging Face folder")
    parser.add_argument(
        "--input", type=Path, required=True, help=".jsonl, .csv, .txt (plain, .gz, .xz or .zst) or .parquet"
    )
    parser.add_argument("--output", type=Path, required=True, help="a .parquet or .npy file")
    parser.add_argument("--text-column", default="text", help="field or column with the text (%(default)s)")
    parser.add_argument("--id-column", help="one with an identifier, text or an integer (default: the record's number)")
    parser.add_argument(
        "--text-documents", choices=TEXT_DOCUMENTS, default="paragraph", help="a document of a .txt (%(default)s)"
    )
    parser.add_argument("--tokenizer", help="name or path (default: the model's own copy)")
    parser.add_argument(
        "--pooling",
        choices=(*POOLINGS, OWN_POOLING),
        help="own: what a retrieval model gives itself; default: that, or as it was fine-tuned, else mean",
    )
    parser.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=True, help="vectors of length 1 (the default)"
    )
    parser.add_argument("--max-length", type=int, metavar="N", help="cut documents to N tokens (default: the model's)")
    parser.add_argument(
        "--batch-tokens", type=int, default=BATCH_TOKENS, metavar="N", help="tokens of a batch at most (%(default)s)"
    )
    parser.add_argument(
        "--chunk", type=int, default=4096, metavar="N", help="documents a killed run loses at most (%(default)s)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    parser.add_argument("--restart", action="store_true", help="remove OUTPUT and its parts first")
    options = vars(parser.parse_args(argv))
    logging.basicConfig(format="%(levelname)s %(message)s")
    name, source, output = options.pop("model"), options.pop("input"), options.pop("output")
    try:
        model = load(name, tokenizer=options.pop("tokenizer"), device=options.pop("device"))
        report = embed_file(model, source, output, **options, progress_bar=True)
    except (RecipeError, OSError) as error:
        return exit_code(error, "what was embedded is kept: make room and give the same command again")
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)  # noqa: T201
        return 130
    sys.stdout.write(report + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
