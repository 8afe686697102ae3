"""Does a long run grow? Memory, descriptors and threads over many small steps, and over a loader's restarts.

python benchmarks/soak.py steps --steps 5000 --output results/soak_steps.json
python benchmarks/soak.py loader --seconds 600 --output results/soak_loader.json
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from composer.core import Callback, State
from composer.loggers import Logger
from machine import write_figures
from synthetic_shards import write_shards

from bert.data.loader_config import DatasetConfig, LoaderConfig
from bert.data.shared_memory import clean_stale_shared_memory
from bert.data.streaming_text import build_data_spec
from bert.recipe import builders
from bert.recipe.train import main as train_main

LENGTH, VOCABULARY = 32, 128
SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
POINTS = 50  # looks at the process in a run


def look() -> dict[str, float]:
    """Return what this process holds now: memory of its own, descriptors, threads, children."""
    gc.collect()
    process = psutil.Process()
    return {
        "memory_mb": process.memory_full_info().uss / 1e6,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
        "shared_memory_files": sum(part.path.startswith("/dev/shm/") for part in process.memory_maps()),
    }


def growth(points: list[dict[str, float]]) -> dict[str, Any]:
    """Compare the last quarter of the looks with the second one; the first is warming up."""
    quarter = len(points) // 4
    before, after = points[quarter : 2 * quarter], points[-quarter:]

    def mean(part: list[dict[str, float]], name: str) -> float:
        return round(sum(point[name] for point in part) / len(part), 2)

    return {name: {"second_quarter": mean(before, name), "last_quarter": mean(after, name)} for name in points[0]}


class Looks(Callback):
    """Look at the process every `interval` batches."""

    def __init__(self, interval: int, points: list[dict[str, float]]) -> None:
        self.interval, self.points = interval, points

    def batch_end(self, state: State, logger: Logger) -> None:
        """Look, where it is time."""
        if state.timestamp.batch.value % self.interval == 0:
            self.points.append({"batch": state.timestamp.batch.value, **look()})


def soak_steps(folder: Path, steps: int) -> list[dict[str, float]]:
    """Train a tiny model with checkpoints, evaluations, logs and the usual callbacks."""
    for split, samples in (("train", 4096), ("validation", 64)):
        write_shards(folder / "data" / split, samples, LENGTH, vocabulary=VOCABULARY, special_ids=SPECIAL)
    model = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    lengths = {"max_position_embeddings": LENGTH, "long_conv_l_max": LENGTH, "hyena_filter_order": 8}
    recipe = {
        "run_name": "soak",
        "data_local": str(folder / "data"),
        "max_seq_len": LENGTH,
        "train_loader": {"num_workers": 1, "dataset": {"shuffle": True}},
        "eval_loader": {"num_workers": 0},
        "model": {"name": "m2_bert", "config": {**model, **lengths}},
        "optimizer": {"name": "decoupled_adamw", "lr": 1e-3},
        "scheduler": {"name": "linear_decay_with_warmup", "t_warmup": "0.1dur", "alpha_f": 0.02},
        "max_duration": f"{steps}ba",
        "global_train_batch_size": 8,
        "device_train_microbatch_size": 4,
        "eval_interval": f"{max(1, steps // 10)}ba",
        "save_interval": f"{max(1, steps // 20)}ba",
        "save_num_checkpoints_to_keep": 2,
        "save_folder": str(folder / "runs" / "{run_name}"),
        "precision": "fp32",
        "device": "cpu",
        "callbacks": {"nan_guard": {}, "loss_spike": {}, "lr_monitor": {}, "loss_curve": {}, "speed_monitor": {}},
        "loggers": {"jsonl": {}},
        "progress_bar": False,
    }
    path = folder / "soak.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    points: list[dict[str, float]] = []
    # The recipe's registry is the seam: this callback is one more name in it.
    builders.REGISTRY["callbacks"]["looks"] = builders.Entry(lambda interval: Looks(interval, points))
    if train_main([str(path), f"callbacks.looks.interval={max(1, steps // POINTS)}"]) != 0:
        raise SystemExit("the run failed")
    return points


def soak_loader(folder: Path, seconds: float) -> list[dict[str, float]]:
    """Read epoch after epoch with two workers that end with each epoch, at the pace of a small model."""
    write_shards(folder / "data" / "train", 2048, LENGTH, vocabulary=VOCABULARY, special_ids=SPECIAL)
    clean_stale_shared_memory()
    dataset = DatasetConfig(local=str(folder / "data"), split="train", shuffle=True)
    config = LoaderConfig(dataset=dataset, num_workers=2, persistent_workers=False)
    spec = build_data_spec(config, device_batch_size=64, max_seq_len=LENGTH, seed=1, train=True)
    points: list[dict[str, float]] = []
    begin, epochs = time.monotonic(), 0
    while time.monotonic() - begin < seconds:
        rows = 0
        for batch in spec.dataloader:
            rows += len(batch["input_ids"])
            time.sleep(0.02)
        if rows != 2048:
            raise SystemExit(f"epoch {epochs} had {rows} samples")
        epochs += 1
        if time.monotonic() - begin > len(points) * seconds / POINTS:
            points.append({"epoch": epochs, "seconds": round(time.monotonic() - begin), **look()})
    return points


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "loader"))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "steps":
            points = soak_steps(Path(folder), options.steps)
        else:
            points = soak_loader(Path(folder), options.seconds)
    figures = {"growth": growth(points), "last": points[-1], "points": points}
    write_figures(options.output, figures)
    for name, (before, after) in ((name, value.values()) for name, value in figures["growth"].items()):
        print(f"{name:<20} second quarter {before:>10,.2f}   last quarter {after:>10,.2f}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
