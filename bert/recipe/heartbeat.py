"""Signs of life between ranks: one that is killed or hung is named, and ends the whole job soon."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.distributed_c10d import _get_default_store

log = logging.getLogger(__name__)

LOST_RANK_EXIT_CODE = 5
_PERIOD = 1.0  # seconds between two signs of life
_SLOW = 30.0  # seconds after which the others are told whom they wait for


class LostRankError(RuntimeError):
    """A rank of the job is gone or does not answer; the message names it."""


class Heartbeat(Callback):
    """Exchange signs of life through the process group's store; rank 0 watches all, and all watch rank 0.

    Composer's launcher notices a rank that ends, and not one that hangs; a collective notices after `dist_timeout`,
    and names none. A thread of each rank writes what its training does; one that is silent for `timeout` seconds, be it
    stopped or swapped out, ends this rank with exit code 5, and with it the job. A rank that lives but does not get on
    is named in the log; the collective that waits for it ends the job.

    Args:
        timeout: seconds; 0: no exchange.
    """

    _runs = 0  # of this process: keys of an earlier run in it are another's

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._doing = "starting"
        self._batch = 0
        self._since = time.monotonic()
        self._stop = threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}  # by rank: the last sign of life, and when it came

    def fit_start(self, state: State, logger: Logger) -> None:
        """Note where the run begins."""
        self._note(state, "loading data")

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Note that the batch is awaited."""
        self._note(state, "loading data")

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Note that the batch is there."""
        self._note(state, "training")

    def batch_end(self, state: State, logger: Logger) -> None:
        """Note that the batch is over: an evaluation or a checkpoint may follow."""
        self._note(state, "evaluating or saving")

    def _note(self, state: State, doing: str) -> None:
        self._batch, self._doing, self._since = state.timestamp.batch.value, doing, time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Exchange signs of life while this is open.

        Raises:
            LostRankError: from within: a collective failed, and a rank that took part does not answer any more.
        """
        if dist.get_world_size() == 1 or not self.timeout:
            yield
            return
        Heartbeat._runs += 1
        prefix = f"heartbeat/{Heartbeat._runs}"
        for run in (self._beat, self._watch):
            threading.Thread(target=run, args=(prefix,), name=f"heartbeat-{run.__name__}", daemon=True).start()
        try:
            yield
        except RuntimeError as error:
            # Gloo and NCCL say that a connection broke, not whose.
            if type(error) not in _COLLECTIVE_ERRORS:
                raise
            lost, behind = self._silent_after(4 * _PERIOD), self._behind()
            if not lost and not behind:
                raise
            who = self._describe(lost) if lost else self._describe(behind, answers=True)
            raise LostRankError(f"{who}; the others cannot go on: {error}") from error
        finally:
            self._stop.set()
            with contextlib.suppress(RuntimeError):
                _get_default_store().set(f"{prefix}/{dist.get_global_rank()}", "done")

    def _peers(self) -> list[int]:
        return list(range(1, dist.get_world_size())) if dist.get_global_rank() == 0 else [0]

    def _beat(self, prefix: str) -> None:
        """Send and take in signs of life; on a store that hangs, this thread does too."""
        store: Any = _get_default_store()
        own = {"host": socket.gethostname(), "pid": os.getpid()}
        count = 0
        while not self._stop.wait(_PERIOD):
            count += 1
            now = {"batch": self._batch, "doing": self._doing, "seconds": round(time.monotonic() - self._since)}
            try:
                store.set(f"{prefix}/{dist.get_global_rank()}", json.dumps({**own, **now, "count": count}))
                for rank in self._peers():
                    key = f"{prefix}/{rank}"
                    value = store.get(key) if store.check([key]) else b""
                    if rank not in self._seen or self._seen[rank][0] != value:
                        self._seen[rank] = (value, time.monotonic())
            except RuntimeError:  # the store is rank 0's, and gone with it: no sign of life
                continue

    def _watch(self, prefix: str) -> None:
        """End this process when a peer is silent for too long; only looks at the clock, so nothing can block it."""
        begin, told = time.monotonic(), time.monotonic()
        while not self._stop.wait(_PERIOD):
            now = time.monotonic()
            for rank in self._peers():
                value, last = self._seen.get(rank, (b"", begin))
                if value != b"done" and now - last > self.timeout:
                    self._end(f"{self._describe([rank])}, for {now - last:.0f} s")
            if now - told > _SLOW < now - self._since and (behind := self._behind()):
                told = now
                log.warning("waiting for %s", self._describe(behind, answers=True))

    def _end(self, reason: str) -> None:
        if not self._stop.is_set():
            sys.stderr.write(f"error: rank {dist.get_global_rank()} ends the job: {reason}\n")
            sys.stderr.flush()
            os._exit(LOST_RANK_EXIT_CODE)  # the main thread waits in a collective, where no exception reaches it

    def _behind(self) -> list[int]:
        """Peers that live, but have not come as far as this rank."""
        lives = {rank: json.loads(value) for rank, (value, _) in self._seen.items() if value not in (b"", b"done")}
        here = (self._batch, self._doing != "loading data")
        return [rank for rank, life in lives.items() if (life["batch"], life["doing"] != "loading data") < here]

    def _silent_after(self, seconds: float) -> list[int]:
        """Wait so long and return the peers of which nothing was heard meanwhile."""
        before = {rank: self._seen.get(rank, (b"", 0.0))[0] for rank in self._peers()}
        self._stop.wait(seconds)
        return [rank for rank, value in before.items() if self._seen.get(rank, (b"", 0.0))[0] == value != b"done"]

    def _describe(self, ranks: list[int], answers: bool = False) -> str:
        said = []
        for rank in ranks:
            value = self._seen.get(rank, (b"", 0.0))[0]
            life: dict[str, Any] = json.loads(value) if value not in (b"", b"done") else {}
            who = f"rank {rank}" + (f" (host {life['host']}, process {life['pid']})" if life else "")
            where = f"in batch {life['batch'] + 1}, {life['doing']}" if life else "before its first batch"
            said.append(
                f"{who} is {where} since {life['seconds']} s" if answers else f"{who} does not answer; it was {where}"
            )
        return ", ".join(said)


_COLLECTIVE_ERRORS = (RuntimeError, torch.distributed.DistBackendError, torch.distributed.DistNetworkError)
