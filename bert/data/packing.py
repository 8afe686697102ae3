"""Texts to token samples: what the worker processes of `prepare` do, and the packing that follows in the main one.

Imports stay light (`tokenizers`, NumPy), because each worker process starts afresh and imports this module.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bert.data.word_cache import DocumentEncoder
from bert.errors import DataError

LAYOUTS = ("concat", "truncate")
_CHUNKS_AHEAD = 8  # for each worker: enough to stay busy while the main process compresses a shard

Tokens = NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class PackingSpec:
    """How documents become samples; the same for workers and packer."""

    tokenizer_json: str
    layout: str  # "concat" or "truncate"
    seq_len: int  # tokens in a sample, special tokens included
    dtype: str  # "uint16" or "uint32"
    cls: int  # token id
    sep: int  # token id
    max_chars: int | None = None  # documents are cut to so many characters before tokenisation


@dataclass(frozen=True)
class TokenChunk:
    """The tokens of some consecutive documents, special tokens set except the [CLS] of `concat` windows."""

    tokens: Tokens  # [sum(lengths)]
    lengths: NDArray[np.int64]  # [documents that have tokens]
    num_skipped: int  # documents without a token


class ChunkTokenizer:
    """Tokenises lists of documents by the rules of a `PackingSpec`."""

    def __init__(self, spec: PackingSpec) -> None:
        self._spec = spec
        self._encoder = DocumentEncoder(spec.tokenizer_json)

    def __call__(self, texts: list[str]) -> TokenChunk:
        """Tokenise documents; [SEP] ends each, and in `truncate` [CLS] begins it."""
        spec = self._spec
        if spec.max_chars is not None:
            texts = [text[: spec.max_chars] for text in texts]
        pieces: list[Tokens] = []
        for ids in self._encoder.encode(texts):
            if not ids:
                continue
            document = [spec.cls, *ids[: spec.seq_len - 2]] if spec.layout == "truncate" else ids
            document.append(spec.sep)
            pieces.append(np.array(document, spec.dtype))
        tokens = np.concatenate(pieces) if pieces else np.zeros(0, spec.dtype)
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        return TokenChunk(tokens, lengths, len(texts) - len(pieces))


class ConcatPacker:
    """Cuts the stream of documents into windows of exactly `seq_len` tokens, each beginning with [CLS]."""

    def __init__(self, spec: PackingSpec, carry: list[int]) -> None:
        """Begin after the tokens `carry`, which an earlier run left over."""
        self._spec = spec
        self._carry = np.array(carry, spec.dtype)

    @property
    def carry(self) -> list[int]:
        """The tokens since the last whole window."""
        return self._carry.tolist()

    def pack(self, chunk: TokenChunk) -> Sequence[Tokens]:
        """Add documents to the stream; return the windows that they complete, [windows, seq_len]."""
        stream = np.concatenate([self._carry, chunk.tokens])
        body = self._spec.seq_len - 1
        count = len(stream) // body
        self._carry = stream[count * body :]
        windows = np.empty((count, self._spec.seq_len), self._spec.dtype)
        windows[:, 0] = self._spec.cls
        windows[:, 1:] = stream[: count * body].reshape(count, body)
        return list(windows)


class TruncatePacker:
    """Gives each document as one sample of its own length."""

    carry: list[int] = []  # noqa: RUF012  never filled: samples end with their documents

    def pack(self, chunk: TokenChunk) -> Sequence[Tokens]:
        """Return one array for each document."""
        return np.split(chunk.tokens, np.cumsum(chunk.lengths)[:-1]) if len(chunk.lengths) else []


_tokenize: ChunkTokenizer  # of a worker process; set by `_start_worker`


def _start_worker(spec: PackingSpec) -> None:
    """Make a worker ready: it leaves Ctrl-C to the main process and ends when that process does."""
    global _tokenize  # noqa: PLW0603  a process pool has no other place for what its initialiser makes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core: the pool is what runs in parallel
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenize = ChunkTokenizer(spec)


def _end_with_parent() -> None:
    # A killed main process cannot close the pool, and its workers would wait for work forever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tokenize_in_worker(texts: list[str]) -> TokenChunk:
    return _tokenize(texts)


def tokenize_chunks(
    chunks: Iterable[tuple[list[str], Any]], spec: PackingSpec, workers: int
) -> Generator[tuple[TokenChunk, Any], None, None]:
    """Tokenise (texts, tag) pairs in `workers` processes (0: in this one); yield (tokens, tag) in the same order.

    Raises:
        DataError: a worker process died.
    """
    if workers == 0:
        tokenize = ChunkTokenizer(spec)
        for texts, tag in chunks:
            yield tokenize(texts), tag
        return
    # "spawn": the main process may hold threads (of `datasets`, of `tokenizers`), which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(spec,))
    pending: deque[tuple[Future[TokenChunk], Any]] = deque()

    def oldest() -> tuple[TokenChunk, Any]:
        future, tag = pending.popleft()
        return future.result(), tag

    try:
        for texts, tag in chunks:
            pending.append((pool.submit(_tokenize_in_worker, texts), tag))
            if len(pending) > _CHUNKS_AHEAD * workers:
                yield oldest()
        while pending:
            yield oldest()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died, perhaps for want of memory. What was prepared so far is kept: run the same "
            "command again, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
