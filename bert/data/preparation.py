"""Turn text into shards of token samples (the command line is `python -m bert.data.prepare`).

The main process reads documents, hands them to worker processes for tokenisation, packs what they return in the
order of the text, and writes it in parts (see `part_store`). The samples depend on the text and the settings alone:
not on the number of workers, nor on how often the run was stopped and started again.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bert.data.metadata import DatasetMetadata
from bert.data.packing import LAYOUTS, ConcatPacker, PackingSpec, TruncatePacker, tokenize_chunks
from bert.data.readers import TEXT_DOCUMENTS
from bert.data.sources import EMBEDDED, HUB_PREFIX, EmbeddedSource, FileSource, HubSource, TextSource, is_searched
from bert.data.tokenizer import backend_json, fingerprint, load_tokenizer, special_token_ids
from bert.errors import DataError, nearest
from bert.files import is_remote

# `part_store` and `tqdm` are imported where they are used: a worker process imports this module again, and the
# streaming library, which it needs not, takes seconds.
if TYPE_CHECKING:
    from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

    from bert.data.part_store import PartStore, Progress

log = logging.getLogger(__name__)

_CHUNK_CHARACTERS = 1 << 18  # handed to a worker at a time: a tenth of a second's work
_CHUNK_DOCUMENTS = 4096
_HASHES = ["xxh64"]


@dataclass(frozen=True)
class PrepareSettings:
    """What to prepare. The fields below the line change how it is done, not the samples."""

    source: Sequence[str]  # "embedded", "hub:NAME", or files, folders and globs
    out: str  # local folder or remote URI; the split goes into a folder of its name in it
    tokenizer: str  # Hub name, folder, tokenizer.json or vocab.txt
    split_name: str = "train"
    seq_len: int = 128  # tokens in a sample, special tokens included
    layout: str = "concat"  # "concat" (windows of exactly seq_len) or "truncate" (one document a sample)
    text_column: str = "text"
    text_documents: str = "paragraph"  # of .txt files: "line", "paragraph" or "file"
    hub_config: str | None = None
    hub_split: str | None = None  # None: split_name
    max_chars: int | None = None  # cut documents to so many characters before tokenisation
    part_characters: int = 1 << 26  # text in a part, the unit of work that a killed run may lose
    compression: str | None = "zstd"  # as the streaming library names it, "zstd:7" for a level; None: none
    # ---
    max_broken: int = 0  # records that may be skipped because they cannot be read
    workers: int = 2  # processes that tokenise; 0: the main process does
    staging: str | None = None  # local folder for the parts of a remote `out`; None: in .prepare-staging
    progress_bar: bool = False

    def check(self) -> None:
        """Raise `DataError` for a setting that cannot be."""
        for name, known in (("layout", LAYOUTS), ("text_documents", TEXT_DOCUMENTS)):
            if getattr(self, name) not in known:
                raise DataError(f"{name} '{getattr(self, name)}' is unknown: {nearest(getattr(self, name), known)}")
        for name, least in (
            ("seq_len", 3),
            ("workers", 0),
            ("part_characters", 1),
            ("max_chars", 1),
            ("max_broken", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise DataError(f"{name} is {value}; it must be at least {least}")
        if not self.split_name or Path(self.split_name).name != self.split_name:
            raise DataError(f"split_name '{self.split_name}' must be one plain folder name, such as 'train'")
        if not self.source:
            raise DataError("no source is given")
        option, written = ("--staging", self.staging) if is_remote(self.out) else ("--out", self.out)
        for folder in map(Path, self.source):
            # The same command would read its own index for text when it goes on, as would that of the next split.
            if written is not None and folder.is_dir() and is_searched(Path(written), folder):
                raise DataError(
                    f"{option} '{written}' lies in the source '{folder}', whose text files are all read: choose "
                    f"another, or name the files (--source '{folder}/*.jsonl')"
                )


def prepare(settings: PrepareSettings) -> DatasetMetadata:
    """Prepare one split; go on where an earlier run with the same settings stopped; nothing to do is no error.

    Returns:
        The metadata of the finished split, which is also in `OUT/<split_name>/metadata.json`.

    Raises:
        DataError: something in the settings, the text, the tokenizer or the folder that the user must change; the
            parts finished before are kept.
    """
    from streaming.base.compression import get_compressions, is_compression

    from bert.data.part_store import PartStore, Progress, staging_folder

    settings.check()
    if settings.compression is not None and not is_compression(settings.compression):
        hint = nearest(settings.compression, get_compressions())
        raise DataError(f"compression '{settings.compression}' is unknown: {hint}")
    tokenizer = load_tokenizer(settings.tokenizer)
    source = open_source(settings)
    identity = _identity(settings, tokenizer, source)
    if is_remote(settings.out):
        remote = f"{settings.out.rstrip('/')}/{settings.split_name}"
        top = Path(settings.staging) if settings.staging else staging_folder(settings.out)
    else:
        remote, top = None, Path(settings.out)
    store = PartStore(top / settings.split_name, remote)
    with store.locked():
        metadata = store.finished()
        if metadata is not None:
            _require_same({name: getattr(metadata, name) for name in identity}, identity, store.folder)
            log.info("%s is prepared already, with these settings: nothing to do", store.folder)
            return metadata
        progress = store.load_progress()
        if progress is None:
            progress = Progress(identity)
            store.save_progress(progress)
        _require_same(progress.identity, identity, store.folder)
        progress.identity = identity  # equal, but in this order of names, which metadata.json keeps
        return _Run(settings, tokenizer, source, store, progress).complete()


def open_source(settings: PrepareSettings) -> TextSource:
    """Return the source that the settings name.

    Raises:
        DataError: it does not exist, or kinds of sources are mixed.
    """
    first = settings.source[0]
    if first == EMBEDDED or first.startswith(HUB_PREFIX):
        if len(settings.source) > 1:
            raise DataError(f"--source {first} stands alone; prepare other sources into folders of their own")
        if first == EMBEDDED:
            return EmbeddedSource(settings.split_name)
        split = settings.hub_split or settings.split_name
        name = first.removeprefix(HUB_PREFIX)
        return HubSource(name, settings.hub_config, split, settings.text_column, settings.max_broken)
    return FileSource(settings.source, settings.text_column, settings.text_documents, settings.max_broken)


def _identity(settings: PrepareSettings, tokenizer: PreTrainedTokenizerFast, source: TextSource) -> dict[str, Any]:
    """Return all that decides the samples, under the names of the metadata's fields."""
    return {
        "layout": settings.layout,
        "seq_len": settings.seq_len,
        "token_dtype": "uint16" if len(tokenizer) <= 1 << 16 else "uint32",
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "source": source.describe(),
        "settings": {
            "max_chars": settings.max_chars,
            "part_characters": settings.part_characters,
            "compression": settings.compression,
            "hashes": _HASHES,
        },
    }


def _require_same(there: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raise `DataError`, naming each difference, where the folder was begun with other settings."""
    old, new = _flat(there), _flat(wanted)
    different = [
        f"{name}: {old.get(name)} there, {new.get(name)} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if different:
        raise DataError(
            f"{folder} was made with other settings ({'; '.join(different)}). Use those, choose another --out, or "
            "remove the folder"
        )


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings as one level: {"source.kind": ...}."""
    nested = {
        f"{outer}.{name}": v for outer, inner in values.items() if isinstance(inner, dict) for name, v in inner.items()
    }
    return {name: v for name, v in values.items() if not isinstance(v, dict)} | nested


class _PartEnd(NamedTuple):
    """Marks the last chunk of a part: the source's place after it, and whether that is the end."""

    source_state: dict[str, Any]
    complete: bool


def _chunks(
    source: TextSource, state: dict[str, Any] | None, part_characters: int
) -> Iterator[tuple[list[str], _PartEnd | None]]:
    """Yield lists of consecutive documents; parts end at places that the text alone decides."""
    texts: list[str] = []
    in_chunk = in_part = 0
    for text in source.documents(state):
        texts.append(text)
        in_chunk += len(text)
        in_part += len(text)
        if in_part >= part_characters:
            yield texts, _PartEnd(source.state(), False)
            texts, in_chunk, in_part = [], 0, 0
        elif in_chunk >= _CHUNK_CHARACTERS or len(texts) >= _CHUNK_DOCUMENTS:
            yield texts, None
            texts, in_chunk = [], 0
    yield texts, _PartEnd(source.state(), True)


class _Run:
    """One run from the recorded progress to the end."""

    def __init__(
        self,
        settings: PrepareSettings,
        tokenizer: PreTrainedTokenizerFast,
        source: TextSource,
        store: PartStore,
        progress: Progress,
    ) -> None:
        self._settings, self._tokenizer, self._source = settings, tokenizer, source
        self._store, self._progress = store, progress
        self._special = special_token_ids(tokenizer)
        dtype = progress.identity["token_dtype"]
        self._spec = PackingSpec(
            tokenizer_json=backend_json(tokenizer),
            layout=settings.layout,
            seq_len=settings.seq_len,
            dtype=dtype,
            cls=self._special["cls"],
            sep=self._special["sep"],
            max_chars=settings.max_chars,
        )
        concat = settings.layout == "concat"
        self._packer = ConcatPacker(self._spec, progress.carry) if concat else TruncatePacker()
        self._column = f"ndarray:{dtype}:{settings.seq_len}" if concat else f"ndarray:{dtype}"
        self._histogram = np.zeros(len(tokenizer), np.int64)
        self._histogram[: len(progress.histogram)] = progress.histogram

    def complete(self) -> DatasetMetadata:
        progress, started = self._progress, time.monotonic()
        if progress.parts:
            log.info("going on after %s documents in %d parts", f"{progress.num_documents:,}", progress.parts)
        earlier_tokens = progress.num_tokens
        if not progress.complete:
            self._write_parts()
        if progress.num_samples == 0:
            raise DataError(
                f"the source gives no sample of {self._settings.seq_len} tokens: {progress.num_documents} documents, "
                f"{len(progress.carry)} tokens. Give more text or a smaller --seq-len"
            )
        self._tokenizer.save_pretrained(self._store.folder / "tokenizer")
        metadata = self._metadata()
        size = self._store.finish(metadata, progress.parts)
        seconds = time.monotonic() - started
        _log_summary(metadata, len(progress.carry), size, seconds, (progress.num_tokens - earlier_tokens) / seconds)
        return metadata

    def _write_parts(self) -> None:
        from tqdm import tqdm

        progress, source, store, settings = self._progress, self._source, self._store, self._settings
        chunks = _chunks(source, progress.source_state, settings.part_characters)
        writer = None
        tokens_here, started = 0, time.monotonic()
        bar = tqdm(
            total=source.size,
            unit=source.unit,
            unit_scale=True,
            dynamic_ncols=True,
            disable=not settings.progress_bar,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            desc=settings.split_name,
        )
        with bar, closing(tokenize_chunks(chunks, self._spec, settings.workers)) as tokenized:
            for chunk, part_end in tokenized:
                if writer is None:
                    writer = store.new_part(progress.parts, self._column, settings.compression, _HASHES)
                samples = self._packer.pack(chunk)
                for sample in samples:
                    writer.write({"input_ids": sample})
                self._count(samples, len(chunk.lengths), chunk.num_skipped)
                if part_end is not None:
                    progress.parts += 1
                    progress.source_state, progress.complete = part_end
                    progress.carry = self._packer.carry
                    progress.histogram = self._histogram.tolist()
                    store.commit_part(writer, progress)
                    writer = None
                tokens_here += len(chunk.tokens)
                speed = tokens_here / (time.monotonic() - started)
                bar.set_postfix_str(f"{progress.num_documents:,} documents, {speed:,.0f} tokens/s", refresh=False)
                bar.update(source.position - bar.n)

    def _count(self, samples: Sequence[NDArray[np.unsignedinteger]], documents: int, skipped: int) -> None:
        progress = self._progress
        progress.num_documents += documents
        progress.num_skipped += skipped
        if samples:
            stored = np.concatenate(samples)
            progress.num_samples += len(samples)
            progress.num_tokens += len(stored)
            self._histogram += np.bincount(stored, minlength=len(self._histogram))

    def _metadata(self) -> DatasetMetadata:
        progress = self._progress
        counts = self._histogram.copy()
        counts[list(self._special.values())] = 0
        return DatasetMetadata(
            **progress.identity,
            tokenizer_name=self._settings.tokenizer,
            vocab_size=len(self._tokenizer),
            special_token_ids=self._special,
            num_samples=progress.num_samples,
            num_tokens=progress.num_tokens,
            num_documents=progress.num_documents,
            num_skipped_documents=progress.num_skipped + (progress.source_state or {}).get("broken", 0),
            unigram_entropy_nats=entropy_nats(counts),
        )


def entropy_nats(counts: NDArray[np.int64]) -> float:
    """Return the entropy of the distribution with these counts; 0 where there are none."""
    counts = counts[counts > 0]
    shares = counts / max(counts.sum(), 1)
    return float(-(shares * np.log(shares)).sum())


def _log_summary(metadata: DatasetMetadata, left_over: int, size: int, seconds: float, speed: float) -> None:
    lines = (
        ("documents", f"{metadata.num_documents:,} ({metadata.num_skipped_documents:,} empty or unreadable left out)"),
        ("samples", f"{metadata.num_samples:,} of {metadata.seq_len} tokens ({metadata.layout})"),
        ("tokens", f"{metadata.num_tokens:,} ({left_over:,} after the last whole window left out)"),
        ("speed", f"{speed:,.0f} tokens/s in this run of {seconds:,.1f} s"),
        ("size", f"{size:,} bytes"),
        ("unigram entropy", f"{metadata.unigram_entropy_nats:.3f} nats"),
    )
    log.info("%s", "\n".join(f"  {name:<16}{value}" for name, value in lines))
