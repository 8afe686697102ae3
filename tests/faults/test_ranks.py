"""One rank of two killed, stopped, hung or without data; the launcher killed; another number of ranks at resume."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.bert.recipe.conftest import write_split
from tests.faults.conftest import losses, wait_for

pytestmark = pytest.mark.faults

START = 240.0  # seconds that a job may take to import and build everything, on a machine that does other things too
REPOSITORY = Path(__file__).parents[2]
COMPOSER = Path(sys.executable).with_name("composer")


class Job:
    """`composer -n RANKS main.py ...`, with all that it starts."""

    def __init__(self, folder: Path, ranks: int, script: Path, *arguments: str) -> None:
        self.log = folder / f"job-{time.monotonic_ns()}.txt"
        command = [str(COMPOSER), "-n", str(ranks), str(script), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self.known: dict[int, psutil.Process] = {}

    def family(self) -> list[psutil.Process]:
        """All processes of the job so far that live, however they are related now."""
        for process in psutil.process_iter(["pid"]):
            try:
                if os.getsid(process.pid) == self.process.pid:
                    self.known[process.pid] = process
            except (ProcessLookupError, PermissionError):
                continue
        return [p for p in self.known.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def rank(self, number: int) -> psutil.Process:
        for process in self.family():
            try:
                if process.ppid() == self.process.pid and process.environ().get("RANK") == str(number):
                    return process
            except psutil.Error:
                continue
        pytest.fail(f"there is no rank {number}")

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the job did not end within {seconds} s:\n{self.said()[-4000:]}")

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        for process in self.family():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(10)


Start = Callable[..., Job]


def begun(condition: Callable[[], object], pause: float = 0.005) -> None:
    """Wait until a job has come so far."""
    wait_for(condition, seconds=START, pause=pause)


@pytest.fixture
def start(tmp_path: Path, recipe: Callable[..., Path]) -> Iterator[Start]:
    """Return a function that starts a job of so many ranks on the tiny recipe: `start(ranks, *overrides)`."""
    path = recipe(algorithms={}, eval_loader=None)
    # Many shards, so that data which are gone are missed.
    write_split(tmp_path / "many" / "train", 4000, 0, size_limit=400)
    jobs: list[Job] = []

    def begin(ranks: int, *overrides: str, script: Path = REPOSITORY / "main.py") -> Job:
        common = ["autoresume=true", "save_interval=10ba", "model.config.hidden_dropout_prob=0.0"]
        jobs.append(Job(tmp_path, ranks, script, str(path), *common, *overrides))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.end()


def nothing_left(job: Job) -> bool:
    """Whether the job's processes are gone; a loader's worker looks for its parent every five seconds."""
    wait_for(lambda: not job.family(), seconds=15, pause=0.2)
    return True


LONG = ["max_duration=5000ba", "train_loader.num_workers=1"]
HANGING = """
import os, sys, time
from bert.recipe import callbacks
original = callbacks.NaNGuard.batch_end
def batch_end(self, state, logger):
    original(self, state, logger)
    if os.environ["RANK"] == "1" and state.timestamp.batch.value == 12:
        time.sleep(600)
callbacks.NaNGuard.batch_end = batch_end
from bert.recipe.train import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_a_lost_rank_ends_the_job_and_is_named(start: Start, tmp_path: Path, fault: str, victim: int) -> None:
    job = start(2, *LONG)
    folder = tmp_path / "runs" / "tiny"
    begun(lambda: len(losses(folder)) > 12)
    time.sleep(2.5)  # some signs of life were exchanged
    begin = time.monotonic()
    job.rank(victim).send_signal(signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    assert job.wait(60) != 0
    seconds = time.monotonic() - begin
    said = job.said()
    if fault == "killed":
        assert f"Rank {victim} crashed with exit code -9" in said  # of the launcher
    else:
        assert f"rank {victim} (host" in said and "does not answer; it was in batch" in said
    assert nothing_left(job) and seconds < 60
    (tmp_path / "seconds").write_text(str(seconds))
    # Nothing that was left behind stops the next start, which goes on from the last whole checkpoint.
    last = max(losses(folder))
    again = start(2, f"max_duration={last + 5}ba", "train_loader.num_workers=1")
    assert again.wait(START + 90) == 0, again.said()[-3000:]
    assert max(losses(folder)) == last + 5


def test_a_rank_that_hangs_is_named_and_the_collective_ends_the_job(start: Start, tmp_path: Path) -> None:
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    job = start(2, *LONG, "dist_timeout=10", script=script)
    begun(lambda: len(losses(tmp_path / "runs" / "tiny")) >= 12)
    assert job.wait(60) != 0
    said = job.said()
    assert re.search(r"error: rank 0: rank 1 \(host .*\) is in batch 12, training since \d+ s; the others cannot", said)
    assert nothing_left(job)


def test_data_that_vanish_end_the_job_and_are_named(start: Start, tmp_path: Path) -> None:
    job = start(2, *LONG, f"data_local={tmp_path / 'many'}", "train_loader.num_workers=0")
    begun(lambda: len(losses(tmp_path / "runs" / "tiny")) >= 2)
    for path in (tmp_path / "many" / "train").glob("*.mds"):
        path.unlink()
    assert job.wait(60) != 0
    said = job.said()
    assert "error: rank " in said and "many/train" in said
    assert nothing_left(job)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_without_their_launcher_the_ranks_save_and_end(start: Start, tmp_path: Path, number: int) -> None:
    """Composer's launcher passes no signal on: it dies, and its ranks would go on."""
    job = start(2, *LONG)
    folder = tmp_path / "runs" / "tiny"
    begun(lambda: len(losses(folder)) > 3)
    job.family()
    job.process.send_signal(number)
    job.process.wait(10)
    assert nothing_left(job)
    last = max(losses(folder))
    assert (folder / "latest-rank0.pt").resolve().name == f"ep{last // 12 - (last % 12 == 0)}-ba{last}-rank0.pt"


def test_two_ranks_are_stopped_together(start: Start, tmp_path: Path) -> None:
    job = start(2, *LONG)
    begun(lambda: len(losses(tmp_path / "runs" / "tiny")) > 3)
    job.rank(1).send_signal(signal.SIGUSR1)  # one of them is enough
    assert job.wait(60) == 128 + signal.SIGUSR1
    last = max(losses(tmp_path / "runs" / "tiny"))
    assert (tmp_path / "runs" / "tiny" / "latest-rank0.pt").resolve().name.endswith(f"-ba{last}-rank0.pt")
    assert nothing_left(job)


@pytest.mark.parametrize(("first", "then"), [((1, 0), (2, 1)), ((2, 1), (1, 2)), ((2, 0), (2, 2))], ids=str)
def test_another_number_of_ranks_or_workers_goes_on_with_the_same_samples(
    start: Start, tmp_path: Path, first: tuple[int, int], then: tuple[int, int]
) -> None:
    settings = ["train_loader.dataset.num_canonical_nodes=2", "save_interval=5ba"]
    whole = start(1, *settings, "run_name=whole", "max_duration=20ba", "train_loader.num_workers=0")
    assert whole.wait(START + 90) == 0, whole.said()[-3000:]
    for (ranks, workers), duration in ((first, 10), (then, 20)):
        # The schedule is that of the whole run: its length in batches is the same, only a part of it is done first.
        job = start(ranks, *settings, "run_name=parts", "max_duration=20ba", f"train_loader.num_workers={workers}")
        if duration == 10:
            begun(lambda: len(losses(tmp_path / "runs" / "parts")) >= 7, pause=0.001)
            job.rank(0).send_signal(signal.SIGTERM)
            assert job.wait(60) in (143, 0)
        else:
            assert job.wait(START + 90) == 0, job.said()[-3000:]
    expected, got = (losses(tmp_path / "runs" / name) for name in ("whole", "parts"))
    assert list(got) == list(expected)
    assert list(got.values()) == pytest.approx(list(expected.values()), abs=1e-4)
