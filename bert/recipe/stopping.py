"""Stopping a run from outside: a signal ends it after the batch under way, with a checkpoint and an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist

from bert.processes import signal_when_parent_ends

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # preemption, Slurm's warning, Ctrl-C


class TrainingStoppedError(RuntimeError):
    """A signal ended the run; `exit_code` is 128 plus its number, as shells report it."""

    def __init__(self, signal_number: int, batch: int, checkpoint: str | None) -> None:
        saved = f"everything up to there is in {checkpoint}: the same command with autoresume=true goes on from it"
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} after batch {batch}; "
            + (saved if checkpoint else "nothing was saved: there is no save_folder")
        )
        self.exit_code = 128 + signal_number


class StopOnSignal(Callback):
    """End the run after the batch in which any rank was sent one of `SIGNALS`.

    The ranks agree once a batch, before checkpoints are due, so that all of them save and end together. A second
    Ctrl-C ends a rank at once.
    """

    def __init__(self) -> None:
        self._received = 0  # number of the signal that this rank was sent first
        self._agreed = 0  # the same, of all ranks

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while this is open; only the main thread of a process can."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            if self._agreed and "LOCAL_RANK" in os.environ:
                # The launcher sends SIGTERM to the ranks that have not ended when the first one has: it would take the
                # place of this rank's exit code.
                before[signal.SIGTERM] = signal.SIG_IGN
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT == self._received:
            raise KeyboardInterrupt
        self._received = self._received or number

    def saving_too(self, due: Callable[[State, Event], bool]) -> Callable[[State, Event], bool]:
        """Return `due` (whether to save a checkpoint now), true as well where the run is about to end."""
        return lambda state, event: due(state, event) or self._agreed != 0

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Let the ranks agree; the checkpoint is saved right after this, by Composer's saver."""
        self._agreed = self._agree(state)

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """End the run, where it was agreed and is not over in any case.

        Raises:
            TrainingStoppedError: on all ranks.
        """
        if self._agreed:
            raise self._error(state)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """End the run in the middle of an evaluation, which may be long; its result is lost.

        Raises:
            TrainingStoppedError: on all ranks, after a checkpoint of the last training batch.
        """
        self._agreed = self._agree(state)
        if not self._agreed:
            return
        for saver in _savers(state):
            if saver.last_checkpoint_batch != state.timestamp.batch:
                saver.batch_checkpoint(state, logger)
        raise self._error(state)

    def _agree(self, state: State) -> int:
        if dist.get_world_size() == 1:
            return self._received
        number = state.device.tensor_to_device(torch.tensor([self._received]))
        dist.all_reduce(number, reduce_operation="MAX")
        return int(number)

    def _error(self, state: State) -> TrainingStoppedError:
        saved = [path for saver in _savers(state) for path in saver.all_saved_checkpoints_to_timestamp]
        return TrainingStoppedError(self._agreed, state.timestamp.batch.value, saved[-1] if saved else None)


def _savers(state: State) -> list[CheckpointSaver]:
    return [callback for callback in state.callbacks if isinstance(callback, CheckpointSaver)]


def end_with_launcher() -> None:
    """Have this rank sent SIGTERM when the launcher that started it ends, however it does.

    Composer's launcher passes neither SIGTERM nor SIGUSR1 on, and dies of them: its ranks would go on as orphans.
    Linux only; a process that no launcher started (it has no LOCAL_RANK) may outlive its parent.
    """
    if "LOCAL_RANK" in os.environ:
        signal_when_parent_ends(signal.SIGTERM)
