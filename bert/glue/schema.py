"""What a fine-tuning YAML says: one dataclass field a key."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from bert.errors import RecipeError, nearest
from bert.glue.metrics import FOR_REGRESSION, METRICS
from bert.glue.tasks import TASKS, Task
from bert.recipe import builders
from bert.recipe.callbacks import flat
from bert.recipe.schema import check_keys, load_dataclass, to_dataclass

RECIPE_FOLDER = Path("yamls/finetune-glue")
POOLING = ("first", "mean")
PADDING = ("auto", "fixed", "dynamic")
PROTOCOLS = ("default", "paper")


@dataclass
class ClassifierConfig:
    """Which model, and its own settings."""

    name: str | None = None  # m2_bert, attention_bert or hf_bert; null: the checkpoint's
    config: dict[str, Any] = field(default_factory=dict)  # fields of its configuration, on top of the checkpoint's


@dataclass
class Settings:
    """How a task is trained. At the top of a YAML for all tasks; a task's own section changes what it names."""

    seeds: list[int] = field(default_factory=lambda: [17])  # a job each: head, dropout and order of samples
    epochs: int = 3
    max_duration: str | None = None  # Composer's time (100ba, 1ep ...) instead of epochs
    batch_size: int = 32  # samples in an optimizer step
    microbatch_size: int | None = None  # samples in a forward pass; null: the whole batch
    eval_batch_size: int = 128
    shuffle: bool = True  # a new order of the training samples each epoch, by the seed; false: the file's own order
    pooling: str = "first"  # what the classifier sees: the first token or the mean of all (M2 and attention BERT)
    optimizer: dict[str, Any] = MISSING  # name, and the arguments of what it names, as in pretraining
    scheduler: dict[str, Any] = MISSING
    algorithms: dict[str, Any] = field(default_factory=dict)  # name -> arguments; null switches an inherited one off
    callbacks: dict[str, Any] = field(default_factory=dict)
    loggers: dict[str, Any] = field(default_factory=dict)  # files go to the job's folder
    precision: str = "amp_bf16"  # fp32, amp_bf16 or amp_fp16; on a CPU amp_* becomes fp32
    compile: Any = False  # true, or arguments of torch.compile
    eval_interval: str | None = None  # time between evaluations; null: one at the end, which is what counts in any case
    start_from: str | None = None  # a task of this sweep whose best model (head aside) these jobs start from
    grid: dict[str, Any] = field(default_factory=dict)  # key of this section -> values: a job each combination


@dataclass
class GlueConfig(Settings):
    """A sweep: tasks x grid points x seeds, each a job in a process of its own."""

    run_name: str = MISSING
    variables: dict[str, Any] = field(default_factory=dict)  # free: values for ${variables.x} elsewhere in the YAML
    protocol: str = "default"  # paper: refuse shuffling, pooling and metrics that the original code did not run

    # --- what is run
    tasks: dict[str, Any] = field(default_factory=dict)  # name -> settings of its own, {} for none, null: left out
    only: list[str] | None = None  # names of the tasks to run out of these; null: all
    test: bool = False  # also predict the test splits, and write the leaderboard's files (the same as --test)
    dry_run: bool = False  # check settings, model and the files' first rows, print the jobs and their state, and stop

    # --- data
    data: str = "hub:nyu-mll/glue"  # hub:NAME, or a folder with a sub-folder a task (TSV, CSV, JSONL or Parquet)
    hub_revision: str | None = None  # commit or tag of a Hub data set
    tokenizer_name: str | None = "bert-base-uncased"  # null: the checkpoint's own
    max_seq_len: int = 128  # longer texts are cut
    padding: str = "auto"  # fixed: to max_seq_len; dynamic: to a batch's longest; auto: dynamic but for M2 unmasked
    cache: str = "data/glue-cache"  # folder of tokenised splits, shared by jobs and sweeps

    # --- starting point
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    checkpoint: str | None = None  # a run's folder or .pt, an original M2's .pt, a Hugging Face folder or name
    trust_remote_code: bool = False  # run the Python code that a Hugging Face model brings

    # --- machine
    device: str | None = None  # cpu or gpu; null: GPUs where there are any
    num_slots: int | None = None  # jobs at a time; null: one a GPU, or one on a CPU
    threads: int | None = None  # CPU threads a job; null: OMP_NUM_THREADS or the cores, divided by the slots
    retries: int = 1  # further attempts after a crash; a mistake in the data and a diverged loss are not tried again
    kernels: bool = True  # Triton kernels where the GPU supports them; false: plain PyTorch, to compare
    cuda_graphs: bool = True  # on a GPU: replay training steps of the BERTs here; false: kernel by kernel
    deterministic: bool = False  # deterministic kernels only: slower

    # --- what is written
    folder: str = "runs/glue/{run_name}"  # jobs, results.jsonl, tables, submission
    output: str | None = None  # the results as JSON here too, for example results/glue_m2-base.json
    python_log_level: str = "info"  # debug, info, warning or error


@dataclass(frozen=True)
class TaskPlan:
    """A task of the sweep with its row of the table, and its settings at each grid point."""

    name: str
    task: Task
    seeds: list[int]
    points: list[tuple[dict[str, Any], Settings]]  # what the grid sets, and the settings with it
    is_start: bool = False  # another task of the recipe starts from this one's model, whether it is run now or not

    @property
    def start_from(self) -> str | None:
        """The task whose best model the jobs start from."""
        return self.points[0][1].start_from


# The original's pooling, in the order of its YAMLs: its `glue.py` rebinds the configuration to one with mean pooling at
# QNLI, and so uses that for every later task too.
PAPER_ORDER = ("mnli", "rte", "qqp", "qnli", "sst2", "stsb", "mrpc", "cola")
PAPER_POOLING = {
    task: "mean" if PAPER_ORDER.index(task) >= PAPER_ORDER.index("qnli") else "first" for task in PAPER_ORDER
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> GlueConfig:
    """Read a fine-tuning YAML with `key=value` overrides on top; errors as in `bert.recipe.schema.load_config`."""
    return load_dataclass(GlueConfig, path, overrides, folder=RECIPE_FOLDER)


def check_config(config: GlueConfig) -> list[TaskPlan]:
    """Check all that can be checked without data, devices or building, and resolve the tasks.

    Returns:
        The tasks in the order of the YAML, but each after the one that it starts from.

    Raises:
        RecipeError: the first mistake, with its key.
    """
    builders.check_choice("protocol", config.protocol, PROTOCOLS)
    builders.check_choice("padding", config.padding, PADDING)
    builders.check_choice("device", config.device, [None, "cpu", "gpu"])
    builders.check_choice("python_log_level", config.python_log_level, builders.LOG_LEVELS)
    if config.model.name is None:
        if config.checkpoint is None:
            raise RecipeError("give a model (model.name and model.config) or a checkpoint that brings one")
    else:
        builders.check_model_name("classifier", config.model.name)
    for key in ("max_seq_len", "num_slots", "threads"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise RecipeError(f"{key} must be at least 1, not {value}")
    if config.retries < 0:
        raise RecipeError(f"retries must not be negative, but is {config.retries}")
    chosen = {name: section for name, section in config.tasks.items() if section is not None}
    for name in config.only or []:
        if name not in chosen:
            raise RecipeError(f"only: there is no task '{name}' in `tasks`: {nearest(name, chosen)}")
    resolved = {name: _resolve(config, name, section) for name, section in chosen.items()}
    starts = {plan.start_from for plan in resolved.values()}
    plans = {
        name: dataclasses.replace(plan, is_start=name in starts)
        for name, plan in resolved.items()
        if config.only is None or name in config.only
    }
    if not plans:
        raise RecipeError("there is no task to run: name some in `tasks`")
    if config.protocol == "paper":
        _check_paper(plans)
    return _ordered(plans)


def _resolve(config: GlueConfig, name: str, section: Any) -> TaskPlan:
    where = f"tasks.{name}"
    if not isinstance(section, dict):
        raise RecipeError(f"{where} must be a section with settings, or {{}} for none, not {section!r}")
    own = {key: value for key, value in section.items() if key != "task"}
    task = _row(name, section.get("task"), where)
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(Settings)}
    points = []
    grid = {**flat(config.grid), **flat(own.get("grid") or {})}
    grid = {key: values for key, values in grid.items() if values is not None}  # null takes a dimension back
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise RecipeError(f"{where}: grid.{key} must be a list of values, not {values!r}")
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        merged = OmegaConf.merge(shared, own, *(_nested(key, value) for key, value in point.items()))
        plain: Any = OmegaConf.to_container(merged)
        plain["grid"] = {}
        check_keys(Settings, plain, f"{where}.", "the recipe")
        settings = to_dataclass(Settings, plain, where)
        _check_settings(settings, where)
        points.append((point, settings))
    first = points[0][1]
    if len(set(first.seeds)) != len(first.seeds) or not first.seeds:
        raise RecipeError(f"{where}.seeds must be different numbers, at least one, not {first.seeds}")
    return TaskPlan(name, task, first.seeds, points)


def _nested(key: str, value: Any) -> dict[str, Any]:
    if key.split(".")[0] in ("seeds", "grid", "start_from"):
        raise RecipeError(f"grid: '{key}' cannot be a dimension of the grid")
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _row(name: str, section: Any, where: str) -> Task:
    if name not in TASKS and section is None:
        raise RecipeError(
            f"{where}: '{name}' is not in the table of tasks: {nearest(name, TASKS)}. A task of your own is "
            f"described in {where}.task, for example {{text: [sentence], labels: [bad, good], metrics: [accuracy], "
            "source: folder}"
        )
    row = dataclasses.asdict(TASKS.get(name, Task()))
    row.update(section or {})
    check_keys(Task, row, f"{where}.task.", "the recipe")
    task = to_dataclass(Task, row, f"{where}.task")
    if not task.train:
        others = [other for other, row in TASKS.items() if row.diagnostic == name]
        raise RecipeError(f"{where}: has no training split; --test predicts it with the model of {' or '.join(others)}")
    if len(task.text) not in (1, 2):
        raise RecipeError(f"{where}.task.text must name one or two columns, not {task.text}")
    if task.labels is not None and len(task.labels) < 2:
        raise RecipeError(f"{where}.task.labels must name at least two classes (null: regression)")
    if not task.metrics:
        raise RecipeError(f"{where}.task.metrics must name at least one of {', '.join(METRICS)}")
    for metric in (*task.metrics, *task.score):
        builders.check_choice(f"{where}.task: metric", metric, list(METRICS))
        if (metric in FOR_REGRESSION) is not (task.labels is None) or (metric == "f1" and task.num_labels != 2):
            kind = "a regression" if task.labels is None else f"{task.num_labels} classes"
            raise RecipeError(f"{where}.task: the metric '{metric}' does not go with {kind}")
    # Its ids are read as the task's own, so its labels must be the same.
    fitting = [other for other, row in TASKS.items() if not row.train and row.labels == task.labels]
    builders.check_choice(f"{where}.task.diagnostic", task.diagnostic, [None, *fitting])
    for metric in task.score:
        builders.check_choice(f"{where}.task.score", metric, task.metrics)
    return task


def _check_settings(settings: Settings, where: str) -> None:
    try:
        builders.check_sections(settings)
        for key in ("max_duration", "eval_interval"):
            if getattr(settings, key) is not None:
                builders.check_time(key, getattr(settings, key))
        builders.check_choice("pooling", settings.pooling, POOLING)
        for key in ("epochs", "batch_size", "eval_batch_size", "microbatch_size"):
            value = getattr(settings, key)
            if value is not None and value < 1:
                raise RecipeError(f"{key} must be at least 1, not {value}")
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _check_paper(plans: dict[str, TaskPlan]) -> None:
    """Refuse settings that are not what the original ran, where its protocol is asked for."""
    for name, plan in plans.items():
        if name not in PAPER_POOLING:
            raise RecipeError(f"protocol: paper has no task '{name}', only {', '.join(PAPER_ORDER)}")
        for _, settings in plan.points:
            for key, value, original in (
                ("shuffle", settings.shuffle, False),
                ("pooling", settings.pooling, PAPER_POOLING[name]),
                ("task.metrics", plan.task.metrics, TASKS[name].metrics),
                ("task.score", plan.task.score, TASKS[name].score),
            ):
                if value != original:
                    raise RecipeError(
                        f"tasks.{name}.{key} is {value}, but the original ran {original}: drop `protocol: paper` to "
                        "depart from it"
                    )


def _ordered(plans: dict[str, TaskPlan]) -> list[TaskPlan]:
    ordered: dict[str, TaskPlan] = {}

    def add(name: str, waiting: tuple[str, ...]) -> None:
        if name in waiting:
            raise RecipeError(f"start_from goes round in a circle: {' -> '.join((*waiting, name))}")
        start = plans[name].start_from
        if start is not None and start not in plans:
            raise RecipeError(
                f"tasks.{name}.start_from: this sweep does not run '{start}' ({nearest(start, plans)}); run it too, or "
                "set start_from: null to start from the checkpoint"
            )
        if start is not None:
            add(start, (*waiting, name))
        ordered.setdefault(name, plans[name])

    for name in plans:
        add(name, ())
    return list(ordered.values())
