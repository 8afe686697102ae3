"""Files that try to run code, to write outside their folder, or to exhaust memory: refused, each with one message."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from streaming import MDSWriter

from bert.convert import read_source
from bert.data.checked_stream import zstd_content_size
from bert.data.loader_config import DatasetConfig, LoaderConfig
from bert.data.streaming_text import build_data_spec
from bert.data.tokenizer import load_tokenizer, train_wordpiece
from bert.errors import CheckpointError, DataError, RecipeError
from bert.recipe.schema import load_config
from bert.recipe.train import main
from bert.safe_loading import check_sharded, load_checkpoint_file
from bert.trained import load_trained, open_model
from tests.bert.recipe.conftest import SEQ_LEN, write_split


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """4 GB of addresses beyond what is in use: whoever believes a header's size fails, and fills no host."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def build(folder: Path) -> object:
    config = LoaderConfig(dataset=DatasetConfig(local=str(folder), split="train"), num_workers=0)
    return build_data_spec(config, device_batch_size=8, max_seq_len=SEQ_LEN, seed=0, train=True)


@pytest.mark.parametrize("where", ["plain", "old", "in a zip", "in a tensor's place"])
def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path: Path, where: str) -> None:
    path, trace = tmp_path / "hostile.pt", tmp_path / "trace"
    content = {"state": {"model": {"weight": Bomb(trace)}}} if "tensor" in where else Bomb(trace)
    if where == "plain":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=where != "old")
    reason = "it has the format of torch before 1.6" if where == "old" else "reading it would run code"
    with pytest.raises(CheckpointError, match=rf"hostile\.pt is refused: {reason}"):
        load_checkpoint_file(path)
    assert not trace.exists()


ITEM_IN_A_TENSOR = b"K\x00G" + struct.pack(">d", 1.0) + b"s."  # tensor[0] = 1.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda pickled: pickled[:-1] + ITEM_IN_A_TENSOR, "items are set in what is no dictionary"),
        (lambda pickled: pickled[:-1] + b"(" + ITEM_IN_A_TENSOR[:-2] + b"u.", "items are set in what is no dictionary"),
        (lambda pickled: pickled.replace(b"K\x04", b"K\x7f"), "storage 0 is smaller than the pickle says"),
        (lambda pickled: pickled.replace(b"FloatStorage", b"DoubleStorage"), "storage 0 is smaller"),
        (lambda pickled: pickled.replace(b"storage", b"starage"), "refers to what is no storage"),
    ],
    ids=["item", "items", "size", "dtype", "reference"],
)
def test_what_torch_would_believe_of_a_pickle_is_looked_at(
    tmp_path: Path, change: Callable[[bytes], bytes], reason: str
) -> None:
    """CVE-2026-24747: before 2.10, torch's own safe loading corrupts memory on these."""
    torch.save(torch.zeros(4), tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            changed = change(content) if name.endswith("data.pkl") else content
            assert changed != content or not name.endswith("data.pkl")
            bad.writestr(name, changed)
    assert torch.equal(load_checkpoint_file(tmp_path / "good.pt"), torch.zeros(4))
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint_file(tmp_path / "bad.pt")


@pytest.mark.parametrize("clean_first", [True, False])
def test_a_second_pickle_under_the_same_name_in_capitals_is_refused(tmp_path: Path, clean_first: bool) -> None:
    """Torch's reader of archives takes capitals for small letters; the pickle looked at must be the one read."""
    torch.save(torch.zeros(4), tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            if not name.endswith("data.pkl"):
                bad.writestr(name, content)
                continue
            pair = [(name, content), (name.replace("data.pkl", "DATA.PKL"), content[:-1] + ITEM_IN_A_TENSOR)]
            for entry in pair if clean_first else pair[::-1]:
                bad.writestr(*entry)
    with pytest.raises(CheckpointError, match="two parts of one name"):
        load_checkpoint_file(tmp_path / "bad.pt")


def test_an_archive_that_begins_within_the_file_is_refused(tmp_path: Path) -> None:
    """Zipfile would count from there, torch from the beginning of the file: they would read different parts."""
    torch.save(torch.zeros(4), tmp_path / "good.pt")
    (tmp_path / "bad.pt").write_bytes(bytes(64) + (tmp_path / "good.pt").read_bytes())
    assert zipfile.is_zipfile(tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="does not begin where the file does"):
        load_checkpoint_file(tmp_path / "bad.pt")


def test_the_metadata_of_a_sharded_checkpoint_are_looked_at(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"model": {"weight": torch.zeros(4, 4), "half": torch.ones(3).bfloat16()}, "rng": [1, "x"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.checkpoint.save(content, checkpoint_id=tmp_path / "good", no_dist=True)
    check_sharded(tmp_path / "good")
    trace = tmp_path / "trace"
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    (tmp_path / "bad" / ".metadata").write_bytes(pickle.dumps(Bomb(trace)))
    assert main([str(recipe()), f"load_path={tmp_path}/bad"]) == 2
    assert "reading it would run code" in capsys.readouterr().err and not trace.exists()


@pytest.mark.parametrize(
    "record",
    [
        "{",
        "[]",
        '{"model": {}}',
        '{"model": [], "recipe": "a: 1"}',
        '{"model": {}, "recipe": "a: [b"}',
        "ALIASES",
        None,
    ],
)
def test_a_record_in_a_checkpoint_is_read_or_refused(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], record: str | None
) -> None:
    if record == "ALIASES":
        lines = ["a0: &a0 [1,1,1,1,1,1,1,1,1]"]
        lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
        record = json.dumps({"model": {}, "recipe": "\n".join(lines)})
    callbacks = {"RecipeRecord": {} if record is None else {"record": record}}
    torch.save({"state": {"model": {}, "callbacks": callbacks}, "rng": []}, tmp_path / "bad.pt")
    assert main([str(recipe()), f"load_path={tmp_path}/bad.pt"]) == 2
    assert "its record of what made it cannot be read" in capsys.readouterr().err


def test_a_checkpoint_that_unpacks_to_more_than_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    torch.save({"weight": torch.zeros(4)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in good.infolist():
            bomb.writestr(entry.filename, b"\0" * (1 << 24) if "/data/" in entry.filename else good.read(entry))
    with pytest.raises(CheckpointError, match="larger than the file"):
        load_checkpoint_file(path)


def test_safetensors_that_claim_more_than_they_hold_are_refused(tmp_path: Path) -> None:
    for number, header in enumerate(
        [
            struct.pack("<Q", 1 << 60) + b"{}",
            _safetensors({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
            _safetensors({"w": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}),
        ]
    ):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(header)
        with pytest.raises(CheckpointError, match="not a whole checkpoint"):
            load_checkpoint_file(path)


def _safetensors(header: dict) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "change", [{"hidden_size": 1 << 20}, {"vocab_size": 1 << 40}, {"num_hidden_layers": 1 << 40}], ids=str
)
def test_a_record_that_asks_for_a_huge_model_is_refused(tmp_path: Path, change: dict) -> None:
    config = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 40, **change}
    record = json.dumps({"model": {"name": "m2_bert", "config": config}})
    state = {"model": {"weight": torch.zeros(2)}, "callbacks": {"RecipeRecord": {"record": record}}}
    torch.save({"state": state}, tmp_path / "latest-rank0.pt")
    with pytest.raises(RecipeError):
        load_trained(tmp_path)


@pytest.mark.parametrize("fields", [{"model_type": "m2_bert"}, {"model_type": "bert"}], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 1 << 20},
        {"vocab_size": 1 << 40},
        {"num_hidden_layers": 1 << 40},
        {"max_position_embeddings": 1 << 40},
        {"num_labels": 1 << 40},
        {"hidden_size": 1 << 62},
        {"hidden_size": "16"},
    ],
    ids=str,
)
def test_a_config_json_that_asks_for_a_huge_model_is_refused(tmp_path: Path, fields: dict, change: dict) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 40}
    (tmp_path / "config.json").write_text(json.dumps({**small, "num_attention_heads": 2, **fields, **change}))
    torch.save({"bert.encoder.layers.0.weight": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    for read in (open_model, read_source):
        with pytest.raises(RecipeError):
            read(tmp_path)


def test_weights_that_claim_more_than_they_hold_are_refused(tmp_path: Path) -> None:
    """One number, as a matrix of 2^40: to copy it would take all memory."""
    torch.save({"bert.x": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="claim"):
        read_source(tmp_path / "model.pt")


def test_an_archive_is_not_unpacked(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "payload").write_text("written")
    with tarfile.open(tmp_path / "hostile.tar", "w") as archive:
        archive.add(tmp_path / "payload", arcname="../../escaped")
    assert main([str(recipe()), f"load_path={tmp_path}/hostile.tar"]) == 2
    assert "is an archive" in capsys.readouterr().err
    assert not list(tmp_path.parent.rglob("escaped"))


def test_code_in_a_tokenizer_folder_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))
    assert not trace.exists()


def test_templates_of_a_tokenizer_are_not_written_anywhere(tmp_path: Path) -> None:
    """CVE-2026-9856: their names are paths, and saving a copy of the tokenizer follows them."""
    train_wordpiece(["a b c"] * 9, 40).save_pretrained(tmp_path / "hostile")
    path = tmp_path / "hostile" / "tokenizer_config.json"
    templates = [{"name": "default", "template": "x"}, {"name": "../../escaped", "template": "x"}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": templates}))
    load_tokenizer(str(tmp_path / "hostile")).save_pretrained(tmp_path / "copies" / "tokenizer")
    assert not list(tmp_path.rglob("escaped*")) and not list(tmp_path.rglob("*.jinja"))


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch {}']", "!!python/name:os.system", "!evil x"])
def test_tags_in_a_yaml_are_not_followed(tmp_path: Path, tag: str) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "hostile.yaml").write_text(f"run_name: {tag.format(trace)}\n")
    with pytest.raises(RecipeError, match=r"hostile\.yaml cannot be read as YAML"):
        load_config(tmp_path / "hostile.yaml")
    assert not trace.exists()


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1,1,1,1,1,1,1,1,1]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "laughs.yaml").write_text("\n".join(lines))
    with pytest.raises(RecipeError, match="aliases expand to more than"):
        load_config(tmp_path / "laughs.yaml")


def edit_index(folder: Path, **changes: object) -> None:
    path = folder / "train" / "index.json"
    index = json.loads(path.read_text())
    shard = index["shards"][0]
    for name, value in changes.items():
        target = shard["raw_data"] if name in ("basename", "bytes") else shard
        target[name] = value
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"basename": "../../../outside"}, "not inside the dataset's folder"),
        ({"basename": "/etc/passwd"}, "not inside the dataset's folder"),
        ({"basename": 3}, "not inside the dataset's folder"),
        ({"bytes": 1 << 50}, "a file of"),
        ({"bytes": -1}, "a file of"),
        ({"samples": 1 << 60}, "a shard of"),
        ({"samples": -5}, "a shard of"),
        ({"samples": 200_000_000}, "a shard of 200,000,000 samples in"),
        ({"column_encodings": ["pkl"]}, "unsafe type"),
        ({"column_encodings": ["ndarray:uint32"]}, "holds ndarray:uint32"),
        ({"format": "exe"}, "is not the index"),
        ({"version": 3}, "is not the index"),
    ],
    ids=str,
)
def test_an_index_is_not_believed(tmp_path: Path, changes: dict, message: str) -> None:
    write_split(tmp_path / "train", 16, 0)
    edit_index(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        build(tmp_path)


def test_a_shard_whose_header_claims_more_than_a_shard_can_hold(tmp_path: Path) -> None:
    assert zstd_content_size(b"\x28\xb5\x2f\xfd\xe0" + (1 << 45).to_bytes(8, "little") + bytes(8)) == 1 << 45
    with MDSWriter(out=str(tmp_path / "mds"), columns={"x": "int"}, compression="zstd") as writer:
        writer.write({"x": 1})
    packed = next((tmp_path / "mds").glob("*.zstd")).read_bytes()
    raw = json.loads((tmp_path / "mds" / "index.json").read_text())["shards"][0]["raw_data"]["bytes"]
    assert zstd_content_size(packed) == raw
    folder = tmp_path / "data"
    write_split(folder / "train", 16, 0)
    index = json.loads((folder / "train" / "index.json").read_text())
    bomb = b"\x28\xb5\x2f\xfd\xe0" + (1 << 45).to_bytes(8, "little") + bytes(32)
    (folder / "train" / "shard.zstd").write_bytes(bomb)
    (folder / "train" / index["shards"][0]["raw_data"]["basename"]).unlink()
    index["shards"][0] |= {"compression": "zstd"}
    index["shards"][0]["zip_data"] = {"basename": "shard.zstd", "bytes": len(bomb), "hashes": {}}
    (folder / "train" / "index.json").write_text(json.dumps(index))
    spec = build(folder)
    with pytest.raises(DataError, match="claims to hold 35,184,372,088,832 bytes"):
        next(iter(spec.dataloader))  # type: ignore[attr-defined]


def test_hostile_metadata_is_one_message(tmp_path: Path) -> None:
    write_split(tmp_path / "train", 16, 0)
    path = tmp_path / "train" / "metadata.json"
    good = json.loads(path.read_text())
    for change in ({"seq_len": "16"}, {"vocab_size": -1}, {"special_token_ids": {"pad": 0}}, {"source": None}):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(DataError, match=next(iter(change))):
            build(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="cannot be read"):
        build(tmp_path)
