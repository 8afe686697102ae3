"""What the YAML of a study says, one dataclass field a key, and the runs that follow from it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from bert.errors import RecipeError, nearest
from bert.recipe.schema import load_dataclass

STUDY_FOLDER = Path("yamls/studies")
KINDS = ("pretrain", "glue", "command")


@dataclass
class JobConfig:
    """One of pretrain, glue and command; the other keys say with what."""

    pretrain: str | None = None  # a recipe of main.py
    glue: str | None = None  # a recipe of glue.py
    command: list[str] | None = None  # arguments of python; {checkpoint}, {output} and {folder} are filled in

    set: dict[str, Any] = field(default_factory=dict)  # key -> value: changes of the recipe
    grid: dict[str, list[Any]] = field(default_factory=dict)  # pretrain: key -> values, a run for each combination
    seeds: list[int] = field(default_factory=list)  # pretrain: a run for each; none: the recipe's own seed
    best_of: str | None = None  # pretrain: takes the grid values of that job's run with the lowest evaluation loss
    minutes: float | None = None  # pretrain: as many steps as this takes ...
    speed_of: str | None = None  # ... at the speed of that job's first run

    checkpoint: str | None = None  # the job that it starts from: the weights alone, of its first run ...
    checkpoint_seed: int | None = None  # ... or of the one with this seed
    output: str | None = None  # command: the JSON that it writes into the results; null: it writes to {folder}
    needs: list[str] = field(default_factory=list)  # jobs that are to be done before

    @property
    def kind(self) -> str:
        """Which of KINDS this is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


@dataclass
class StudyConfig:
    """A study: jobs on the same data."""

    name: str = MISSING  # of its runs and of its folder in results/
    title: str = MISSING  # in the report
    data: str = MISSING  # what was trained on, in words, for the report
    set: dict[str, Any] = field(default_factory=dict)  # key -> value: changes of every pretraining recipe
    glue_set: dict[str, Any] = field(default_factory=dict)  # the same of every fine-tuning recipe
    jobs: dict[str, JobConfig] = field(default_factory=dict)
    results: str = "results/{name}"

    @property
    def results_folder(self) -> Path:
        """Where a JSON for each run is written."""
        return Path(self.results.replace("{name}", self.name))


@dataclass(frozen=True)
class Run:
    """A job at one grid point and seed."""

    name: str  # job, grid values and seed
    job: str
    config: JobConfig
    point: Mapping[str, Any]  # grid values
    seed: int | None


def load_study(path: str | Path, overrides: list[str] | None = None) -> StudyConfig:
    """Read a study and check that its jobs fit together.

    Raises:
        RecipeError: a missing file, an unknown key, a value of the wrong type, or jobs that do not fit together.
    """
    study = load_dataclass(StudyConfig, path, overrides or [], folder=STUDY_FOLDER)
    for name, job in study.jobs.items():
        _check_job(study, name, job, f"{path}: jobs.{name}")
    _check_order(study, str(path))
    _check_names(study, str(path))
    return study


# Key of a job -> the kinds that it is for.
_FOR = {"set": ("pretrain", "glue"), "grid": ("pretrain",), "seeds": ("pretrain",), "best_of": ("pretrain",)}
_FOR |= {"minutes": ("pretrain",), "speed_of": ("pretrain",), "output": ("command",)}
_JOBS = ("best_of", "speed_of", "checkpoint")  # keys that name another job


def _check_job(study: StudyConfig, name: str, job: JobConfig, where: str) -> None:
    kinds = [kind for kind in KINDS if getattr(job, kind) is not None]
    if len(kinds) != 1:
        raise RecipeError(f"{where}: give one of {', '.join(KINDS)}, not {len(kinds)}")
    for key, allowed in _FOR.items():
        if getattr(job, key) not in (None, {}, []) and kinds[0] not in allowed:
            raise RecipeError(f"{where}: '{key}' is for {' and '.join(allowed)}, not for {kinds[0]}")
    others = {key: getattr(job, key) for key in _JOBS} | {f"needs[{i}]": other for i, other in enumerate(job.needs)}
    for key, other in others.items():
        if other is not None and other not in study.jobs:
            raise RecipeError(f"{where}.{key}: there is no job '{other}': {nearest(other, study.jobs)}")
    for key, values in job.grid.items():
        if not values:
            raise RecipeError(f"{where}.grid: '{key}' has no values")
    if job.best_of is not None and not study.jobs[job.best_of].grid:
        raise RecipeError(f"{where}: best_of '{job.best_of}', which has no grid")
    if (job.minutes is None) != (job.speed_of is None):
        raise RecipeError(f"{where}: 'minutes' and 'speed_of' go together")
    for key in ("speed_of", "best_of"):
        if (other := getattr(job, key)) is not None and study.jobs[other].kind != "pretrain":
            raise RecipeError(f"{where}: {key} '{other}', which trains nothing")
    if job.checkpoint is not None and study.jobs[job.checkpoint].kind == "glue":
        raise RecipeError(f"{where}: checkpoint '{job.checkpoint}': fine-tuning leaves none to start from")
    if job.checkpoint_seed is not None:
        if job.checkpoint is None:
            raise RecipeError(f"{where}: 'checkpoint_seed' without a checkpoint")
        if job.checkpoint_seed not in (seeds := study.jobs[job.checkpoint].seeds):
            raise RecipeError(f"{where}: {job.checkpoint_seed} is none of the seeds of '{job.checkpoint}': {seeds}")


def _check_names(study: StudyConfig, path: str) -> None:
    """Refuse runs of one name, and results that would share a file."""
    runs, files = set[str](), {"study.json"}
    for run in runs_of(study):
        file = run.config.output if run.config.command is not None else f"{run.name}.json"
        if run.name in runs or file in files:
            raise RecipeError(f"{path}: jobs.{run.job}: the name {run.name}, or its result {file}, is taken already")
        runs.add(run.name)
        if file is not None:
            files.add(file)


def _check_order(study: StudyConfig, path: str) -> None:
    done: set[str] = set()
    while len(done) < len(study.jobs):
        ready = {name for name, job in study.jobs.items() if name not in done and dependencies(job) <= done}
        if not ready:
            waiting = ", ".join(name for name in study.jobs if name not in done)
            raise RecipeError(f"{path}: jobs wait for each other: {waiting}")
        done |= ready


def dependencies(job: JobConfig) -> set[str]:
    """The names of the jobs that must be done before this one can start."""
    return {other for other in (*(getattr(job, key) for key in _JOBS), *job.needs) if other is not None}


def runs_of(study: StudyConfig) -> Iterator[Run]:
    """Yield the runs of all jobs, in the YAML's order."""
    for name, job in study.jobs.items():
        seeds: list[int | None] = [*job.seeds] or [None]
        for values in itertools.product(*job.grid.values()):
            point = dict(zip(job.grid, values, strict=True))
            for seed in seeds:
                parts = [name, *(f"{key.rpartition('.')[2]}-{_word(value)}" for key, value in point.items())]
                if len(job.seeds) > 1:
                    parts.append(f"seed-{seed}")
                yield Run("-".join(parts), name, job, point, seed)


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(letter if letter.isalnum() or letter in ".+-" else "_" for letter in text)


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Write keys and values as `key=value`, as the command lines of main.py and glue.py take them."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
