"""SIGTERM, SIGUSR1 and Ctrl-C: a checkpoint within the batch, an exit code that says so, and nothing lost."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from bert.recipe.train import main
from tests.faults.conftest import Child, assert_same, final_state, losses, wait_for

Fork = Callable[..., Child]


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        (signal.SIGTERM, 0),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.faults),
        pytest.param(signal.SIGUSR1, 1, marks=pytest.mark.faults),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.faults),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_signal_ends_the_run_after_its_batch(
    recipe: Callable[..., Path], tmp_path: Path, fork: Fork, number: signal.Signals, workers: int
) -> None:
    command = [str(recipe()), "max_duration=200ba", "save_interval=1000ba", "autoresume=true", "eval_interval=24ba"]
    command.append(f"train_loader.num_workers={workers}")
    child = fork(main, [*command, "run_name=stopped"])
    stopped, whole = tmp_path / "runs" / "stopped", tmp_path / "runs" / "whole"
    wait_for(lambda: len(losses(stopped)) >= 5)
    begun = len(losses(stopped))
    # The whole job is sent it, as by Slurm or a terminal: the loader's workers too.
    import os

    os.killpg(child.process.pid, number)
    assert child.wait(30) == 128 + number
    last = max(losses(stopped))
    assert last <= begun + 3 < 200
    assert (stopped / "latest-rank0.pt").resolve().name.endswith(f"-ba{last}-rank0.pt")
    said = child.log.read_text()
    assert f"stopped by {number.name} after batch {last}" in said and "Traceback" not in said
    assert fork(main, [*command[:1], f"max_duration={last + 14}ba", *command[2:], "run_name=stopped"]).wait() == 0
    assert fork(main, [*command[:1], f"max_duration={last + 14}ba", *command[2:], "run_name=whole"]).wait() == 0
    # The schedule of the first part was made for 200 batches, so only that part is compared with a run for 200.
    assert list(losses(stopped)) == list(losses(whole))
