"""Before a run starts: does its folder allow it, and is the checkpoint it starts from safe and its own?"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from composer.utils import format_name_with_dist
from torch import nn

from bert.errors import CheckpointError, RecipeError
from bert.recipe.callbacks import RecipeRecord, check_record, differences
from bert.recipe.schema import TrainConfig
from bert.safe_loading import load_checkpoint_file

log = logging.getLogger(__name__)

LATEST = "latest-rank0.pt"  # the link that Composer moves after each checkpoint is wholly written


def is_remote(folder: str) -> bool:
    """Whether `folder` is a URI such as s3://bucket/path."""
    return "://" in folder


def run_folder(config: TrainConfig) -> Path:
    """The local folder for logs, curves and the resolved recipe: save_folder, or runs/{run_name} where that is none."""
    folder = config.save_folder
    local = "runs/{run_name}" if folder is None or is_remote(folder) else folder
    return Path(format_name_with_dist(local, run_name=config.run_name))


@dataclass(frozen=True)
class StartingPoint:
    """A local checkpoint that a run starts from, and whether it takes over its weights only."""

    path: Path
    weights_only: bool


def starting_point(config: TrainConfig) -> StartingPoint | None:
    """What this run starts from; None for nothing, or for a checkpoint that Composer is going to download.

    Raises:
        RecipeError: load_path does not exist; the folder holds checkpoints and the recipe does not say whether to go
            on from them or to overwrite them.
    """
    start = None
    if config.load_path is not None and not is_remote(config.load_path):
        path = Path(format_name_with_dist(config.load_path, run_name=config.run_name))
        if not path.exists():
            raise CheckpointError(f"load_path: {path} does not exist")
        start = StartingPoint(path.resolve(), config.load_weights_only)
    if config.save_folder is None or is_remote(config.save_folder):
        return start
    folder = run_folder(config)
    latest = folder / LATEST
    if config.autoresume and latest.exists():
        return StartingPoint(latest.resolve(), weights_only=False)
    found = sorted(folder.glob("ep*-ba*-rank0.pt"), key=lambda path: int(path.name.split("-")[1].removeprefix("ba")))
    if found and config.autoresume:
        raise CheckpointError(
            f"{folder} holds checkpoints ({found[-1].name}) but no {LATEST}: a run was killed while it saved. Delete "
            f"the last one if it is not whole, and name the one to go on from: ln -s {found[-1].name} {latest}"
        )
    if (
        found
        and not config.save_overwrite
        and (start is None or start.weights_only or start.path != found[-1].resolve())
    ):
        raise RecipeError(
            f"{folder} already holds checkpoints ({found[-1].name}): go on from the last with autoresume=true, start "
            "over with save_overwrite=true, or choose another run_name"
        )
    return start


def check_checkpoint(start: StartingPoint, current: Mapping[str, Any], model: nn.Module | None = None) -> None:
    """Compare the record in a checkpoint with this run's, before Composer loads it; warn of other settings.

    Where only the weights are taken over, dropout and the like may differ; the tokenizer may not.

    Args:
        start: the checkpoint; a folder (sharded FSDP) is left to Composer.
        current: this run's record (see `RecipeRecord`).
        model: this run's; where only the weights are taken over, their shapes are compared with its own.

    Raises:
        CheckpointError: the file is unreadable, unsafe, or another model's or tokenizer's.
    """
    if start.path.is_dir():
        return
    content = load_checkpoint_file(start.path)
    try:
        callbacks = content["state"].get("callbacks", {})
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{start.path} is not a Composer checkpoint: it has no training state") from error
    if start.weights_only and model is not None:
        _check_shapes(start.path, content["state"].get("model") or {}, model)
    stored = callbacks.get(RecipeRecord.__qualname__)
    if stored is None:
        return
    record = json.loads(stored["record"])
    if start.weights_only:
        check_record({**record, "model": current["model"]}, current, str(start.path))
        return
    check_record(record, current, str(start.path))
    changes = differences(yaml.safe_load(record["recipe"]), yaml.safe_load(current["recipe"]), "then", "now")
    if changes:
        log.warning(
            "going on from %s, which other settings made (the optimizer's own are kept as they were): %s",
            start.path,
            "; ".join(changes),
        )


def _check_shapes(path: Path, weights: Mapping[str, Any], model: nn.Module) -> None:
    """Raise CheckpointError where weights have other shapes than the model's; say what to do about another length."""
    own = {name: value.shape for name, value in model.state_dict().items()}
    given = {name.removeprefix("module."): value.shape for name, value in weights.items()}
    differ = [name for name in own if name in given and given[name] != own[name]]
    if not differ:
        return
    tied = (".position_embeddings.weight", ".position_features", ".times")  # to the length: axis 0
    if all(name.endswith(tied) and given[name][1:] == own[name][1:] for name in differ):
        there, here = given[differ[0]][0], own[differ[0]][0]
        hint = (
            f"python -m bert.extend_context {path} {here} --out DIR makes it one" if there < here else "that is longer"
        )
        raise CheckpointError(
            f"load_path: {path} is a model for {there} tokens, the recipe's is for {here}: {hint}; or set "
            f"max_seq_len={there}"
        )
    shapes = "".join(f"\n  {name}: {tuple(given[name])} there, {tuple(own[name])} here" for name in differ[:10])
    raise CheckpointError(f"load_path: {path} holds another model:{shapes}")
