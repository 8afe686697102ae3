"""Embedding killed, or out of room; the same command again makes the rest and gives the same file."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bert import embed, load
from bert.configuration import M2BertConfig
from bert.data.tokenizer import train_wordpiece
from bert.errors import DataError
from bert.inference import LoadedModel
from bert.modeling import M2BertForMaskedLM
from tests.faults.conftest import Child, kill_before, wait_for

TEXTS = ["the cat sat on the mat", "a dog", "the mat is on the floor and the cat is on the mat", "cat", "a dog ran"]
DOCUMENTS = 300


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
    lengths = {"max_position_embeddings": 32, "long_conv_l_max": 32}
    M2BertForMaskedLM(M2BertConfig(**sizes, **lengths, hyena_filter_order=4)).save_pretrained(tmp_path / "model")
    train_wordpiece(TEXTS * 20, 60).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.faults
def test_embedding_killed(
    folder: Path, tmp_path: Path, fork: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output, whole = tmp_path / "docs.jsonl", tmp_path / "v.parquet", tmp_path / "whole.parquet"
    lines = [json.dumps({"text": f"{TEXTS[i % 5]} {TEXTS[i % 4]}"}) for i in range(DOCUMENTS)]
    source.write_text("\n".join(lines) + "\n")
    model = load(folder, device="cpu")
    embed.embed_file(model, source, whole, chunk=2)
    arguments = [str(folder), "--input", str(source), "--output", str(output), "--chunk", "2", "--device", "cpu"]
    child = fork(embed.main, arguments)
    parts = tmp_path / "v.parquet.parts"
    wait_for(lambda: len(list(parts.glob("part-*"))) >= 5)
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    made = len(list(parts.glob("part-*")))
    assert 5 <= made < DOCUMENTS // 2 and not output.exists()
    encode, encoded = LoadedModel.encode, []

    def counted(self: LoadedModel, texts: list[str], **options: object) -> object:
        encoded.extend(texts)
        return encode(self, texts, **options)

    monkeypatch.setattr(LoadedModel, "encode", counted)
    embed.embed_file(model, source, output, chunk=2)
    assert len(encoded) == DOCUMENTS - 2 * made and not parts.exists()
    assert output.read_bytes() == whole.read_bytes()


def killed_at(step: int, model: LoadedModel, source: Path, output: Path, restart: bool) -> None:
    """Embed, in a process of its own that is killed before its file operation `step`, counted from 1."""
    kill_before(step)
    embed.embed_file(model, source, output, chunk=2, restart=restart)


@pytest.mark.faults
@pytest.mark.parametrize("restart", [False, True], ids=["new", "--restart"])
def test_embedding_killed_at_any_step_mixes_no_models(
    folder: Path, tmp_path: Path, fork: Callable[..., Child], restart: bool
) -> None:
    source, place = tmp_path / "docs.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    first, second = load(folder, device="cpu"), load(folder, device="cpu")
    shutil.copy(first.file, tmp_path / "other.safetensors")
    second.file = tmp_path / "other.safetensors"
    with open(second.file, "ab") as file:
        file.write(b"another")
    with torch.no_grad():
        for parameter in second.network.parameters():
            parameter.mul_(1.5).add_(0.01)
    wanted = {}
    for name, model in (("first", first), ("second", second)):
        embed.embed_file(model, source, tmp_path / f"{name}.npy", chunk=2)
        wanted[name] = (tmp_path / f"{name}.npy").read_bytes()
    assert wanted["first"] != wanted["second"]

    step, refused = 0, 0
    while True:
        step += 1
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        output = place / "v.npy"
        if restart:  # the parts of a run of the same settings that was stopped before its output
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(embed, "_join", stopped)
                embed.embed_file(first, source, output, chunk=2)
        code = fork(killed_at, step, first, source, output, restart).wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL
        shutil.copytree(place, tmp_path / "copy", dirs_exist_ok=False)
        try:
            embed.embed_file(second, source, tmp_path / "copy" / "v.npy", chunk=2)
        except DataError as error:
            assert "model was" in str(error)
            refused += 1
        else:
            assert (tmp_path / "copy" / "v.npy").read_bytes() == wanted["second"], f"killed at step {step}"
        shutil.rmtree(tmp_path / "copy")
        embed.embed_file(first, source, output, chunk=2)
        assert output.read_bytes() == wanted["first"]
        assert {path.name for path in place.iterdir()} <= {"v.npy", "v.npy.json", ".v.npy.lock"}
    assert step > 10 and 0 < refused < step


def stopped(*given: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.faults
@pytest.mark.parametrize("name", ["v.parquet", "v.npy"])
@pytest.mark.parametrize("documents", [20, 6], ids=["in a part", "in the output"])
def test_a_full_disk_keeps_what_was_embedded(
    folder: Path,
    tmp_path: Path,
    small_disk: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
    name: str,
    documents: int,
) -> None:
    disk = small_disk(16)  # the settings and three parts, each of which takes a page
    source, output, parts = tmp_path / "docs.jsonl", disk / name, disk / f"{name}.parts"
    source.write_text("".join(json.dumps({"text": TEXTS[i % 5]}) + "\n" for i in range(documents)))
    command = [str(folder), "--input", str(source), "--chunk", "2", "--device", "cpu", "--output"]
    assert embed.main([*command, str(output)]) == 4
    error = capsys.readouterr().err
    assert "error: " in error and "No space left on device" in error
    assert "make room" in error and "Traceback" not in error
    kept = len(list(parts.glob("part-*")))
    assert 0 < kept <= documents // 2 and (kept == documents // 2) is (documents == 6)
    assert not output.exists() and not list(disk.rglob(".*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
    assert embed.main([*command, str(output)]) == 0
    assert f"{documents - 2 * kept} made now" in capsys.readouterr().out and not parts.exists()
    assert embed.main([*command, str(tmp_path / name)]) == 0
    assert output.read_bytes() == (tmp_path / name).read_bytes()
