"""Processes that are killed, stopped or starved; and what two runs must have in common afterwards."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from bert.safe_loading import load_checkpoint_file
from tests.bert.recipe.conftest import _leave_no_trace, data, recipe

__all__ = ["_leave_no_trace", "data", "recipe"]

SECONDS = 300  # no process of these tests may live longer


def _quietly(log: Path, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In a forked process: output to a file, a session of its own, and the target's result as the exit code."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(descriptor, "w", buffering=1)  # noqa: SIM115  pytest has put its own in their place
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    result = target(*arguments)
    os._exit(result if isinstance(result, int) else 0)


class Child:
    """A function in a forked process, which skips the seconds that importing takes."""

    def __init__(self, log: Path, target: Callable[..., Any], *arguments: Any) -> None:
        self.log = log
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_quietly, args=(log, target, arguments))
        self.process.start()

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = SECONDS) -> int:
        """Wait for the end and return the exit code, negative for a signal; whatever it started ends too."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.end()
            pytest.fail(f"the process did not end within {seconds} s:\n{self.log.read_text()[-3000:]}")
        return self.process.exitcode

    def end(self) -> None:
        if self.process.pid is None or not self.process.is_alive():
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
        self.process.kill()
        self.process.join()


@pytest.fixture
def fork(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Return a function that runs another one in a forked process: `fork(target, *arguments)`."""
    children: list[Child] = []

    def start(target: Callable[..., Any], *arguments: Any) -> Child:
        children.append(Child(tmp_path / "output.txt", target, *arguments))
        return children[-1]

    yield start
    for child in children:
        child.end()


def kill_before(step: int) -> None:
    """Have this process, a forked one, killed before its file operation `step`, counted from 1."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **named)

        return call

    for name in ("replace", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    torch.save = counted(torch.save)
    Path.write_text = counted(Path.write_text)  # type: ignore[method-assign]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that mounts a disk of so many KiB."""
    mounted = []

    def mount(kilobytes: int) -> Path:
        place = tmp_path / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no right to mount a small disk")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=False)


def wait_for(condition: Callable[[], Any], seconds: float = 60.0, pause: float = 0.005) -> Any:
    """Wait until `condition` holds, and return its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(pause)
    pytest.fail(f"waited {seconds} s in vain")


def losses(folder: Path) -> dict[int, float]:
    """The losses of a run by batch; every whole line of its log must be there once."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    train = [line for line in lines if line["event"] == "train"]
    assert len({line["batch"] for line in train}) == len(train)
    return {line["batch"]: line["loss/train/total"] for line in train}


def final_state(folder: Path) -> dict[str, Any]:
    """Weights, optimizer, schedule, place in the data and random state of the last checkpoint."""
    content = load_checkpoint_file(folder / "latest-rank0.pt")
    state = content["state"]
    kept = {name: state[name] for name in ("model", "optimizers", "schedulers", "dataset_state")}
    clock = {name: state["timestamp"]["Timestamp"][name] for name in ("epoch", "batch", "sample", "token")}
    return {**kept, "timestamp": clock, "rng": content["rng"]}


def assert_same(first: Any, second: Any, where: str = "") -> None:
    """Compare nested values bit for bit."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and first.shape == second.shape, where
        assert first.contiguous().view(-1).numpy().tobytes() == second.contiguous().view(-1).numpy().tobytes(), where
    elif isinstance(first, np.ndarray):
        assert first.dtype == second.dtype and first.tobytes() == second.tobytes(), where
    else:
        assert first == second, where
