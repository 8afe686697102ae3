"""Weights into models, all of them: what a file says of its model is compared with them before it takes memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bert.errors import CheckpointError, RecipeError

Network = TypeVar("Network", bound=nn.Module)
# A checkpoint may hold a tensor under several names, but not without end: each may become memory of its own.
MAX_SHARING = 8
MAX_SHOWN = 30
# Keys of a config.json that make transformers read another file than the folder's own weights, or read them otherwise.
LOADING_KEYS = ("transformers_weights", "quantization_config")


def checked_weights(content: Any, source: str) -> dict[str, Tensor]:
    """Return a state dict, once it is known to hold plain weights, and about as many bytes as they claim.

    Raises:
        CheckpointError: it is no state dict, or a tensor of it is no weight (integers, sparse, quantized ...).
    """
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    ):
        raise CheckpointError(
            f"{source} holds no state dict (names with tensors), neither plainly nor under state/model"
        )
    for name, value in content.items():
        plain = value.layout == torch.strided and not (value.is_meta or value.is_quantized or value.is_nested)
        if not plain or not (value.is_floating_point() or name.endswith("position_ids")):
            raise CheckpointError(f"{source} is refused: {name} is no weight ({value.dtype}, {value.layout})")
    claimed = sum(value.numel() * value.element_size() for value in content.values())
    held = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in content.values()}
    if claimed > MAX_SHARING * sum(held.values()):
        raise CheckpointError(
            f"{source} is refused: its tensors claim {claimed:,} bytes and hold {sum(held.values()):,}"
        )
    return dict(content)


def check_config_keys(folder: str | os.PathLike[str]) -> None:
    """Refuse a Hugging Face folder whose config.json leads transformers to other weights than those beside it.

    Args:
        folder: the folder; where it has no config.json (a name on the Hub) nothing is looked at.

    Raises:
        CheckpointError: it has one of LOADING_KEYS, or cannot be read.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} is not a model's configuration")
    for key in LOADING_KEYS:
        if fields.get(key) is not None:
            raise CheckpointError(
                f"{path} is refused: its {key} would load other weights than the folder's own; take the key out"
            )


def check_counts(fields: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse a configuration with more layers or labels than weights: counting so far takes memory and time.

    Raises:
        CheckpointError: there are more.
    """
    longest = max((size for value in weights.values() for size in value.shape), default=0)
    for name, limit in (("num_hidden_layers", len(weights)), ("num_labels", longest)):
        value = fields.get(name)
        if isinstance(value, int | float) and value > limit:
            raise CheckpointError(f"{source} does not fit its configuration: {name} is {value:,}, over {limit:,}")


def blueprint(build: Callable[[], Network], source: str) -> Network:
    """Build a model without memory for its weights, to see what a configuration asks for.

    Raises:
        RecipeError: there is no such model.
    """
    try:
        with torch.device("meta"):
            return build()
    except RecipeError:
        raise
    except Exception as error:  # whatever strange values make PyTorch or transformers raise
        raise CheckpointError(f"{source}: its configuration describes no model: {_first_line(error)}") from error


def load_exactly(build: Callable[[], Network], weights: Mapping[str, Tensor], source: str) -> Network:
    """Build a model and load weights into it: all of them, and nothing is missing. In evaluation mode.

    What the configuration asks for is compared with the weights before it takes memory: a file's word for it is as
    little to be trusted as the rest of the file.

    Args:
        build: builds the model, anywhere.
        weights: what `checked_weights` returned; see `check_counts` too.
        source: for messages.

    Raises:
        CheckpointError: names or shapes differ; the message lists them.
    """
    expected = blueprint(build, source).state_dict()
    problems = [f"missing     {name} {tuple(expected[name].shape)}" for name in expected if name not in weights]
    problems += [f"unexpected  {name} {tuple(weights[name].shape)}" for name in weights if name not in expected]
    problems += [
        f"shape       {name}: {tuple(weights[name].shape)} in the file, {tuple(value.shape)} in the model"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit the model it names; nothing was loaded:\n  {listed(problems)}")
    model = build()
    model.load_state_dict(weights, strict=True)
    return model.eval()


def listed(lines: list[str]) -> str:
    """Join the lines of a message, the first ones where there are many."""
    more = len(lines) - MAX_SHOWN
    return "\n  ".join(lines[:MAX_SHOWN]) + (f"\n  ... and {more} more" if more > 0 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
