"""Run a study: what is missing, a run on each GPU at a time, within a given time, and go on with the same command."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bert.composer_models import count_parameters
from bert.errors import DataError, RecipeError, nearest
from bert.files import write_json
from bert.glue.schema import GlueConfig
from bert.glue.schema import check_config as check_glue_config
from bert.glue.schema import load_config as load_glue_config
from bert.processes import signal_when_parent_ends, signals_as_interrupts, visible_gpus
from bert.provenance import commit, device_name, provenance
from bert.recipe import builders
from bert.recipe.resume import LATEST, run_folder
from bert.recipe.schema import TrainConfig, load_config, to_yaml
from bert.study.records import pretraining_record, read_metrics, recipe_hash
from bert.study.schema import Run, StudyConfig, as_overrides, dependencies, runs_of

log = logging.getLogger(__name__)

WAITING, RUNNING, DONE, FAILED, STOPPED, BLOCKED = "waiting", "running", "done", "failed", "stopped", "blocked"
FINISHED, DIVERGED, UNFINISHED = "finished", "diverged", "unfinished"  # outcomes of a pretraining run
_DIVERGED_CODE = 3  # of main.py
_POLL_SECONDS = 0.2
_STATUS_SECONDS = 30.0
_PATIENCE = 120.0  # seconds that a run has, after SIGTERM, to end its batch and save a checkpoint


@dataclass(frozen=True)
class Plan:
    """How a run is made, once the results that it follows from are known."""

    command: list[str]  # arguments of python
    key: str  # of all that it follows from: a result with another one is not this run's
    config: TrainConfig | None  # of a pretraining run
    result: Path | None  # the JSON for the report
    written: Path | None  # that JSON while it is not known to be whole: the run writes it
    folder: Path  # what others start from


@dataclass
class Progress:
    """A run and how far it is."""

    run: Run
    state: str = WAITING
    plan: Plan | None = None
    reason: str = ""
    wanted: bool = True
    process: subprocess.Popen[bytes] | None = None
    slot: int = 0
    started: float = 0.0


class Study:
    """The runs of a study and their processes.

    Args:
        config: the study.
        only: jobs to run in this order, each after what it needs; None: all, in the YAML's order.
        slots: runs at a time; None: one on each GPU, or one on the CPU.
        commit: of the code, for the record; None: what git says.

    Raises:
        RecipeError: a recipe that does not fit, before anything is run.
    """

    def __init__(
        self,
        config: StudyConfig,
        *,
        only: Sequence[str] | None = None,
        slots: int | None = None,
        commit_hash: str | None = None,
    ) -> None:
        if not Path("main.py").exists():
            raise RecipeError("start a study in the project's folder, where main.py and glue.py are")
        self.config = config
        self.commit = commit_hash or commit()
        self.work_folder = Path("runs") / config.name
        self.gpus = visible_gpus()
        self.slots = slots or max(1, len(self.gpus))
        self.runs = {run.name: Progress(run) for run in runs_of(config)}
        for name in only or []:
            if name not in config.jobs:
                raise RecipeError(f"there is no job '{name}': {nearest(name, config.jobs)}")
        self._recipes: dict[tuple[str, ...], TrainConfig] = {}
        self._check_recipes()
        self._choose(set(only) if only else set(config.jobs))
        jobs = _in_order(config, only) if only else [*config.jobs]
        self._in_order = [progress for job in jobs for progress in self._of_job(job)]

    # --- what a run is

    def _check_recipes(self) -> None:
        """Read every recipe with what is known of its changes, so that a mistake costs nothing."""
        for progress in self.runs.values():
            run = progress.run
            if run.config.pretrain is not None:
                builders.check_config(self._pretraining(run, {}, None)[0])
            elif run.config.glue is not None:
                check_glue_config(load_glue_config(run.config.glue, self._glue_overrides(run, "runs/x", None)))
            else:
                self._command(run, None if run.config.checkpoint is None else "x", "x")

    def _of_job(self, job: str) -> list[Progress]:
        return [progress for progress in self.runs.values() if progress.run.job == job]

    def _start(self, run: Run) -> Progress | None:
        """The run whose weights a run starts from; None where it starts from none."""
        job = run.config
        if job.checkpoint is None:
            return None
        return next(p for p in self._of_job(job.checkpoint) if job.checkpoint_seed in (None, p.run.seed))

    def _pretraining(self, run: Run, best: dict[str, Any], steps: int | None) -> tuple[TrainConfig, list[str]]:
        """The recipe of a pretraining run, and the changes that make it, in a folder of its own.

        Its name follows from the whole recipe: one that was changed begins anew, and is never taken for the old one.
        """
        values = {**self.config.set, **run.config.set}
        for key, value in {**best, **run.point}.items():
            values.pop(key, None)  # to come last: after the section that set.optimizer.lr of a command line makes
            values[key] = value
        if (start := self._start(run)) is not None:
            folder = Path("unknown") if start.plan is None else start.plan.folder
            values |= {"load_path": str(folder / LATEST), "load_weights_only": True}
        values |= {"run_name": self._name(run), "autoresume": True, "save_overwrite": False}
        if run.seed is not None:
            values["seed"] = run.seed
        if steps is not None:
            values["max_duration"] = f"{steps}ba"
        recipe, short = str(run.config.pretrain), self._name(run)
        config = self._read(recipe, as_overrides(values))
        text = to_yaml(config)
        values["run_name"] = name = f"{short}-{recipe_hash(text)[:6]}"
        overrides = as_overrides(values)
        if text.count(short) > 1:  # something else may follow from the name
            return self._read(recipe, overrides), overrides
        return dataclasses.replace(config, run_name=name), overrides

    def _read(self, recipe: str, overrides: list[str]) -> TrainConfig:
        """Read a recipe, each once: it takes a twentieth of a second, and must not change while the study runs."""
        key = (recipe, *overrides)
        if key not in self._recipes:
            self._recipes[key] = load_config(recipe, overrides)
        return self._recipes[key]

    def _name(self, run: Run) -> str:
        return f"{self.config.name}-{run.name}"

    def _glue_overrides(self, run: Run, checkpoint: str, output: Path | None) -> list[str]:
        values = {**self.config.glue_set, **run.config.set, "run_name": self._name(run)}
        return as_overrides({**values, "checkpoint": checkpoint, "output": str(output)})

    def _command(self, run: Run, checkpoint: str | None, folder: str) -> list[str]:
        values = {"checkpoint": checkpoint, "output": self._written(run), "folder": folder}
        return [_filled(part, values, run.name) for part in run.config.command or []]

    def _result(self, run: Run) -> Path | None:
        if run.config.command is not None:
            return self.config.results_folder / run.config.output if run.config.output else None
        return self.config.results_folder / f"{run.name}.json"

    def _written(self, run: Run) -> Path | None:
        """Where a run's process writes its result: not over an earlier one, since it may be stopped half-way."""
        result = self._result(run)
        return None if result is None else self.work_folder / "written" / result.name

    def plan(self, run: Run) -> Plan | None:
        """How a run is made; None while a result that it follows from is missing.

        Raises:
            RecipeError: no run of the job that it takes its values from has come to a result, or what it starts from
                has diverged.
        """
        job = run.config
        source = self._start(run)
        start = None if source is None else self._planned(source)
        if source is not None and start is None:
            return None
        if source is not None and self._has_diverged(source):
            raise RecipeError(f"{run.name}: {source.run.name}, which it starts from, has diverged")
        if job.pretrain is not None:
            best, steps = self._best(run), self._steps(run)
            if best is None or steps == 0:
                return None
            config, overrides = self._pretraining(run, best, steps)
            command = ["main.py", job.pretrain, *overrides]
            return Plan(command, recipe_hash(config), config, self._result(run), None, run_folder(config))
        checkpoint, made_from = (None, "") if start is None else (str(start.folder), start.key)
        follows: list[Any] = [made_from, list(job.command or [])]
        if job.glue is not None:
            overrides = self._glue_overrides(run, checkpoint or "null", self._result(run))
            follows[1] = ["glue.py", job.glue, *overrides]
            follows.append(_settings(load_glue_config(job.glue, overrides)))
        key = hashlib.sha256(json.dumps(follows, sort_keys=True).encode()).hexdigest()[:16]
        folder = Path("runs") / f"{self._name(run)}-{key[:6]}"
        if job.glue is not None:
            command = ["glue.py", job.glue, *self._glue_overrides(run, checkpoint or "null", self._written(run))]
        else:
            command = self._command(run, checkpoint, str(folder))
        return Plan(command, key, None, self._result(run), self._written(run), folder)

    def _best(self, run: Run) -> dict[str, Any] | None:
        """The grid values of the best run of `best_of`; {} without one, None while that job has open runs."""
        job = run.config.best_of
        if job is None:
            return {}
        found = [self._finished(progress) for progress in self._of_job(job)]
        if any(result is None for result in found):
            return None
        pairs = zip(found, self._of_job(job), strict=True)
        losses = [
            (result["evaluation_loss"], dict(progress.run.point))
            for result, progress in pairs
            if result is not None and result["study"]["outcome"] == FINISHED and result["evaluation_loss"] is not None
        ]
        if not losses:
            raise RecipeError(f"{run.name}: no run of {job} has an evaluation loss")
        return min(losses, key=lambda pair: pair[0])[1]

    def _steps(self, run: Run) -> int | None:
        """The steps that `minutes` are; None where the recipe says, 0 while the speed is not known."""
        job = run.config
        if job.minutes is None or job.speed_of is None:
            return None
        other = self._of_job(job.speed_of)[0]
        result = self._finished(other)
        if result is None:
            return 0
        if not result["tokens_per_second"]:
            raise RecipeError(f"{run.name}: the run of {job.speed_of} has no speed: its recipe needs speed_monitor")
        config, _ = self._pretraining(run, self._best(run) or {}, None)
        tokens = config.global_train_batch_size * config.max_seq_len
        return max(1, round(60 * job.minutes * result["tokens_per_second"] / tokens))

    # --- what is done

    def _planned(self, progress: Progress) -> Plan | None:
        """The plan of a run; None while there is none, or where there cannot be one: starting it says why."""
        if progress.plan is None:
            with contextlib.suppress(RecipeError):
                progress.plan = self.plan(progress.run)
        return progress.plan

    def _finished(self, progress: Progress) -> dict[str, Any] | None:
        """The result of a run, where there is one and it is this run's; a diverged run is one too."""
        plan = self._planned(progress)
        if plan is None:
            return None
        content = _result_of(plan.result or self._marker(progress.run), plan.key)
        return None if content is None or content["study"]["outcome"] == UNFINISHED else content

    def _marker(self, run: Run) -> Path:
        return self.work_folder / "done" / f"{run.name}.json"

    def _has_diverged(self, progress: Progress) -> bool:
        result = self._finished(progress)
        return result is not None and result["study"]["outcome"] == DIVERGED

    def _has_folder(self, progress: Progress) -> bool:
        """Whether what others start from is there, this run's, and sound: made again, it may diverge this time."""
        plan = self._planned(progress)
        if plan is None or not plan.folder.exists():
            return False
        made = _result_of(self._marker(progress.run), plan.key)
        return made is not None and made["study"]["outcome"] == FINISHED

    def _choose(self, jobs: set[str]) -> None:
        """Mark what is to be run: what has no result, and what leaves something that those start from.

        Results travel (they are committed), checkpoints do not: a run whose result is there is made again only where
        another one starts from its weights.
        """
        for progress in self.runs.values():
            progress.wanted = progress.run.job in jobs and self._finished(progress) is None
        grown = True
        while grown:
            grown = False
            for progress in [p for p in self.runs.values() if p.wanted]:
                for name in dependencies(progress.run.config):
                    for other in self._of_job(name):
                        if not other.wanted and not self._serves(other, progress.run):
                            other.wanted = grown = True
        for progress in self.runs.values():
            if not progress.wanted and self._finished(progress) is not None:
                progress.state = DONE

    def _serves(self, other: Progress, run: Run) -> bool:
        """Whether `other` is done, as far as `run` needs it."""
        if other is self._start(run):
            return self._has_folder(other) or self._has_diverged(other)  # to be made again would not help
        job = other.run.job
        needs_all = job in (run.config.best_of, *run.config.needs)
        gives_speed = job == run.config.speed_of and other is self._of_job(job)[0]
        return not (needs_all or gives_speed) or self._finished(other) is not None

    def _starts_others(self, progress: Progress) -> bool:
        """Whether a run that is still to be made starts from this one's weights, which are not there."""
        waiting = (p.run for p in self.runs.values() if p.wanted and p.state == WAITING)
        return any(self._start(run) is progress and not self._serves(progress, run) for run in waiting)

    # --- the processes

    def work(self, seconds: float | None) -> bool:
        """Run what is wanted; return whether it was stopped, by a signal or because the time is over."""
        deadline = None if seconds is None else time.monotonic() + seconds
        shown = time.monotonic()
        self._write_about()
        with signals_as_interrupts():
            try:
                changed = True  # what can start depends on results: files are looked at when a run has ended alone
                while self._open():
                    if changed:
                        self._start_runs()
                        changed = False
                    if not any(progress.process for progress in self.runs.values()):
                        if self._block():
                            break
                        changed = True
                        continue
                    time.sleep(_POLL_SECONDS)
                    for progress in self.runs.values():
                        if progress.process is not None and progress.process.poll() is not None:
                            self._finish(progress)
                            changed = True
                    if time.monotonic() - shown > _STATUS_SECONDS:
                        shown = time.monotonic()
                        self._say_status()
                    if deadline is not None and time.monotonic() > deadline:
                        log.info("the time is over: %d runs stop with a checkpoint", len(self._running()))
                        return True
            except KeyboardInterrupt:
                return True
            finally:
                self._stop_all()
        return False

    def _open(self) -> bool:
        return any(p.wanted and p.state in (WAITING, RUNNING) for p in self.runs.values())

    def _running(self) -> list[Progress]:
        return [progress for progress in self.runs.values() if progress.process is not None]

    def _ready(self, progress: Progress) -> bool:
        for name in dependencies(progress.run.config):
            if not all(self._serves(other, progress.run) for other in self._of_job(name)):
                return False
        return True

    def _start_runs(self) -> None:
        free = [slot for slot in range(self.slots) if slot not in {p.slot for p in self._running()}]
        for progress in self._in_order:
            if not (free and progress.wanted and progress.state == WAITING and self._ready(progress)):
                continue
            try:
                progress.plan = self.plan(progress.run)
            except RecipeError as error:
                progress.state, progress.reason = BLOCKED, str(error)
                log.error("%s: %s", progress.run.name, error)
                continue
            assert progress.plan is not None
            if self._finished(progress) is not None and not self._starts_others(progress):
                progress.state = DONE  # what it follows from was made again, and came to the same
                continue
            progress.slot = free.pop(0)
            progress.started = time.monotonic()
            environment = {**os.environ}
            if self.gpus:
                environment["CUDA_VISIBLE_DEVICES"] = self.gpus[progress.slot % len(self.gpus)]
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.slots)))
            path = self._log(progress.run)
            path.parent.mkdir(parents=True, exist_ok=True)
            if progress.plan.written is not None:
                progress.plan.written.parent.mkdir(parents=True, exist_ok=True)
                progress.plan.written.unlink(missing_ok=True)  # what a stopped one left is not this one's
            log.info("%s: python %s", progress.run.name, " ".join(progress.plan.command))
            with path.open("ab") as output:
                # A session of its own: Ctrl-C is for the study, which then stops its runs with a checkpoint.
                progress.process = subprocess.Popen(
                    [sys.executable, *progress.plan.command],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=partial(signal_when_parent_ends, signal.SIGTERM),  # noqa: PLW1509  calls prctl alone
                )
            progress.state = RUNNING

    def _log(self, run: Run) -> Path:
        return self.work_folder / "logs" / f"{run.name}.txt"

    def _block(self) -> bool:
        """Give up what waits for runs that failed; return whether that leaves nothing to do."""
        for progress in self.runs.values():
            if progress.wanted and progress.state == WAITING and not self._ready(progress):
                progress.state = BLOCKED
                needs = sorted(dependencies(progress.run.config))
                lacking = [name for name in needs if not all(self._serves(p, progress.run) for p in self._of_job(name))]
                progress.reason = "what it needs has failed, or left nothing to start from: " + ", ".join(lacking)
        return not self._open()

    def _finish(self, progress: Progress) -> None:
        assert progress.process is not None and progress.plan is not None
        code, progress.process = progress.process.returncode, None
        outcome = FINISHED if code == 0 else UNFINISHED
        if code == _DIVERGED_CODE and progress.plan.config is not None:
            outcome = DIVERGED
        try:
            self._record(progress, outcome)
        except (DataError, OSError) as error:
            if outcome != UNFINISHED:  # else the run's own reason says more
                outcome, progress.reason = UNFINISHED, str(error)
        if outcome == UNFINISHED:
            progress.state = STOPPED if progress.state == STOPPED else FAILED
            progress.reason = progress.reason or f"exit code {code}: {_last_line(self._log(progress.run))}"
            log.error("%s: %s (%s)", progress.run.name, progress.reason, self._log(progress.run))
        else:
            progress.state = DONE
            log.info("%s: %s after %.0f s", progress.run.name, outcome, time.monotonic() - progress.started)

    def _record(self, progress: Progress, outcome: str) -> None:
        """Put down what a run has reached, and for what it counts as done."""
        plan, run = progress.plan, progress.run
        assert plan is not None
        about = {
            "name": self.config.name,
            "run": run.name,
            "job": run.job,
            "point": dict(run.point),
            "recipe": Path(run.config.pretrain or run.config.glue or "").stem or None,
            "start": run.config.checkpoint,
            "start_seed": run.config.checkpoint_seed,
            "key": plan.key,
            "outcome": outcome,
            "commit": self.commit,
        }
        if self._finished(progress) is not None:
            pass  # made again for its weights: the first result stays, and so does what follows from its figures
        elif plan.config is not None:
            with torch.device("meta"):
                parameters = count_parameters(builders.build_model(plan.config))
            record = pretraining_record(plan.config, parameters)
            assert plan.result is not None
            made = {**provenance(plan.command), "device": device_name()}
            write_json(plan.result, {**made, **record, "study": about})
        elif plan.result is not None and plan.written is not None and outcome == FINISHED:
            try:
                content = json.loads(plan.written.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise DataError(f"{plan.written}, which the run was to write, cannot be read: {error}") from error
            write_json(plan.result, {**content, "study": about})
        if outcome != UNFINISHED:
            write_json(self._marker(run), {"study": about})

    def _stop_all(self) -> None:
        running = self._running()
        for progress in running:
            assert progress.process is not None
            progress.state = STOPPED
            progress.process.terminate()
        deadline = time.monotonic() + _PATIENCE
        for progress in running:
            assert progress.process is not None
            try:
                progress.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(progress.process.pid, signal.SIGKILL)
                progress.process.wait()
            self._finish(progress)

    def _write_about(self) -> None:
        about = {key: getattr(self.config, key) for key in ("name", "title", "data")}
        jobs = {name: dataclasses.asdict(job) for name, job in self.config.jobs.items()}
        write_json(self.config.results_folder / "study.json", {"kind": "study", **about, "jobs": jobs})

    def _say_status(self) -> None:
        for progress in self._running():
            text = f"{time.monotonic() - progress.started:.0f} s"
            if progress.plan is not None and progress.plan.config is not None:
                try:
                    last = read_metrics(progress.plan.folder / "metrics.jsonl")[-1]
                    loss = last.get("loss/train/total")
                    text += f", batch {last['batch']}" + (f", loss {loss:.3f}" if loss is not None else "")
                except (DataError, IndexError):
                    text += ", starting"
            log.info("%s: %s", progress.run.name, text)

    def table(self) -> list[list[str]]:
        """A header, and a line for each run of the jobs asked for and of what they need."""
        rows = [["run", "state", "evaluation loss", "tokens/s", "minutes", ""]]
        for progress in self._in_order:
            result = self._finished(progress) or {}
            columns = (("evaluation_loss", ".3f"), ("tokens_per_second", ",.0f"), ("minutes", ".1f"))
            cells = [f"{result[key]:{form}}" if result.get(key) else "" for key, form in columns]
            rows.append([progress.run.name, progress.state, *cells, progress.reason])
        return rows


def _settings(config: GlueConfig) -> dict[str, Any]:
    """What a sweep's YAML and changes set: a key that comes to the schema later, with its default, changes nothing."""
    defaults = dataclasses.asdict(GlueConfig())
    return {key: value for key, value in dataclasses.asdict(config).items() if value != defaults[key]}


def _in_order(config: StudyConfig, only: Sequence[str]) -> list[str]:
    """Return the jobs of `only` in that order, each after what it needs."""
    found: list[str] = []
    for name in only:
        needed = dependencies(config.jobs[name])
        found += [*_in_order(config, [job for job in config.jobs if job in needed]), name]
    return [*dict.fromkeys(found)]


def _result_of(path: Path, key: str) -> dict[str, Any] | None:
    """Read a result or a marker; None where there is none, or it is of a run with another key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if content["study"]["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _filled(part: str, values: dict[str, Any], run: str) -> str:
    for name, value in values.items():
        if f"{{{name}}}" in part:
            if value is None:
                raise RecipeError(f"{run}: its command says {{{name}}}, and the job has none")
            part = part.replace(f"{{{name}}}", str(value))
    return part


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[-300:] if lines else "it said nothing"
