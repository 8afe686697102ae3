"""SIGTERM, SIGUSR1 and Ctrl-C: a checkpoint within the batch, an exit code that says so, and nothing lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bert.recipe.stopping import StopOnSignal
from bert.recipe.train import main
from tests.faults.conftest import Child, assert_same, final_state, losses, wait_for

Fork = Callable[..., Child]


def in_evaluation(arguments: list[str]) -> int:
    """Train, and be sent SIGTERM after a batch of the second evaluation, which has four."""
    calls = 0
    original = StopOnSignal.eval_batch_end

    def eval_batch_end(self: StopOnSignal, *given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, *given)

    StopOnSignal.eval_batch_end = eval_batch_end  # type: ignore[method-assign]
    return main(arguments)


@pytest.mark.parametrize(
    ("number", "workers", "evaluating"),
    [
        (signal.SIGTERM, 1, False),
        pytest.param(signal.SIGTERM, 0, False, marks=pytest.mark.faults),
        pytest.param(signal.SIGTERM, 0, True, marks=pytest.mark.faults),
        pytest.param(signal.SIGUSR1, 1, False, marks=pytest.mark.faults),
        pytest.param(signal.SIGINT, 1, False, marks=pytest.mark.faults),
    ],
    ids=["SIGTERM", "SIGTERM-no-workers", "SIGTERM-evaluating", "SIGUSR1", "SIGINT"],
)
def test_a_signal_ends_the_run_after_its_batch(
    recipe: Callable[..., Path], tmp_path: Path, fork: Fork, number: signal.Signals, workers: int, evaluating: bool
) -> None:
    command = [str(recipe()), "max_duration=32ba", "save_interval=1000ba", "autoresume=true", "eval_interval=15ba"]
    command += [f"train_loader.num_workers={workers}", "global_eval_batch_size=4"]
    stopped, whole = tmp_path / "runs" / "stopped", tmp_path / "runs" / "whole"
    child = fork(in_evaluation if evaluating else main, [*command, "run_name=stopped"])
    if not evaluating:
        wait_for(lambda: len(losses(stopped)) >= 5)
        # The whole job is sent it, as by Slurm or a terminal: the loader's workers too.
        os.killpg(child.process.pid or 0, number)
    assert child.wait(30) == 128 + number
    last = max(losses(stopped))
    assert (last == 30) if evaluating else (5 <= last < 15), last
    assert (stopped / "latest-rank0.pt").resolve().name.endswith(f"-ba{last}-rank0.pt")
    said = child.log.read_text()
    assert f"stopped by {number.name} after batch {last}" in said and "Traceback" not in said
    assert fork(main, [*command, "run_name=stopped"]).wait() == 0
    assert fork(main, [*command, "run_name=whole"]).wait() == 0
    assert losses(stopped) == losses(whole)
    assert_same(final_state(stopped), final_state(whole))
