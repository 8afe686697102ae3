"""The training loader: tokenised MDS shards → masked batches of one fixed shape, the same for any workers and ranks."""

from __future__ import annotations

import logging
import mmap
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from composer.core import DataSpec
from numpy.typing import NDArray
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.distributed import get_local_world_size, get_world_size

from bert.data.checked_stream import CheckedStream, check_hash, check_size, remove_files
from bert.data.loader_config import (
    PREPARE_HINT,
    DatasetConfig,
    LoaderConfig,
    check_metadata,
    describe,
    load_metadata,
    sources,
)
from bert.data.masking import IGNORED_LABEL, mask_tokens
from bert.data.metadata import FILE_NAME, DatasetMetadata
from bert.data.shared_memory import alone_on_this_host
from bert.errors import DataError
from bert.processes import signal_when_parent_ends

log = logging.getLogger(__name__)

COLUMN = "input_ids"
_EVALUATION_EPOCH = 0
_SECONDS_AFTER_SIGTERM = 60  # that a worker has left
_WIDTH_MULTIPLE = 16  # of batches as wide as their longest sample: kernels then load several tokens at once
_REGISTRATIONS = 20  # attempts at a number for shared memory
_MAPPED_SHARDS = 128  # kept open by a process; each holds a file descriptor, of which a process may have 1,024


class TextSample(NamedTuple):
    """What the dataset hands to the collator."""

    sample_id: int  # among all samples of all streams
    epoch: int  # that the masks are drawn for
    tokens: NDArray[np.unsignedinteger]  # (length,), unpadded


class StreamingTextDataset(StreamingDataset):
    """Samples of tokens with the two numbers that their masks depend on.

    Args:
        fixed_epoch: the epoch to draw masks for, in evaluation; None: the epoch of the data, also after resuming.
        **options: those of `streaming.StreamingDataset`.
    """

    def __init__(self, *, fixed_epoch: int | None = None, **options: Any) -> None:
        _map_file.cache_clear()  # a folder may hold other shards than when this process last read it
        super().__init__(**options)
        self._fixed_epoch = fixed_epoch
        self._epoch = fixed_epoch or 0
        self._prepared: set[int] = set()
        self._checked: set[str] = set()  # shards that this process has looked at whole
        self._failure: BaseException | None = None  # of a background thread

    def _resume_incr_epoch(self) -> tuple[int, int]:
        # Runs in each worker at the start of each epoch: the only place that knows the number after resuming.
        epoch, sample_in_epoch = super()._resume_incr_epoch()
        if self._fixed_epoch is None:
            self._epoch = epoch
        return epoch, sample_in_epoch

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
        # Streaming ends the epoch early, without an error, when its download thread fails between two samples.
        if self._event.is_set():
            raise DataError(f"reading the shards failed: {self._failure or 'the error is in the log above'}")

    def on_exception(self, future: Any) -> None:
        """Keep the error of a background thread, for the error that ends the epoch (see the base class)."""
        self._failure = self._failure or future.exception()
        super().on_exception(future)

    def get_item(self, sample_id: int, retry: int = 7) -> TextSample:
        """Read one sample, downloading its shard first where it is missing (see the base class)."""
        return TextSample(int(sample_id), self._epoch, self._read_tokens(sample_id, retry))

    def _read_tokens(self, sample_id: int, retry: int) -> NDArray[np.unsignedinteger]:
        if self.cache_limit:  # shards come and go, and streaming must see each access
            return super().get_item(sample_id, retry)[COLUMN]
        shard_id, index = self.spanner[sample_id]
        shard: Any = self.shards[shard_id]
        stream = self.streams[self.stream_per_shard[shard_id]]
        try:
            data = self._mapped(shard, stream.validate_hash)
        except FileNotFoundError:
            return super().get_item(sample_id, retry)[COLUMN]
        except ValueError as error:
            if stream.remote in (None, stream.local):
                raise DataError(f"{error}; copy the shard again, or prepare the dataset again") from error
            log.warning("%s; fetching it again", error)
            remove_files(shard)
            _map_file.cache_clear()
            self._shard_states[shard_id] = _ShardState.REMOTE
            self.prepare_shard(shard_id)
            data = self._mapped(shard, stream.validate_hash)
        try:
            begin, end = np.frombuffer(data, np.uint32, 2, 4 * (1 + index))  # the file starts with its count
            return shard.decode_sample(data[begin:end])[COLUMN]
        except ValueError as error:
            raise DataError(f"sample {index} of '{_raw_file(shard)}' cannot be read: {error}") from error

    def _mapped(self, shard: Any, hash_name: str | None) -> memoryview:
        """Map a shard into memory, looking at its size and hash when this process first does.

        Streaming looks at neither where the file was there before.
        """
        path = _raw_file(shard)
        data = _map_file(path)
        if path not in self._checked:
            check_size(shard)
            if hash_name:
                check_hash(shard, hash_name, data)
            self._checked.add(path)
        return data

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Download a shard (see the base class); look only once where no cache limit can take it away again."""
        if not blocking and shard_id in self._prepared:
            return
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException as error:
            self._failure = self._failure or error
            # Streaming leaves the shard marked as being prepared, and all who need it would wait for ever.
            self._shard_states[shard_id] = _ShardState.REMOTE
            raise
        if blocking or self.cache_limit:
            return
        if os.path.exists(_raw_file(self.shards[shard_id])):
            self._prepared.add(shard_id)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Say where the training is; Composer asks with the samples of the epoch that the model has seen.

        Streaming answers for the epoch that was begun last. Between two epochs, where Composer's number is 0, that
        would repeat the finished one after resuming.
        """
        if from_beginning and self.replication:
            num_samples //= self.replication
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0 and self.next_epoch > 0:
            state["epoch"] = self.next_epoch
        return state


def _raw_file(shard: Any) -> str:
    return os.path.join(shard.dirname, shard.split, shard.raw_data.basename)


@lru_cache(maxsize=_MAPPED_SHARDS)
def _map_file(path: str) -> memoryview:
    # Reading by system calls costs more than all else, and each hands the interpreter to the download threads.
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class MaskingCollator:
    """Make a masked batch from samples of one epoch: of one fixed shape, or as wide as its longest sample.

    The tensors `input_ids`, `attention_mask` and `labels` are (batch, max_seq_len) int64, or narrower;
    `sample_ids` (batch,) int64 says which samples of the dataset they are. `num_tokens` (without padding) and
    `num_masked` are Python numbers: the trainer weights losses by them without waiting for the device.
    """

    def __init__(
        self,
        metadata: DatasetMetadata,
        *,
        max_seq_len: int,
        mlm_probability: float,
        seed: int,
        pad_to_longest: bool = False,
    ) -> None:
        self.metadata = metadata
        self.pad_to_longest = pad_to_longest
        self.max_seq_len = max_seq_len
        self.mlm_probability = mlm_probability
        self.seed = seed

    def __call__(self, samples: Sequence[TextSample]) -> dict[str, Any]:
        """Return the batch; a sample longer than `max_seq_len` is a DataError."""
        special = self.metadata.special_token_ids
        lengths = np.array([len(sample.tokens) for sample in samples])
        if lengths.max() > self.max_seq_len:
            raise DataError(
                f"sample {samples[int(lengths.argmax())].sample_id} has {lengths.max()} tokens, more than max_seq_len "
                f"{self.max_seq_len} and than its {FILE_NAME} says; prepare the dataset again"
            )
        tokens = np.concatenate([sample.tokens for sample in samples])
        if tokens.max(initial=0) >= self.metadata.vocab_size:
            wrong = next(s for s in samples if s.tokens.max(initial=0) >= self.metadata.vocab_size)
            raise DataError(
                f"sample {wrong.sample_id} holds the token id {wrong.tokens.max()}, and the vocabulary has "
                f"{self.metadata.vocab_size}: its shard is damaged; set validate_hash, or prepare the dataset again"
            )
        width = self.max_seq_len
        if self.pad_to_longest:
            width = min(width, -(-int(lengths.max()) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE)
        is_token = np.arange(width) < lengths[:, None]
        ids = np.full(is_token.shape, special["pad"], dtype=np.int64)
        ids[is_token] = tokens
        masked, labels = mask_tokens(
            ids,
            np.array([sample.sample_id for sample in samples]),
            seed=self.seed,
            epoch=samples[0].epoch,
            rate=self.mlm_probability,
            mask_id=special["mask"],
            special_ids=special.values(),
            vocab_size=self.metadata.vocab_size,
        )
        return _with_counts(
            {
                "input_ids": torch.from_numpy(masked),
                "attention_mask": torch.from_numpy(is_token.astype(np.int64)),
                "labels": torch.from_numpy(labels),
                "sample_ids": torch.tensor([sample.sample_id for sample in samples]),
            }
        )


def _with_counts(batch: dict[str, Any]) -> dict[str, Any]:
    # By NumPy: PyTorch would wake a thread a core for each of these sums: nearly half of a training step on 64 cores.
    batch["num_tokens"] = int(np.count_nonzero(batch["attention_mask"].numpy()))
    batch["num_masked"] = int(np.count_nonzero(batch["labels"].numpy() != IGNORED_LABEL))
    return batch


def split_batch(batch: dict[str, Any], microbatch_size: int | float) -> list[dict[str, Any]]:
    """Split a batch for gradient accumulation and count anew; the last part holds what is left.

    Composer splits before it moves a batch to the device, so the counting waits for nothing.
    """
    tensors = {name: value.split(int(microbatch_size)) for name, value in batch.items() if torch.is_tensor(value)}
    return [_with_counts(dict(zip(tensors, parts, strict=True))) for parts in zip(*tensors.values(), strict=True)]


def count_samples(batch: dict[str, Any]) -> int:
    """Return the number of rows."""
    return len(batch["input_ids"])


def count_tokens(batch: dict[str, Any]) -> dict[str, int]:
    """Return the tokens without padding and those that carry loss (at least 1: Composer divides by their sum)."""
    return {"total": batch["num_tokens"], "loss_generating": max(1, batch["num_masked"])}


def _unchanged(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def build_data_spec(
    config: LoaderConfig, *, device_batch_size: int, max_seq_len: int, seed: int, train: bool
) -> DataSpec:
    """Build the loader of one split for Composer's trainer, which saves and resumes its place in the epoch.

    Call `clean_stale_shared_memory` once before the first loader.

    Args:
        config: what to read and how.
        device_batch_size: samples a rank and step.
        max_seq_len: length that every batch is padded to, in tokens; with `pad_to_longest` the most it may be.
        seed: of the run, the same on all ranks.
        train: False: the masks of epoch 0 in every evaluation, and an incomplete last batch is kept.

    Raises:
        DataError: the dataset is missing, does not fit, or has options that cannot work together.
    """
    data = config.dataset
    metadata = load_metadata(data, any_length=config.pad_to_longest)
    check_metadata(metadata, max_seq_len=max_seq_len, any_length=config.pad_to_longest)
    dataset = _build_dataset(data, metadata, device_batch_size, seed, train)
    _check_cache_limit(dataset, config, device_batch_size)
    drop_last = train if config.drop_last is None else config.drop_last
    global_batch = device_batch_size * max(1, get_world_size() // (data.replication or 1))
    if drop_last and dataset.epoch_size < global_batch:
        raise DataError(
            f"an epoch of {dataset.epoch_size} samples is less than one global batch of {global_batch} "
            f"({describe(data)}): use a smaller batch or more data, or set drop_last: false"
        )
    collator = MaskingCollator(
        metadata,
        max_seq_len=max_seq_len,
        mlm_probability=data.mlm_probability,
        seed=seed if data.mask_seed is None else data.mask_seed,
        pad_to_longest=config.pad_to_longest,
    )
    workers = config.num_workers > 0
    loader = StreamingDataLoader(
        dataset,
        batch_size=device_batch_size,
        collate_fn=collator,
        num_workers=config.num_workers,
        prefetch_factor=config.prefetch_factor if workers else None,
        persistent_workers=config.persistent_workers and workers,
        pin_memory=torch.cuda.is_available() if config.pin_memory is None else config.pin_memory,
        drop_last=drop_last,
        timeout=config.timeout if workers else 0,
        worker_init_fn=_start_worker,
    )
    return DataSpec(
        loader,
        num_samples=dataset.epoch_size,
        # The defaults are methods of the DataSpec itself. In such a cycle the loader is freed by the garbage collector,
        # which closes the workers' queues before the loader's destructor uses them: 5 s of waiting for each worker.
        batch_transforms=_unchanged,
        microbatch_transforms=_unchanged,
        split_batch=split_batch,
        get_num_samples_in_batch=count_samples,
        get_num_tokens_in_batch=count_tokens,
    )


def _start_worker(worker: int) -> None:
    """Let a worker live as long as its training process, and no longer.

    When a whole job is sent a signal, the training process still needs a batch to end well. A worker that waits for
    another rank's, in streaming's barriers, does not look whether its own process is still there.
    """
    signal_when_parent_ends(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Torch ends its workers by SIGTERM too, when they do not end by themselves.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_SECONDS_AFTER_SIGTERM))


def end_workers(loader: Any) -> None:
    """End the workers that a loader keeps between epochs (others end with their epoch's iterator).

    Left alone they end with Python, which sends them SIGTERM and waits: they take it for the job's, and stay a minute.
    """
    iterator: Any = getattr(loader, "_iterator", None)
    if not hasattr(iterator, "_shutdown_workers"):
        return
    loader._iterator = None
    iterator._shutdown_workers()
    for worker in iterator._workers:
        if worker.is_alive():  # it waits for a rank that is gone
            worker.kill()


# Fields of DatasetConfig that are not options of StreamingDataset, or are passed in another form.
_OWN_FIELDS = ("streams", "local", "remote", "split", "mlm_probability", "mask_seed", "shuffle_seed")


def _build_dataset(
    config: DatasetConfig, metadata: DatasetMetadata, batch_size: int, seed: int, train: bool
) -> StreamingTextDataset:
    options = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _OWN_FIELDS}
    options["batch_size"] = batch_size
    options["shuffle_seed"] = seed if config.shuffle_seed is None else config.shuffle_seed
    options["fixed_epoch"] = None if train else _EVALUATION_EPOCH

    try:
        with alone_on_this_host():
            dataset = _register([asdict(stream) for stream in sources(config).values()], options)
    except DataError:
        raise
    except (ValueError, RuntimeError, OSError) as error:
        raise DataError(f"{describe(config)} cannot be read: {error}") from error
    _check_shards(dataset, metadata)
    return dataset


def _register(streams: Sequence[dict[str, Any]], options: dict[str, Any]) -> StreamingTextDataset:
    """Make the dataset; anew where another job on this host, about to end, had removed a part of its shared memory.

    Streaming looks for a free number by each of a number's segments, and takes the highest: it may have another one.
    Several ranks look together, and cannot look again. Each attempt makes its streams anew: a dataset writes weights
    into them, and refuses those that have some.
    """

    def make() -> StreamingTextDataset:
        return StreamingTextDataset(streams=[CheckedStream(**stream) for stream in streams], **options)

    for _ in range(_REGISTRATIONS - 1 if get_world_size() == 1 else 0):
        try:
            return make()
        except FileExistsError as error:
            log.info("%s: another job is ending; looking for another number", error)
            time.sleep(0.1)
    return make()


def _check_cache_limit(dataset: StreamingTextDataset, config: LoaderConfig, batch_size: int) -> None:
    """Refuse a cache that cannot hold what is read at a time.

    Streaming accepts four shards. When a shard is removed again before the sample that it was fetched for is read, all
    who wait for it wait for ever.
    """
    if not dataset.cache_limit:
        return
    data, shards = config.dataset, dataset.shards
    nodes = max(1, get_world_size() // get_local_world_size())
    parts = max(1, (data.num_canonical_nodes or nodes * (64 if data.shuffle_algo in ("py1s", "py2s") else 1)) // nodes)
    block = (data.shuffle_block_size or max(4_000_000 // (parts * nodes), 1 << 18)) if data.shuffle else 0
    readers = get_local_world_size() * max(1, config.num_workers)
    ahead = readers * (data.predownload or 8 * batch_size)
    at_a_time = (block * parts + ahead) // min(shard.samples for shard in shards) + 2 * parts + readers
    largest = max(shard.get_max_size() for shard in shards)
    needed = min(at_a_time * largest, sum(shard.get_persistent_size(data.keep_zip) for shard in shards) + largest)
    needed += sum(stream.get_index_size() for stream in dataset.streams)  # streaming counts them too
    if int(dataset.cache_limit) < needed:
        raise DataError(
            f"dataset.cache_limit is {int(dataset.cache_limit):,} bytes, and {needed:,} are read at a time "
            f"({min(at_a_time, len(shards))} shards of up to {largest:,}): with less, streaming was seen to wait for "
            "ever. Raise it, or lower shuffle_block_size, num_canonical_nodes, predownload or num_workers"
        )


def _check_shards(dataset: StreamingTextDataset, metadata: DatasetMetadata) -> None:
    stored = sum(shard.samples for shard in dataset.shards)
    if stored != metadata.num_samples:
        folder = dataset.shards[0].dirname
        raise DataError(
            f"the index of '{folder}' names {stored:,} samples and its {FILE_NAME} {metadata.num_samples:,}: they are "
            "of different datasets. Copy or prepare it again"
        )
    encodings = (f"ndarray:{metadata.token_dtype}", f"ndarray:{metadata.token_dtype}:{metadata.seq_len}")
    shards: list[Any] = dataset.shards
    for shard, stream_id in zip(shards, dataset.stream_per_shard, strict=True):
        path = _raw_file(shard)
        if COLUMN not in shard.column_names:
            raise DataError(
                f"'{path}' has the columns {', '.join(shard.column_names)} and not {COLUMN}; {PREPARE_HINT}"
            )
        # Streams of several lengths have each its own.
        if len(dataset.streams) == 1 and shard.column_encodings not in ([encodings[0]], [encodings[1]]):
            found = ", ".join(shard.column_encodings)
            raise DataError(f"'{path}' holds {found} and not {encodings[1]}, as its {FILE_NAME} says; {PREPARE_HINT}")
        if dataset.streams[stream_id].remote is None:
            files = [info.basename for pair in shard.file_pairs for info in pair if info]
            if not any(os.path.exists(os.path.join(shard.dirname, shard.split, name)) for name in files):
                raise DataError(f"'{path}' is missing: copy it again, or prepare the dataset again")
