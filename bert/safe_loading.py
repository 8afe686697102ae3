"""Reading checkpoint files without running what they bring: the one place that unpickles."""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors

from bert.errors import CheckpointError

# What a Composer checkpoint holds besides tensors and plain values: times, torch's version, numpy's random state.
HARMLESS: list[Any] = [
    datetime.timedelta,
    type(torch.__version__),
    np.empty(0).__reduce__()[0],  # the function that a pickled array names
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
]


@contextlib.contextmanager
def safe_loading() -> Iterator[None]:
    """While this is open, no `torch.load` of this process runs code that a file brings, Composer's included.

    Composer 0.32 loads with weights_only=False, which executes whatever a hostile checkpoint says; torch lets the
    environment overrule it. Sharded FSDP checkpoints (a folder) are read by torch.distributed and are not covered.

    Raises:
        CheckpointError: from within: the file asks for more than tensors, plain values, times and numpy arrays.
    """
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(HARMLESS):
            yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"the checkpoint is refused: {_reason(error)}") from error
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def load_checkpoint_file(path: str | os.PathLike[str]) -> Any:
    """Read a .pt, .bin or .safetensors file onto the CPU.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it asks to run code.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_safetensors(path)
        with torch.serialization.safe_globals(HARMLESS):
            # Mapped into memory: of a training checkpoint most is optimizer state that nobody reads here.
            mapped = zipfile.is_zipfile(path)
            if mapped:
                _check_archive(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is refused: {_reason(error)}") from error
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        SafetensorError,
    ) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a whole checkpoint file: {error}") from error


def _check_archive(path: str | os.PathLike[str]) -> None:
    """Refuse an archive whose entries are larger than the file: torch stores them as they are, a bomb does not."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
        sum(entry.file_size for entry in entries) > os.path.getsize(path)
    ):
        raise CheckpointError(
            f"{path} is refused: its parts are compressed, or larger than the file; torch saves neither"
        )


def is_torn(path: str | os.PathLike[str]) -> bool:
    """Say whether a checkpoint file (.pt) is not what was once written: cut off, or other bytes; it is read through.

    Raises:
        CheckpointError: it cannot be read at all, which says nothing about what it holds.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except (zipfile.BadZipFile, EOFError, NotImplementedError):
        return True
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _reason(error: Exception) -> str:
    asked_for = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"reading it would run code: it asks for {asked_for[1]}" if asked_for else "it is damaged"
