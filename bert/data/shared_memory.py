"""Streaming's shared memory: what a killed run leaves behind, and starting beside other runs."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch.distributed
from filelock import FileLock, Timeout
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, SHM_TO_CLEAN
from streaming.base.distributed import get_local_rank, maybe_init_dist

log = logging.getLogger(__name__)

_SECONDS_ALONE = 60  # that a job waits until others on this host have started
_SEGMENT = re.compile(rf"(\d{{6,}})_({'|'.join(SHM_TO_CLEAN)})")
_LOCK = re.compile(rf"(\d{{6,}})_({BARRIER_FILELOCK}|{CACHE_FILELOCK})")


@contextlib.contextmanager
def alone_on_this_host() -> Iterator[None]:
    """Keep other jobs from choosing the same number for their shared memory; the ranks of one job choose together.

    Two jobs on the same two hosts may each wait for the other's: so none waits for ever.
    """
    lock = _start_lock()
    try:
        if get_local_rank() == 0:
            lock.acquire()
    except Timeout:
        log.warning("another job has been starting for %d s: not waiting for it any longer", _SECONDS_ALONE)
    try:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # streaming's own constructor ends with another
        yield
    finally:
        lock.release()


def _start_lock(timeout: float = _SECONDS_ALONE) -> FileLock:
    return FileLock(Path(tempfile.gettempdir(), f"streaming-start-{os.getuid()}.lock"), timeout=timeout)


def clean_stale_shared_memory(
    folder: str = "/dev/shm", processes: str = "/proc", temporary: str | None = None
) -> list[str]:
    """Remove shared memory of streaming that a killed run left behind; what a living process uses stays.

    Every rank calls it once before the first loader; the first of each node does the work and the others wait. Only
    Linux keeps the segments as files, so elsewhere nothing happens. (Streaming's own function of this name removes the
    segments of other running jobs too.)

    The empty lock files in the temporary folder whose number has no segment go too: every run leaves two for each of
    its datasets, and each new dataset looks for those of all numbers, one by one (0.5 s where 6,500 were left).
    Those of segments that this call removed stay until the next: Python may yet unlink what the killed run had
    registered, and must not meet another run's of the same number.

    Containers that share /dev/shm must share their process numbers too, or their segments look unused; those that share
    the temporary folder must share /dev/shm, for the lock files' sake.

    Args:
        folder: where the segments are.
        processes: where the processes are.
        temporary: the temporary folder; None: Python's.

    Returns:
        The names of the removed segments.
    """
    removed: list[str] = []
    started_distributed = maybe_init_dist()
    if get_local_rank() == 0 and os.path.isdir(folder) and os.path.isdir(processes):
        # Listed before the processes are: a segment that is made in between is not a candidate.
        candidates = _own_files(folder, _SEGMENT)
        mapped = _mapped_files(processes, folder) if candidates else set()
        removed = sorted(path.name for path in candidates if path.name not in mapped)
        for name in removed:
            Path(folder, name).unlink(missing_ok=True)
        if removed:
            log.info("removed %d shared-memory segments that a killed run left: %s", len(removed), ", ".join(removed))
        # While no other job takes a number; where one takes long, the next run removes them.
        with contextlib.suppress(Timeout), _start_lock(timeout=10):
            _remove_locks(temporary or tempfile.gettempdir(), folder, besides=removed)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    if started_distributed:
        torch.distributed.destroy_process_group()
    return removed


def _remove_locks(temporary: str, folder: str, besides: list[str]) -> None:
    locks = _own_files(temporary, _LOCK)
    # A run makes its segments before its locks: one that was listed, and has none now, is left over.
    segments = [*(entry.name for entry in os.scandir(folder)), *besides]
    used = {match[1] for name in segments if (match := _SEGMENT.fullmatch(name))}
    for path in locks:
        if path.name.partition("_")[0] not in used:
            path.unlink(missing_ok=True)


def _own_files(folder: str, pattern: re.Pattern[str]) -> list[Path]:
    found = []
    for entry in os.scandir(folder):
        if pattern.fullmatch(entry.name):
            with contextlib.suppress(FileNotFoundError):
                if entry.stat(follow_symlinks=False).st_uid == os.getuid():
                    found.append(Path(entry.path))
    return found


def _mapped_files(processes: str, folder: str) -> set[str]:
    """Return the names in `folder` that a visible process has mapped; segments are private to their user."""
    names = set()
    pattern = re.compile(rf" {re.escape(folder)}/(\S+)$", re.MULTILINE)
    for entry in os.scandir(processes):
        if entry.name.isdigit():
            try:
                names.update(pattern.findall(Path(entry.path, "maps").read_text(errors="replace")))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it ended, or belongs to another user
    return names
