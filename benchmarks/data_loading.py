"""Speed of the training loader against tokenizing on the fly, both with the same masking, in one run.

python benchmarks/data_loading.py --workers 2 --batch-size 64 --output data_loading.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from machine import write_figures
from synthetic_shards import write_shards
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from torch.utils.data import DataLoader, Dataset

from bert.data.loader_config import DatasetConfig, LoaderConfig
from bert.data.metadata import DatasetMetadata
from bert.data.shared_memory import clean_stale_shared_memory
from bert.data.streaming_text import MaskingCollator, TextSample, build_data_spec

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
RATE, SEED = 0.3, 17
TARGET = 9000.0  # samples/s of 128 tokens with 2 workers on 2 cores
TEXTS = 20_000  # distinct documents; more would only fill memory


def make_texts(words_each: int) -> list[str]:
    """Draw documents from made-up words whose frequencies follow Zipf's law."""
    rng = np.random.default_rng(SEED)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(20_000)]
    frequencies = 1 / np.arange(1, len(words) + 1)
    drawn = rng.choice(len(words), (TEXTS, words_each), p=frequencies / frequencies.sum())
    return [" ".join(words[word] for word in row) for row in drawn]


def make_tokenizer(texts: list[str], vocab: str | None, length: int) -> Tokenizer:
    """Load a WordPiece vocabulary, or train one on some of the texts."""
    tokenizer = BertWordPieceTokenizer(vocab) if vocab else BertWordPieceTokenizer()
    if not vocab:
        tokenizer.train_from_iterator(texts[:2000], vocab_size=8192, show_progress=False)
    tokenizer.enable_truncation(length)
    return tokenizer


class Texts(Dataset):
    """Raw documents, tokenized in the collator."""

    def __init__(self, texts: list[str], samples: int) -> None:
        self.texts = texts
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[int, str]:
        return index, self.texts[index % len(self.texts)]


class TokenizingCollator:
    """Tokenize a batch, then mask it as the training loader does."""

    def __init__(self, tokenizer: Tokenizer, masking: MaskingCollator) -> None:
        self.tokenizer = tokenizer
        self.masking = masking

    def __call__(self, batch: list[tuple[int, str]]) -> dict[str, Any]:
        """Return the masked batch."""
        encodings = self.tokenizer.encode_batch([text for _, text in batch])
        return self.masking(
            [
                TextSample(index, 0, np.array(encoding.ids, dtype=np.uint16))
                for (index, _), encoding in zip(batch, encodings, strict=True)
            ]
        )


def measure(loader: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Iterate once; the clock starts at the first batch, when the workers have started."""
    batches = iter(loader)
    next(batches)
    samples = tokens = 0
    start = time.perf_counter()
    for batch in batches:
        samples += len(batch["input_ids"])
        tokens += batch["num_tokens"]
    seconds = time.perf_counter() - start
    return {"samples_per_second": samples / seconds, "tokens_per_second": tokens / seconds, "samples": samples}


def main() -> None:
    """Measure both loaders in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000, help="samples in the shards")
    parser.add_argument("--text-samples", type=int, default=20_000, help="samples to tokenize on the fly")
    parser.add_argument("--length", type=int, default=128, help="tokens a sample")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="epochs of each; the median counts")
    parser.add_argument("--vocab", help="a WordPiece vocab.txt; without it a small one is trained")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism, as in training

    clean_stale_shared_memory()
    texts = make_texts(args.length)
    tokenizer = make_tokenizer(texts, args.vocab, args.length)
    with tempfile.TemporaryDirectory(prefix="data_loading_") as folder:
        write_shards(
            Path(folder),
            args.samples,
            args.length,
            vocabulary=tokenizer.get_vocab_size(),
            special_ids={name: tokenizer.token_to_id(token) for name, token in SPECIAL.items()},
            seed=SEED,
        )
        config = LoaderConfig(
            dataset=DatasetConfig(local=folder, shuffle=True, mlm_probability=RATE), num_workers=args.workers
        )
        streaming = build_data_spec(
            config, device_batch_size=args.batch_size, max_seq_len=args.length, seed=SEED, train=True
        ).dataloader
        masking = MaskingCollator(
            DatasetMetadata.load(folder), max_seq_len=args.length, mlm_probability=RATE, seed=SEED
        )
        on_the_fly = DataLoader(
            Texts(texts, args.text_samples),
            batch_size=args.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=args.workers,
            persistent_workers=args.workers > 0,
            collate_fn=TokenizingCollator(tokenizer, masking),
        )
        loaders = {"shards": streaming, "tokenizing on the fly": on_the_fly}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in loaders}
        for _ in range(args.repeats):
            for name, loader in loaders.items():
                runs[name].append(measure(loader))

    results = {
        name: {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        for name, measured in runs.items()
    }
    print(f"{args.length} tokens, batches of {args.batch_size}, {args.workers} workers, {os.cpu_count()} cores")
    print(f"{'loader':<24}{'samples/s':>12}{'tokens/s':>14}")
    for name, result in results.items():
        print(f"{name:<24}{result['samples_per_second']:>12,.0f}{result['tokens_per_second']:>14,.0f}")
    ratio = results["shards"]["samples_per_second"] / results["tokenizing on the fly"]["samples_per_second"]
    print(f"ratio {ratio:.1f}; target of the shards at 128 tokens and 2 workers: {TARGET:,.0f} samples/s")
    if args.output:
        write_figures(args.output, {"results": results, "runs": runs, "ratio": ratio})


if __name__ == "__main__":
    main()
