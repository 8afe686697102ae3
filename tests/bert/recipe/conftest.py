"""Tiny tokenised shards and a tiny recipe, for runs of a second."""

from __future__ import annotations

import atexit
import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from streaming import MDSWriter
from streaming.base.shared import memory

from bert.data.metadata import DatasetMetadata

SEQ_LEN = 16
VOCAB_SIZE = 40
SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}


@pytest.fixture(autouse=True)
def _leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep relative runs/ folders, logging levels, random state and shared memory of a test to itself.

    Streaming gives its shared memory back when the process ends, and opens, for each new dataset, a segment of each
    that there is: a worker of the whole suite was seen to have as many files open as it may.
    """
    closing: list[Callable[[], None]] = []
    monkeypatch.setattr(memory, "atexit", SimpleNamespace(register=closing.append))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    level = logging.getLogger("bert").level
    yield
    logging.getLogger("bert").setLevel(level)
    torch.set_num_threads(threads)
    gc.collect()  # a segment that an array still lies in cannot be closed
    for close in closing:
        try:
            close()
        except BufferError:
            atexit.register(close)


def write_split(
    folder: Path, num_samples: int, seed: int, *, seq_len: int = SEQ_LEN, fingerprint: str = "abc", **writing: Any
) -> None:
    """Shards of a few frequent and many rare tokens, so that a model learns something within a few steps."""
    generator = np.random.default_rng(seed)
    ordinary = np.arange(len(SPECIAL), VOCAB_SIZE)
    frequency = 0.7 ** np.arange(len(ordinary))
    with MDSWriter(out=str(folder), columns={"input_ids": "ndarray:uint16"}, exist_ok=True, **writing) as writer:
        for _ in range(num_samples):
            body = generator.choice(ordinary, seq_len - 1, p=frequency / frequency.sum())
            writer.write({"input_ids": np.concatenate([[SPECIAL["cls"]], body]).astype(np.uint16)})
    DatasetMetadata(
        layout="concat",
        seq_len=seq_len,
        token_dtype="uint16",
        tokenizer_name="toy",
        tokenizer_fingerprint=fingerprint,
        vocab_size=VOCAB_SIZE,
        special_token_ids=SPECIAL,
        source={"kind": "test"},
        num_samples=num_samples,
        num_tokens=num_samples * seq_len,
        num_documents=num_samples,
        num_skipped_documents=0,
        unigram_entropy_nats=3.5,
    ).save(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_split(folder / "train", 96, 0)
    write_split(folder / "validation", 16, 1)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, data: Path) -> Callable[..., Path]:
    """Return a function that writes a tiny recipe, with top-level sections replaced, and gives its path."""

    def write(**changes: object) -> Path:
        values = {
            "run_name": "tiny",
            "seed": 3,
            "data_local": str(data),
            "max_seq_len": SEQ_LEN,
            "train_loader": {"num_workers": 0, "dataset": {"shuffle": True}},
            "eval_loader": {"num_workers": 0},
            "model": {
                "name": "m2_bert",
                "config": {
                    "vocab_size": VOCAB_SIZE,
                    "hidden_size": 16,
                    "num_hidden_layers": 1,
                    "intermediate_size": 32,
                    "max_position_embeddings": SEQ_LEN,
                    "long_conv_l_max": SEQ_LEN,
                    "hyena_filter_order": 8,
                    "hidden_dropout_prob": 0.1,
                },
            },
            "optimizer": {"name": "decoupled_adamw", "lr": 1e-2, "betas": [0.9, 0.98], "eps": 1e-6},
            "scheduler": {"name": "linear_decay_with_warmup", "t_warmup": "0.1dur", "alpha_f": 0.02},
            "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}},
            "max_duration": "8ba",
            "global_train_batch_size": 8,
            "device_train_microbatch_size": 8,
            "eval_interval": "4ba",
            "precision": "fp32",
            "device": "cpu",
            "callbacks": {"nan_guard": {}, "lr_monitor": {}},
            "loggers": {"jsonl": {}},
            "progress_bar": False,
            "save_folder": str(tmp_path / "runs" / "{run_name}"),
            "save_interval": "4ba",
            **changes,
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write
