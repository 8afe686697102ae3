"""Metrics by name, the metric that Composer evaluates with, and the GLUE averages in circulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import binary_f1_score, multiclass_accuracy, multiclass_f1_score

# What a metric maps to its value: outputs (rows, labels) and true labels (rows,).
MetricFunction = Callable[[Tensor, Tensor], Tensor]


def _accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    return multiclass_accuracy(outputs.argmax(-1), labels, outputs.shape[-1], average="micro")


def _f1(outputs: Tensor, labels: Tensor) -> Tensor:
    return binary_f1_score(outputs.argmax(-1), labels)


def _f1_macro(outputs: Tensor, labels: Tensor) -> Tensor:
    return multiclass_f1_score(outputs.argmax(-1), labels, outputs.shape[-1], average="macro")


def _matthews(outputs: Tensor, labels: Tensor) -> Tensor:
    # torchmetrics bends a correlation that is not defined (one class only) to +-1; scikit-learn's 0 is the usual one.
    predicted = torch.nn.functional.one_hot(outputs.argmax(-1), outputs.shape[-1]).double()
    true = torch.nn.functional.one_hot(labels, outputs.shape[-1]).double()
    predicted, true = predicted - predicted.mean(0), true - true.mean(0)
    scale = (predicted.square().sum() * true.square().sum()).sqrt()
    return (predicted * true).sum() / scale if scale > 0 else scale


def _correlation(function: Callable[[Tensor, Tensor], Tensor]) -> MetricFunction:
    def metric(outputs: Tensor, labels: Tensor) -> Tensor:
        predicted = outputs.flatten().double()
        if bool((predicted == predicted[0]).all()) or bool((labels == labels[0]).all()):
            return torch.zeros(())  # not defined for a constant
        return function(predicted, labels.double())

    return metric


METRICS: dict[str, MetricFunction] = {
    "accuracy": _accuracy,
    "f1": _f1,  # of class 1; two classes only
    "f1_macro": _f1_macro,
    "matthews": _matthews,
    "pearson": _correlation(pearson_corrcoef),
    "spearman": _correlation(spearman_corrcoef),
}
FOR_REGRESSION = ("pearson", "spearman")


class DatasetMetric(Metric):
    """A metric of a whole split: it keeps all outputs, since correlations and F1 do not add up over batches."""

    full_state_update = False
    outputs: list[Tensor]
    labels: list[Tensor]

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.function = METRICS[name]
        self.add_state("outputs", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Add a batch: outputs (batch, labels) and true labels (batch,)."""
        self.outputs.append(outputs.detach().float())
        self.labels.append(labels)

    def compute(self) -> Tensor:
        """Return the metric of all that was added."""
        return self.function(torch.cat(self.outputs), torch.cat(self.labels))


def metric_key(metric: str, split: str, splits: list[str]) -> str:
    """The name of a metric in results: with the split's own part (matched, mismatched) where there are several."""
    return metric if len(splits) == 1 else f"{metric}_{split.removeprefix('validation_')}"


# convention -> column -> the (task, metric) whose mean it is. Each average is the plain mean of its columns.
AVERAGES: dict[str, dict[str, list[tuple[str, str]]]] = {
    # The paper's code: eight tasks, MRPC by F1 alone.
    "paper": {
        "MNLI": [("mnli", "accuracy_matched"), ("mnli", "accuracy_mismatched")],
        "QNLI": [("qnli", "accuracy")],
        "QQP": [("qqp", "accuracy"), ("qqp", "f1")],
        "RTE": [("rte", "accuracy")],
        "SST-2": [("sst2", "accuracy")],
        "MRPC": [("mrpc", "f1")],
        "CoLA": [("cola", "matthews")],
        "STS-B": [("stsb", "spearman")],
    }
}
# MosaicBERT's code, and ModernBERT's after it: MRPC by the mean of accuracy and F1.
AVERAGES["mosaicbert"] = {**AVERAGES["paper"], "MRPC": [("mrpc", "accuracy"), ("mrpc", "f1")]}
# Devlin et al., table 1: nine columns.
AVERAGES["devlin"] = {
    "MNLI-m": [("mnli", "accuracy_matched")],
    "MNLI-mm": [("mnli", "accuracy_mismatched")],
    **{column: parts for column, parts in AVERAGES["paper"].items() if column not in ("MNLI", "QQP")},
    "QQP": [("qqp", "f1")],
}


def columns(convention: str, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The columns of a convention that `metrics` (task -> metric -> value) has everything for."""
    return {
        column: sum(metrics[task][metric] for task, metric in parts) / len(parts)
        for column, parts in AVERAGES[convention].items()
        if all(metric in metrics.get(task, {}) for task, metric in parts)
    }


def average(convention: str, metrics: Mapping[str, Mapping[str, float]]) -> float | None:
    """The GLUE average of a convention; None where a column is missing: an average of fewer is another figure."""
    values = columns(convention, metrics)
    return sum(values.values()) / len(values) if len(values) == len(AVERAGES[convention]) else None
