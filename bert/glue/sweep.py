"""The sweep: from a YAML to jobs, each in a process of its own on a device from a pool, and to their tables."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import inspect
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from rich.console import Console
from rich.logging import RichHandler

from bert.errors import DataError, RecipeError
from bert.glue import job as jobs
from bert.glue import report
from bert.glue.data import HUB, Place, hub_commit, locate, read_rows
from bert.glue.job import JobSpec
from bert.glue.model import Start, check_fits
from bert.glue.results import Results
from bert.glue.schema import RECIPE_FOLDER, GlueConfig, Settings, check_config, load_config
from bert.glue.state import BLOCKED, DONE, ELSEWHERE, FAILED, OPEN, QUEUED, RUNNING, WAITING, Job, best_job
from bert.glue.tasks import TASKS, Task
from bert.glue.view import View
from bert.processes import signals_as_interrupts, visible_gpus
from bert.text_tables import Rows, print_table

log = logging.getLogger(__name__)

USAGE = """usage: python glue.py RECIPE.yaml [--test] [key=value ...]

Fine-tunes on the recipe's tasks, seeds and grid, for example:
  python glue.py yamls/finetune-glue/m2-base.yaml checkpoint=runs/m2-base
  python glue.py yamls/finetune-glue/m2-base.yaml checkpoint=runs/m2-base data=glue_data only=[cola,sst2]
  ... 'grid={optimizer.lr: [3e-5, 5e-5], epochs: [3, 10]}' num_slots=8

The same command again does what is missing. Results and tables are in runs/glue/RUN_NAME. --test also predicts the test
splits and writes the leaderboard's files. It keeps each job's model, and so predicts without training again; jobs that
were done without it have kept none (but those that others start from) and are trained again. The exit code is 0 where
every job is done, 1 where one failed, 2 for a mistake in the recipe, 130 after Ctrl-C. A task's own section goes before
the settings at the top, so change them there: tasks.rte.epochs=2. These are the keys:
"""

INTERRUPTED = 130  # exit code
CHECKED_ROWS = 100  # of each split before any job: a wrong column or label is one message
# What of a task's row and of its settings a job's key follows from, the content of its data aside.
ROW_KEYS = (
    *("text", "label", "labels", "label_range", "metrics", "score", "train", "validation"),
    *("tsv_columns", "tsv_headerless", "tsv_names"),
)
NO_NUMBERS = ("loggers", "seeds", "grid", "start_from")
_POLL_SECONDS = 0.5
_ELSEWHERE_SECONDS = 2.0  # between two looks at a job that another sweep runs
_PATIENCE = 10.0  # seconds that a job has to end after SIGTERM


def main(argv: Sequence[str]) -> int:
    """Run the command line `RECIPE.yaml [--test] [key=value ...]` and return the exit code (see USAGE)."""
    if any(argument in ("-h", "--help") for argument in argv):
        print(USAGE, inspect.getsource(Settings), inspect.getsource(GlueConfig), inspect.getsource(Task), sep="\n")  # noqa: T201
        print("The table of tasks:", ", ".join(TASKS))  # noqa: T201
        return 0
    try:
        words = [argument for argument in argv if argument != "--test"]
        recipes = [word for word in words if "=" not in word and not word.startswith("-")]
        if len(recipes) != 1:
            found = ", ".join(str(path) for path in sorted(RECIPE_FOLDER.glob("*.yaml")))
            raise RecipeError(f"give one recipe, not {len(recipes)}, and key=value overrides; recipes here: {found}")
        config = load_config(recipes[0], [word for word in words if word != recipes[0]])
        config = dataclasses.replace(config, test=config.test or "--test" in argv)
        return run(config, ["glue.py", *argv])
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2


def run(config: GlueConfig, command: Sequence[str]) -> int:
    """Run a sweep to its end, or to an interruption, and write its tables.

    Args:
        config: the sweep.
        command: the command line that started it, for the record.

    Raises:
        RecipeError: a mistake that can be found before the first job starts.
    """
    console = Console(stderr=True)
    if console.is_terminal:  # lines of the log go above the live table
        logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])
    else:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("bert").setLevel(config.python_log_level.upper())
    threads = torch.get_num_threads()
    # Jobs are forks of this process. One that had started threads for its arithmetic would leave them broken ones.
    torch.set_num_threads(1)
    try:
        sweep = Sweep(config, threads)
        if config.dry_run:
            print_table(sweep.preview())
            return 0
        interrupted = sweep.work(console)
    finally:
        torch.set_num_threads(threads)
    summary = report.summarise(config, sweep.jobs, command)
    report.write(sweep.folder, config, summary, sweep.jobs)
    if interrupted:
        print(f"interrupted: {sweep.folder} keeps what is done; the same command does the rest", file=sys.stderr)  # noqa: T201
        return INTERRUPTED
    return 0 if all(job.state == DONE for job in sweep.jobs) else 1


def _check_beginning(place: Place, task: Task) -> None:
    """Raise DataError where the first rows of a file cannot be read; Hub data is not fetched for it."""
    if place.file is not None:
        read_rows(place, task, first=CHECKED_ROWS)


class Sweep:
    """The jobs of a configuration, and their processes.

    Args:
        config: of the sweep.
        threads: CPU threads that the jobs share, where the configuration does not say how many each has.

    Raises:
        RecipeError: a mistake in the configuration, the data's place or the checkpoint.
    """

    def __init__(self, config: GlueConfig, threads: int) -> None:
        self.config = config
        self.plans = check_config(config)
        if dist.get_world_size() > 1:
            raise RecipeError("start glue.py with python, not with a launcher: it gives each job a device itself")
        self.folder = Path(config.folder.replace("{run_name}", config.run_name))
        self.gpus = _gpus(config.device)
        self.device = "gpu" if self.gpus else "cpu"  # said to each job, so that none falls back to the CPU by itself
        self.num_slots = config.num_slots or max(1, len(self.gpus))
        self.threads = config.threads or max(1, threads // self.num_slots)
        self.start = Start(
            config.model.name, dict(config.model.config), config.checkpoint, trust_remote_code=config.trust_remote_code
        )
        self.tokenizer_name = self.start.tokenizer_name(config.tokenizer_name)
        self.tokenizer_id = self._check_model()
        self.revisions = self._revisions()
        self._identities, self._predictions = self._check_data()
        self._start_identity = self.start.identity()
        self.results = Results(self.folder)
        self.jobs = [
            Job(plan, point, seed) for plan in self.plans for point in range(len(plan.points)) for seed in plan.seeds
        ]

    def _check_model(self) -> str:
        pools = {(settings.pooling, plan.task.num_labels) for plan in self.plans for _, settings in plan.points}
        tokenizer_id = ""
        # One build a pooling: what does not fit, fits in no job.
        for pooling, num_labels in dict(sorted(pools)).items():
            if self.start.kind() == "random":
                with torch.device("meta"):
                    model = self.start.build(num_labels, pooling)
            else:
                model = self.start.build(num_labels, pooling)
            tokenizer_id = check_fits(model, self.config.max_seq_len, self.config.padding, self.tokenizer_name)
        return tokenizer_id

    def _revisions(self) -> dict[str, str | None]:
        sources = {self.config.data, *(plan.task.source or self.config.data for plan in self.plans)}
        names = sorted(source.removeprefix(HUB) for source in sources if source.startswith(HUB))
        return {name: hub_commit(name, self.config.hub_revision) for name in names}

    def _check_data(self) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
        """What each task's splits are, and what each task's model is to predict."""
        config, identities = self.config, {}
        predictions: dict[str, list[dict[str, Any]]] = {}
        for plan in self.plans:
            task = plan.task
            splits = [task.train, *task.validation]
            places = {name: locate(plan.name, task, name, config.data, self.revisions) for name in splits}
            for place in places.values():
                _check_beginning(place, task)
            identities[plan.name] = {name: place.identity() for name, place in places.items()}
            predictions[plan.name] = []
            if config.test:
                predictions[plan.name] += [self._predicted(plan.name, task, split) for split in task.test]
            if config.test and task.diagnostic is not None:
                row = TASKS[task.diagnostic]
                try:
                    predictions[plan.name] += [self._predicted(task.diagnostic, row, split) for split in row.test]
                except DataError as error:
                    log.warning("no predictions for %s: %s", task.diagnostic, error)
        return identities, predictions

    def _predicted(self, name: str, task: Task, split: str) -> dict[str, Any]:
        place = locate(name, task, split, self.config.data, self.revisions)
        _check_beginning(place, task)
        return {
            "task": name,
            "split": split,
            "file": task.submission.get(split, f"{name}-{split}"),
            "names": task.submit_names,
            "data": place.identity(),
        }

    # --- what a job is

    def _specify(self, job: Job, start: Job | None) -> JobSpec:
        """The specification of a job; `start` is the job whose model it starts from."""
        config, plan = self.config, job.plan
        point, settings = plan.points[job.point]
        start_key = None
        weights: Any = self._start_identity
        begin = self.start
        if start is not None:
            assert start.spec is not None
            start_key = start.spec.key
            weights = {"job": start_key}
            begin = dataclasses.replace(begin, checkpoint=str(start.spec.folder / jobs.FILES[jobs.MODEL]))
        task = dataclasses.asdict(plan.task)
        numbers = {key: value for key, value in dataclasses.asdict(settings).items() if key not in NO_NUMBERS}
        identity = {
            "task": plan.name,
            "row": {key: task[key] for key in ROW_KEYS},
            "data": self._identities[plan.name],
            "tokenizer": self.tokenizer_id,
            "max_seq_len": config.max_seq_len,
            "padding": config.padding,
            "start": weights,
            "settings": numbers,
            "device": self.device,
            "kernels": config.kernels,
            "cuda_graphs": config.cuda_graphs,
            "deterministic": config.deterministic,
            "seed": job.seed,
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        outputs = [jobs.MODEL] if plan.is_start or config.test else []
        return JobSpec(
            key=key,
            sweep_folder=str(self.folder),
            task_name=plan.name,
            task=plan.task,
            seed=job.seed,
            point=point,
            settings=settings,
            start=begin,
            start_key=start_key,
            start_identity=self._start_identity,
            data=config.data,
            revisions=self.revisions,
            data_identity=self._identities[plan.name],
            predictions=self._predictions[plan.name],
            tokenizer_name=self.tokenizer_name,
            tokenizer_id=self.tokenizer_id,
            max_seq_len=config.max_seq_len,
            padding=config.padding,
            cache=config.cache,
            device=self.device,
            threads=self.threads,
            kernels=config.kernels,
            cuda_graphs=config.cuda_graphs,
            deterministic=config.deterministic,
            python_log_level=config.python_log_level,
            outputs=outputs + ([jobs.TEST] if config.test else []),
        )

    def _release(self) -> None:
        """Specify the jobs whose starting model is known by now, and take up what is already done."""
        done = self.results.read()
        for job in self.jobs:
            if job.state != WAITING:
                continue
            start = None
            if job.plan.start_from is not None:
                others = [other for other in self.jobs if other.plan.name == job.plan.start_from]
                if any(other.state in OPEN for other in others):
                    continue
                start = best_job(others)
                if start is None:
                    job.state, job.reason = (
                        BLOCKED,
                        f"no job of {job.plan.start_from}, which it starts from, was finished",
                    )
                    continue
            job.spec = self._specify(job, start)
            result = done.get(job.spec.key)
            if jobs.is_done(result, job.spec):
                job.state, job.result = DONE, result
            else:
                job.state = QUEUED

    def preview(self) -> Rows:
        """A header, and a line a job: whether it is done, is to be run, or waits for the task that it starts from."""
        self._release()
        return [["job", "state"], *([job.name, job.state] for job in self.jobs)]

    # --- the processes

    def work(self, console: Console) -> bool:
        """Run all jobs; return whether a signal stopped it."""
        with View(self.jobs, console) as view, signals_as_interrupts():
            try:
                self._release()
                log.info("%d jobs in %s, %d at a time", len(self.jobs), self.folder, self.num_slots)
                while any(job.state in OPEN for job in self.jobs):
                    self._start_jobs()
                    running = [job.process.sentinel for job in self.jobs if job.process is not None]
                    if running:
                        wait(running, timeout=_POLL_SECONDS)
                    else:
                        time.sleep(_POLL_SECONDS)
                    for job in self.jobs:
                        if job.process is not None and job.process.exitcode is not None:
                            self._finish(job)
                    self._release()
                    view.refresh()
            except KeyboardInterrupt:
                return True
            finally:
                self._stop_all()
        return False

    def _start_jobs(self) -> None:
        taken = {job.slot for job in self.jobs if job.process is not None}
        free = [slot for slot in range(self.num_slots) if slot not in taken]
        now = time.monotonic()
        for job in self.jobs:
            if free and job.state in (QUEUED, ELSEWHERE) and job.not_before <= now:
                assert job.spec is not None
                job.slot = free.pop(0)
                job.spec.save()
                gpu = self.gpus[job.slot % len(self.gpus)] if self.gpus else None
                # Forked, a job need not import anything again, which would take longer than a small task.
                context = multiprocessing.get_context("fork")
                job.process = context.Process(target=_job_process, args=(job.spec, gpu, os.getpid()), daemon=False)
                job.process.start()
                job.state = RUNNING

    def _finish(self, job: Job) -> None:
        assert job.process is not None and job.spec is not None
        code = job.process.exitcode
        job.process.close()
        job.process, job.slot = None, None
        if code == jobs.BUSY:
            job.state, job.not_before = ELSEWHERE, time.monotonic() + _ELSEWHERE_SECONDS
            return
        result = self.results.read().get(job.spec.key)
        if jobs.is_done(result, job.spec):
            job.state, job.result = DONE, result
            return
        job.attempts += 1
        job.reason = _reason(job.spec, code)
        final = code in (jobs.REFUSED, jobs.DIVERGED) or job.attempts > self.config.retries
        job.state = FAILED if final else QUEUED
        log.log(
            logging.ERROR if final else logging.WARNING, "%s: %s%s", job.name, job.reason, "" if final else "; again"
        )

    def _stop_all(self) -> None:
        processes = [job.process for job in self.jobs if job.process is not None]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + _PATIENCE
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
        for job in self.jobs:
            if job.process is not None:
                job.process, job.slot, job.state = None, None, QUEUED


def _gpus(device: str | None) -> list[str]:
    """The GPUs of the `device` key, as `visible_gpus` names them; empty for the CPU."""
    gpus = [] if device == "cpu" else visible_gpus()
    if device == "gpu" and not gpus:
        raise RecipeError("device=gpu, but torch sees no CUDA device: use device=cpu, or install a CUDA build of torch")
    return gpus


def _reason(spec: JobSpec, code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    try:
        reason = json.loads((spec.folder / jobs.FAILURE).read_text(encoding="utf-8"))["reason"]
    except FileNotFoundError:
        return f"ended with exit code {code}; its log: {spec.folder / 'log.txt'}"
    return str(reason)


def _job_process(spec: JobSpec, gpu: str | None, parent: int) -> None:
    """What a forked process does: cut its ties, take its device, run the job."""
    os.setsid()  # Ctrl-C in the terminal is for the sweep, which then stops its jobs
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with(parent)
    spec.folder.mkdir(parents=True, exist_ok=True)
    (spec.folder / jobs.FAILURE).unlink(missing_ok=True)  # an earlier attempt's reason is not this one's
    sys.stdout = sys.stderr = (spec.folder / "log.txt").open("a", encoding="utf-8", buffering=1)
    for stream in (1, 2):
        os.dup2(sys.stdout.fileno(), stream)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        if torch.cuda._is_in_bad_fork():
            # Something in the sweep's process has touched CUDA, so that no fork of it can: start anew.
            os.environ["OMP_NUM_THREADS"] = str(spec.threads)
            os.execv(sys.executable, [sys.executable, "-m", "bert.glue.job", str(spec.folder / "job.json")])
    code = jobs.run(spec)
    logging.shutdown()
    os._exit(code)  # nothing of the sweep's own is to be wound up here


def _die_with(parent: int) -> None:
    """Have Linux kill this process when the sweep dies, even of SIGKILL: no job outlives the sweep that reads it."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os._exit(1)
