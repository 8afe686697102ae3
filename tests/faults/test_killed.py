"""Kill -9 at random moments of preparation and training; the same command again loses nothing."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bert.data.preparation import PrepareSettings, prepare
from bert.recipe.train import main
from bert.safe_loading import is_torn
from tests.faults.conftest import Child, assert_same, final_state, losses, wait_for

Fork = Callable[..., Child]

SYLLABLES = [a + b for a in "bdfgklmn" for b in "aeiou"]


@pytest.fixture
def settings(tmp_path: Path) -> PrepareSettings:
    vocabulary = tmp_path / "vocab.txt"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SYLLABLES, *(f"##{s}" for s in SYLLABLES)]
    vocabulary.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    draw = random.Random(7)
    corpus = tmp_path / "corpus.txt"
    lines = (" ".join(draw.choices(SYLLABLES, k=draw.randint(1, 60))) for _ in range(3000))
    corpus.write_text("\n".join(lines), encoding="utf-8")
    source = [str(corpus)]
    common = {"text_documents": "line", "seq_len": 16, "part_characters": 20_000, "workers": 0}
    return PrepareSettings(source, str(tmp_path / "out"), str(vocabulary), **common)  # type: ignore[arg-type]


def contents(folder: str) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith(".prepare")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("tries", [2, pytest.param(50, marks=pytest.mark.faults)])
def test_preparation_killed_at_random_moments(settings: PrepareSettings, fork: Fork, tries: int) -> None:
    whole = replace(settings, out=settings.out + "-whole")
    begin = time.monotonic()
    assert fork(prepare, whole).wait() == 0
    seconds = time.monotonic() - begin
    draw = random.Random(tries)
    begun = 0
    for number in range(tries):
        shutil.rmtree(settings.out, ignore_errors=True)
        child = fork(prepare, settings)
        time.sleep(draw.uniform(0, seconds))
        child.send(signal.SIGKILL)
        child.wait()
        begun += any(Path(settings.out).rglob("part-*"))
        assert fork(prepare, settings).wait() == 0
        assert contents(settings.out) == contents(whole.out), f"try {number}"
    assert begun, "no kill came after work had begun"


ARGUMENTS = ["save_interval=2ba", "max_duration=14ba", "autoresume=true", "save_num_checkpoints_to_keep=2"]


@pytest.mark.parametrize("tries", [2, pytest.param(30, marks=pytest.mark.faults)])
def test_training_killed_at_random_moments(
    recipe: Callable[..., Path], tmp_path: Path, fork: Fork, tries: int, record_property: Callable[..., None]
) -> None:
    command = [str(recipe()), *ARGUMENTS]
    seconds = {}
    for workers in (0, 1) if tries > 2 else (0,):
        begin = time.monotonic()
        assert fork(main, [*command, f"run_name=whole{workers}", f"train_loader.num_workers={workers}"]).wait() == 0
        seconds[workers] = time.monotonic() - begin
    killed = tmp_path / "runs" / "killed"
    draw = random.Random(tries)
    torn = resumed = 0
    for number in range(tries):
        shutil.rmtree(killed, ignore_errors=True)
        workers = number % len(seconds)
        whole = tmp_path / "runs" / f"whole{workers}"
        # Every third one in the middle of writing a checkpoint.
        aimed = killed / f"ep0-ba{draw.choice([4, 6, 8, 10])}-rank0.pt" if number % 3 == 0 else None
        again = [*command, "run_name=killed", f"train_loader.num_workers={workers}"]
        child = fork(main, again)
        if aimed is None:
            time.sleep(draw.uniform(0, seconds[workers]))
        else:
            wait_for(aimed.exists, pause=0)
        child.send(signal.SIGKILL)
        child.wait()
        left = [path for path in killed.glob("ep*.pt") if is_torn(path)]
        torn += bool(left)
        resumed += len(left) < len(list(killed.glob("ep*.pt")))
        assert fork(main, again).wait() == 0
        assert losses(killed) == losses(whole), f"try {number}"
        assert_same(final_state(killed), final_state(whole))
    assert resumed, "no kill came after a whole checkpoint"
    assert torn or tries < 10, "no kill came in the middle of a write"
    record_property("figures", f"{tries} kills, {torn} in the middle of a write, {resumed} after a whole checkpoint")
