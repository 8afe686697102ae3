"""Pairs of query and document: a JSONL file to batches for Composer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from composer.core import DataSpec
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

from bert.data.loader_config import LoaderConfig
from bert.errors import DataError

PAIRS_HINT = "make it with: python -m bert.data.pairs --help"


class Pairs(Dataset):
    """(query, document) by number."""

    def __init__(self, path: Path) -> None:
        """Read a JSONL file of objects with the strings `query` and `document`.

        Raises:
            DataError: there is no such file, or a line is something else (named by its number).
        """
        self.rows: list[tuple[str, str]] = []
        try:
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    self.rows.append(_pair(line, f"{path}, line {number}"))
        except FileNotFoundError:
            raise DataError(f"there is no file {path}; {PAIRS_HINT}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[str, str]:
        return self.rows[index]


def _pair(line: str, where: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: it is not JSON, one object a line ({error})") from None
    query, document = (record.get("query"), record.get("document")) if isinstance(record, dict) else (None, None)
    if isinstance(query, str) and query.strip() and isinstance(document, str) and document.strip():
        return query, document
    raise DataError(f"{where}: it needs the strings 'query' and 'document', not empty")


class PairCollator:
    """Tokenise pairs and pad queries and documents each to the batch's longest."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, query_length: int, document_length: int) -> None:
        self.tokenizer = tokenizer
        self.query_length = query_length
        self.document_length = document_length

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        """Return query_ids, query_mask, document_ids and document_mask, (pairs, length) int64."""
        queries, documents = zip(*pairs, strict=True)
        batch = {}
        for name, texts, limit in (
            ("query", queries, self.query_length),
            ("document", documents, self.document_length),
        ):
            encoded = self.tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
            batch[f"{name}_ids"], batch[f"{name}_mask"] = encoded["input_ids"], encoded["attention_mask"]
        return batch


def count_pairs(batch: Mapping[str, Tensor]) -> int:
    """Return the number of pairs."""
    return len(batch["query_ids"])


def count_tokens(batch: Mapping[str, Tensor]) -> dict[str, int]:
    """Return tokens, padding included (counting the others would wait for the device), and pairs, which carry loss."""
    tokens = batch["query_ids"].numel() + batch["document_ids"].numel()
    return {"total": tokens, "loss_generating": count_pairs(batch)}


def build_pair_loader(
    pairs: Pairs, config: LoaderConfig, collator: PairCollator, *, device_batch_size: int, train: bool
) -> DataSpec:
    """Build the loader of one split; Composer seeds the order and skips what a resumed run has seen.

    Raises:
        DataError: training pairs do not fill one global batch, or there are none to evaluate.
    """
    if not len(pairs):
        raise DataError(f"split '{config.dataset.split}' has no pairs; eval_loader=null goes without an evaluation")
    if train and len(pairs) < device_batch_size * dist.get_world_size():
        raise DataError(f"{len(pairs)} training pairs do not fill a batch: use a smaller global_train_batch_size")
    workers = config.num_workers > 0
    loader: DataLoader[Any] = DataLoader(
        pairs,
        batch_size=device_batch_size,
        sampler=dist.get_sampler(pairs, shuffle=train, drop_last=train),
        collate_fn=collator,
        num_workers=config.num_workers,
        prefetch_factor=config.prefetch_factor if workers else None,
        persistent_workers=config.persistent_workers and workers,
        pin_memory=torch.cuda.is_available() if config.pin_memory is None else config.pin_memory,
        drop_last=train,
    )
    return DataSpec(loader, get_num_samples_in_batch=count_pairs, get_num_tokens_in_batch=count_tokens)
