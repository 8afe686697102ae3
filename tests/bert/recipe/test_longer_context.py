"""From a run to a run at twice its length, on a mix of lengths, stopped and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bert.composer_models import MaskedLanguageModel
from bert.errors import CheckpointError, RecipeError
from bert.extend_context import extend
from bert.recipe.schema import load_config
from bert.recipe.train import train

from .conftest import SEQ_LEN, write_split
from .test_train import losses, stop_at

MODEL = ["model.config.mask_padding=true", f"model.config.max_position_embeddings={2 * SEQ_LEN}"]


def test_a_run_goes_on_at_twice_its_length(
    recipe: Callable[..., Path], tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, runs = recipe(), tmp_path / "runs"
    train(load_config(path, ["model.config.mask_padding=true", "max_duration=2ba", "save_interval=2ba"]))
    write_split(tmp_path / "long" / "train", 48, 2, seq_len=2 * SEQ_LEN)
    write_split(tmp_path / "long" / "validation", 16, 3, seq_len=2 * SEQ_LEN)
    longer = [
        *MODEL,
        f"model.config.long_conv_l_max={2 * SEQ_LEN}",
        f"max_seq_len={2 * SEQ_LEN}",
        "load_weights_only=true",
        "train_loader.pad_to_longest=true",
        "train_loader.dataset.batching_method=per_stream",
        f"train_loader.dataset.streams.short={{local: {data}, proportion: 0.5}}",
        f"train_loader.dataset.streams.long={{local: {tmp_path / 'long'}, proportion: 0.5}}",
        f"eval_loader.dataset.local={tmp_path / 'long'}",
        "max_duration=6ba",
        "save_interval=3ba",
        "autoresume=true",
    ]
    with pytest.raises(CheckpointError, match=r"for 16 tokens, the recipe's is for 32: python -m bert.extend_context"):
        train(load_config(path, [*longer, f"load_path={runs / 'tiny' / 'latest-rank0.pt'}", "run_name=short"]))
    written = extend(runs / "tiny", 2 * SEQ_LEN, "keep-taps", tmp_path / "extended")
    with pytest.raises(RecipeError, match=r"train_loader.pad_to_longest wants a model that leaves padding out"):
        train(load_config(path, [*longer, "model.config.mask_padding=false", "run_name=unmasked"]))

    widths: list[tuple[int, ...]] = []
    forward = MaskedLanguageModel.forward

    def spying(self: MaskedLanguageModel, batch: dict) -> dict:
        if self.training:
            widths.append(tuple(batch["input_ids"].shape))
            assert batch["attention_mask"].all()  # each batch is of one length
        return forward(self, batch)

    monkeypatch.setattr(MaskedLanguageModel, "forward", spying)
    longer.append(f"load_path={written}")
    result = train(load_config(path, [*longer, "run_name=whole"]))
    assert result.batches == 6 and len(widths) == 6
    assert set(widths) == {(8, SEQ_LEN), (8, 2 * SEQ_LEN)}
    first = widths.copy()
    with monkeypatch.context() as context:
        stop_at(context, 4)
        with pytest.raises(KeyboardInterrupt):
            train(load_config(path, [*longer, "run_name=stopped"]))
    train(load_config(path, [*longer, "run_name=stopped"]))
    assert widths[6:] == [*first[:4], *first[3:]]  # the fourth batch again, from the checkpoint after the third
    whole, stopped = losses(runs / "whole"), losses(runs / "stopped")
    assert whole[6] == pytest.approx(stopped[6], rel=1e-6)
    weights = [torch.load(runs / name / "latest-rank0.pt", weights_only=False) for name in ("whole", "stopped")]
    for name, value in weights[0]["state"]["model"].items():
        assert torch.equal(value, weights[1]["state"]["model"][name]), name
