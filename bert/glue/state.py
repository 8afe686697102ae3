"""The jobs of a sweep while it runs: how far each is, and which is best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

from bert.glue.job import JobSpec
from bert.glue.schema import TaskPlan

WAITING, QUEUED, RUNNING, ELSEWHERE = "waiting", "queued", "running", "elsewhere"
DONE, FAILED, BLOCKED = "done", "failed", "blocked"
OPEN = (WAITING, QUEUED, RUNNING, ELSEWHERE)


@dataclass
class Job:
    """A job of the sweep and how far it is."""

    plan: TaskPlan
    point: int  # index into plan.points
    seed: int
    state: str = WAITING
    spec: JobSpec | None = None  # None until the model that it starts from is known
    reason: str = ""  # why it failed or is blocked
    attempts: int = 0
    not_before: float = 0.0
    slot: int | None = None
    process: BaseProcess | None = None
    result: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """Task, grid point and seed, for people."""
        point = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.plan.points[self.point][0].items())
        return f"{self.plan.name} seed {self.seed}" + (f" ({point})" if point else "")


def best_point(candidates: Sequence[Job]) -> int | None:
    """The grid point of one task with the best dev score over seeds, out of those with most of their seeds done."""
    scores: dict[int, list[float]] = {}
    for job in candidates:
        if job.result is not None:
            scores.setdefault(job.point, []).append(job.result["score"])
    if not scores:
        return None
    return max(scores, key=lambda point: (len(scores[point]), sum(scores[point]) / len(scores[point]), -point))


def best_job(candidates: Sequence[Job]) -> Job | None:
    """The best single job at the best grid point; None where nothing is done."""
    point = best_point(candidates)
    done = [job for job in candidates if job.point == point and job.result is not None]
    return max(done, key=lambda job: job.result["score"] if job.result else 0.0, default=None)
