"""One job: fine-tune a classifier on a task, evaluate it, and put down the result. Runs in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Callback, Evaluator, Event, State, TimeUnit
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, reproducibility
from filelock import FileLock, Timeout

from bert.data.tokenizer import load_tokenizer
from bert.errors import CheckpointError, RecipeError
from bert.files import write_json
from bert.glue.data import EncodedSplit, count_warnings, in_file_order, load_split, loader, locate
from bert.glue.graphs import TrainingGraphs, graphs_apply
from bert.glue.metrics import metric_key
from bert.glue.model import SequenceClassifier, Start, load_finetuned, save_finetuned
from bert.glue.results import Results
from bert.glue.schema import Settings
from bert.glue.tasks import TASKS, Task
from bert.provenance import device_name, processor, versions
from bert.recipe import builders
from bert.recipe.callbacks import TrainingDivergedError
from bert.recipe.train import precision_on, training_device
from bert.recipe.trainer import Trainer
from monarch_mixer.kernels import use_kernels

log = logging.getLogger(__name__)

DONE, CRASHED, REFUSED, DIVERGED, BUSY = 0, 1, 2, 3, 75  # exit codes; BUSY: another process runs this job
MODEL, TEST = "model", "test"  # what a job leaves on demand, and the names of their files
FAILURE = "failure.json"  # the reason of a failed attempt
FILES = {MODEL: "model.pt", TEST: "test.json"}


@dataclass(frozen=True)
class JobSpec:
    """All that a job's process needs to know."""

    key: str  # hash of what defines the job
    sweep_folder: str
    task_name: str
    task: Task
    seed: int
    point: dict[str, Any]  # what the grid sets
    settings: Settings
    start: Start
    start_key: str | None  # the job whose model `start` is; None: the sweep's checkpoint
    start_identity: Any  # of the sweep's checkpoint, as `Start.identity` gave it when the key was made
    data: str
    revisions: dict[str, str | None]  # of Hub data sets, by name
    data_identity: dict[str, Any]  # of each split, as `Place.identity` gave it when the key was made
    predictions: list[dict[str, Any]]  # what to predict: task, split, file, names, and the identity of its data
    tokenizer_name: str
    tokenizer_id: str
    max_seq_len: int
    padding: str
    cache: str
    device: str | None
    threads: int
    kernels: bool
    cuda_graphs: bool
    deterministic: bool
    python_log_level: str
    outputs: list[str]  # of MODEL and TEST: what to leave besides the result

    @property
    def folder(self) -> Path:
        """The job's own folder."""
        return job_folder(self.sweep_folder, self.key)

    def save(self) -> Path:
        """Write the specification into the job's folder and return its path."""
        path = self.folder / "job.json"
        write_json(path, dataclasses.asdict(self), shared=True)
        return path

    @classmethod
    def load(cls, path: Path) -> JobSpec:
        """Read a specification."""
        values = json.loads(path.read_text(encoding="utf-8"))
        values["task"], values["settings"] = Task(**values["task"]), Settings(**values["settings"])
        return cls(**{**values, "start": Start(**values["start"])})


def job_folder(sweep_folder: str | Path, key: str) -> Path:
    """The folder of a job."""
    return Path(sweep_folder) / "jobs" / key


def run(spec: JobSpec) -> int:
    """Run a job, unless another process runs it or has finished it, and return the exit code.

    The reason of a failure goes to failure.json in the job's folder.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("bert").setLevel(spec.python_log_level.upper())
    results = Results(spec.sweep_folder)
    spec.folder.mkdir(parents=True, exist_ok=True)
    failure = spec.folder / FAILURE
    try:
        # The operating system takes the lock away from a process that dies, however it dies.
        with FileLock(spec.folder / "lock", timeout=0):
            result = results.read().get(spec.key)
            if is_done(result, spec):
                return DONE
            for left in (failure, spec.folder / "progress.json"):
                left.unlink(missing_ok=True)
            try:
                with use_kernels(spec.kernels):
                    if not _is_trained(result, spec):
                        for name in FILES.values():
                            (spec.folder / name).unlink(missing_ok=True)
                        results.append(train(spec))
                    if TEST in spec.outputs:
                        predict(spec)
                return DONE
            except RecipeError as error:
                code, reason = REFUSED, str(error)
            except TrainingDivergedError as error:
                code, reason = DIVERGED, str(error)
            except Exception as error:  # whatever it is, the sweep goes on and reports it
                code, reason = CRASHED, f"{type(error).__name__}: {error}"
                log.exception("the job failed")
            log.error("%s", reason)
            write_json(failure, {"reason": reason}, shared=True)
            return code
    except Timeout:
        return BUSY


def is_done(result: Mapping[str, Any] | None, spec: JobSpec) -> bool:
    """Say whether a result is there with everything that is wanted of the job."""
    return _is_trained(result, spec) and (TEST not in spec.outputs or _is_predicted(spec))


def _is_trained(result: Mapping[str, Any] | None, spec: JobSpec) -> bool:
    return result is not None and (MODEL not in spec.outputs or (spec.folder / FILES[MODEL]).is_file())


def _is_predicted(spec: JobSpec) -> bool:
    try:
        content = json.loads((spec.folder / FILES[TEST]).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # ValueError: torn by a power cut
        return False
    return content["made_from"] == spec.predictions


class JobProgress(Callback):
    """Say in progress.json, once a second at most, how far the job is, and time its parts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.train_seconds, self.eval_seconds = 0.0, 0.0
        self.first_batch: tuple[float, int] | None = None
        self.last_batch: tuple[float, int] = (0.0, 0)
        self._written = 0.0
        self._since = 0.0
        self._in_fit = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Training begins."""
        self._in_fit = time.perf_counter()
        self._write(state, force=True)

    def batch_end(self, state: State, logger: Logger) -> None:
        """A step is over; its loss is on the host, so that the device is done with it too."""
        now = (time.perf_counter() - self.eval_seconds, state.timestamp.sample.value)
        self.first_batch, self.last_batch = self.first_batch or now, now
        self._write(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Training is over."""
        self.train_seconds = time.perf_counter() - self._in_fit - self.eval_seconds

    def eval_start(self, state: State, logger: Logger) -> None:
        """An evaluation begins."""
        self._since = time.perf_counter()

    def eval_end(self, state: State, logger: Logger) -> None:
        """An evaluation is over."""
        self.eval_seconds += time.perf_counter() - self._since

    def samples_per_second(self) -> float | None:
        """Of training, from the end of the first step on, which also pays for what is made once; None for one step."""
        if self.first_batch is None or self.last_batch[0] <= self.first_batch[0]:
            return None
        seconds, samples = (last - first for last, first in zip(self.last_batch, self.first_batch, strict=True))
        return samples / seconds

    def _write(self, state: State, force: bool = False) -> None:
        now = time.perf_counter()
        if not force and now - self._written < 1.0:
            return
        self._written = now
        step, steps = state.timestamp.batch.value, _total_steps(state)
        metric = {name: float(value.compute()) for name, value in _last_metrics(state).items()}
        write_json(
            self.path,
            {
                "step": step,
                "steps": steps,
                "seconds_left": (now - self._in_fit) * (steps / step - 1) if steps and step else None,
                "loss": (state.total_loss_dict or {}).get("loss/train/total"),
                "metric": metric,
            },
        )


def _total_steps(state: State) -> int | None:
    """Optimizer steps of the whole run; None where only the data could say."""
    duration = state.max_duration
    if duration is None or state.dataloader_len is None:
        return None
    if duration.unit == TimeUnit.EPOCH:
        return duration.value * int(state.dataloader_len)
    return duration.value if duration.unit == TimeUnit.BATCH else None


def _last_metrics(state: State) -> dict[str, Any]:
    if state.eval_timestamp.batch.value == 0:
        return {}
    return next(iter(state.eval_metrics.values()), {})


def train(spec: JobSpec) -> dict[str, Any]:
    """Train and evaluate as a specification says, and save the model where that is wanted.

    Returns:
        The result, as it is kept in results.jsonl.

    Raises:
        RecipeError: the data or the checkpoint do not fit.
        TrainingDivergedError: the loss or a metric is not finite.
    """
    started = time.perf_counter()
    torch.set_num_threads(spec.threads)
    settings, task = spec.settings, spec.task
    device = training_device(spec.device)
    reproducibility.seed_all(spec.seed)
    data = _Data(spec)
    train_split = data.load(task.train)
    evaluated = {split: data.load(split) for split in task.validation}
    if TEST in spec.outputs:  # what is wrong with them is better known before the training
        for prediction in spec.predictions:
            data.load_test(prediction)
    model = spec.start.build(task.num_labels, settings.pooling)
    if spec.start_key is None and spec.start.identity() != spec.start_identity:
        raise CheckpointError(
            f"checkpoint: {spec.start.checkpoint} has changed since the sweep was started: start it again"
        )
    model.metric_names = list(task.metrics)
    if spec.cuda_graphs and device.name == "gpu" and graphs_apply(model.model, settings):
        model.training_pass = TrainingGraphs(model.model, model.inputs)
    progress = JobProgress(spec.folder / "progress.json")
    train_data, _ = data.batches(model, train_split, settings.batch_size, train=True)
    evaluators = [
        Evaluator(
            label=split,
            dataloader=data.batches(model, encoded, settings.eval_batch_size)[0],
            device_eval_microbatch_size=settings.eval_batch_size,
        )
        for split, encoded in evaluated.items()
    ]
    trainer = Trainer(
        model=model,
        train_dataloader=train_data,
        max_duration=settings.max_duration or f"{settings.epochs}ep",
        optimizers=builders.build_optimizer(settings, model),
        schedulers=builders.build_scheduler(settings),
        algorithms=builders.build_algorithms(settings),
        callbacks=[
            *builders.build_callbacks(settings, {"loss_curve": {"path": str(spec.folder / "loss.png")}}),
            progress,
        ],
        loggers=builders.build_loggers(
            settings,
            {
                "jsonl": {"path": str(spec.folder / "metrics.jsonl")},
                "file": {"filename": str(spec.folder / "composer.txt"), "overwrite": True},
                "tensorboard": {"log_dir": str(spec.folder / "tensorboard")},
            },
        ),
        seed=spec.seed,
        run_name=f"{spec.task_name}-{spec.key}",
        device=device,
        precision=precision_on(device, settings.precision),
        device_train_microbatch_size=min(settings.microbatch_size or settings.batch_size, settings.batch_size),
        compile_config=builders.compile_arguments(settings),
        deterministic_mode=spec.deterministic,
        progress_bar=False,
        python_log_level="warning" if spec.python_log_level == "info" else spec.python_log_level,
        **_evaluation_while_training(settings, evaluators),
    )
    try:
        set_up = time.perf_counter() - started
        trainer.fit()
        fit_eval_seconds, progress.eval_seconds = progress.eval_seconds, 0.0
        trainer.eval(eval_dataloader=evaluators)
        metrics = {
            metric_key(name, split, task.validation): float(metric.compute())
            for split in evaluated
            for name, metric in trainer.state.eval_metrics[split].items()
        }
        _check_finite(metrics, trainer)
        if MODEL in spec.outputs:
            temporary = spec.folder / f".{FILES[MODEL]}.tmp"
            about = {"key": spec.key, "task": spec.task_name, "labels": task.labels, "metrics": metrics}
            save_finetuned(temporary, model, spec.start, about)
            os.replace(temporary, spec.folder / FILES[MODEL])
        steps = trainer.state.timestamp.batch.value
    finally:
        trainer.close()
    total = time.perf_counter() - started
    scored = [
        metric_key(name, split, task.validation) for name in task.score or task.metrics for split in task.validation
    ]
    rows = sum(len(split) for split in evaluated.values())
    return {
        "key": spec.key,
        "task": spec.task_name,
        "seed": spec.seed,
        "point": spec.point,
        "score": sum(metrics[name] for name in scored) / len(scored),
        "metrics": metrics,
        "start_key": spec.start_key,
        "steps": steps,
        "train_rows": len(train_split),
        "warnings": [
            warning
            for split, rows in {task.train: train_split, **evaluated}.items()
            for warning in count_warnings(task, split, len(rows))
        ],
        "samples_per_second": {
            "train": progress.samples_per_second(),
            "eval": rows / progress.eval_seconds if progress.eval_seconds else None,
        },
        "seconds": {
            "total": total,
            "before_training": set_up,
            "training": progress.train_seconds,
            "evaluation": fit_eval_seconds + progress.eval_seconds,
        },
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "device": device_name() if device.name == "gpu" else processor(),
        "versions": versions(),
    }


def _evaluation_while_training(settings: Settings, evaluators: list[Evaluator]) -> dict[str, Any]:
    if settings.eval_interval is None:
        return {}
    # The evaluation at the end is the job's own.
    due = create_interval_scheduler(settings.eval_interval, include_end_of_training=False)

    def evaluate_now(state: State, event: Event) -> bool:
        return due(state, event)

    return {"eval_dataloader": evaluators, "eval_interval": evaluate_now}


def _check_finite(metrics: Mapping[str, float], trainer: Trainer) -> None:
    bad = [name for name, parameter in trainer.state.model.named_parameters() if not parameter.isfinite().all()]
    if bad:
        raise TrainingDivergedError(f"the weights are not finite after training (the first: {bad[0]}); lower the rate")
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainingDivergedError(f"{name} is {value}; a lower learning rate or a longer warm-up may help")


class _Data:
    """The splits of a job, as its model wants them."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.tokenizer = load_tokenizer(spec.tokenizer_name)

    def load(self, split: str) -> EncodedSplit:
        """A split to train on or to evaluate."""
        return self._load(self.spec.task_name, self.spec.task, split, self.spec.data_identity[split])

    def load_test(self, prediction: Mapping[str, Any]) -> EncodedSplit:
        """The split of one of the specification's predictions."""
        row = _predicted_task(self.spec, prediction)
        return self._load(prediction["task"], row, prediction["split"], prediction["data"])

    def _load(self, name: str, task: Task, split: str, identity: Mapping[str, Any]) -> EncodedSplit:
        spec = self.spec
        place = locate(name, task, split, spec.data, spec.revisions)
        return load_split(place, task, self.tokenizer, spec.tokenizer_id, spec.max_seq_len, Path(spec.cache), identity)

    def batches(self, model: SequenceClassifier, split: EncodedSplit, batch_size: int, *, train: bool = False) -> Any:
        dynamic = model.fixed_length is None and self.spec.padding != "fixed"
        shuffle = train and self.spec.settings.shuffle
        return loader(
            split,
            batch_size,
            pad_id=self.tokenizer.pad_token_id,
            fixed_length=None if dynamic else self.spec.max_seq_len,
            shuffle=shuffle,
            sort=shuffle or not train,
            seed=self.spec.seed,
        )


def predict(spec: JobSpec) -> None:
    """Predict the test splits with the job's saved model, and write that down with what it was made from.

    Raises:
        RecipeError: a split is not what it was when the sweep was started.
    """
    torch.set_num_threads(spec.threads)
    device = training_device(spec.device)
    data = _Data(spec)
    model = load_finetuned(spec.folder / FILES[MODEL], spec.start, spec.task.num_labels, spec.settings.pooling)
    trainer = Trainer(
        model=model,
        seed=spec.seed,
        device=device,
        precision=precision_on(device, spec.settings.precision),
        deterministic_mode=spec.deterministic,
        progress_bar=False,
        python_log_level="warning" if spec.python_log_level == "info" else spec.python_log_level,
    )
    predictions = {}
    try:
        for wanted in spec.predictions:
            batches, order = data.batches(model, data.load_test(wanted), spec.settings.eval_batch_size)
            outputs = trainer.predict(batches, return_outputs=True)
            values = in_file_order([np.asarray(batch.float().cpu()) for batch in outputs], order)
            predictions[wanted["file"]] = [_prediction(row, spec.task, wanted["names"]) for row in values]
    finally:
        trainer.close()
    write_json(spec.folder / FILES[TEST], {"made_from": spec.predictions, "predictions": predictions}, shared=True)


def _predicted_task(spec: JobSpec, prediction: Mapping[str, Any]) -> Task:
    return spec.task if prediction["task"] == spec.task_name else TASKS[prediction["task"]]


def _prediction(outputs: np.ndarray, task: Task, names: bool) -> Any:
    if task.labels is None:
        low, high = task.label_range or (-math.inf, math.inf)
        return round(min(max(float(outputs[0]), low), high), 3)
    index = int(outputs.argmax())
    return task.labels[index] if names else index


def main(argv: Sequence[str]) -> int:
    """Run the job of a job.json: what a sweep's process becomes where a forked one cannot use its GPU."""
    return run(JobSpec.load(Path(argv[0])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
