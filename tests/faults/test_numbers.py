"""Losses and gradients that are not finite, spikes, and batches that do not fit into memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import State

from bert.composer_models import MaskedLanguageModel
from bert.recipe import train as train_module
from bert.recipe.callbacks import NaNGuard, SkipBatches
from bert.recipe.train import main
from bert.recipe.trainer import Trainer
from tests.faults.conftest import assert_same, final_state, losses

Recipe = Callable[..., Path]


class _Inf(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


def ruin(monkeypatch: pytest.MonkeyPatch, batch: int, what: str) -> dict[int, list[int]]:
    """Let the loss or the gradients of one batch, known by its samples, be ruined; return the ids by batch."""
    seen: dict[int, list[int]] = {}
    original, watched = MaskedLanguageModel.forward, NaNGuard.after_dataloader
    culprit: list[int] = []

    def after_dataloader(self: NaNGuard, state: State, logger: Any) -> None:
        watched(self, state, logger)
        number = state.timestamp.batch.value + 1
        seen[number] = state.batch["sample_ids"].tolist()
        if number == batch and not culprit:
            culprit.extend(seen[number])

    def forward(self: MaskedLanguageModel, given: Any) -> dict[str, torch.Tensor]:
        output = original(self, given)
        if self.training and given["sample_ids"].tolist() == culprit and (given["labels"] >= 0).any():
            loss = output["loss"]
            output["loss"] = _Inf.apply(loss) if what == "gradient" else loss * float(what)
        return output

    monkeypatch.setattr(NaNGuard, "after_dataloader", after_dataloader)
    monkeypatch.setattr(MaskedLanguageModel, "forward", forward)
    return seen


@pytest.mark.parametrize("what", [pytest.param("nan", marks=pytest.mark.faults), "inf", "gradient"])
def test_what_is_not_finite_is_stopped_and_named(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    seen = ruin(monkeypatch, 6, what)
    assert main([str(recipe()), "save_interval=2ba"]) == 3
    message, folder = capsys.readouterr().err, tmp_path / "runs" / "tiny"
    assert "at batch 6" in message and "ep0-ba4-rank0.pt" in message and str(folder / "diverged.json") in message
    assert "rollbacks=1 goes back" in message
    assert ("gradients are not finite" in message) == (what == "gradient")
    written = json.loads((folder / "diverged.json").read_text())
    assert written["batch"] == 6 and written["sample_ids"] == [seen[6]]
    assert not (folder / "ep0-ba6-rank0.pt").exists()


def test_a_rollback_passes_over_the_batch(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [str(recipe()), "save_interval=4ba", "max_duration=10ba"]
    assert main([*command, "run_name=whole"]) == 0
    ruin(monkeypatch, 6, "nan")
    assert main([*command, "run_name=back", "rollbacks=1"]) == 0
    whole, back = (losses(tmp_path / "runs" / name) for name in ("whole", "back"))
    assert list(back) == list(range(1, 11))
    assert [back[batch] for batch in range(1, 6)] == [whole[batch] for batch in range(1, 6)]
    assert back[6] == 0 and back[7] == pytest.approx(whole[7], abs=0.5) and back[7] != whole[7]
    assert "rollback 1 of 1" in caplog.text and "batch 6 is passed over" in caplog.text


@pytest.mark.faults
def test_rollbacks_are_limited(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        original = NaNGuard.batch_end

        def batch_end(self: NaNGuard, state: State, logger: Any) -> None:
            if state.timestamp.batch.value > 3:
                state.total_loss_dict = {"loss/train/total": float("nan")}
            original(self, state, logger)

        patch.setattr(NaNGuard, "batch_end", batch_end)
        assert main([str(recipe()), "save_interval=2ba", "rollbacks=2"]) == 3
    error = capsys.readouterr().err
    assert "at batch 4" in error and "no rollback is left of 2" in error and "rollbacks=1" not in error
    assert main([str(recipe(callbacks={})), "rollbacks=1"]) == 2


@pytest.mark.faults
def test_a_loss_spike_warns(recipe: Recipe, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    ruin(monkeypatch, 9, "3")
    with caplog.at_level(logging.WARNING):
        spike = {"window": 4, "deviations": 3.0}
        assert main([str(recipe(callbacks={"nan_guard": {}, "loss_spike": spike})), "max_duration=11ba"]) == 0
    warnings = [record.getMessage() for record in caplog.records if "the loss is" in record.getMessage()]
    assert len(warnings) == 1 and warnings[0].startswith("batch 9:")


def test_a_batch_that_does_not_fit_is_split(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` needs a GPU. Here its error is raised by the model, and Composer told that it searches for the size."""
    command = [str(recipe()), "max_duration=4ba", "model.config.hidden_dropout_prob=0.0"]
    assert main([*command, "run_name=whole"]) == 0
    original, sizes = MaskedLanguageModel.forward, []

    def forward(self: MaskedLanguageModel, batch: Any) -> dict[str, torch.Tensor]:
        rows = len(batch["input_ids"])
        if self.training:
            sizes.append(rows)
            if rows > 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return original(self, batch)

    class Searching(Trainer):
        def fit(self, *arguments: Any, **named: Any) -> None:
            self.state.auto_microbatching = True
            super().fit(*arguments, **named)

    monkeypatch.setattr(MaskedLanguageModel, "forward", forward)
    monkeypatch.setattr(train_module, "Trainer", Searching)
    assert main([*command, "run_name=split"]) == 0
    assert sizes[:3] == [8, 4, 2] and set(sizes[3:]) == {2}
    whole, split = (losses(tmp_path / "runs" / name) for name in ("whole", "split"))
    assert list(split.values()) == pytest.approx(list(whole.values()), abs=1e-5)


def test_a_batch_passed_over_leaves_the_weights_alone(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "SkipBatches", lambda batches: SkipBatches({3}))
        assert main([str(recipe()), "save_interval=1ba", "max_duration=3ba"]) == 0
    folder = tmp_path / "runs" / "tiny"
    last = final_state(folder)
    (folder / "latest-rank0.pt").unlink()
    (folder / "latest-rank0.pt").symlink_to("ep0-ba2-rank0.pt")
    before = final_state(folder)
    assert_same(last["model"], before["model"])
    moments = [
        [parameter["exp_avg"] for parameter in state["optimizers"]["DecoupledAdamW"]["state"].values()]
        for state in (last, before)
    ]
    assert_same(*moments)
