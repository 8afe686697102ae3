"""What a pretraining run leaves for the report: one JSON, with the recipe's hash and the whole curve."""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bert.errors import DataError
from bert.recipe.builders import resolved_compile
from bert.recipe.resume import run_folder
from bert.recipe.schema import TrainConfig, to_yaml

CURVE_POINTS = 300  # of the training curve; each is the mean over its part of the steps
EVALUATION = "metrics/eval/MaskedCrossEntropy"
ACCURACY = "metrics/eval/MaskedAccuracy"


def recipe_hash(config: TrainConfig | str) -> str:
    """Return 16 hexadecimal digits that follow from the resolved recipe, or from its YAML where that is at hand."""
    text = config if isinstance(config, str) else to_yaml(config)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics.jsonl; a last line torn by a kill is left out.

    Raises:
        DataError: the file is missing, or a line is no object with event, batch and token.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): the recipe needs the logger jsonl") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            found.append({**values, "event": values["event"], "batch": values["batch"], "token": values["token"]})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number} is no line of metrics: {error}") from error
    return found


def curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Gather the training and the evaluation curve, speed and utilisation of a run.

    Args:
        metrics: lines of metrics.jsonl. "time/train" (hours, of the speed monitor) is time in batches alone: no
            evaluation, no checkpoints, no start.

    Returns:
        "train" and "evaluation": lists by column, with "step", "tokens" (positions, without padding) and "minutes"
        (of training) beside "loss" (nats) and "accuracy"; "steps", "tokens", "minutes": of the whole run;
        "tokens_per_second" and "mfu": medians of the speed monitor's windows, None where there is none.
    """
    steps = [line for line in metrics if line["event"] == "train" and "loss/train/total" in line]
    train: dict[str, list[float]] = {"step": [], "tokens": [], "minutes": [], "loss": []}
    for part in _parts(steps, CURVE_POINTS):
        train["step"].append(part[-1]["batch"])
        train["tokens"].append(part[-1]["token"])
        train["minutes"].append(round(60 * part[-1].get("time/train", 0.0), 4))
        train["loss"].append(round(statistics.fmean(line["loss/train/total"] for line in part), 5))
    evaluation: dict[str, list[float | None]] = {"step": [], "tokens": [], "minutes": [], "loss": [], "accuracy": []}
    minutes = {line["batch"]: 60 * line.get("time/train", 0.0) for line in steps}
    for line in metrics:
        if line["event"] == "eval" and EVALUATION in line and line["batch"] not in evaluation["step"]:
            evaluation["step"].append(line["batch"])
            evaluation["tokens"].append(line["token"])
            evaluation["minutes"].append(round(minutes.get(line["batch"], 0.0), 4))
            evaluation["loss"].append(line[EVALUATION])
            evaluation["accuracy"].append(line.get(ACCURACY))
    last: Mapping[str, Any] = steps[-1] if steps else {}
    return {
        "train": train,
        "evaluation": evaluation,
        "steps": last.get("batch", 0),
        "tokens": last.get("token", 0),
        "minutes": round(60 * last.get("time/train", 0.0), 4),
        "tokens_per_second": _median(steps, "throughput/tokens_per_sec"),
        "mfu": _median(steps, "throughput/device/mfu"),
    }


def _parts(lines: Sequence[Mapping[str, Any]], count: int) -> list[Sequence[Mapping[str, Any]]]:
    edges = [round(i * len(lines) / count) for i in range(count + 1)] if len(lines) > count else range(len(lines) + 1)
    return [lines[a:b] for a, b in itertools.pairwise(edges)]


def _median(lines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [line[key] for line in lines if key in line]
    return statistics.median(values) if values else None


def pretraining_record(config: TrainConfig, parameters: int) -> dict[str, Any]:
    """Return what a run of `config` has reached so far, finished or not.

    Args:
        config: of the run, as it was started.
        parameters: of its model.

    Raises:
        DataError: its metrics cannot be read.
    """
    found = curves(read_metrics(run_folder(config) / "metrics.jsonl"))
    losses, accuracies = found["evaluation"]["loss"], found["evaluation"]["accuracy"]
    return {
        "kind": "pretrain",
        "run_name": config.run_name,
        "recipe_hash": recipe_hash(config),
        "model": config.model.name,
        "parameters": parameters,
        "lr": config.optimizer.get("lr"),
        "seed": config.seed,
        "batch_size": config.global_train_batch_size,
        "max_seq_len": config.max_seq_len,
        "mlm_probability": config.mlm_probability,
        "precision": config.precision,
        "compile": resolved_compile(config, on_gpu=config.device in (None, "gpu") and torch.cuda.is_available())[0],
        "evaluation_loss": losses[-1] if losses else None,
        "evaluation_accuracy": accuracies[-1] if accuracies else None,
        **found,
    }
