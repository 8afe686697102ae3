from __future__ import annotations

import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from filelock import FileLock
from streaming import StreamingDataset
from transformers import BertTokenizerFast

from bert.data import embedded, part_store
from bert.data.metadata import DatasetMetadata
from bert.data.prepare import PrepareSettings, main, prepare
from bert.data.shared_memory import alone_on_this_host
from bert.errors import DataError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SYLLABLES = [a + b for a in "bdfgklmn" for b in "aeiou"]
SEQ_LEN = 16


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    tokens = [*SPECIAL, ".", ",", *SYLLABLES, *(f"##{s}" for s in SYLLABLES)]
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    draw = random.Random(7)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(200)]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 60))).capitalize() + ". Été, baba!" for _ in range(90)]
    texts[11] = "ba [MASK] da [SEP] ga"  # special tokens that the text itself spells out
    return [*texts[:40], "  ", *texts[40:]]


@pytest.fixture
def settings(tmp_path: Path, vocab: str, documents: list[str]) -> PrepareSettings:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return PrepareSettings(
        [str(corpus)], str(tmp_path / "out"), vocab, seq_len=SEQ_LEN, part_characters=2500, workers=0
    )


def contents(folder: str | Path) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith(".prepare")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def read_back(folder: str | Path) -> list[np.ndarray]:
    with alone_on_this_host():
        dataset = StreamingDataset(local=str(folder), shuffle=False, batch_size=1, validate_hash="xxh64")
    return [dataset[i]["input_ids"] for i in range(len(dataset))]


def test_concat_is_the_token_stream_cut_into_windows(
    settings: PrepareSettings, vocab: str, documents: list[str]
) -> None:
    metadata = prepare(settings)
    tokenizer = BertTokenizerFast(vocab_file=vocab)
    stream: list[int] = []
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        stream += [*ids, tokenizer.sep_token_id] if ids else []
    body = SEQ_LEN - 1
    windows = [[tokenizer.cls_token_id, *stream[i : i + body]] for i in range(0, len(stream) - body + 1, body)]

    samples = read_back(Path(settings.out) / "train")
    assert [sample.tolist() for sample in samples] == windows
    assert {(sample.dtype, sample.shape) for sample in samples} == {(np.dtype("uint16"), (SEQ_LEN,))}
    assert len(list((Path(settings.out) / "train").glob("part-*"))) > 3, "the corpus must span several parts"
    counts = Counter(token for window in windows for token in window)
    for special in tokenizer.all_special_ids:
        counts.pop(special, None)
    shares = [count / counts.total() for count in counts.values()]
    assert metadata.unigram_entropy_nats == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert (metadata.num_samples, metadata.num_tokens) == (len(windows), len(windows) * SEQ_LEN)
    assert (metadata.num_documents, metadata.num_skipped_documents) == (len(documents) - 1, 1)
    assert metadata == DatasetMetadata.load(Path(settings.out) / "train")
    assert metadata.special_token_ids == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}


@pytest.mark.parametrize("max_chars", [None, 20])
def test_truncate_is_one_document_a_sample(
    settings: PrepareSettings, vocab: str, documents: list[str], max_chars: int | None
) -> None:
    metadata = prepare(replace(settings, layout="truncate", max_chars=max_chars))
    tokenizer = BertTokenizerFast(vocab_file=vocab)
    wanted = [
        tokenizer(t[:max_chars], truncation=True, max_length=SEQ_LEN)["input_ids"] for t in documents if t.strip()
    ]
    samples = [sample.tolist() for sample in read_back(Path(settings.out) / "train")]
    assert samples == wanted
    assert min(map(len, samples)) < SEQ_LEN, "short documents stay short"
    assert metadata.num_tokens == sum(map(len, wanted))


@pytest.mark.parametrize("layout", ["concat", "truncate"])
def test_output_is_the_same_for_any_number_of_workers(
    settings: PrepareSettings, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bert.data.preparation._CHUNK_CHARACTERS", 600)
    prepare(replace(settings, layout=layout))
    for workers in (1, 2):
        out = f"{settings.out}-{workers}"
        prepare(replace(settings, layout=layout, workers=workers, out=out))
        assert contents(out) == contents(settings.out)


def run_until(settings: PrepareSettings, step: int) -> None:
    """Prepare, in a forked process, until it kills itself with -9 at the given file operation."""
    done = 0

    def counted(work):
        def inner(*arguments, **keywords):
            nonlocal done
            done += 1
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*arguments, **keywords)

        return inner

    os.replace = counted(os.replace)
    os.fsync = counted(os.fsync)
    os.unlink = counted(os.unlink)
    part_store.TokenWriter.flush_shard = counted(part_store.TokenWriter.flush_shard)
    prepare(settings)


def test_killed_at_any_step_then_resumed_gives_the_same_bytes(settings: PrepareSettings) -> None:
    settings = replace(settings, part_characters=5000)
    prepare(replace(settings, out=settings.out + "-reference"))
    reference = contents(settings.out + "-reference")
    fork = multiprocessing.get_context("fork")
    codes = []
    for step in itertools.count(1):
        shutil.rmtree(settings.out, ignore_errors=True)
        process = fork.Process(target=run_until, args=(settings, step))
        process.start()
        process.join()
        codes.append(process.exitcode)
        if step % 3 == 0:  # twice in a row
            process = fork.Process(target=run_until, args=(settings, step))
            process.start()
            process.join()
        prepare(settings)
        assert contents(settings.out) == reference, f"killed at step {step}"
        if codes[-1] == 0:
            break
    assert set(codes[:-1]) == {-signal.SIGKILL} and len(codes) > 20


def test_resume_does_not_repeat_whole_parts(settings: PrepareSettings) -> None:
    fork = multiprocessing.get_context("fork").Process(target=run_until, args=(settings, 20))
    fork.start()
    fork.join()
    folder = Path(settings.out) / "train"
    parts = json.loads((folder / "progress.json").read_text(encoding="utf-8"))["parts"]
    shards = [next(folder.glob(f"part-{number:05d}/shard*")) for number in range(parts)]
    before = {path: path.stat().st_mtime_ns for path in shards}
    assert before
    prepare(settings)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items())


@pytest.mark.slow
def test_command_line_killed_and_resumed(settings: PrepareSettings, vocab: str, tmp_path: Path) -> None:
    text = Path(settings.source[0]).read_text(encoding="utf-8") * 60
    Path(settings.source[0]).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "bert.data.prepare", "--source", *settings.source, "--tokenizer", vocab]
    command += ["--seq-len", "16", "--part-characters", "40000", "--workers", "1", "--out", settings.out]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (Path(settings.out) / "train/part-00001").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert not (Path(settings.out) / "train/metadata.json").exists(), "killed too late to show anything"
    assert not psutil.wait_procs(children, timeout=10)[1], "workers must not outlive the main process"
    assert main([*command[3:-3], "0", "--out", settings.out]) == 0
    prepare(replace(settings, part_characters=40000, out=settings.out + "-reference"))
    assert contents(settings.out) == contents(settings.out + "-reference")


def test_other_settings_are_refused_each_by_name(settings: PrepareSettings) -> None:
    prepare(settings)
    before = contents(settings.out)
    with pytest.raises(DataError) as caught:
        prepare(replace(settings, seq_len=32, compression=None))
    assert "seq_len: 16 there, 32 now" in str(caught.value)
    assert "settings.compression: zstd there, None now" in str(caught.value)
    assert "layout" not in str(caught.value)
    with open(settings.source[0], "a", encoding="utf-8") as file:
        file.write('{"text": "ba"}\n')
    with pytest.raises(DataError, match=r"source\.bytes"):
        prepare(settings)
    assert contents(settings.out) == before


def test_other_settings_are_refused_in_an_unfinished_folder(settings: PrepareSettings) -> None:
    with open(settings.source[0], "a", encoding="utf-8") as file:
        file.write("not JSON\n")
    with pytest.raises(DataError, match=r"corpus\.jsonl, line 92: it is not JSON.*--max-broken"):
        prepare(settings)
    with pytest.raises(DataError, match="layout: concat there, truncate now"):
        prepare(replace(settings, layout="truncate"))
    assert prepare(replace(settings, max_broken=1)).num_skipped_documents == 2  # goes on, and counts it


def test_a_finished_folder_is_left_alone(settings: PrepareSettings, caplog: pytest.LogCaptureFixture) -> None:
    metadata = prepare(settings)
    times = {path: path.stat().st_mtime_ns for path in Path(settings.out).rglob("*.*") if path.suffix != ".lock"}
    caplog.set_level(logging.INFO)
    assert prepare(replace(settings, workers=1)) == metadata
    assert "nothing to do" in caplog.text
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in times.items())


def test_a_folder_with_other_files_is_refused(settings: PrepareSettings) -> None:
    (Path(settings.out) / "train").mkdir(parents=True)
    (Path(settings.out) / "train/thesis.tex").write_text("precious", encoding="utf-8")
    with pytest.raises(DataError, match="did not make"):
        prepare(settings)


def test_two_at_once_are_refused_and_a_dead_lock_is_not(settings: PrepareSettings) -> None:
    folder = Path(settings.out) / "train"
    folder.mkdir(parents=True)
    with FileLock(folder / ".prepare.lock"), pytest.raises(DataError, match="another `prepare`"):
        prepare(settings)
    (folder / ".prepare.lock").write_text("12345", encoding="utf-8")
    assert prepare(settings).num_samples > 0


def test_large_vocabularies_are_stored_as_uint32(settings: PrepareSettings, tmp_path: Path) -> None:
    vocab = tmp_path / "large.txt"
    vocab.write_text("\n".join([*SPECIAL, *(f"w{i}" for i in range(70_000))]) + "\n", encoding="utf-8")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i}" for i in range(69_990, 70_000)), encoding="utf-8")
    metadata = prepare(replace(settings, source=[str(text)], tokenizer=str(vocab), seq_len=8))
    (sample,) = read_back(Path(settings.out) / "train")
    assert metadata.token_dtype == "uint32" and sample.dtype == np.uint32
    assert sample.tolist() == [2, *range(69_995, 70_002)]


def test_saved_tokenizer_is_the_one_used(settings: PrepareSettings, vocab: str, documents: list[str]) -> None:
    from bert.data.tokenizer import fingerprint, load_tokenizer

    metadata = prepare(settings)
    saved = load_tokenizer(f"{settings.out}/train/tokenizer")
    assert fingerprint(saved) == metadata.tokenizer_fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "concatenate"}, "did you mean 'concat'"),
        ({"compression": "zst"}, "did you mean 'zstd'"),
        ({"seq_len": 2}, "seq_len is 2"),
        ({"workers": -1}, "workers is -1"),
        ({"split_name": "../x"}, "split_name"),
        ({"seq_len": 100_000}, "gives no sample"),
        ({"source": ["embedded", "x.txt"]}, "stands alone"),
        ({"source": ["."], "out": "new/out"}, "--out 'new/out' lies in the source"),
        ({"source": ["."], "out": "s3://b/x", "staging": "parts"}, "--staging 'parts' lies in the source"),
    ],
)
def test_impossible_settings(settings: PrepareSettings, change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(replace(settings, **change))


class FakeCloud:
    """Stands for streaming's uploader and downloader: a folder for each remote."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fail_on: str | None = None

    def get(self, out: tuple[str, str], keep_local: bool, exist_ok: bool) -> FakeCloud:
        self.local, self.remote = out
        return self

    def path(self, uri: str) -> Path:
        return self.root / uri.removeprefix("s3://")

    def upload_file(self, name: str) -> None:
        if self.fail_on is not None and self.fail_on in name:
            raise ConnectionError("the line went dead")
        target = self.path(f"{self.remote}/{name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(self.local) / name, target)

    def list_objects(self, prefix: str) -> list[str]:
        base = self.path(self.remote)
        return [str(p) for p in base.rglob("*") if str(p).startswith(f"{base}/{prefix}")]

    def direct_download(self, uri: str, local: str) -> None:
        Path(local).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.path(uri), local)


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCloud:
    fake = FakeCloud(tmp_path / "cloud")
    monkeypatch.setattr(part_store, "CloudUploader", fake)
    monkeypatch.setattr(part_store, "CloudDownloader", fake)
    return fake


def test_remote_output(settings: PrepareSettings, cloud: FakeCloud, tmp_path: Path) -> None:
    prepare(settings)
    remote = replace(settings, out="s3://bucket/text", staging=str(tmp_path / "staging"))
    cloud.fail_on = "part-00002"
    with pytest.raises(DataError, match=r"could not be uploaded.*the line went dead"):
        prepare(remote)
    cloud.fail_on = None
    shutil.rmtree(tmp_path / "staging")  # go on from another machine
    metadata = prepare(remote)
    there = contents(tmp_path / "cloud/bucket/text/train")
    assert there.pop("progress.json")
    assert there == contents(Path(settings.out) / "train")
    assert not list((tmp_path / "staging").rglob("*.zstd")), "what is uploaded need not stay"

    shutil.rmtree(tmp_path / "staging")
    assert prepare(remote) == metadata
    with pytest.raises(DataError, match="seq_len"):
        prepare(replace(remote, seq_len=32))
    remote_folder, cache = str(tmp_path / "cloud/bucket/text"), str(tmp_path / "cache")
    with alone_on_this_host():
        dataset = StreamingDataset(remote=remote_folder, local=cache, split="train", batch_size=1)
    assert [s["input_ids"].tolist() for s in dataset] == [s.tolist() for s in read_back(f"{settings.out}/train")]


def test_command_line_prepares_the_embedded_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], documents: list[str]
) -> None:
    corpus = tuple((f"document {i}", text) for i, text in enumerate(documents))
    monkeypatch.setattr(embedded, "_corpus", lambda: corpus)
    command = ["--source", "embedded", "--seq-len", "8", "--workers", "0", "--out", str(tmp_path / "demo")]
    assert main([*command, "--train-tokenizer", "150"]) == 0
    train, validation = (DatasetMetadata.load(tmp_path / "demo" / split) for split in ("train", "validation"))
    assert train.num_documents + validation.num_documents == len(documents) - 1
    assert train.tokenizer_fingerprint == validation.tokenizer_fingerprint
    assert validation.num_samples > 0
    before = contents(tmp_path)
    assert main([*command, "--train-tokenizer", "150"]) == 0
    assert main([*command, "--train-tokenizer", "140"]) == 2
    assert "holds another tokenizer" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_command_line_errors_and_interruption(
    settings: PrepareSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], vocab: str
) -> None:
    command = ["--out", settings.out, "--tokenizer", vocab, "--workers", "0"]
    assert main([*command, "--source", "no/such/file.txt"]) == 2
    error = capsys.readouterr().err
    assert "no/such/file.txt" in error and "hub:" in error and "Traceback" not in error

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bert.data.preparation.ConcatPacker.pack", interrupted)
    assert main([*command, "--source", *settings.source]) == 130
    assert "same command" in capsys.readouterr().err
