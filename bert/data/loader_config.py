"""What a recipe says about a dataset and its loader, and the checks that it can be read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from streaming.base.batching import batching_methods
from streaming.base.distributed import get_local_rank
from streaming.base.format import get_index_basename
from streaming.base.partition import algos as partition_algorithms
from streaming.base.shuffle import algos as shuffle_algorithms
from streaming.base.storage import CloudDownloader
from streaming.base.util import retry, wait_for_file_to_exist

from bert.data.metadata import FILE_NAME, DatasetMetadata
from bert.errors import DataError, nearest

PREPARE_HINT = "make it with: python -m bert.data.prepare --help"
_POLL_SECONDS = 0.05


@dataclass
class StreamConfig:
    """One of several sources that are mixed; `None` where the dataset's own value holds."""

    local: str | None = None  # folder of the shards, or where they are cached; required
    remote: str | None = None  # URI or folder to download from; None: everything is in `local`
    split: str | None = None  # sub-folder of `local` and `remote`; None: the dataset's
    proportion: float | None = None  # share of the epoch, relative to the other streams' proportions
    repeat: float | None = None  # times each sample is seen in an epoch
    choose: int | None = None  # samples of an epoch
    download_retry: int | None = None  # further attempts after a failed download
    download_timeout: float | None = None  # seconds to wait for a file
    validate_hash: str | None = None  # hash algorithm to check shards with; None: the dataset's
    keep_zip: bool | None = None  # keep the compressed form of a shard beside the raw one


@dataclass
class DatasetConfig:
    """Where the samples are, their order and their masking."""

    local: str | None = None  # folder of the shards, or where they are cached; None: `streams` is given
    remote: str | None = None  # URI or folder to download from; None: everything is in `local`
    split: str | None = None  # sub-folder of `local` and `remote`, such as train; None: they hold the shards
    streams: dict[str, StreamConfig] = field(default_factory=dict)  # several sources by name, instead of local/remote
    mlm_probability: float = 0.15  # probability that an ordinary token is chosen for prediction
    mask_seed: int | None = None  # None: the run's seed
    shuffle: bool = False  # a new order each epoch
    shuffle_algo: str = "py1e"  # of streaming: py1e, py1br, py1b, py1s, py2s, naive
    shuffle_seed: int | None = None  # None: the run's seed
    shuffle_block_size: int | None = None  # samples; None: max(4,000,000 / num_canonical_nodes, 262,144)
    # Parts that the order of samples is interleaved from; None: the nodes of the first run, kept in its checkpoints.
    # For one order on any number of nodes, give a number that all these numbers of nodes divide.
    num_canonical_nodes: int | None = None
    predownload: int | None = None  # samples that a worker downloads ahead; None: 8 batches
    # Bytes in `local`, such as 50gb; None: no limit. Give far more than the shards that are read at a time: streaming
    # was seen to wait for ever with a cache of a few shards.
    cache_limit: int | str | None = None
    epoch_size: int | str | None = None  # samples of an epoch; None: all, or as the streams say
    sampling_method: str = "balanced"  # balanced: other samples each epoch where a stream is subsampled; or fixed
    sampling_granularity: int = 1  # samples taken in a row from a shard where a stream is subsampled
    batching_method: str = "random"  # of streaming: random, stratified, per_stream, device_per_stream
    partition_algo: str = "relaxed"  # of streaming: relaxed (resume with another number of devices) or orig
    replication: int | None = None  # consecutive ranks that see the same samples; None: every rank its own
    download_retry: int = 2  # further attempts after a failed download
    download_timeout: float = 60.0  # seconds to wait for a file
    validate_hash: str | None = None  # hash algorithm to check shards with; None: no check
    keep_zip: bool = False  # keep the compressed form of a downloaded shard beside the raw one


@dataclass
class LoaderConfig:
    """A data loader: what it reads, and how many processes prepare its batches."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    pad_to_longest: bool = False  # batches as wide as their longest sample; for models that leave padding out
    num_workers: int = 2  # processes a rank; 0: batches are made in the training process
    prefetch_factor: int | None = None  # batches that a worker has ready; None: 2; no effect without workers
    persistent_workers: bool = True  # keep the workers between epochs and evaluations; no effect without workers
    pin_memory: bool | None = None  # page-locked batches, quicker to copy to a GPU; None: where there is a GPU
    drop_last: bool | None = None  # leave out an incomplete last batch; None: in training only
    timeout: float = 0.0  # seconds to wait for a batch of a worker; 0: for ever


def describe(config: DatasetConfig) -> str:
    """Return the folders of a dataset, for messages."""
    return "dataset " + ", ".join(f"'{_folder(stream)}'" for stream in sources(config).values())


def _folder(stream: StreamConfig) -> Path:
    return Path(stream.local or "", stream.split or "")


def sources(config: DatasetConfig) -> dict[str, StreamConfig]:
    """Return the streams by the name of their key, with the dataset's values where they have none."""
    if not config.streams:
        return {"dataset": StreamConfig(local=config.local, remote=config.remote, split=config.split)}
    return {
        f"dataset.streams.{name}": replace(stream, split=stream.split or config.split)
        for name, stream in config.streams.items()
    }


def _check_options(config: DatasetConfig) -> None:
    if config.streams and (config.local or config.remote):
        raise DataError("dataset has both streams and local/remote: move the latter into a stream of their own")
    choices: dict[str, Iterable[str]] = {
        "shuffle_algo": shuffle_algorithms,
        "batching_method": batching_methods,
        "partition_algo": partition_algorithms,
        "sampling_method": ("balanced", "fixed"),
    }
    for name, known in choices.items():
        value = getattr(config, name)
        if value not in known:
            raise DataError(f"dataset.{name} is '{value}': {nearest(value, known)}")
    if not 0.0 <= config.mlm_probability <= 1.0:
        raise DataError(f"dataset.mlm_probability is {config.mlm_probability}: give a probability from 0 to 1")
    _check_mixture(config)
    for key, stream in sources(config).items():
        if not stream.local:
            raise DataError(
                f"{key}.local is missing: give the folder of the shards, or where to cache those of a remote"
            )
        if stream.remote not in (None, stream.local) and _same_folder(str(stream.remote), stream.local):
            raise DataError(
                f"{key}.remote is the folder of {key}.local: leave it out, or streaming would delete its shards"
            )
        if config.cache_limit and stream.remote in (None, stream.local):
            # Streaming would delete the only copy of the shards to stay below the limit (its issue #988).
            raise DataError(f"dataset.cache_limit with {key} that has no remote would delete its shards: leave it out")


def _check_mixture(config: DatasetConfig) -> None:
    """Refuse shares of streams that streaming would refuse in its own words, or take for something else."""
    relative = [name for name, stream in config.streams.items() if stream.proportion is not None]
    for name, stream in config.streams.items():
        key = f"dataset.streams.{name}"
        given = {
            share: value
            for share in ("proportion", "repeat", "choose")
            if (value := getattr(stream, share)) is not None
        }
        if len(given) > 1:
            raise DataError(f"{key} has {' and '.join(given)}: give one of them")
        for share, value in given.items():
            if not 0 < value < math.inf:
                raise DataError(f"{key}.{share} is {value}: give a positive number, or leave the stream out")
        if relative and name not in relative:
            raise DataError(
                f"{key} has no proportion, and {relative[0]} has one: give one to each stream, or to none (repeat and "
                "choose count samples)"
            )
        if config.epoch_size is not None and (given.keys() - {"proportion"}):
            raise DataError(
                f"{key} counts samples, and so does dataset.epoch_size: give each stream a proportion, or none"
            )


def _same_folder(remote: str, local: str) -> bool:
    path = remote.removeprefix("file://")
    return "://" not in path and os.path.realpath(path) == os.path.realpath(local)


def load_metadata(config: DatasetConfig, *, any_length: bool = False) -> DatasetMetadata:
    """Read what the dataset holds, fetching `metadata.json` from a remote into the local folder where it is missing.

    Several streams must agree on tokenizer and, but for `any_length`, on sample length (the greatest is returned).
    Their counts are added, and the unigram entropy is the mean over their tokens.

    Raises:
        DataError: options that cannot work, a folder that is missing or unfinished, or streams that differ.
    """
    _check_options(config)
    parts = {}
    for key, stream in sources(config).items():
        if stream.remote and not (_folder(stream) / FILE_NAME).exists():
            attempts = config.download_retry if stream.download_retry is None else stream.download_retry
            _fetch_metadata(key, stream, stream.download_timeout or config.download_timeout, attempts)
        if not stream.remote:
            _check_folder(key, stream)
        try:
            parts[key] = DatasetMetadata.load(_folder(stream))
        except DataError:
            if stream.remote not in (None, stream.local):
                (_folder(stream) / FILE_NAME).unlink(missing_ok=True)  # a damaged copy; the next start fetches another
            raise
    first_key, first = next(iter(parts.items()))
    same = ("tokenizer_fingerprint", "vocab_size", "special_token_ids", *(() if any_length else ("seq_len",)))
    for key, part in parts.items():
        for name in same:
            if getattr(part, name) != getattr(first, name):
                raise DataError(
                    f"{key} and {first_key} differ in {name} ({getattr(part, name)} and {getattr(first, name)}): "
                    f"prepare both with the same tokenizer and length"
                )
    counts = ("num_samples", "num_tokens", "num_documents", "num_skipped_documents")
    entropy = sum(part.unigram_entropy_nats * part.num_tokens for part in parts.values())
    total = sum(part.num_tokens for part in parts.values())
    return replace(
        max(parts.values(), key=lambda part: part.seq_len),
        source=first.source if len(parts) == 1 else {"kind": "streams"} | {key: p.source for key, p in parts.items()},
        unigram_entropy_nats=entropy / max(1, total),
        **{name: sum(getattr(part, name) for part in parts.values()) for name in counts},
    )


def _check_folder(key: str, stream: StreamConfig) -> None:
    folder = _folder(stream)
    if not folder.is_dir():
        root = Path(stream.local or "")
        splits = [path.parent.name for path in root.glob(f"*/{FILE_NAME}")]
        hint = f"{key}.split: {nearest(folder.name, splits)}" if splits else PREPARE_HINT
        raise DataError(f"{key}: there is no folder '{folder}'; {hint}")
    if (folder / FILE_NAME).exists() and not (folder / get_index_basename()).exists():
        raise DataError(f"{key}: '{folder}' has no {get_index_basename()}: run its prepare command again to finish it")


def _fetch_metadata(key: str, stream: StreamConfig, timeout: float, attempts: int) -> None:
    local = _folder(stream) / FILE_NAME
    remote = os.path.join(stream.remote or "", stream.split or "", FILE_NAME)
    if get_local_rank() != 0:
        wait_for_file_to_exist(str(local), _POLL_SECONDS, timeout, f"{key}: {remote} was not downloaded to {local}")
        return
    try:
        downloader = CloudDownloader.get(stream.remote)
        retry(num_attempts=max(1, attempts))(lambda: downloader.download(remote, str(local), timeout))()
    except Exception as error:  # each storage service raises errors of its own
        raise DataError(f"{key}: cannot download {remote} ({error}): is it a prepared dataset?") from error


def check_metadata(
    metadata: DatasetMetadata,
    *,
    max_seq_len: int,
    vocab_size: int | None = None,
    tokenizer_fingerprint: str | None = None,
    any_length: bool = False,
) -> None:
    """Refuse a dataset that does not fit the model.

    Args:
        metadata: of the dataset.
        max_seq_len: tokens of a batch's row.
        vocab_size: rows of the model's embedding, padding to a round number included; None: not checked.
        tokenizer_fingerprint: of the tokenizer that the recipe names; None: not checked.
        any_length: whether samples may be shorter than `max_seq_len` in any layout.

    Raises:
        DataError: the sample length, the vocabulary or the tokenizer differs; the message says what to do.
    """
    length = metadata.seq_len
    if length > max_seq_len or (metadata.layout == "concat" and length != max_seq_len and not any_length):
        raise DataError(
            f"the shards hold samples of {length} tokens ({metadata.layout} layout) and max_seq_len is {max_seq_len}: "
            f"set max_seq_len: {length}, or prepare the text again with a length of {max_seq_len}"
        )
    if vocab_size is not None and metadata.vocab_size > vocab_size:
        raise DataError(
            f"the shards were made with a vocabulary of {metadata.vocab_size} ('{metadata.tokenizer_name}') and the "
            f"model has {vocab_size} entries: give the model a vocab_size of at least {metadata.vocab_size}"
        )
    if tokenizer_fingerprint is not None and metadata.tokenizer_fingerprint != tokenizer_fingerprint:
        raise DataError(
            f"the shards were made with tokenizer '{metadata.tokenizer_name}' (fingerprint "
            f"{metadata.tokenizer_fingerprint}) and the recipe's has {tokenizer_fingerprint}: use the one saved in the "
            f"dataset's tokenizer folder, or prepare the text again with the recipe's"
        )
