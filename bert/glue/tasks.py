"""The one table of tasks: columns, labels, metrics, splits, file names. A YAML may add rows (`tasks.NAME.task`)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Task:
    """A classification or regression task on one text or a pair. Splits go by the Hub's names."""

    text: list[str] = field(default_factory=list)  # one or two columns, or templates such as "{question} {answer}"
    label: str = "label"  # column
    labels: list[str] | None = None  # class names, in the order of their ids; null: regression
    label_range: list[float] | None = None  # regression: the scale, which labels and submissions keep to
    metrics: list[str] = field(default_factory=list)  # names in bert.glue.metrics
    score: list[str] = field(default_factory=list)  # metrics whose mean ranks grid points; empty: all
    train: str = "train"  # split
    validation: list[str] = field(default_factory=lambda: ["validation"])  # splits; the metrics of several are averaged
    test: list[str] = field(default_factory=lambda: ["test"])  # splits without labels
    # --- where the data is
    source: str | None = None  # hub:NAME or a folder; null: the sweep's `data`
    hub_config: str | None = None  # the Hub data set's configuration; null: the task's name
    folder: str | None = None  # sub-folder of a local source; null: the task's name; ".": the source itself
    files: dict[str, str] = field(default_factory=dict)  # split -> file in that folder, where it is not SPLIT.EXTENSION
    tsv_columns: dict[str, str] = field(default_factory=dict)  # our column -> its name in TSV files, where it differs
    tsv_headerless: list[str] = field(default_factory=list)  # splits whose TSV has no first line with names ...
    tsv_names: list[str] = field(default_factory=list)  # ... and the names of its columns
    rows: dict[str, int] = field(default_factory=dict)  # split -> known number of rows; others give a warning
    # --- the leaderboard
    submission: dict[str, str] = field(default_factory=dict)  # test split -> file name without .tsv
    submit_names: bool = False  # class names in the submission instead of ids
    diagnostic: str | None = None  # a task without training data that this one's model predicts too, with --test

    @property
    def num_labels(self) -> int:
        """Outputs of the head."""
        return 1 if self.labels is None else len(self.labels)


_BINARY = ["0", "1"]
_ENTAILMENT = ["entailment", "not_entailment"]
_NLI = ["entailment", "neutral", "contradiction"]
_PAIR = ["sentence1", "sentence2"]

# Sizes: https://huggingface.co/datasets/nyu-mll/glue. Scores are those of the paper's code, MRPC's its F1; averages in
# other conventions are in bert.glue.metrics.AVERAGES.
TASKS: dict[str, Task] = {
    "mnli": Task(
        text=["premise", "hypothesis"],
        labels=_NLI,
        metrics=["accuracy"],
        validation=["validation_matched", "validation_mismatched"],
        test=["test_matched", "test_mismatched"],
        folder="MNLI",
        tsv_columns={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
        rows={
            "train": 392_702,
            "validation_matched": 9_815,
            "validation_mismatched": 9_832,
            "test_matched": 9_796,
            "test_mismatched": 9_847,
        },
        submission={"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm"},
        submit_names=True,
        diagnostic="ax",
    ),
    "qqp": Task(
        text=["question1", "question2"],
        labels=_BINARY,
        metrics=["accuracy", "f1"],
        folder="QQP",
        tsv_columns={"label": "is_duplicate"},
        rows={"train": 363_846, "validation": 40_430, "test": 390_965},
        submission={"test": "QQP"},
    ),
    "qnli": Task(
        text=["question", "sentence"],
        labels=_ENTAILMENT,
        metrics=["accuracy"],
        folder="QNLI",
        rows={"train": 104_743, "validation": 5_463, "test": 5_463},
        submission={"test": "QNLI"},
        submit_names=True,
    ),
    "sst2": Task(
        text=["sentence"],
        labels=_BINARY,
        metrics=["accuracy"],
        folder="SST-2",
        rows={"train": 67_349, "validation": 872, "test": 1_821},
        submission={"test": "SST-2"},
    ),
    "cola": Task(
        text=["sentence"],
        labels=_BINARY,
        metrics=["matthews"],
        folder="CoLA",
        tsv_headerless=["train", "validation"],
        tsv_names=["source", "label", "judgement", "sentence"],
        rows={"train": 8_551, "validation": 1_043, "test": 1_063},
        submission={"test": "CoLA"},
    ),
    "stsb": Task(
        text=_PAIR,
        label_range=[0.0, 5.0],
        metrics=["spearman", "pearson"],
        score=["spearman"],
        folder="STS-B",
        tsv_columns={"label": "score"},
        rows={"train": 5_749, "validation": 1_500, "test": 1_379},
        submission={"test": "STS-B"},
    ),
    "mrpc": Task(
        text=_PAIR,
        labels=_BINARY,
        metrics=["f1", "accuracy"],
        score=["f1"],
        folder="MRPC",
        tsv_columns={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
        rows={"train": 3_668, "validation": 408, "test": 1_725},
        submission={"test": "MRPC"},
    ),
    "rte": Task(
        text=_PAIR,
        labels=_ENTAILMENT,
        metrics=["accuracy"],
        folder="RTE",
        rows={"train": 2_490, "validation": 277, "test": 3_000},
        submission={"test": "RTE"},
        submit_names=True,
    ),
    "wnli": Task(
        text=_PAIR,
        labels=_BINARY,
        metrics=["accuracy"],
        folder="WNLI",
        rows={"train": 635, "validation": 71, "test": 146},
        submission={"test": "WNLI"},
    ),
    "ax": Task(
        text=["premise", "hypothesis"],
        labels=_NLI,
        train="",
        validation=[],
        folder="diagnostic",
        files={"test": "diagnostic.tsv"},
        tsv_columns={"premise": "sentence1", "hypothesis": "sentence2"},
        rows={"test": 1_104},
        submission={"test": "AX"},
        submit_names=True,
    ),
}
