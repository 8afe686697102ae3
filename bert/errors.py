"""Errors that a user can act on: each message says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
from collections.abc import Iterable, Mapping


class RecipeError(ValueError):
    """A mistake in what the user gave (a recipe, a file, a folder); entry points print it without a traceback."""


class DataError(RecipeError):
    """A dataset, a tokenizer or a text source that cannot be used as asked."""


class CheckpointError(RecipeError):
    """A checkpoint that cannot be read safely, or does not fit the model."""


FEW = 8  # names that are all told


def nearest(word: str, known: Iterable[str], shown: Mapping[str, object] | None = None) -> str:
    """Return a hint for an unknown `word`: the nearest of the `known` ones, and all of them where they are few.

    `shown` has what is said in place of a name.
    """
    names = sorted(str(name) for name in known)
    texts = {name: str((shown or {}).get(name, name)) for name in names}
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    every = f"known: {', '.join(texts.values()) or 'none'}"
    if not close:
        return every
    return f"did you mean '{texts[close[0]]}'?" + (f" ({every})" if 1 < len(names) <= FEW else "")


_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def storage_failure(error: Exception) -> str | None:
    """Say what is wrong with the disk where `error` comes from there; None where it is about something else."""
    if isinstance(error, OSError) and error.errno in _STORAGE:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    number = re.search(r"\(os error (\d+)\)", str(error))  # of libraries written in Rust, such as safetensors
    if number and int(number[1]) in _STORAGE:
        return os.strerror(int(number[1]))
    if isinstance(error, RuntimeError) and any(
        said in str(error) for said in ("PytorchStreamWriter", "unexpected pos")
    ):
        return f"the checkpoint could not be written ({str(error).splitlines()[0]})"
    return None


def exit_code(error: Exception, advice: str) -> int:
    """Say on stderr what a command failed of; return 2 for a mistake in what was given, 4 for the disk.

    Args:
        error: what was raised; raised again where it is neither.
        advice: what became of the work where the disk failed, and what to do.
    """
    if isinstance(error, RecipeError):
        sys.stderr.write(f"error: {error}\n")
        return 2
    if failure := storage_failure(error):
        sys.stderr.write(f"error: {failure}; {advice}\n")
        return 4
    if isinstance(error, OSError):
        sys.stderr.write(f"error: {error}\n")
        return 2
    raise error
