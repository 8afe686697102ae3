"""M2-BERT-base against Hugging Face BERT-base on this machine's CPU: encoder forward, and a training step.

    python benchmarks/cpu_speed.py [--batch 8] [--length 128] [--runs 9] [--output results.json]

The two sides alternate in one process; medians, and the median of the ratios pair by pair.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import write_figures
from transformers import BertForMaskedLM

from bert.composer_models import MaskedLanguageModel, build_masked_lm

MASK_RATE = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="sequences a batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=9, help="timed pairs a row (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    lengths = {"max_position_embeddings": max(512, arguments.length)}
    models = {
        "m2": build_masked_lm(
            "m2_bert",
            {"max_position_embeddings": arguments.length, "long_conv_l_max": arguments.length},
            train_mask_rate=MASK_RATE,
            eval_mask_rate=MASK_RATE,
        ),
        "hf": build_masked_lm("hf_bert", lengths, train_mask_rate=MASK_RATE, eval_mask_rate=MASK_RATE),
    }
    ids = torch.randint(1000, 30000, (arguments.batch, arguments.length))
    labels = torch.where(torch.rand(ids.shape) < MASK_RATE, ids, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    rows = {
        "encoder forward": compare({k: forward_of(m, ids) for k, m in models.items()}, arguments.runs),
        "training step (masked rows)": compare({k: step_of(m, batch) for k, m in models.items()}, arguments.runs),
        "training step (HF as shipped)": compare(
            {"m2": step_of(models["m2"], batch), "hf": shipped_step_of(models["hf"], batch)}, arguments.runs
        ),
    }
    shape = f"{arguments.batch} x {arguments.length}"
    print(f"{'fp32, ' + shape:<32} {'M2, s':>8} {'HF, s':>8} {'HF / M2':>8}")
    for name, row in rows.items():
        print(f"{name:<32} {row['m2_s']:8.3f} {row['hf_s']:8.3f} {row['ratio']:8.2f}")
    if arguments.output:
        write_figures(arguments.output, {"shape": shape, "threads": torch.get_num_threads(), "rows": rows})


def forward_of(model: MaskedLanguageModel, ids: torch.Tensor) -> Callable[[], None]:
    """The encoder alone, embeddings included, in evaluation mode."""

    def run() -> None:
        model.eval()
        with torch.inference_mode():
            model.model.base_model(input_ids=ids)

    return run


def step_of(model: MaskedLanguageModel, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Forward and backward of the recipe: head and loss on masked rows for both sides."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def run() -> None:
        model.train()
        optimizer.zero_grad()
        model(batch)["loss"].backward()
        optimizer.step()

    return run


def shipped_step_of(model: MaskedLanguageModel, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Hugging Face's own loss, with logits at every position."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def run() -> None:
        model.train()
        optimizer.zero_grad()
        BertForMaskedLM.forward(model.model, **batch).loss.backward()
        optimizer.step()

    return run


def compare(sides: dict[str, Callable[[], None]], runs: int) -> dict[str, float]:
    """Time both sides in turn; the first pair is not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(runs + 1):
        for name, function in sides.items():
            start = time.perf_counter()
            function()
            if run:
                times[name].append(time.perf_counter() - start)
    ratios = [hf / m2 for m2, hf in zip(times["m2"], times["hf"], strict=True)]
    return {
        "m2_s": statistics.median(times["m2"]),
        "hf_s": statistics.median(times["hf"]),
        "ratio": statistics.median(ratios),
    }


if __name__ == "__main__":
    main()
