"""From a task's files or Hub data set to batches: reading, checking, tokenising once, and padding."""

from __future__ import annotations

import csv
import gzip
import hashlib
import itertools
import json
import logging
import os
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from composer.core import DataSpec
from filelock import FileLock
from huggingface_hub import HfApi
from torch.utils.data import DataLoader, Dataset, Sampler

from bert.errors import DataError
from bert.glue.tasks import TASKS, Task

if TYPE_CHECKING:
    from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

HUB = "hub:"
EXTENSIONS = (".tsv", ".csv", ".jsonl", ".json", ".parquet", ".tsv.gz", ".csv.gz", ".jsonl.gz")
GLUE_HINT = (
    "get GLUE's TSV files from https://gluebenchmark.com/tasks, or take the data from the Hub: data=hub:nyu-mll/glue"
)
_CACHE_VERSION = 2  # of the arrays' layout, and of how rows are read
_HUB_SECONDS = 10.0  # to wait for an answer about a commit
_CHUNK = 10_000  # texts tokenised at a time
_WIDTH_MULTIPLE = 16  # batches are as wide as such a number where they may be: kernels then load several tokens at once
_SORTED_BATCHES = 64  # shuffled batches that are sorted by length together, where padding is dynamic


@dataclass(frozen=True)
class Place:
    """Where a split is: a file, or a split of a Hub data set."""

    task: str
    split: str
    file: Path | None = None
    hub_name: str = ""
    hub_config: str | None = None
    hub_revision: str | None = None

    def __str__(self) -> str:
        return str(self.file) if self.file is not None else f"{HUB}{self.hub_name} {self.hub_config} {self.split}"

    def identity(self) -> dict[str, Any]:
        """What the split's content follows from: the hash of its file, or its name on the Hub."""
        if self.file is not None:
            return {"sha256": file_hash(self.file)}
        return {"hub": [self.hub_name, self.hub_config, self.hub_revision, self.split]}


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hub_commit(name: str, revision: str | None) -> str | None:
    """The commit that a branch or tag of a Hub data set, or its newest state, stands for; `revision` where none says.

    Without it, data that change on the Hub would keep the identity, and the results, of what they were.
    """
    if Path(name).is_dir():
        return revision
    try:
        return HfApi().dataset_info(name, revision=revision, timeout=_HUB_SECONDS).sha
    except (OSError, ValueError) as error:  # offline, refused, no such name: loading it says so, if it is not cached
        log.warning("%s%s: its commit is not known, so a change there goes unseen (%s)", HUB, name, error)
        return revision


def locate(name: str, task: Task, split: str, data: str, revisions: Mapping[str, str | None] | None = None) -> Place:
    """Find a split of a task.

    Args:
        name: of the task.
        task: its row in the table.
        split: name of the split.
        data: the sweep's source, where the task has none of its own: "hub:NAME" or a folder.
        revisions: commits or tags of Hub data sets by name; None: the newest.

    Raises:
        DataError: a local file is missing; the message names those looked for.
    """
    source = task.source or data
    if source.startswith(HUB):
        hub_name = source.removeprefix(HUB)
        return Place(
            name,
            split,
            hub_name=hub_name,
            hub_config=task.hub_config or name,
            hub_revision=(revisions or {}).get(hub_name),
        )
    root = Path(source).expanduser()
    if not root.is_dir():
        raise DataError(f"{name}: there is no folder '{root}'; {_hint(name, task)}")
    folders = [root / (task.folder or name), root / name, *([root] if task.source else [])]
    found = [folder for folder in folders if folder.is_dir()]
    if not found:
        raise DataError(f"{name}: there is no folder '{folders[0]}'; {_hint(name, task)}")
    folder = found[0]
    if split in task.files:
        if (folder / task.files[split]).is_file():
            return Place(name, split, file=folder / task.files[split])
        raise DataError(f"{name}: there is no file '{folder / task.files[split]}' for its split {split}")
    stems = [split, split.replace("validation", "dev")]
    for stem in stems:
        for extension in EXTENSIONS:
            if (folder / f"{stem}{extension}").is_file():
                return Place(name, split, file=folder / f"{stem}{extension}")
        parts = sorted(folder.glob(f"{stem}-*-of-*.parquet"))  # as downloaded from the Hub
        if len(parts) == 1:
            return Place(name, split, file=parts[0])
        if parts:
            raise DataError(f"{name}: {folder} holds {split} in {len(parts)} Parquet files: join them into one")
    raise DataError(
        f"{name}: no file for its split {split} in '{folder}': looked for {' and '.join(dict.fromkeys(stems))} as "
        f"{', '.join(EXTENSIONS)}; {_hint(name, task)}"
    )


def _hint(name: str, task: Task) -> str:
    if name in TASKS:
        return GLUE_HINT
    names = ", ".join(f"{split}.csv" for split in dict.fromkeys([task.train, *task.validation]))
    return f"one's own task has {names} (or {', '.join(EXTENSIONS)}) in tasks.{name}.task.source, or DATA/{name}"


@dataclass
class Rows:
    """A split as read: one or two texts a row, and labels (class ids or numbers) where it has any."""

    texts: list[tuple[str, ...]]
    labels: list[float] | None

    def __len__(self) -> int:
        return len(self.texts)


def read_rows(place: Place, task: Task, first: int | None = None) -> Rows:
    """Read and check a split, or, to see whether it can be read, the `first` rows of it.

    Raises:
        DataError: a column is missing, a label is out of range, or no row is left; with file and row.
    """
    labelled = place.split not in task.test
    texts: list[tuple[str, ...]] = []
    labels: list[float] = []
    columns = [name for template in task.text for name in _columns_of(template)] + [task.label] * labelled
    torn, number = 0, 0
    for number, row in enumerate(itertools.islice(_records(place, task), first), 1):
        if not isinstance(row, Mapping):
            raise DataError(
                f"{place.task}: {place}, row {number} is a JSON {type(row).__name__}; one object a line is read"
            )
        missing = [name for name in columns if name not in row]
        if missing:
            raise DataError(
                f"{place.task}: {place} has no column {', '.join(missing)}; its columns: {', '.join(map(str, row))}"
            )
        # A line of a TSV or CSV file with too few fields, or (under None) too many.
        if None in row or any(row[name] is None for name in columns):
            torn += 1
            continue
        texts.append(tuple(_text(row, template) for template in task.text))
        if labelled:
            labels.append(_label(row[task.label], task, f"{place}, row {number}"))
    if torn and place.split in task.test:  # predictions are numbered by row
        raise DataError(f"{place.task}: {place}: {torn} rows with missing or surplus fields")
    if not texts and number != first:  # of a longer file the rest is not known
        raise DataError(f"{place.task}: {place} has no rows")
    if torn and first is None:
        log.warning("%s: %d rows with missing or surplus fields are left out", place, torn)
    for warning in count_warnings(task, place.split, len(texts)) if first is None else []:
        log.warning("%s: %s: %s", place.task, warning, place)
    return Rows(texts, labels if labelled else None)


def count_warnings(task: Task, split: str, rows: int) -> list[str]:
    """Say that a split has not the number of rows that it is known to have; nothing where it has, or none is known."""
    known = task.rows.get(split, rows)
    return [] if known == rows else [f"{split}: {rows} rows, but the data set is known to have {known}"]


def _columns_of(template: str) -> list[str]:
    if "{" not in template:
        return [template]
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def _text(row: Mapping[str, Any], template: str) -> str:
    return str(row[template]) if "{" not in template else template.format_map(row)


def _label(value: Any, task: Task, where: str) -> float:
    if task.labels is None:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise DataError(f"{where}: the label {value!r} is not a number") from None
        low, high = task.label_range or (-np.inf, np.inf)
        if not low <= number <= high:
            raise DataError(f"{where}: the label {number} is outside of {low} to {high}")
        return number
    if str(value) in task.labels:  # a name before it is an id, whether the file has it as text or as a number
        return task.labels.index(str(value))
    try:
        index = int(value)
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < len(task.labels) or str(value) not in (str(index), str(float(index)), str(bool(index))):
        raise DataError(
            f"{where}: the label {value!r} is none of {', '.join(task.labels)}, nor a number from 0 to "
            f"{len(task.labels) - 1}"
        )
    return index


def _records(place: Place, task: Task) -> Iterator[Mapping[str, Any]]:
    if place.file is None:
        yield from _hub_records(place)
        return
    name = place.file.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            import pyarrow.parquet

            # No threads: a sweep looks at the first rows, and its jobs are forks of it.
            for batch in pyarrow.parquet.ParquetFile(place.file).iter_batches(use_threads=False):
                yield from batch.to_pylist()
            return
        with _open(place.file) as file:
            if name.endswith(".tsv"):
                yield from _tsv_records(file, place, task)
            elif name.endswith(".csv"):
                yield from csv.DictReader(file)
            else:
                yield from (json.loads(line) for line in file if line.strip())
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's and json's errors are ValueErrors
        if isinstance(error, DataError):
            raise
        raise DataError(f"{place.task}: {place} cannot be read: {error}") from error


def _open(path: Path) -> IO[str]:
    # utf-8-sig: MRPC's files begin with a byte-order mark.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _tsv_records(file: IO[str], place: Place, task: Task) -> Iterator[Mapping[str, Any]]:
    # A quote in GLUE's TSV files is a quote: they are not escaped, and often not paired.
    names = task.tsv_names if place.split in task.tsv_headerless else None
    reader = csv.DictReader(file, fieldnames=names, delimiter="\t", quoting=csv.QUOTE_NONE)
    renamed = {theirs: ours for ours, theirs in task.tsv_columns.items()}
    for row in reader:
        yield {renamed.get(name, name): value for name, value in row.items()}


def _hub_records(place: Place) -> Iterator[Mapping[str, Any]]:
    from datasets import load_dataset

    try:
        split = load_dataset(place.hub_name, place.hub_config, split=place.split, revision=place.hub_revision)
    except Exception as error:  # the library raises errors of its own for each way a download can fail
        raise DataError(f"{place.task}: {place} cannot be loaded: {error}") from error
    yield from split


@dataclass(frozen=True)
class EncodedSplit:
    """A tokenised split, as flat arrays."""

    tokens: np.ndarray  # of all rows, one after the other
    offsets: np.ndarray  # (rows + 1,): where each row begins
    second: np.ndarray  # (rows,): position in the row at which the second text begins; its length for one text
    labels: np.ndarray | None  # (rows,): class ids (int64) or numbers (float32)

    def __len__(self) -> int:
        return len(self.second)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, special ones included."""
        return np.diff(self.offsets)


def encode(rows: Rows, task: Task, tokenizer: PreTrainedTokenizerFast, max_length: int) -> EncodedSplit:
    """Tokenise rows to at most `max_length` tokens; of a pair the longer text is cut first."""
    tokens: list[np.ndarray] = []
    lengths: list[int] = []
    second: list[int] = []
    for start in range(0, len(rows), _CHUNK):
        chunk = rows.texts[start : start + _CHUNK]
        sides = [list(side) for side in zip(*chunk, strict=True)]
        encoded = tokenizer(*sides, truncation=True, max_length=max_length, return_token_type_ids=True)
        for ids, types in zip(encoded["input_ids"], encoded["token_type_ids"], strict=True):
            tokens.append(np.asarray(ids, dtype=np.int32))
            lengths.append(len(ids))
            second.append(types.index(1) if 1 in types else len(ids))
    labels = None
    if rows.labels is not None:
        labels = np.asarray(rows.labels, dtype=np.float32 if task.labels is None else np.int64)
    return EncodedSplit(np.concatenate(tokens), np.cumsum([0, *lengths]), np.asarray(second), labels)


def load_split(
    place: Place,
    task: Task,
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_id: str,
    max_length: int,
    cache: Path,
    identity: Mapping[str, Any] | None = None,
) -> EncodedSplit:
    """Read and tokenise a split, or take it from the cache; jobs that want the same one wait for the first.

    Args:
        place: of the split.
        task: its row in the table.
        tokenizer: what tokenises.
        tokenizer_id: its fingerprint.
        max_length: tokens of a row at most.
        cache: folder of tokenised splits.
        identity: what `place.identity()` was when the result's key was made; None: what it is now.

    Raises:
        DataError: as `read_rows`, or the content is not what `identity` says.
    """
    identity = identity or place.identity()
    cached = {"version": _CACHE_VERSION, "split": identity, "name": place.split, "tokenizer": tokenizer_id}
    cached |= {"max_length": max_length, "text": task.text, "label": task.label, "labels": task.labels}
    cached |= {"range": task.label_range, "tsv": [task.tsv_columns, task.tsv_headerless, task.tsv_names]}
    key = hashlib.sha256(json.dumps(cached, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"{place.task}-{place.split}-{max_length}-{key}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            split = encode(read_rows(place, task), task, tokenizer, max_length)
            if place.identity() != identity:
                raise DataError(f"{place.task}: {place} has changed since the sweep was started: start it again")
            arrays = {"tokens": split.tokens, "offsets": split.offsets, "second": split.second}
            if split.labels is not None:
                arrays["labels"] = split.labels
            temporary = path.with_suffix(".tmp")
            with temporary.open("wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            log.info("%s %s: %d rows tokenised", place.task, place.split, len(split))
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return EncodedSplit(arrays["tokens"], arrays["offsets"], arrays["second"], arrays.get("labels"))


class _Batches(Dataset):
    """Batches by the row numbers that a sampler gives."""

    def __init__(self, split: EncodedSplit, pad_id: int, fixed_length: int | None) -> None:
        self.split, self.pad_id, self.fixed_length = split, pad_id, fixed_length
        self.longest = split.lengths.max()

    def __getitem__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        split = self.split
        lengths = split.offsets[np.asarray(rows) + 1] - split.offsets[rows]
        dynamic = min(-(-lengths.max() // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE, self.longest)
        width = int(self.fixed_length or dynamic)
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        for target, row, length in zip(ids, rows, lengths, strict=True):
            target[:length] = split.tokens[split.offsets[row] :][:length]
        positions = np.arange(width)
        mask = positions < lengths[:, None]
        types = mask & (positions >= split.second[rows][:, None])
        batch = {"input_ids": ids, "attention_mask": mask.astype(np.int64), "token_type_ids": types.astype(np.int64)}
        if split.labels is not None:
            batch["labels"] = split.labels[rows]
        return {name: torch.from_numpy(array) for name, array in batch.items()}


class BatchOrder(Sampler[list[int]]):
    """The rows of each batch, epoch after epoch.

    Shuffled by seed and epoch, or in the order of the file. With `lengths`, shuffled batches are of rows of like
    length, so that little is padded: some batches' worth of rows are sorted together, and the batches shuffled again;
    rows that are not shuffled are sorted as a whole.
    """

    def __init__(self, num_rows: int, batch_size: int, *, shuffle: bool, seed: int, lengths: np.ndarray | None) -> None:
        self.num_rows, self.batch_size, self.shuffle, self.seed, self.lengths = (
            num_rows,
            batch_size,
            shuffle,
            seed,
            lengths,
        )
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1
        order = random.permutation(self.num_rows) if self.shuffle else np.arange(self.num_rows)
        if self.lengths is not None:
            span = self.batch_size * _SORTED_BATCHES if self.shuffle else self.num_rows
            parts = [order[start : start + span] for start in range(0, self.num_rows, span)]
            order = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in parts])
        batches = [
            order[start : start + self.batch_size].tolist() for start in range(0, self.num_rows, self.batch_size)
        ]
        if self.shuffle and self.lengths is not None:
            batches = [batches[index] for index in random.permutation(len(batches))]
        yield from batches


def loader(
    split: EncodedSplit,
    batch_size: int,
    *,
    pad_id: int,
    fixed_length: int | None,
    shuffle: bool = False,
    sort: bool = True,
    seed: int = 0,
) -> tuple[DataSpec, BatchOrder]:
    """Return the batches of a split for Composer, and the order they come in.

    Args:
        split: the tokenised rows.
        batch_size: rows a batch; the last may have fewer.
        pad_id: id of the padding token.
        fixed_length: tokens that every row is padded to; None: those of the batch's longest, rounded up a little.
        shuffle: a new order each epoch, by `seed`.
        sort: where padding is dynamic, put rows of like length together.
        seed: of the order.
    """
    lengths = split.lengths if fixed_length is None and sort else None
    order = BatchOrder(len(split), batch_size, shuffle=shuffle, seed=seed, lengths=lengths)
    batches = DataLoader(_Batches(split, pad_id, fixed_length), batch_size=None, sampler=order)
    return DataSpec(batches, get_num_samples_in_batch=_num_rows, get_num_tokens_in_batch=_num_tokens), order


def _num_rows(batch: Mapping[str, torch.Tensor]) -> int:
    return batch["input_ids"].shape[0]


def _num_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    return batch["input_ids"].numel()


def in_file_order(outputs: Iterable[np.ndarray], order: BatchOrder) -> np.ndarray:
    """Put the outputs of one epoch's batches back into the order of the split's rows."""
    joined = np.concatenate(list(outputs))
    order.epoch = 0
    rows = np.concatenate([np.asarray(batch) for batch in order])
    result = np.empty_like(joined)
    result[rows] = joined
    return result
