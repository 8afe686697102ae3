"""Full disks, damaged shards, wrong indices, and remotes that fail: retried, then one message; nothing corrupt kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bert.data.loader_config import DatasetConfig, LoaderConfig
from bert.data.prepare import main as prepare_main
from bert.data.streaming_text import build_data_spec
from bert.errors import DataError
from bert.recipe.train import main
from bert.safe_loading import is_torn, load_checkpoint_file
from tests.bert.recipe.conftest import SEQ_LEN, write_split
from tests.faults.conftest import Child, assert_same, final_state, losses
from tests.faults.object_store import ObjectStore, serving

Fork = Callable[..., Child]
SHARDS = {"size_limit": 700, "hashes": ["xxh64"]}  # twelve samples a shard


def batches(folder: Path, **options: Any) -> list[torch.Tensor]:
    dataset = DatasetConfig(local=str(folder), split="train", **options)
    config = LoaderConfig(dataset=dataset, num_workers=0)
    spec = build_data_spec(config, device_batch_size=8, max_seq_len=SEQ_LEN, seed=0, train=True)
    return [batch["input_ids"] for batch in spec.dataloader]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    write_split(tmp_path / "whole" / "train", 96, 0, **SHARDS)
    return tmp_path / "whole"


def shard(folder: Path, number: int = 3) -> Path:
    return sorted((folder / "train").glob("*.mds"))[number]


# Checkpoints


@pytest.mark.parametrize("stride", [37, pytest.param(1, marks=pytest.mark.faults)])
def test_a_bit_of_a_checkpoint_flipped_anywhere_is_seen_or_does_no_harm(tmp_path: Path, stride: int) -> None:
    """Contents have checksums, the directory at the file's end has none; nor does every reader notice each damage."""
    path = tmp_path / "checkpoint.pt"
    torch.save({"state": {"a": torch.arange(8.0), "b": torch.ones(3, 2)}, "rng": [1, 2.5]}, path)
    whole, good = path.read_bytes(), load_checkpoint_file(path)
    harmless = 0
    for bit in range(0, 8 * len(whole), stride):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        if is_torn(path):
            continue
        harmless += 1
        assert_same(load_checkpoint_file(path), good, f"bit {bit}")
    assert harmless < 8 * len(whole) // stride * 3 // 4
    for length in range(0, len(whole), 8 * stride + 5):
        path.write_bytes(whole[:length])
        assert is_torn(path)


# The disk


@pytest.mark.faults
def test_a_full_disk_ends_preparation_and_it_goes_on_later(
    tmp_path: Path, small_disk: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(200)
    vocabulary, corpus = tmp_path / "vocab.txt", tmp_path / "corpus.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    corpus.write_text("".join("a b " * 20 + "\n" for _ in range(2000)))
    common = ["--source", str(corpus), "--tokenizer", str(vocabulary), "--seq-len", "16", "--text-documents", "line"]
    common += ["--workers", "0", "--part-characters", "20000", "--compression", "none"]
    assert prepare_main([*common, "--out", str(disk / "out")]) == 4
    error = capfd.readouterr().err
    assert "No space left on device" in error and "same command again" in error and "Traceback" not in error
    assert not (disk / "out" / "train" / "metadata.json").exists()
    kept = sorted((disk / "out" / "train").glob("part-*"))
    assert kept
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    assert prepare_main([*common, "--out", str(disk / "out")]) == 0
    assert prepare_main([*common, "--out", str(tmp_path / "out")]) == 0
    for path in (tmp_path / "out").rglob("*.*"):
        if path.is_file() and not path.name.startswith("."):
            assert path.read_bytes() == (disk / "out" / path.relative_to(tmp_path / "out")).read_bytes()


@pytest.mark.faults
@pytest.mark.parametrize("full", ["checkpoints", "log"])
def test_a_full_disk_ends_training_and_it_goes_on_later(
    recipe: Callable[..., Path], tmp_path: Path, small_disk: Callable[[int], Path], fork: Fork, full: str
) -> None:
    disk = small_disk(600 if full == "checkpoints" else 4)
    path = str(recipe(loggers={"jsonl": {"path": str(tmp_path / "logs" / "{run_name}" / "metrics.jsonl")}}))
    command = [path, "max_duration=14ba", "save_interval=2ba", "autoresume=true", "eval_loader=null"]
    where = [f"save_folder={disk}/{{run_name}}"]
    if full == "log":
        where = [f"loggers.jsonl.path={disk}/{{run_name}}/metrics.jsonl"]
    child = fork(main, [*command, *where])
    assert child.wait() == 4
    said = child.log.read_text()
    assert "same command" in said and "Traceback" not in said.split("error: ")[-1]
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    assert fork(main, [*command, *where]).wait() == 0
    assert fork(main, [*command, "run_name=whole"]).wait() == 0
    checkpoints = disk if full == "checkpoints" else tmp_path / "runs"
    assert_same(final_state(checkpoints / "tiny"), final_state(tmp_path / "runs" / "whole"))
    logs = tmp_path / "logs" if full == "checkpoints" else disk
    assert losses(logs / "tiny") == losses(tmp_path / "logs" / "whole")


# Shards and index


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
@pytest.mark.parametrize("remote", [False, True], ids=["local only", "cached"])
def test_a_damaged_shard_is_named_or_fetched_again(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str, remote: bool
) -> None:
    good = batches(whole)
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    damaged = shard(copy)
    content = damaged.read_bytes()
    if damage == "truncated":
        damaged.write_bytes(content[:-40])
    else:
        damaged.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    options = {"validate_hash": "xxh64", **({"remote": str(whole)} if remote else {})}
    if not remote:
        with pytest.raises(DataError, match=rf"{damaged.name}.*damaged.*copy the shard again"):
            batches(copy, **options)
        assert damaged.exists()  # the only copy is never removed
        return
    assert all(torch.equal(a, b) for a, b in zip(batches(copy, **options), good, strict=True))
    assert "fetching it again" in caplog.text
    assert damaged.read_bytes() == content


def test_an_index_that_is_missing_empty_or_anothers(whole: Path, tmp_path: Path) -> None:
    index = whole / "train" / "index.json"
    write_split(tmp_path / "other" / "train", 32, 5, **SHARDS)
    for content in (
        b"",
        b"{}",
        b"[]",
        b'{"version": 2, "shards": []}',
        (tmp_path / "other/train/index.json").read_bytes(),
    ):
        index.write_bytes(content)
        with pytest.raises(DataError, match=r"index"):
            batches(whole)
    index.unlink()
    with pytest.raises(DataError, match=r"no index\.json"):
        batches(whole)


def test_a_cache_read_without_its_remote_keeps_its_shards(tmp_path: Path) -> None:
    """Streaming deletes raw shards whose compressed form is gone, where there is no remote: the only copy."""
    write_split(tmp_path / "remote" / "train", 96, 0, compression="zstd", **SHARDS)
    cache = tmp_path / "cache"
    good = batches(cache, remote=str(tmp_path / "remote"))
    shutil.rmtree(tmp_path / "remote")
    before = {path.name: path.read_bytes() for path in (cache / "train").glob("*.mds")}
    assert len(before) > 3
    assert all(torch.equal(a, b) for a, b in zip(batches(cache), good, strict=True))
    assert {path.name: path.read_bytes() for path in (cache / "train").glob("*.mds")} == before


def test_a_cache_too_small_for_what_is_read_at_a_time_is_refused(whole: Path, tmp_path: Path) -> None:
    largest = max(path.stat().st_size for path in (whole / "train").glob("*.mds"))
    with pytest.raises(DataError, match=r"cache_limit is .* are read at a time.*Raise it") as raised:
        batches(tmp_path / "cache", remote=str(whole), cache_limit=5 * largest, shuffle=True)
    enough = int(str(raised.value).split(" are read")[0].split()[-1].replace(",", ""))
    options = {"remote": str(whole), "cache_limit": enough, "shuffle": True}
    assert len(batches(tmp_path / "cache2", **options)) == 12
    assert len(list((tmp_path / "cache2" / "train").glob("*.mds"))) == len(list((whole / "train").glob("*.mds")))
    with pytest.raises(DataError, match="delete its shards"):
        batches(whole, cache_limit="1mb")
    link = tmp_path / "link"
    link.symlink_to(whole)
    with pytest.raises(DataError, match="streaming would delete its shards"):
        batches(whole, remote=str(link))
    assert len(list((whole / "train").glob("*.mds"))) > 3


# A remote


@pytest.fixture
def store(whole: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    with serving(whole.parent) as server:
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, "us-east-1")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield server


REMOTE = {"remote": "s3://whole", "validate_hash": "xxh64", "download_timeout": 1.0}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("500", marks=pytest.mark.faults),
        pytest.param("stall", marks=pytest.mark.faults),
        "short",
        pytest.param("noise", marks=pytest.mark.faults),
    ],
)
def test_a_remote_that_fails_once_loses_nothing(whole: Path, tmp_path: Path, store: ObjectStore, fault: str) -> None:
    store.faults = {"shard.00003": [fault, "ok"], "metadata.json": [fault if fault != "noise" else "ok", "ok"]}
    got = batches(tmp_path / "cache", **REMOTE)
    assert all(torch.equal(a, b) for a, b in zip(got, batches(whole), strict=True))
    assert len([path for path in store.requests if "shard.00003" in path]) >= 2
    for path in (tmp_path / "cache" / "train").glob("*.mds"):
        assert path.read_bytes() == (whole / "train" / path.name).read_bytes()


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["500", "stall", "short", "noise"])
def test_a_remote_that_keeps_failing_is_an_error_and_nothing_corrupt_stays(
    whole: Path, tmp_path: Path, store: ObjectStore, fault: str
) -> None:
    store.faults = {"shard.00003": [fault]}
    with pytest.raises(DataError, match=r"shard\.00003\.mds' could not be fetched from s3://whole.*start again"):
        batches(tmp_path / "cache", **REMOTE)
    for path in (tmp_path / "cache" / "train").glob("shard*"):
        assert path.read_bytes() == (whole / "train" / path.name).read_bytes()
    assert len([path for path in store.requests if "shard.00003" in path]) >= 2
    store.faults = {}
    got = batches(tmp_path / "cache", **REMOTE)
    assert all(torch.equal(a, b) for a, b in zip(got, batches(whole), strict=True))


@pytest.mark.faults
@pytest.mark.parametrize("name", ["index.json", "metadata.json"])
@pytest.mark.parametrize("fault", ["500", "short", "noise"])
def test_a_damaged_index_or_metadata_of_a_remote_is_not_kept(
    tmp_path: Path, store: ObjectStore, name: str, fault: str
) -> None:
    store.faults = {name: [fault]}
    with pytest.raises(DataError, match=name):
        batches(tmp_path / "cache", **REMOTE)
    store.faults = {}
    assert len(batches(tmp_path / "cache", **REMOTE)) == 12
    assert json.loads((tmp_path / "cache" / "train" / name).read_text())
    assert os.listdir(tmp_path / "cache" / "train")
