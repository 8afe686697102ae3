"""Shards of random tokens in the format that `bert.data.prepare` writes, for benchmarks that need data of any size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from streaming import MDSWriter

from bert.data.metadata import DatasetMetadata

# Those of bert-base-uncased.
SPECIAL_IDS = {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}
VOCABULARY = 30_522


def write_shards(
    folder: Path,
    samples: int,
    length: int,
    *,
    vocabulary: int = VOCABULARY,
    special_ids: Mapping[str, int] = SPECIAL_IDS,
    seed: int = 17,
) -> None:
    """Write random samples of exactly `length` tokens, as `prepare` does in its concat layout."""
    tokens = np.random.default_rng(seed).integers(0, vocabulary, (samples, length), dtype=np.uint16)
    tokens[:, 0], tokens[:, -1] = special_ids["cls"], special_ids["sep"]
    with MDSWriter(out=str(folder), columns={"input_ids": "ndarray:uint16"}, hashes=["xxh64"]) as out:
        for row in tokens:
            out.write({"input_ids": row})
    DatasetMetadata(
        layout="concat",
        seq_len=length,
        token_dtype="uint16",
        tokenizer_name="benchmark",
        tokenizer_fingerprint="benchmark",
        vocab_size=vocabulary,
        special_token_ids=dict(special_ids),
        source={"kind": "random"},
        num_samples=samples,
        num_tokens=tokens.size,
        num_documents=samples,
        num_skipped_documents=0,
        unigram_entropy_nats=float(np.log(vocabulary)),
    ).save(folder)
