"""Errors that a user can act on: each message says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RecipeError(ValueError):
    """A mistake in what the user gave (a recipe, a file, a folder); entry points print it without a traceback."""


class DataError(RecipeError):
    """A dataset, a tokenizer or a text source that cannot be used as asked."""


class CheckpointError(RecipeError):
    """A checkpoint that cannot be read safely, or does not fit the model."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown `word`: the nearest of the `known` ones, or all of them."""
    names = sorted(str(name) for name in known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"
