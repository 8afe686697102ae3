"""Metrics against scikit-learn and SciPy on random predictions, and averages against published rows."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from bert.glue.metrics import AVERAGES, METRICS, DatasetMetric, average, columns, metric_key
from bert.glue.tasks import TASKS

REFERENCES = {
    "accuracy": sklearn.metrics.accuracy_score,
    "f1": sklearn.metrics.f1_score,
    "f1_macro": lambda true, predicted: sklearn.metrics.f1_score(true, predicted, average="macro"),
    "matthews": sklearn.metrics.matthews_corrcoef,
    "pearson": lambda true, predicted: scipy.stats.pearsonr(true, predicted).statistic,
    "spearman": lambda true, predicted: scipy.stats.spearmanr(true, predicted).statistic,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.metrics])
def test_every_metric_of_every_task_is_that_of_scikit_learn_or_scipy(name: str, seed: int) -> None:
    task, random = TASKS[name], np.random.default_rng(seed)
    rows = 211
    if task.labels is None:
        labels = random.integers(0, 26, rows) / 5  # many ties, as in STS-B
        outputs = (labels + random.normal(0, 2, rows))[:, None].round(1)
        predicted = outputs[:, 0]
    else:
        labels = random.integers(0, task.num_labels, rows)
        outputs = random.normal(0, 1, (rows, task.num_labels)) + np.eye(task.num_labels)[labels]
        predicted = outputs.argmax(1)
    for metric_name in task.metrics:
        metric = DatasetMetric(metric_name)
        for part in np.array_split(np.arange(rows), 7):
            metric.update(torch.tensor(outputs[part]), torch.tensor(labels[part]))
        assert float(metric.compute()) == pytest.approx(REFERENCES[metric_name](labels, predicted), abs=1e-6)


def test_every_metric_has_a_reference_here() -> None:
    assert METRICS.keys() == REFERENCES.keys()


@pytest.mark.parametrize("metric", ["accuracy", "f1", "f1_macro", "matthews"])
def test_one_class_only_as_scikit_learn_has_it(metric: str) -> None:
    labels = np.array([0, 1, 1, 0, 1])
    for predicted in (np.zeros(5, int), np.ones(5, int)):
        outputs = torch.nn.functional.one_hot(torch.tensor(predicted), 2).float()
        assert float(METRICS[metric](outputs, torch.tensor(labels))) == pytest.approx(
            REFERENCES[metric](labels, predicted)
        )


def test_a_constant_prediction_correlates_with_nothing() -> None:
    labels = torch.tensor([0.0, 1.0, 3.0])
    for name in ("pearson", "spearman"):
        assert float(METRICS[name](torch.ones(3, 1), labels)) == 0.0


# Devlin et al. (2019), table 1: MNLI-m/mm, QQP, QNLI, SST-2, CoLA, STS-B, MRPC, RTE, and the average printed there.
DEVLIN = {
    "BERT-base": ((84.6, 83.4), 71.2, 90.5, 93.5, 52.1, 85.8, 88.9, 66.4, 79.6),
    "BERT-large": ((86.7, 85.9), 72.1, 92.7, 94.9, 60.5, 86.5, 89.3, 70.1, 82.1),
}


@pytest.mark.parametrize("model", DEVLIN)
def test_devlins_averages(model: str) -> None:
    (matched, mismatched), qqp, qnli, sst2, cola, stsb, mrpc, rte, printed = DEVLIN[model]
    metrics = {
        "mnli": {"accuracy_matched": matched, "accuracy_mismatched": mismatched},
        "qqp": {"f1": qqp, "accuracy": 0.0},
        "qnli": {"accuracy": qnli},
        "sst2": {"accuracy": sst2},
        "cola": {"matthews": cola},
        "stsb": {"spearman": stsb, "pearson": 0.0},
        "mrpc": {"f1": mrpc, "accuracy": 0.0},
        "rte": {"accuracy": rte},
    }
    value = average("devlin", metrics)
    assert value is not None
    assert round(value, 1) == printed
    assert len(AVERAGES["devlin"]) == 9


def test_the_papers_average_and_mosaicberts() -> None:
    # Hydra's table 4 (arXiv 2407.09941), its row for M2: the mean of eight is the paper's 80.9.
    m2 = {"mnli": 80.5, "qnli": 86.0, "qqp": 87.0, "rte": 69.3, "sst2": 92.3, "mrpc": 89.2, "cola": 56.0, "stsb": 86.9}
    metrics = {
        task: {
            metric_key(name, split, TASKS[task].validation): value for name in TASKS[task].metrics for split in splits
        }
        for task, value in m2.items()
        for splits in [TASKS[task].validation]
    }
    value = average("paper", metrics)
    assert value is not None
    assert round(value, 1) == 80.9
    metrics["mrpc"]["accuracy"] = 85.2
    mosaic = average("mosaicbert", metrics)
    assert mosaic == pytest.approx(value - 2.0 / 8)


def test_the_papers_average_is_its_codes_flat_mean() -> None:
    """The original pools every (seed, split, metric) value of a task, and averages the tasks."""
    random = np.random.default_rng(0)
    metrics, originals = {}, []
    for parts in AVERAGES["paper"].values():
        values = {part: random.random(5) for part in parts}  # five seeds
        originals.append(np.mean([value for seeds in values.values() for value in seeds]))
        metrics[parts[0][0]] = {metric: float(seeds.mean()) for (_, metric), seeds in values.items()}
    assert average("paper", metrics) == pytest.approx(np.mean(originals))


def test_an_average_of_fewer_tasks_is_none() -> None:
    metrics = {"rte": {"accuracy": 0.6}, "mrpc": {"f1": 0.8}}
    assert average("paper", metrics) is None
    assert columns("paper", metrics) == {"RTE": 0.6, "MRPC": 0.8}
    assert columns("mosaicbert", metrics) == {"RTE": 0.6}


def test_the_scores_of_the_table_are_the_papers_columns() -> None:
    """A task's own score, which ranks grid points, is its column in the paper's convention."""
    for parts in AVERAGES["paper"].values():
        task = TASKS[parts[0][0]]
        scored = [
            metric_key(name, split, task.validation) for name in task.score or task.metrics for split in task.validation
        ]
        assert sorted(scored) == sorted(metric for _, metric in parts)
