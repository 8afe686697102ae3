"""Models that a recipe of this project trained: from a Composer checkpoint back to a model and its tokenizer."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

from bert.composer_models import MaskedLanguageModel, build_masked_lm
from bert.data.tokenizer import fingerprint, load_tokenizer
from bert.errors import CheckpointError, DataError
from bert.safe_loading import load_checkpoint_file

log = logging.getLogger(__name__)

# The callback that carries the recipe in each checkpoint (bert.recipe.callbacks.RecipeRecord).
RECORD_NAME = "RecipeRecord"
LATEST_NAME = "latest-rank0.pt"


@dataclass
class TrainedModel:
    """A trained model and the record of what made it."""

    model: MaskedLanguageModel
    record: dict[str, Any]  # recipe (YAML), model (name, config), tokenizer_name, tokenizer_fingerprint, versions

    def tokenizer(self, name_or_path: str | None = None) -> PreTrainedTokenizerFast:
        """Return the tokenizer the model was trained with.

        Args:
            name_or_path: where it is; None for the copy in the training data's folder.

        Raises:
            DataError: it is not there, or is another one (its fingerprint differs).
        """
        tokenizer = load_tokenizer(name_or_path or self.tokenizer_folder())
        found, expected = fingerprint(tokenizer), self.record["tokenizer_fingerprint"]
        if found != expected:
            raise DataError(f"this is not the model's tokenizer: its fingerprint is {found}, the model's {expected}")
        return tokenizer

    def tokenizer_folder(self) -> str:
        """Return the copy of the tokenizer in the training data's folder; DataError where it is gone."""
        recipe = OmegaConf.create(self.record["recipe"])
        dataset = recipe.train_loader.dataset
        for stream in (dataset, *(dataset.get("streams") or {}).values()):
            folder = Path(str(stream.get("local") or dataset.get("local")), str(stream.get("split") or ""), "tokenizer")
            if folder.is_dir():
                return str(folder)
        raise DataError(
            f"the model's tokenizer ({self.record['tokenizer_name']}) is not where the training data was: name it, or "
            f"its folder, with --tokenizer"
        )


def has_record(content: Any) -> bool:
    """Say whether the content of a checkpoint file was saved by a recipe of this project."""
    state = content.get("state") if isinstance(content, Mapping) else None
    return isinstance(state, Mapping) and RECORD_NAME in (state.get("callbacks") or {})


def load_trained(path: str | os.PathLike[str]) -> TrainedModel:
    """Load a checkpoint that `main.py` saved, a file or its folder (then the latest one), in evaluation mode.

    Raises:
        CheckpointError: it cannot be read without running code, was not made by a recipe of this project, or does not
            fit the model that its record names.
    """
    file = Path(path)
    if file.is_dir():
        file = file / LATEST_NAME
    content = load_checkpoint_file(file)
    try:
        state: Mapping[str, Any] = content["state"]
        record = json.loads(state["callbacks"][RECORD_NAME]["record"])
        weights = state["model"]
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise CheckpointError(f"{file} carries no record of a recipe: it was not saved by this project") from None
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    model = _build_for(record["model"]["name"], record["model"]["config"], weights, file)
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{file} does not fit the model it names: {error}") from error
    return TrainedModel(model.eval(), record)


def _build_for(name: str, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], file: Path) -> Any:
    """Build the model of a checkpoint's record, once it is known to be no larger than the weights beside it.

    The record is as little to be trusted as the rest of the file, and could ask for any amount of memory.
    """
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(weights):
        raise CheckpointError(f"{file} does not fit the model it names: {layers} layers, and {len(weights)} tensors")
    with torch.device("meta"):
        shapes = build_masked_lm(name, config, train_mask_rate=1.0, eval_mask_rate=1.0).state_dict()
    different = [key for key, value in shapes.items() if key in weights and weights[key].shape != value.shape]
    different += sorted(shapes.keys() ^ weights.keys())
    if different:
        raise CheckpointError(f"{file} does not fit the model it names: {', '.join(different[:5])} differ")
    return build_masked_lm(name, config, train_mask_rate=1.0, eval_mask_rate=1.0)
