"""A conversion killed at any of its steps, or out of room: the old result or the new one, whole."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bert import convert
from bert.checkpoint import to_original
from bert.configuration import M2BertConfig
from bert.data.tokenizer import train_wordpiece
from bert.modeling import M2BertForMaskedLM
from tests.faults.conftest import Child, kill_before

Fork = Callable[..., Child]
FIELDS = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
LENGTHS = {"max_position_embeddings": 8, "long_conv_l_max": 8, "hyena_filter_order": 4}


@pytest.fixture
def command(tmp_path: Path) -> Callable[[Path], list[str]]:
    """Return a function that gives the arguments of a conversion to a destination."""
    torch.manual_seed(1)
    model = M2BertForMaskedLM(M2BertConfig(**FIELDS, **LENGTHS))
    state = {f"model.{name}": value for name, value in to_original(model).items()}
    torch.save({"state": {"model": state}}, tmp_path / "original.pt")
    model.config.to_json_file(tmp_path / "config.json")
    train_wordpiece(["the cat sat on the mat"] * 9, 60).save_pretrained(tmp_path / "tokenizer")
    source = [str(tmp_path / "original.pt"), "--config", str(tmp_path / "config.json")]
    return lambda out: [*source, str(out), "--tokenizer", str(tmp_path / "tokenizer"), "--overwrite"]


def contents(place: Path) -> dict[str, bytes]:
    if place.is_file():
        return {"": place.read_bytes()}
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def killed_at(step: int, arguments: list[str]) -> int:
    """Convert, in a process of its own that is killed before its file operation `step`, counted from 1."""
    kill_before(step)
    return convert.main(arguments)


@pytest.mark.parametrize("name", ["model.pt", pytest.param("folder", marks=pytest.mark.faults)])
@pytest.mark.parametrize("old", [False, True], ids=["new", "replacing"])
def test_a_conversion_killed_at_any_step(
    command: Callable[[Path], list[str]], tmp_path: Path, fork: Fork, name: str, old: bool
) -> None:
    assert convert.main(command(tmp_path / "whole" / name)) == 0
    whole = contents(tmp_path / "whole" / name)
    place = tmp_path / "out" / name
    # Of a folder, as much as shows that a conversion wrote it.
    before = {"config.json": b"old", "model.safetensors": b"old"} if name == "folder" else {"": b"old"}
    steps = 0
    while True:
        shutil.rmtree(place.parent, ignore_errors=True)
        if old:
            place.parent.mkdir()
            if name == "folder":
                place.mkdir()
            for part, content in before.items():
                (place / part).write_bytes(content)
        code = fork(killed_at, steps + 1, command(place)).wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL
        steps += 1
        if place.exists():
            assert contents(place) == whole or (old and contents(place) == before), f"killed at step {steps}"
        elif old:  # between the renamings of two folders, which no call exchanges
            assert name == "folder"
            kept = [path.parent for path in place.parent.rglob("config.json") if path.read_bytes() == b"old"]
            assert len(kept) == 1 and contents(kept[0]) == before
        assert convert.main(command(place)) == 0
        assert contents(place) == whole
    assert contents(place) == whole
    assert steps >= 3


@pytest.mark.parametrize("name", ["model.pt", "folder"])
def test_a_full_disk_ends_a_conversion(
    command: Callable[[Path], list[str]],
    small_disk: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    disk = small_disk(16)
    assert convert.main(command(disk / name)) == 4
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "make room" in error and "Traceback" not in error
    assert not list(disk.iterdir())
