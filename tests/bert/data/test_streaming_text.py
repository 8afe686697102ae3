from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from composer import Trainer
from composer.core import Callback
from composer.models import ComposerModel
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from streaming import MDSWriter

from bert.data import shared_memory, streaming_text
from bert.data.loader_config import DatasetConfig, LoaderConfig, StreamConfig, check_metadata, load_metadata
from bert.data.masking import IGNORED_LABEL
from bert.data.metadata import DatasetMetadata
from bert.data.shared_memory import alone_on_this_host, clean_stale_shared_memory
from bert.data.streaming_text import build_data_spec, count_samples, count_tokens, split_batch
from bert.errors import DataError

LENGTH, VOCAB, SAMPLES = 16, 500, 203
SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
FORK = multiprocessing.get_context("fork")


def write_split(folder, *, samples=SAMPLES, layout="concat", seed=0, column="input_ids", compression=None, **changes):
    """Write a prepared split; sample i starts with [CLS] and its own number in two tokens."""
    rng = np.random.default_rng(seed)
    with MDSWriter(
        out=str(folder), columns={column: "ndarray:uint16"}, size_limit=1 << 10, compression=compression
    ) as out:
        for number in range(samples):
            length = LENGTH if layout == "concat" else int(rng.integers(4, LENGTH + 1))
            tokens = rng.integers(5, VOCAB, length).astype(np.uint16)
            tokens[0], tokens[-1] = SPECIAL["cls"], SPECIAL["sep"]
            tokens[1:3] = 5 + number // 400 + 7 * seed, 5 + number % 400
            out.write({column: tokens})
    fields = {
        "layout": layout,
        "seq_len": LENGTH,
        "token_dtype": "uint16",
        "tokenizer_name": "tiny",
        "tokenizer_fingerprint": "abc",
        "vocab_size": VOCAB,
        "special_token_ids": SPECIAL,
        "source": {},
        "num_samples": samples,
        "num_tokens": samples * LENGTH,
        "num_documents": samples,
        "num_skipped_documents": 0,
        "unigram_entropy_nats": 6.0,
    }
    DatasetMetadata(**{**fields, **changes}).save(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_split(root / "train")
    write_split(root / "other", seed=1, samples=60)
    write_split(root / "short", layout="truncate")
    write_split(root / "zipped", compression="zstd")
    return root


def config(root, *, workers=0, persistent_workers=True, drop_last=None, **dataset):
    options = {"local": str(root), "split": "train", "mlm_probability": 0.3, "shuffle": True, **dataset}
    return LoaderConfig(
        dataset=DatasetConfig(**options),
        num_workers=workers,
        persistent_workers=persistent_workers,
        drop_last=drop_last,
    )


def build(root, *, train=True, batch=8, seed=17, **options):
    return build_data_spec(config(root, **options), device_batch_size=batch, max_seq_len=LENGTH, seed=seed, train=train)


def rows(batch):
    """A batch as an array of (ids, mask, labels)."""
    return np.stack([batch[name].numpy() for name in ("input_ids", "attention_mask", "labels")])


def epoch(spec):
    return [rows(batch) for batch in spec.dataloader]


def same(first, second):
    return len(first) == len(second) > 0 and all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def original(batch):
    """Undo the masking: what the shards hold."""
    ids, _, labels = batch
    return np.where(labels == IGNORED_LABEL, ids, labels)


def samples_of(epochs):
    return sorted(tuple(row[1:3]) for batch in epochs for row in original(batch))


# What a batch holds


def test_a_batch_is_padded_masked_and_counted(root):
    batch = next(iter(build(root, split="short", batch=32).dataloader))
    ids, attention, labels = rows(batch)
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "attention_mask", "labels"))
    assert ids.shape == (32, LENGTH)
    lengths = attention.sum(1)
    assert len(set(lengths)) > 3
    for row, length, mask in zip(original((ids, attention, labels)), lengths, attention, strict=True):
        assert mask[:length].all() and not mask[length:].any()
        assert row[0] == SPECIAL["cls"] and row[length - 1] == SPECIAL["sep"]
        assert (row[length:] == SPECIAL["pad"]).all() and (row[1 : length - 1] >= 5).all()
    assert not (labels[np.isin(ids, (0, 2, 3))] != IGNORED_LABEL).any()
    assert type(batch["num_tokens"]) is int and batch["num_tokens"] == attention.sum()
    assert type(batch["num_masked"]) is int and batch["num_masked"] == (labels != IGNORED_LABEL).sum() > 0


def test_each_sample_once_an_epoch(root):
    first = epoch(build(root, drop_last=False))
    assert samples_of(first) == [(5, 5 + number) for number in range(SAMPLES)]
    assert len(epoch(build(root))) == SAMPLES // 8  # the incomplete batch is left out in training
    assert len(epoch(build(root, train=False))[-1][0]) == SAMPLES % 8


def test_microbatches_are_counted_anew(root):
    batch = next(iter(build(root, split="short", batch=10).dataloader))
    parts = split_batch(batch, 4)
    assert [count_samples(part) for part in parts] == [4, 4, 2]
    assert np.array_equal(np.concatenate([rows(part) for part in parts], axis=1), rows(batch))
    assert [count_tokens(part)["total"] for part in parts] == [int(part["attention_mask"].sum()) for part in parts]
    assert sum(count_tokens(part)["loss_generating"] for part in parts) == batch["num_masked"]
    assert len(split_batch(batch, 64)) == 1


def test_a_part_without_masked_tokens_still_weighs_something(root):
    batch = next(iter(build(root, mlm_probability=0.0).dataloader))
    assert count_tokens(batch) == {"total": 8 * LENGTH, "loss_generating": 1}


# The same data for any workers and ranks


@pytest.fixture(scope="module")
def two_epochs(root):
    spec = build(root)
    return epoch(spec), epoch(spec)


@pytest.mark.parametrize(("workers", "persistent"), [(1, False), (2, True), (2, False)])
def test_workers_change_nothing(root, two_epochs, workers, persistent):
    spec = build(root, workers=workers, persistent_workers=persistent)
    assert same(epoch(spec), two_epochs[0])
    assert same(epoch(spec), two_epochs[1])


def _run_rank(rank, world, port, root, connection):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    clean_stale_shared_memory()
    spec = build(root, batch=8 // world, workers=1)
    connection.send((epoch(spec), epoch(spec)))
    connection.recv()


def test_ranks_see_the_same_global_batches(root, two_epochs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [FORK.Pipe() for _ in range(2)]
    ranks = [FORK.Process(target=_run_rank, args=(i, 2, port, root, pipes[i][1])) for i in range(2)]
    for process in ranks:
        process.start()
    try:
        received = [ours.recv() if ours.poll(60) else pytest.fail("a rank hangs") for ours, _ in pipes]
        for ours, _ in pipes:
            ours.send("done")
    finally:
        for process in ranks:
            process.join(5)
            process.kill()
    for expected, first, second in zip(two_epochs, *received, strict=True):
        assert len(first) == len(second) == len(expected)
        for whole, *halves in zip(expected, first, second, strict=True):
            together = np.concatenate(halves, axis=1)
            order = [np.lexsort(original(x).T) for x in (whole, together)]
            assert np.array_equal(whole[:, order[0]], together[:, order[1]])


def test_epochs_differ_in_order_and_masks(root, two_epochs):
    first, second = two_epochs
    assert not np.array_equal(original(first[0]), original(second[0]))
    spec = build(root, shuffle=False)
    first, second = epoch(spec), epoch(spec)
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(original(a), original(b))
        assert not np.array_equal(a[2], b[2])


@pytest.mark.parametrize("workers", [0, 1])
def test_every_evaluation_sees_the_same(root, workers):
    spec = build(root, train=False, shuffle=False, workers=workers)
    first = epoch(spec)
    assert same(epoch(spec), first)
    next(iter(spec.dataloader))  # an evaluation that is cut short
    assert same(epoch(spec), first)


def test_the_seeds_are_the_runs_unless_given(root, two_epochs):
    other = epoch(build(root, seed=18))
    assert not np.array_equal(original(other[0]), original(two_epochs[0][0]))
    assert same(epoch(build(root, seed=18, shuffle_seed=17, mask_seed=17)), two_epochs[0])


# Stop and resume


@pytest.mark.parametrize(("workers", "workers_after"), [(0, 0), (2, 1)])
def test_resuming_gives_exactly_the_remaining_batches(root, two_epochs, workers, workers_after):
    spec = build(root, workers=workers)
    epoch(spec)
    seen = 5
    batches = iter(spec.dataloader)
    for _ in range(seen):
        next(batches)
    state = spec.dataloader.dataset.state_dict(seen * 8, True)  # as Composer asks
    assert state == spec.dataloader.state_dict()

    resumed = build(root, workers=workers_after)
    resumed.dataloader.load_state_dict(state)
    assert same(epoch(resumed), two_epochs[1][seen:])
    third = epoch(resumed)
    del batches
    assert same(epoch(spec), third)
    assert not same(third, two_epochs[0])


class Recorder(ComposerModel):
    """A model that remembers what it was trained on."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Embedding(VOCAB, 1)
        self.seen = []

    def forward(self, batch):
        if self.training:
            self.seen.append(rows(batch))
        return self.layer(batch["input_ids"]).mean()

    def loss(self, outputs, batch):
        return outputs


class Tokens(Callback):
    def batch_end(self, state, logger):
        self.total = int(state.timestamp.token)


def fit(root, folder, duration, load=None):
    model, tokens = Recorder(), Tokens()
    trainer = Trainer(
        model=model,
        train_dataloader=build(root, batch=50),
        eval_dataloader=build(root, batch=50, train=False),
        max_duration=duration,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        device_train_microbatch_size=20,
        accumulate_train_batch_on_tokens=True,
        callbacks=[tokens],
        save_folder=str(folder),
        save_interval="1ba",
        save_filename="batch{batch}.pt",
        save_overwrite=True,
        load_path=None if load is None else str(load),
        progress_bar=False,
        log_to_console=False,
        device="cpu",
    )
    trainer.fit()
    trainer.close()
    return model.seen, tokens.total


def test_composer_trains_in_microbatches_and_resumes_anywhere(root, tmp_path):
    whole, tokens = fit(root, tmp_path / "a", "2ep")
    assert [batch.shape[1] for batch in whole[:4]] == [20, 20, 10, 20]
    assert len(whole) == 2 * 4 * 3
    assert tokens == 2 * 4 * 50 * LENGTH
    for batch in (2, 4, 5):  # within an epoch, at its end, in the second
        resumed, tokens = fit(root, tmp_path / "b", "2ep", load=tmp_path / "a" / f"batch{batch}.pt")
        assert same(resumed, whole[3 * batch :])
        assert tokens == 2 * 4 * 50 * LENGTH


def test_a_checkpoint_between_two_epochs_starts_the_next(root, two_epochs):
    spec = build(root)
    epoch(spec)
    state = spec.dataloader.dataset.state_dict(0, True)  # Composer's number at the end of an epoch
    resumed = build(root)
    resumed.dataloader.load_state_dict(state)
    assert same(epoch(resumed), two_epochs[1])


# Where the shards are


def test_streams_are_mixed_by_proportion(root):
    streams = {
        "a": StreamConfig(local=str(root), split="train", proportion=1.0),
        "b": StreamConfig(local=str(root), split="other", proportion=3.0),
    }
    spec = build(root, local=None, split=None, streams=streams, epoch_size=200, batch=10)
    names = [name for name, _ in samples_of(epoch(spec))]
    assert (names.count(5), names.count(12)) == (50, 150)
    metadata = load_metadata(DatasetConfig(streams=streams))
    assert metadata.num_samples == SAMPLES + 60


def test_a_remote_is_downloaded_with_its_metadata(root, tmp_path, two_epochs):
    cache = tmp_path / "cache"
    spec = build(cache, remote=str(root), workers=1)
    assert same(epoch(spec), two_epochs[0])
    assert DatasetMetadata.load(cache / "train").vocab_size == VOCAB


def test_a_folder_that_was_prepared_again_is_read_again(tmp_path, two_epochs):
    write_split(tmp_path / "train", seed=3)
    assert not same(epoch(build(tmp_path)), two_epochs[0])
    for path in (tmp_path / "train").iterdir():
        path.unlink()
    write_split(tmp_path / "train")
    assert same(epoch(build(tmp_path)), two_epochs[0])


def test_compressed_shards_change_nothing(root, two_epochs):
    assert same(epoch(build(root, split="zipped")), two_epochs[0])


def test_a_cache_limit_changes_nothing(root, tmp_path, two_epochs):
    # Roomy enough that nothing is evicted: streaming can wait for ever where a cache holds only a few shards.
    assert same(epoch(build(tmp_path / "cache", remote=str(root), cache_limit="1mb")), two_epochs[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_is_an_error_and_not_a_short_epoch_or_a_wait(tmp_path, workers):
    write_split(tmp_path / "train")
    spec = build(tmp_path, workers=workers)
    sorted((tmp_path / "train").glob("*.mds"))[3].unlink()
    with pytest.raises((RuntimeError, ValueError)):
        epoch(spec)
    with pytest.raises(DataError, match=r"shard\.00003\.mds' is missing"):
        build(tmp_path)


# Mistakes


def mixture(*shares):
    """Changes of `build`'s options for streams a, b, ... with these shares."""
    streams = {name: StreamConfig(local="/nowhere", **share) for name, share in zip("ab", shares, strict=False)}
    return {"local": None, "streams": streams}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local": "/nowhere"}, "no folder '/nowhere/train'.*python -m bert.data.prepare"),
        ({"split": "trian"}, "no folder.*did you mean 'train'"),
        ({"local": None}, "dataset.local is missing"),
        ({"cache_limit": "10gb"}, "cache_limit.*delete its shards"),
        ({"shuffle_algo": "py1x"}, "shuffle_algo is 'py1x'.*did you mean"),
        ({"batching_method": "no"}, "batching_method is 'no'"),
        ({"partition_algo": "strict"}, "partition_algo is 'strict'.*known"),
        ({"streams": {"a": StreamConfig(local="x")}}, "both streams and local"),
        ({"sampling_method": "ballanced"}, "did you mean 'balanced'"),
        ({"sampling_granularity": 0}, "cannot be read.*sampling_granularity"),
        (mixture({"proportion": 0.5, "choose": 3}), "streams.a has proportion and choose: give one"),
        (mixture({"repeat": 2}, {"proportion": 0.5}), "streams.a has no proportion, and b has one"),
        (mixture({"proportion": 0.5}, {}), "streams.b has no proportion, and a has one"),
        (mixture({"proportion": 0}), "streams.a.proportion is 0: give a positive number"),
        (mixture({"repeat": float("nan")}), "streams.a.repeat is nan: give a positive number"),
        (mixture({"repeat": 2}) | {"epoch_size": 10}, "streams.a counts samples.*a proportion, or none"),
        ({"mlm_probability": 1.3}, "mlm_probability"),
    ],
)
def test_mistakes_say_what_to_do(root, changes, message):
    with pytest.raises(DataError, match=message):
        build(root, **changes)


def test_a_remote_without_metadata_is_refused(root, tmp_path):
    (tmp_path / "remote" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"cannot download .*metadata\.json"):
        build(tmp_path / "cache", remote=str(tmp_path / "remote"))


def test_an_unfinished_folder_is_refused(tmp_path):
    write_split(tmp_path / "train")
    (tmp_path / "train" / "index.json").unlink()
    with pytest.raises(DataError, match=r"no index\.json.*again"):
        build(tmp_path)


def test_other_columns_are_refused(tmp_path):
    write_split(tmp_path / "train", column="tokens")
    with pytest.raises(DataError, match="columns tokens and not input_ids"):
        build(tmp_path)


def test_less_than_one_global_batch_is_refused(root):
    with pytest.raises(DataError, match="203 samples is less than one global batch of 204"):
        build(root, batch=204)
    assert len(epoch(build(root, batch=204, train=False))) == 1


def test_streams_must_agree(root, tmp_path):
    write_split(tmp_path / "b", tokenizer_fingerprint="xyz")
    streams = {"a": StreamConfig(local=str(root), split="train"), "b": StreamConfig(local=str(tmp_path / "b"))}
    with pytest.raises(DataError, match=r"streams\.b and dataset\.streams\.a differ in tokenizer_fingerprint"):
        load_metadata(DatasetConfig(streams=streams))


@pytest.mark.parametrize(
    ("split", "options", "message"),
    [
        ("train", {"max_seq_len": 8}, "samples of 16 tokens .*set max_seq_len: 16"),
        ("train", {"max_seq_len": 32}, "samples of 16 tokens .*set max_seq_len: 16"),
        ("short", {"max_seq_len": 8}, "samples of 16 tokens"),
        ("short", {"max_seq_len": 32}, None),
        ("train", {"max_seq_len": 16, "vocab_size": 499}, "vocab_size of at least 500"),
        ("train", {"max_seq_len": 16, "vocab_size": 512, "tokenizer_fingerprint": "abc"}, None),
        ("train", {"max_seq_len": 16, "tokenizer_fingerprint": "abd"}, "tokenizer 'tiny'.*abc.*abd"),
    ],
)
def test_the_dataset_must_fit_the_model(root, split, options, message):
    metadata = DatasetMetadata.load(root / split)
    if message is None:
        check_metadata(metadata, **options)
        return
    with pytest.raises(DataError, match=message):
        check_metadata(metadata, **options)


def test_the_yaml_schema():
    schema = OmegaConf.structured(LoaderConfig)
    given = {"num_workers": 0, "dataset": {"cache_limit": "5gb", "streams": {"a": {"local": "x", "repeat": 2}}}}
    loaded = OmegaConf.to_object(OmegaConf.merge(schema, given))
    assert loaded.dataset.streams["a"] == StreamConfig(local="x", repeat=2.0)
    assert loaded.dataset.cache_limit == "5gb"
    with pytest.raises(OmegaConfBaseException):
        OmegaConf.merge(schema, {"dataset": {"shufle": True}})


# After a crash


def _hold(root, cache, connection):
    spec = build(cache, remote=str(root))
    next(iter(spec.dataloader))
    connection.send([shm for shm in os.listdir("/dev/shm") if shm.startswith(prefix_of(spec))])
    connection.recv()


def prefix_of(spec):
    return f"{spec.dataloader.dataset._shm_prefix_int:06}_"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="segments are files on Linux only")
def test_what_a_killed_run_left_is_removed_and_a_living_run_keeps_its_own(root, tmp_path):
    ours, theirs = FORK.Pipe()
    holder = FORK.Process(target=_hold, args=(root, tmp_path / "cache", theirs))
    holder.start()
    try:
        segments = ours.recv() if ours.poll(60) else pytest.fail("the holder hangs")
        assert len(segments) >= 5
        assert not set(clean_stale_shared_memory()) & set(segments)
        assert set(segments) <= set(os.listdir("/dev/shm"))
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
    assert set(segments) <= set(clean_stale_shared_memory())
    assert not set(segments) & set(os.listdir("/dev/shm"))
    assert len(epoch(build(tmp_path / "cache", remote=str(root)))) == SAMPLES // 8


def test_locks_go_with_their_numbers_segments(tmp_path):
    names = [f"{number}_{kind}_filelock" for number in ("000000", "000001", "1234567") for kind in ("barrier", "cache")]
    temporary, segments, processes = (tmp_path / name for name in ("tmp", "shm", "proc"))
    for folder in (temporary, segments, processes / "12"):
        folder.mkdir(parents=True)
    for name in (*names, "000002_other_filelock", "streaming-start.lock"):
        (temporary / name).touch()
    (segments / "000001_locals").touch()
    (processes / "12" / "maps").write_text(f"7f00-7f01 rw-s 0 00:19 5    {segments}/000001_locals\n")
    assert clean_stale_shared_memory(str(segments), str(processes), str(temporary)) == []
    left = {"000001_barrier_filelock", "000001_cache_filelock", "000002_other_filelock", "streaming-start.lock"}
    assert set(os.listdir(temporary)) == left
    (processes / "12" / "maps").unlink()  # it was killed
    assert clean_stale_shared_memory(str(segments), str(processes), str(temporary)) == ["000001_locals"]
    assert set(os.listdir(temporary)) == left  # not at once
    assert clean_stale_shared_memory(str(segments), str(processes), str(temporary)) == []
    assert set(os.listdir(temporary)) == {"000002_other_filelock", "streaming-start.lock"}


def test_only_segments_of_streaming_are_candidates(tmp_path):
    for name in ("000000_locals", "000012_resume", "000000_other", "x000000_locals", "sem.000000_locals"):
        (tmp_path / name).touch()
    processes = tmp_path / "proc"
    (processes / "12").mkdir(parents=True)
    (processes / "12" / "maps").write_text(f"7f00-7f01 rw-s 0 00:19 5    {tmp_path}/000000_locals\n")
    assert clean_stale_shared_memory(str(tmp_path), str(processes), str(tmp_path)) == ["000012_resume"]
    assert (tmp_path / "000000_locals").exists() and (tmp_path / "000000_other").exists()


def test_a_number_that_another_job_still_holds_in_part_is_passed_over(root, monkeypatch):
    """Streaming takes the highest number that is free by one of its segments; by another one it may not be."""
    original, calls = streaming_text.StreamingTextDataset.__init__, []

    def taken_at_first(self, **options):
        calls.append(1)
        original(self, **options)  # writes weights into its streams
        if len(calls) < 3:
            raise FileExistsError(17, "File exists", "/000001_locals")

    monkeypatch.setattr(streaming_text.StreamingTextDataset, "__init__", taken_at_first)
    spec = build(root)
    assert next(iter(spec.dataloader))["input_ids"].shape == (8, LENGTH) and len(calls) == 3


def test_jobs_that_start_at_once_choose_different_numbers(root, monkeypatch):
    monkeypatch.setattr(streaming_text, "_REGISTRATIONS", 1)
    go, numbers = FORK.Barrier(6), FORK.Queue()
    jobs = [FORK.Process(target=_start_with_others, args=(root, go, numbers)) for _ in range(6)]
    for job in jobs:
        job.start()
    assert len({numbers.get(timeout=60) for _ in jobs}) == 6
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0


def _start_with_others(root, go, numbers):
    go.wait(60)
    spec = build(root)
    numbers.put(spec.dataloader.dataset._shm_prefix_int)
    go.wait(60)  # its shared memory stays until all have theirs


def test_a_job_that_never_starts_does_not_stop_others(root, monkeypatch, caplog):
    monkeypatch.setattr(shared_memory, "_SECONDS_ALONE", 0)
    with alone_on_this_host():
        assert next(iter(build(root).dataloader))["input_ids"].shape == (8, LENGTH)
    assert "not waiting for it any longer" in caplog.text
