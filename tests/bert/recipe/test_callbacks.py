"""Callbacks and the JSONL logger on a state made by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from composer.callbacks import CheckpointSaver
from composer.core import Event, Time, Timestamp
from composer.devices import DeviceCPU
from composer.loggers import Logger
from composer.utils import create_interval_scheduler

from bert.errors import CheckpointError
from bert.recipe.callbacks import (
    GradientBuffers,
    LossCurve,
    NaNGuard,
    RandomStateOnResume,
    RecipeRecord,
    TrainingDivergedError,
    check_record,
    finite_only,
)
from bert.recipe.loggers import JsonlLogger

LOGGER = cast(Logger, None)  # none of these callbacks logs through it


def state(batch: int = 1, loss: float = 1.0, **changes: Any) -> Any:
    previous = Timestamp(batch=batch - 1) if batch else None
    values = {
        "timestamp": Timestamp(batch=batch, sample=batch * 8, token=batch * 128),
        "previous_timestamp": previous,
        "total_loss_dict": {"loss/train/total": loss},
        "callbacks": [],
        "model": torch.nn.Linear(2, 2),
        "device": DeviceCPU(),
        "run_name": "run",
        "max_duration": Time(100, "ba"),
        "get_elapsed_duration": lambda: Time(batch / 100, "dur"),
        "eval_metrics": {},
        "batch": {},
        **changes,
    }
    return SimpleNamespace(**values)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_nan_guard_names_batch_and_last_checkpoint(loss: float) -> None:
    saver = CheckpointSaver("folder")
    saver.all_saved_checkpoints_to_timestamp = {"a.pt": Timestamp(), "b.pt": Timestamp()}
    with pytest.raises(TrainingDivergedError, match=r"batch 7: loss/train/total is .*the last checkpoint is b\.pt"):
        NaNGuard().batch_end(state(7, loss, callbacks=[saver]), LOGGER)
    with pytest.raises(TrainingDivergedError, match="no checkpoint was saved"):
        NaNGuard().batch_end(state(7, loss), LOGGER)


def test_nan_guard_lets_finite_losses_pass() -> None:
    NaNGuard().batch_end(state(1, 1e30), LOGGER)
    NaNGuard().batch_end(state(1, total_loss_dict=None), LOGGER)


def test_weights_that_are_not_finite_are_not_saved() -> None:
    due = finite_only(create_interval_scheduler("4ba"))
    good, bad = state(4), state(8)
    with torch.no_grad():
        bad.model.bias[1] = float("nan")
    assert due(good, Event.BATCH_CHECKPOINT)
    assert not due(state(5, model=bad.model), Event.BATCH_CHECKPOINT)  # not due, so not looked at
    with pytest.raises(TrainingDivergedError, match=r"batch 8: weights are not finite.*the first is bias"):
        due(bad, Event.BATCH_CHECKPOINT)


def test_check_record_lists_what_differs() -> None:
    record = {"model": {"name": "m2_bert", "config": {"hidden_size": 8, "w": 1}}, "tokenizer_fingerprint": "a"}
    check_record(record, record, "x.pt")
    check_record({}, {"tokenizer_fingerprint": "a"}, "x.pt")
    other = {**record, "model": {"name": "hf_bert", "config": {"hidden_size": 8, "v": 2}}}
    with pytest.raises(CheckpointError) as raised:
        check_record(record, other, "x.pt")
    lines = str(raised.value).splitlines()
    assert lines[1:4] == [
        "  model.config.v: None there, 2 here",
        "  model.config.w: 1 there, None here",
        "  model.name: m2_bert there, hf_bert here",
    ]
    with pytest.raises(
        CheckpointError, match=r"x\.pt was trained with another tokenizer \(fingerprint a, the data's is b"
    ):
        check_record(record, {**record, "tokenizer_fingerprint": "b"}, "x.pt")


def test_recipe_record_travels_and_refuses() -> None:
    stored = RecipeRecord({"model": {"name": "a"}, "tokenizer_fingerprint": "t"}).state_dict()
    RecipeRecord({"model": {"name": "a"}, "tokenizer_fingerprint": "t"}).load_state_dict(stored)
    with pytest.raises(CheckpointError, match="another model"):
        RecipeRecord({"model": {"name": "b"}, "tokenizer_fingerprint": "t"}).load_state_dict(stored)


@pytest.mark.parametrize("event", ["epoch_start", "after_dataloader"])
def test_random_state_goes_back_once(event: str) -> None:
    torch.manual_seed(1)
    saved = RandomStateOnResume().state_dict()
    expected = torch.rand(3)
    resumed = RandomStateOnResume()
    resumed.load_state_dict(saved)
    torch.manual_seed(2)
    getattr(resumed, event)(None, LOGGER)
    assert torch.equal(torch.rand(3), expected)
    getattr(resumed, event)(None, LOGGER)
    assert not torch.equal(torch.rand(3), expected)


def curve_points(curve: LossCurve) -> dict[str, Any]:
    return json.loads(curve.state_dict()["points"])


def test_loss_curve_keeps_points_draws_and_resumes(tmp_path: Path) -> None:
    path = tmp_path / "{run_name}" / "loss.png"
    curve = LossCurve(str(path), unigram_entropy=3.0)
    curve.batch_end(state(1, 4.0), LOGGER)
    metrics = {
        "eval": {"MaskedCrossEntropy": SimpleNamespace(compute=lambda: torch.tensor(2.5)), "MaskedAccuracy": None}
    }
    curve.eval_end(state(1, eval_metrics=metrics), LOGGER)
    drawn = tmp_path / "run" / "loss.png"
    first = drawn.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert [p.name for p in drawn.parent.iterdir()] == ["loss.png"]
    resumed = LossCurve(str(path))
    resumed.load_state_dict(curve.state_dict())
    resumed.batch_end(state(2, 3.0), LOGGER)
    assert curve_points(resumed) == {"train": [[1, 4.0], [2, 3.0]], "evaluation": [[1, 2.5]], "stride": 1}
    resumed.fit_end(state(2), LOGGER)
    assert drawn.read_bytes() != first


def test_loss_curve_thins_its_points_evenly(tmp_path: Path) -> None:
    curve = LossCurve(str(tmp_path / "loss.png"), max_points=8)
    for batch in range(1, 41):
        curve.batch_end(state(batch, float(batch)), LOGGER)
    batches = [point[0] for point in curve_points(curve)["train"]]
    assert len(batches) <= 8
    assert len({b - a for a, b in itertools.pairwise(batches)}) == 1
    assert batches[-1] >= 36


def test_jsonl_has_a_line_a_batch_and_none_twice_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"

    def run(first: int, last: int) -> None:
        logger = JsonlLogger(str(path))
        logger.fit_start(state(first - 1), LOGGER)
        for batch in range(first, last + 1):
            logger.log_metrics({"loss": torch.tensor(0.5) * batch})
            logger.log_metrics({"lr": 0.1, "time/batch": batch - 1})
            logger.batch_end(state(batch), LOGGER)
            if batch == 2:
                logger.log_metrics({"metrics/eval/x": 1})
                logger.eval_end(state(batch), LOGGER)
        logger.close(state(last), LOGGER)

    run(1, 4)
    whole = path.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [(line["event"], line["batch"]) for line in lines] == [
        ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("train", 4)
    ]  # fmt: skip
    assert lines[0] == {"event": "train", "batch": 1, "sample": 8, "token": 128, "loss": 0.5, "lr": 0.1}
    assert lines[2] == {"event": "eval", "batch": 2, "sample": 16, "token": 256, "metrics/eval/x": 1}
    path.write_text(whole + '{"torn": ')
    run(3, 4)
    assert path.read_text() == whole
    run(1, 4)
    assert path.read_text() == whole


def test_gradients_keep_their_memory_and_add_up() -> None:
    """Composer takes gradients away before a batch; two microbatches then add up, where the last batch's were too."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2).double())
    model[0].bias.requires_grad_(False)
    callback, addresses = GradientBuffers(), []
    for _ in range(2):
        microbatches = torch.randn(2, 4, 3)
        model.zero_grad(set_to_none=True)
        whole = torch.autograd.grad(
            model[1](model[0](microbatches.flatten(0, 1)).double()).square().sum(),
            [p for p in model.parameters() if p.requires_grad],
        )
        for microbatch in microbatches:
            callback.before_forward(state(model=model), LOGGER)
            model[1](model[0](microbatch).double()).square().sum().backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        torch.testing.assert_close(found, list(whole))
        addresses.append([gradient.data_ptr() for gradient in found])
    assert addresses[0] == addresses[1]
    assert model[0].bias.grad is None


def test_gradients_stay_in_their_memory_when_a_layer_is_frozen() -> None:
    """As Composer's layer freezing does it: no longer in the optimizer, so that its gradient is never taken away."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    callback, addresses = GradientBuffers(), []
    for _ in range(2):
        model[1].zero_grad(set_to_none=True)
        inputs = torch.randn(4, 3)
        exact = torch.autograd.grad(model(inputs).square().sum(), list(model[1].parameters()))
        callback.before_forward(state(model=model), LOGGER)
        model(inputs).square().sum().backward()
        found = [p.grad for p in model[1].parameters() if p.grad is not None]
        torch.testing.assert_close(found, list(exact))
        addresses.append([gradient.data_ptr() for gradient in found])
        model[0].requires_grad_(False)
    assert addresses[0] == addresses[1]
