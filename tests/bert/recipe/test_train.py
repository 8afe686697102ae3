"""Whole runs through `main` on the CPU: they learn, stop, resume and divide as they should."""

from __future__ import annotations

import json
import logging
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import composer
import pytest
import torch
from composer.core import State
from filelock import FileLock

from bert.composer_models import MaskedLanguageModel
from bert.errors import RecipeError
from bert.recipe import builders, resume
from bert.recipe import train as train_module
from bert.recipe.callbacks import NaNGuard
from bert.recipe.optim import DecoupledAdamW
from bert.recipe.schema import TrainConfig, load_config
from bert.recipe.train import main, train
from monarch_mixer.kernels import kernels_enabled
from tests.bert.recipe.conftest import write_split

SEQ_LEN = 16

Recipe = Callable[..., Path]


def lines(folder: Path, event: str = "train") -> list[dict]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["event"] == event]


def write_metadata(folder: Path, **changes: object) -> None:
    path = folder / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def losses(folder: Path) -> dict[int, float]:
    return {line["batch"]: line["loss/train/total"] for line in lines(folder)}


def stop_at(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Let the run die after `batch` batches, as if it were killed there."""
    original = NaNGuard.batch_end

    def batch_end(self: NaNGuard, state: State, logger: object) -> None:
        original(self, state, logger)  # type: ignore[arg-type]
        if state.timestamp.batch.value == batch:
            raise KeyboardInterrupt

    monkeypatch.setattr(NaNGuard, "batch_end", batch_end)


def test_a_run_learns_and_leaves_what_it_promises(recipe: Recipe, tmp_path: Path) -> None:
    callbacks = {"nan_guard": {}, "lr_monitor": {}, "loss_curve": {}, "speed_monitor": {"window_size": 2}}
    path = recipe(callbacks=callbacks)
    assert main([str(path), "max_duration=24ba", "eval_interval=12ba", "optimizer.lr=0.05"]) == 0
    folder = tmp_path / "runs" / "tiny"
    by_batch = losses(folder)
    assert list(by_batch) == list(range(1, 25))
    assert sum(by_batch[b] for b in range(20, 25)) < sum(by_batch[b] for b in range(1, 6)) - 2.0
    last = lines(folder)[-1]
    assert (last["sample"], last["token"]) == (24 * 8, 24 * 8 * SEQ_LEN)
    assert last["lr-DecoupledAdamW/group0"] == pytest.approx(0.05 * (1 - 0.98 * 21 / 22))  # of batch 23, from 0
    assert last["throughput/tokens_per_sec"] > 0
    evaluations = lines(folder, "eval")
    assert [line["batch"] for line in evaluations] == [12, 24]
    assert evaluations[1]["metrics/eval/MaskedCrossEntropy"] < evaluations[0]["metrics/eval/MaskedCrossEntropy"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert load_config(folder / "recipe.yaml") == load_config(
        path, ["max_duration=24ba", "eval_interval=12ba", "optimizer.lr=0.05"]
    )
    assert (folder / "latest-rank0.pt").resolve().name == "ep1-ba24-rank0.pt"


@pytest.mark.parametrize(
    ("save_interval", "killed_at"), [("4ba", 6), ("12ba", 14)], ids=["mid-epoch", "between-epochs"]
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(
    recipe: Recipe, tmp_path: Path, save_interval: str, killed_at: int
) -> None:
    arguments = [str(recipe()), f"save_interval={save_interval}", "max_duration=18ba", "autoresume=true"]
    assert main([*arguments, "run_name=whole"]) == 0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, killed_at)
        main([*arguments, "run_name=stopped"])
    stopped = tmp_path / "runs" / "stopped"
    assert max(losses(stopped)) < 18
    assert main([*arguments, "run_name=stopped"]) == 0
    assert losses(stopped) == losses(tmp_path / "runs" / "whole")
    log = (stopped / "metrics.jsonl").read_text()
    assert main([*arguments, "run_name=stopped"]) == 0  # it is finished: nothing to do
    assert (stopped / "metrics.jsonl").read_text() == log
    assert lines(stopped, "eval")[-1].keys() == lines(tmp_path / "runs" / "whole", "eval")[-1].keys()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_run_leaves_no_workers_behind(recipe: Recipe, stopped: bool) -> None:
    """Python would end them at its own end, and they take a minute then (`_start_worker`)."""
    before = set(multiprocessing.active_children())
    workers = ["train_loader.num_workers=2", "eval_loader.num_workers=1", "max_duration=4ba", "eval_interval=2ba"]
    arguments = [str(recipe()), *workers]
    with pytest.MonkeyPatch.context() as patch:
        seen: list[int] = []
        original = NaNGuard.batch_end

        def batch_end(self: NaNGuard, state: State, logger: object) -> None:
            original(self, state, logger)  # type: ignore[arg-type]
            seen.append(len(set(multiprocessing.active_children()) - before))
            if stopped and len(seen) == 3:
                raise KeyboardInterrupt

        patch.setattr(NaNGuard, "batch_end", batch_end)
        if stopped:
            with pytest.raises(KeyboardInterrupt):
                main(arguments)
        else:
            assert main(arguments) == 0
    assert seen[-1] == 3
    assert not set(multiprocessing.active_children()) - before


def test_microbatches_do_not_change_the_loss(recipe: Recipe, tmp_path: Path) -> None:
    path = str(recipe())
    common = [path, "model.config.hidden_dropout_prob=0.0", "max_duration=6ba"]
    assert main([*common, "run_name=one"]) == 0
    assert main([*common, "run_name=four", "device_train_microbatch_size=2"]) == 0
    one, four = (losses(tmp_path / "runs" / name) for name in ("one", "four"))
    assert list(one.values()) == pytest.approx(list(four.values()), abs=1e-5)


def test_the_weights_are_updated_before_the_host_reads_the_loss(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in a closure of the optimizer's, as Composer's own trainer does it; the losses are the same ones."""
    closures: list[object] = []
    step = DecoupledAdamW.step

    def watched(self: DecoupledAdamW, closure: Callable[[], object] | None = None) -> object:
        closures.append(closure)
        return step(self, closure)

    monkeypatch.setattr(DecoupledAdamW, "step", watched)
    arguments = [str(recipe()), "max_duration=6ba", "device_train_microbatch_size=2"]
    assert main([*arguments, "run_name=ours"]) == 0
    assert closures == [None] * 6
    monkeypatch.setattr(train_module, "Trainer", composer.Trainer)
    assert main([*arguments, "run_name=composers"]) == 0
    assert len(closures) == 12
    assert None not in closures[6:]
    ours, theirs = (losses(tmp_path / "runs" / name) for name in ("ours", "composers"))
    assert len(ours) == 6
    assert ours == theirs


def test_the_kernels_switch_holds_while_the_model_is_built_and_trained(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[bool]] = {"built": set(), "trained": set()}
    build_model, forward = builders.build_model, MaskedLanguageModel.forward

    def watched_build(config: TrainConfig) -> MaskedLanguageModel:
        seen["built"].add(kernels_enabled())
        return build_model(config)

    def watched_forward(self: MaskedLanguageModel, batch: dict) -> dict[str, torch.Tensor]:
        seen["trained"].add(kernels_enabled())
        return forward(self, batch)

    monkeypatch.setattr(builders, "build_model", watched_build)
    monkeypatch.setattr(MaskedLanguageModel, "forward", watched_forward)
    common = [str(recipe()), "max_duration=2ba", "save_folder=null", "eval_loader=null"]
    for switch, expected in (([], True), (["kernels=false"], False)):
        assert main([*common, *switch]) == 0
        assert seen == {"built": {expected}, "trained": {expected}}
        assert kernels_enabled()
        seen = {"built": set(), "trained": set()}


def test_a_run_without_evaluation_and_without_saving(recipe: Recipe, tmp_path: Path) -> None:
    loggers = {"jsonl": {"path": str(tmp_path / "log.jsonl"), "interval": 2}}
    values = {"eval_loader": None, "save_folder": None, "loggers": loggers, "callbacks": {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main([str(recipe(**values)), "max_duration=4ba"]) == 0
    written = [json.loads(line)["batch"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert written == [2, 4]
    assert not list(tmp_path.rglob("*.pt"))


def test_divergence_stops_the_run_and_spares_the_last_good_checkpoint(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MaskedLanguageModel.loss
    calls = 0

    def loss(self: MaskedLanguageModel, *arguments: object, **named: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        value = original(self, *arguments, **named)  # type: ignore[arg-type]
        return value * float("nan") if calls == 6 else value

    monkeypatch.setattr(MaskedLanguageModel, "loss", loss)
    assert main([str(recipe()), "save_interval=2ba"]) == 3
    message = capsys.readouterr().err
    assert "batch 6" in message and "ep0-ba4-rank0.pt" in message
    folder = tmp_path / "runs" / "tiny"
    assert (folder / "latest-rank0.pt").resolve().name == "ep0-ba4-rank0.pt"
    assert not (folder / "ep0-ba6-rank0.pt").exists()


def test_a_folder_with_checkpoints_is_not_overwritten_silently(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = str(recipe())
    assert main([path, "max_duration=4ba"]) == 0
    log = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text()
    assert main([path, "max_duration=4ba"]) == 2
    assert "autoresume=true" in capsys.readouterr().err
    assert (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text() == log
    assert "starting over" not in caplog.text
    assert main([path, "max_duration=4ba", "save_overwrite=true", "optimizer.lr=0.0"]) == 0
    assert "starting over beside checkpoints (to ep0-ba4-rank0.pt)" in caplog.text
    assert (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text() != log


def test_autoresume_takes_the_newest_whole_checkpoint(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(recipe())
    command = [path, "autoresume=true", "save_interval=2ba"]
    assert main([*command, "max_duration=6ba"]) == 0
    folder = tmp_path / "runs" / "tiny"
    whole = losses(folder)
    (folder / "latest-rank0.pt").unlink()  # killed before Composer's link was made again
    (folder / "ep0-ba6-rank0.pt").unlink()
    torn = folder / "ep0-ba4-rank0.pt"
    content = torn.read_bytes()
    torn.write_bytes(content[:-100])
    assert main([*command, "max_duration=6ba"]) == 0
    assert "torn by a kill, and skipped: ['ep0-ba4-rank0.pt']; going on from ep0-ba2-rank0.pt" in caplog.text
    assert losses(folder) == whole
    assert torn.read_bytes() != content[:-100]  # the run came by again
    flipped = bytearray((folder / "ep0-ba6-rank0.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (folder / "ep0-ba6-rank0.pt").write_bytes(flipped)
    assert main([*command, "max_duration=8ba"]) == 0
    assert "going on from ep0-ba4-rank0.pt" in caplog.text
    for file in folder.glob("ep*.pt"):
        file.write_bytes(b"")
    assert main([*command, "max_duration=2ba"]) == 0
    assert "holds no whole checkpoint" in caplog.text
    assert list(losses(folder)) == [1, 2]


def test_a_run_started_over_goes_on_from_its_own_checkpoints(recipe: Recipe, tmp_path: Path) -> None:
    path = str(recipe())
    assert main([path, "max_duration=8ba"]) == 0
    assert main([path, "max_duration=4ba", "save_overwrite=true", "seed=9"]) == 0
    second = losses(tmp_path / "runs" / "tiny")
    assert main([path, "max_duration=5ba", "autoresume=true", "seed=9"]) == 0  # and not from ep0-ba8-rank0.pt
    assert second.items() <= losses(tmp_path / "runs" / "tiny").items()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("compare", [True, False], ids=["checked-first", "composer-alone"])
def test_nothing_in_a_checkpoint_is_executed(
    recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    compare: bool,
) -> None:
    if not compare:  # as for a checkpoint that Composer downloads
        monkeypatch.setattr(train_module, "check_checkpoint", lambda *arguments, **named: None)
    hostile, trace = tmp_path / "hostile.pt", tmp_path / "executed"
    torch.save({"state": {"model": {}, "callbacks": {}}, "rng": Bomb(trace)}, hostile)
    assert main([str(recipe()), f"load_path={hostile}"]) == 2
    assert "refused" in capsys.readouterr().err
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace)))  # it does go off where it is loaded without care
    assert trace.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_damaged_or_foreign_checkpoint_is_one_message(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    path = tmp_path / "damaged.pt"
    if content is None:
        torch.save({"weights": torch.zeros(2)}, path)
    else:
        path.write_bytes(content)
    assert main([str(recipe()), f"load_path={path}"]) == 2
    assert str(path) in capsys.readouterr().err


def test_a_checkpoint_of_another_model_or_tokenizer_is_refused(
    recipe: Recipe, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recipe())
    assert main([path, "max_duration=4ba"]) == 0
    start = f"load_path={tmp_path}/runs/tiny/latest-rank0.pt"
    other = [path, "run_name=other", start, "max_duration=6ba"]
    assert main([*other, "model.config.hidden_size=24"]) == 2
    assert "model.config.hidden_size: 16 there, 24 here" in capsys.readouterr().err
    assert main([*other, "model.config.num_hidden_layers=3", "load_weights_only=true"]) == 2
    assert "(here alone)" in capsys.readouterr().err
    assert main([*other, "model.config.hidden_dropout_prob=0.0"]) == 2
    assert main([*other, "model.config.hidden_dropout_prob=0.0", "load_weights_only=true"]) == 0
    capsys.readouterr()
    for split in ("train", "validation"):
        write_metadata(data / split, tokenizer_fingerprint="other")
    for weights_only in ("false", "true"):
        assert main([*other, "run_name=third", f"load_weights_only={weights_only}"]) == 2
        assert "another tokenizer" in capsys.readouterr().err


def test_going_on_says_which_settings_changed(recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(recipe())
    assert main([path, "max_duration=4ba"]) == 0
    assert main([path, "max_duration=12ba", "optimizer.lr=0.5", "autoresume=true"]) == 0
    assert "max_duration: 4ba then, 12ba now; optimizer.lr: 0.01 then, 0.5 now" in caplog.text
    caplog.clear()
    last = f"load_path={tmp_path}/runs/tiny/latest-rank0.pt"
    assert main([path, "max_duration=16ba", last]) == 0  # the folder's own last checkpoint, named outright
    assert list(losses(tmp_path / "runs" / "tiny")) == list(range(1, 17))
    assert main([path, "max_duration=20ba", f"load_path={tmp_path}/runs/tiny/ep0-ba8-rank0.pt"]) == 2


def test_a_run_s_folder_is_one_job_s_at_a_time(
    recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resume, "_LOCK_SECONDS", 0)
    folder = tmp_path / "runs" / "tiny"
    command = [str(recipe(autoresume=True)), "save_interval=2ba"]
    assert main([*command, "max_duration=2ba"]) == 0
    with FileLock(folder / ".lock"):
        assert main([*command, "max_duration=4ba"]) == 2
        assert f"another process is training in {folder}" in capsys.readouterr().err
        assert list(losses(folder)) == [1, 2]
        assert main([*command, "max_duration=4ba", "run_name=other"]) == 0
    assert main([*command, "max_duration=4ba"]) == 0
    assert list(losses(folder)) == [1, 2, 3, 4]

    class NoLock(FileLock):
        def acquire(self, *_: object, **__: object) -> None:
            raise OSError("no locks here")

    monkeypatch.setattr(resume, "FileLock", NoLock)  # as some network file systems
    assert main([*command, "max_duration=6ba"]) == 0
    assert "cannot be locked (no locks here)" in caplog.text


def test_that_the_model_comes_compiled_is_no_news(recipe: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "composer.trainer.trainer"):
        assert main([str(recipe(compile={"backend": "eager"})), "max_duration=2ba"]) == 0
        logging.getLogger("composer.trainer.trainer").warning("said afterwards: it is already compiled")
    said = [record.getMessage() for record in caplog.records if record.name == "composer.trainer.trainer"]
    assert said == ["said afterwards: it is already compiled"]


def test_going_on_in_other_data_is_said_and_in_fewer_refused(
    recipe: Recipe, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = str(recipe(autoresume=True))
    assert main([path, "max_duration=8ba"]) == 0
    folder = data / "train"
    for samples, code in ((104, 0), (96, 2), (40, 2)):
        shutil.rmtree(folder)
        write_split(folder, samples, 5)
        caplog.clear()
        assert main([path, "max_duration=16ba"]) == code
        if code == 0:
            assert caplog.text.count("samples: 96 then, 104 now") == 1
        else:  # the run went on in 104
            error = capsys.readouterr().err
            assert f"saved with 104 training samples, and there are {samples} now" in error
    weights = f"load_path={tmp_path}/runs/tiny/latest-rank0.pt"
    assert main([path, "run_name=next", weights, "load_weights_only=true", "max_duration=2ba"]) == 0


def test_weights_only_takes_the_weights_and_starts_at_batch_one(recipe: Recipe, tmp_path: Path) -> None:
    path = str(recipe())
    assert main([path, "max_duration=12ba", "optimizer.lr=0.05"]) == 0
    start = f"load_path={tmp_path}/runs/tiny/latest-rank0.pt"
    arguments = [path, "run_name=next", start, "load_weights_only=true", "max_duration=2ba", "autoresume=true"]
    assert main([*arguments, "model.config.hidden_dropout_prob=0.0"]) == 0
    after = losses(tmp_path / "runs" / "next")
    assert list(after) == [1, 2]
    assert after[1] < losses(tmp_path / "runs" / "tiny")[1] - 0.3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimiser.lr=1"], "did you mean 'optimizer'?"),
        (["data_local=nowhere"], "train_loader: dataset: there is no folder 'nowhere/train'"),
        (["max_seq_len=8"], "samples of 16 tokens"),
        (["model.config.vocab_size=16"], "vocabulary of 40"),
        (["global_train_batch_size=512"], "less than one global batch of 512"),
        (["load_path=nowhere.pt"], "nowhere.pt does not exist"),
        (["device=gpu"], "no CUDA device"),
        (["device=cpu", "parallelism_config={fsdp: {}}"], "parallelism_config needs GPUs"),
        (["lr"], "not 2"),
        (["--lr=3"], "'--lr=3' is not an override"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    if overrides == ["device=gpu"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main([str(recipe()), *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_the_batch_must_divide_by_the_devices(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecipeError, match=r"global_train_batch_size 8 does not divide by the 3 devices.*is 9"):
        train(load_config(recipe()))


def test_a_cpu_run_says_what_it_changes(recipe: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    assert main([str(recipe()), "precision=amp_bf16", "device_train_microbatch_size=auto", "max_duration=1ba"]) == 0
    assert "precision amp_bf16 becomes fp32" in caplog.text
    assert "device_train_microbatch_size auto becomes 8" in caplog.text


def test_the_tokenizer_that_a_recipe_names_is_checked(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    assert main([str(recipe()), f"tokenizer_name={vocabulary}"]) == 2
    assert "made with tokenizer 'toy'" in capsys.readouterr().err


def test_help_lists_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "global_train_batch_size" in text and "samples in an optimizer step" in text


@pytest.mark.parametrize(
    ("compile_", "device_batch", "needed"),
    [("{mode: reduce-overhead}", 8, True), ("{mode: reduce-overhead}", 4, False), ("true", 8, False)],
)
def test_gradients_have_memory_of_their_own_where_graphs_add_them_up(
    recipe: Recipe, compile_: str, device_batch: int, needed: bool
) -> None:
    config = load_config(recipe(), [f"compile={compile_}", "device_train_microbatch_size=4"])
    assert train_module._needs_gradient_buffers(config, device_batch) is needed


def test_compile_auto_is_nothing_on_a_cpu(recipe: Recipe, tmp_path: Path) -> None:
    assert main([str(recipe()), "compile=auto", "max_duration=1ba", "device=cpu"]) == 0
    assert "compile: false" in (tmp_path / "runs" / "tiny" / "recipe.yaml").read_text()
