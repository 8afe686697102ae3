"""Tiny tasks in GLUE's own file format, a tiny vocabulary and a tiny sweep: jobs of a second."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

MAX_LENGTH = 16
WORDS = ["good", "bad", "fine", "poor", "cat", "dog", "sat", "ran", "the", "a", '"', "mat", "##s"]
MODEL = {
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "max_position_embeddings": MAX_LENGTH,
    "long_conv_l_max": MAX_LENGTH,
    "hyena_filter_order": 8,
    "hyena_w": 1,
    "initializer_range": 0.2,
}


@pytest.fixture(autouse=True)
def _leave_no_trace() -> Iterator[None]:
    """Keep threads and logging levels of a test to itself: jobs are forks of this process."""
    threads, level = torch.get_num_threads(), logging.getLogger("bert").level
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.getLogger("bert").setLevel(level)


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n", encoding="utf-8")
    return path


def sentences(number: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS[:10], generator.integers(2, 6))) for _ in range(number)]


def label_of(sentence: str) -> int:
    return int(("good" in sentence) or ("fine" in sentence))


def write_glue(root: Path, rows: int = 40) -> Path:
    """CoLA, STS-B, RTE, MNLI and AX, as distributed but tiny and with labels that a word gives away."""
    for stem, seed in (("train", 0), ("dev", 1), ("test", 2)):
        first, second = sentences(rows, seed), sentences(rows, seed + 10)
        cola = [f"gj04\t{label_of(text)}\t\t{text}" for text in first]
        stsb = [f"{i}\tg\tf\ty\t{i}\ts\ts\t{a}\t{b}" for i, (a, b) in enumerate(zip(first, second, strict=True))]
        rte = [f"{i}\t{a}\t{b}" for i, (a, b) in enumerate(zip(first, second, strict=True))]
        stsb_head = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
        rte_head = "index\tsentence1\tsentence2"
        if stem == "test":
            cola = ["index\tsentence", *(f"{i}\t{text}" for i, text in enumerate(first))]
        else:
            stsb = [f"{row}\t{2.5 * label_of(a) + 1:.3f}" for row, a in zip(stsb, first, strict=True)]
            rte = [f"{row}\t{('not_entailment', 'entailment')[label_of(a)]}" for row, a in zip(rte, first, strict=True)]
            stsb_head, rte_head = f"{stsb_head}\tscore", f"{rte_head}\tlabel"
        write(root / "CoLA" / f"{stem}.tsv", cola)
        write(root / "STS-B" / f"{stem}.tsv", [stsb_head, *stsb])
        write(root / "RTE" / f"{stem}.tsv", [rte_head, *rte])
        labels = ["neutral" if len(a) % 3 == 0 else ("contradiction", "entailment")[label_of(a)] for a in first]
        for split in ("train",) if stem == "train" else (f"{stem}_matched", f"{stem}_mismatched"):
            head = "index\tsentence1\tsentence2" + ("" if stem == "test" else "\tgold_label")
            mnli = [
                f"{i}\t{a}\t{b}" + ("" if stem == "test" else f"\t{label}")
                for i, (a, b, label) in enumerate(zip(first, second, labels, strict=True))
            ]
            write(root / "MNLI" / f"{split}.tsv", [head, *mnli])
    pairs = [f"{i}\t{a}\t{b}" for i, (a, b) in enumerate(zip(sentences(30, 5), sentences(30, 6), strict=True))]
    write(root / "diagnostic" / "diagnostic.tsv", ["index\tsentence1\tsentence2", *pairs])
    return root


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def glue_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"))


Recipe = Callable[..., Path]


@pytest.fixture
def recipe(tmp_path: Path, glue_data: Path, vocabulary: Path) -> Recipe:
    """Return a function that writes a tiny sweep, with top-level keys replaced, and gives its path."""

    def write_recipe(**changes: object) -> Path:
        values = {
            "run_name": "tiny",
            "folder": str(tmp_path / "sweep"),
            "cache": str(tmp_path / "cache"),
            "data": str(glue_data),
            "tokenizer_name": str(vocabulary),
            "max_seq_len": MAX_LENGTH,
            "model": {"name": "m2_bert", "config": dict(MODEL)},
            "seeds": [1, 2],
            "epochs": 1,
            "batch_size": 8,
            "eval_batch_size": 16,
            "precision": "fp32",
            "device": "cpu",
            "num_slots": 2,
            "threads": 1,
            "retries": 0,
            "optimizer": {"name": "decoupled_adamw", "lr": 1e-2},
            "scheduler": {"name": "linear_decay_with_warmup", "t_warmup": "0.1dur", "alpha_f": 0.0},
            "callbacks": {"nan_guard": {}},
            "tasks": {"cola": {}, "stsb": {}},
            **changes,
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return path

    return write_recipe
