"""M2-BERT: models, data, recipes and tools built on the Monarch Mixer layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bert.inference import LoadedModel


def load(path: str, *, tokenizer: str | None = None, device: str | None = None) -> LoadedModel:
    """Load a model to use: `load("runs/m2-base").encode(["a text"])`. See `bert.inference.load`."""
    from bert import inference  # only here: it brings torch and transformers along, which takes seconds

    return inference.load(path, tokenizer=tokenizer, device=device)
