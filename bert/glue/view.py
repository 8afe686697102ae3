"""What a sweep shows while it runs: one live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from bert.glue.state import BLOCKED, DONE, ELSEWHERE, FAILED, QUEUED, RUNNING, WAITING, Job

log = logging.getLogger(__name__)

_LINES_SECONDS = 60.0  # between two plain lines about running jobs
_SHOWN = 30  # rows of the live table


class View:
    """Shows the jobs each time `refresh` is called.

    Args:
        jobs: of the sweep; read, not changed.
        console: where to.
    """

    def __init__(self, jobs: Sequence[Job], console: Console) -> None:
        self.jobs = jobs
        self.console = console
        # Without a refreshing thread of its own: jobs are forks of this process.
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._states: dict[int, str] = {}
        self._last_lines = time.monotonic()

    def __enter__(self) -> View:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refresh()
        if self.live is not None:
            self.live.stop()

    def refresh(self) -> None:
        """Show how the jobs are now."""
        if self.live is not None:
            self.live.update(self._table(), refresh=True)
            return
        now = time.monotonic()
        due = now - self._last_lines > _LINES_SECONDS
        if due:
            self._last_lines = now
        for index, job in enumerate(self.jobs):
            changed = self._states.get(index) != job.state
            self._states[index] = job.state
            if (changed and job.state not in (WAITING, QUEUED)) or (due and job.state == RUNNING):
                log.info("%s", "  ".join(part for part in (job.name, job.state, *_progress(job)) if part))

    def _table(self) -> Table:
        counts: dict[str, int] = {}
        for job in self.jobs:
            counts[job.state] = counts.get(job.state, 0) + 1
        table = Table(title=", ".join(f"{number} {state}" for state, number in counts.items()), title_justify="left")
        for name in ("task", "seed", "point", "state", "step", "last metric", "time left"):
            table.add_column(name, no_wrap=name != "point")
        # What moves or needs a look first, then what is to come, then what is over.
        order = (RUNNING, FAILED, BLOCKED, ELSEWHERE, QUEUED, WAITING, DONE)
        shown = sorted(self.jobs, key=lambda job: order.index(job.state))
        for job in shown[:_SHOWN]:
            point = ", ".join(f"{key}={value}" for key, value in job.plan.points[job.point][0].items())
            table.add_row(job.plan.name, str(job.seed), point, job.state, *_progress(job))
        if len(shown) > _SHOWN:
            table.add_row(f"... {len(shown) - _SHOWN} more")
        return table


def _progress(job: Job) -> tuple[str, str, str]:
    """Step, last metric and time left of a job."""
    if job.result is not None:
        return str(job.result["steps"]), _values(job.result["metrics"]), ""
    if job.state != RUNNING or job.spec is None:
        return "", job.reason.splitlines()[0] if job.reason else "", ""
    try:
        now: dict[str, Any] = json.loads((job.spec.folder / "progress.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return "loading", "", ""
    step = f"{now['step']}/{now['steps']}" if now["steps"] else str(now["step"])
    metric = _values(now["metric"]) or ("" if now["loss"] is None else f"loss {now['loss']:.3f}")
    left = now["seconds_left"]
    return step, metric, "" if left is None else f"{int(left) // 60}:{int(left) % 60:02d}"


def _values(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in metrics.items())
