"""A log file that programs read: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

import torch
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist, format_name_with_dist

from bert.files import write_text

# Composer's own counts, taken before the batch: beside the line's, which are taken after it, they would only confuse.
_COUNTS = {f"time/{unit}{suffix}" for unit in ("batch", "sample", "token") for suffix in ("", "_in_epoch")}


class JsonlLogger(LoggerDestination):
    """Write every metric to a file on rank 0: a line a batch, and a line an evaluation.

    A line has "event" ("train" or "eval"), "batch", "sample" and "token" (finished so far) and the metrics logged
    since the line before. `loss/train/total` is the mean over the masked tokens of the whole batch, before its
    optimizer step; `lr-*` is the rate of the next step. A resumed run drops the lines after its checkpoint, so that
    each batch is there once.

    Args:
        path: of the file; may hold {run_name}.
        interval: in batches: write every `interval`-th batch only.
    """

    def __init__(self, path: str = "runs/{run_name}/metrics.jsonl", interval: int = 1) -> None:
        if interval < 1:
            raise ValueError(f"interval must be at least 1 batch, not {interval}")
        self.path = path
        self.interval = interval
        self._metrics: dict[str, float] = {}
        self._file: IO[str] | None = None

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Keep the metrics until the batch or the evaluation ends."""
        for name, value in metrics.items():
            if name not in _COUNTS:
                self._metrics[name] = value.item() if isinstance(value, torch.Tensor) else value

    def fit_start(self, state: State, logger: Logger) -> None:
        """Open the file, without the lines that a resumed run is going to write again."""
        if dist.get_global_rank() != 0:
            return
        path = Path(format_name_with_dist(self.path, run_name=state.run_name))
        kept = _lines_until(path, state.timestamp.batch.value)
        write_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def batch_end(self, state: State, logger: Logger) -> None:
        """Write the line of the batch, where one is due."""
        if state.timestamp.batch.value % self.interval == 0:
            self._write("train", state)
        self._metrics.clear()

    def eval_end(self, state: State, logger: Logger) -> None:
        """Write the line of the evaluation."""
        self._write("eval", state)

    def close(self, state: State, logger: Logger) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, event: str, state: State) -> None:
        if self._file is not None:
            now = state.timestamp
            counts = {"batch": now.batch.value, "sample": now.sample.value, "token": now.token.value}
            self._file.write(json.dumps({"event": event, **counts, **self._metrics}) + "\n")
            self._file.flush()
        self._metrics.clear()


def _lines_until(path: Path, batch: int) -> list[str]:
    """The whole lines of the file that were written up to `batch`; a line torn by a kill is dropped."""
    if batch == 0 or not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if values["batch"] <= batch:
            kept.append(line)
    return kept
