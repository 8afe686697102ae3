"""Reading checkpoint files without running what they bring: the one place that unpickles."""

from __future__ import annotations

import collections
import contextlib
import datetime
import errno
import io
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

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
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a file of torch before 1.6 begins so
_STORAGE_WIDTHS = {"Untyped": 1, "Byte": 1, "Char": 1, "Bool": 1, "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4} | {
    "Float": 4,
    "Long": 8,
    "Double": 8,
    "ComplexFloat": 8,
    "ComplexDouble": 16,
}  # bytes of an element, by the name of torch's class before "Storage"
_CONTAINERS = {"OrderedDict": collections.OrderedDict, "Counter": collections.Counter}


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint that asks to run code, which damage alone does not."""


@contextlib.contextmanager
def safe_loading() -> Iterator[None]:
    """While this is open, no `torch.load` of this process runs code that a file brings, Composer's included.

    Composer 0.32 loads with weights_only=False, which executes whatever a hostile checkpoint says; torch lets the
    environment overrule it. The metadata of sharded checkpoints is not covered: see `check_sharded`.

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
        CheckpointError: there is no such file, it is damaged, or it asks to run code; or it is one of torch before 1.6.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_safetensors(path)
        with torch.serialization.safe_globals(HARMLESS):
            # Mapped into memory: of a training checkpoint most is optimizer state that nobody reads here.
            mapped = zipfile.is_zipfile(path)
            if mapped:
                _check_archive(path)
            else:
                _refuse_legacy(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except pickle.UnpicklingError as error:
        kind = UnsafeCheckpointError if "GLOBAL" in str(error) else CheckpointError
        raise kind(f"{path} is refused: {_reason(error)}") from error
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
        SafetensorError,
    ) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a whole checkpoint file: {error}") from error


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Look at the pickled weights of a Hugging Face folder before that library reads them.

    Args:
        folder: the folder; where there is none (a name on the Hub) nothing is looked at.

    Raises:
        CheckpointError: see `load_checkpoint_file`.
    """
    for path in sorted(Path(folder).glob("*.bin")):
        load_checkpoint_file(path)


def _refuse_legacy(path: str | os.PathLike[str]) -> None:
    with open(path, "rb") as file:
        if file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC:
            raise CheckpointError(
                f"{path} is refused: it has the format of torch before 1.6, which cannot be checked before it is read. "
                "If you trust it, load it and save it again with a newer torch"
            )


def _check_archive(path: str | os.PathLike[str]) -> None:
    """Refuse an archive whose parts are not what they claim, before torch believes them.

    Entries larger than the file: torch stores them as they are, a bomb does not. And what torch before 2.10 takes
    without a look (CVE-2026-24747): storages smaller than the pickle says, and items set in what is no dictionary.
    """
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()) or (
            sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path)
        ):
            raise CheckpointError(
                f"{path} is refused: its parts are compressed, or larger than the file; torch saves neither"
            )
        # Torch's reader takes capitals and small letters for the same, and counts from the beginning of the file.
        if len({name.lower() for name in entries}) != len(archive.infolist()):
            raise CheckpointError(f"{path} is refused: it has two parts of one name")
        if not entries or min(entry.header_offset for entry in entries.values()) != 0:
            raise CheckpointError(f"{path} is refused: its archive does not begin where the file does")
        folders = {name.partition("/")[0] + "/" for name in entries}
        folder = folders.pop()
        if folders or f"{folder}data.pkl" not in entries:
            raise CheckpointError(f"{path} is not a whole checkpoint file: it is no one folder with a data.pkl")
        sizes = {
            name.removeprefix(f"{folder}data/"): entry.file_size
            for name, entry in entries.items()
            if name.startswith(f"{folder}data/")
        }
        _InertUnpickler(archive.read(f"{folder}data.pkl"), sizes).load()


class _Inert:
    """What stands for every object that a pickle asks for; it does nothing, and is no dictionary."""

    name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        raise pickle.UnpicklingError("items are set in what is no dictionary")


class _InertUnpickler(pickle._Unpickler):  # in Python: the one in C lets a pickle ask for a memo of any size
    """Walk through a pickle without making anything of it but plain containers.

    Args:
        content: the pickle.
        sizes: bytes of each storage in the archive, by its key.
    """

    def __init__(self, content: bytes, sizes: dict[str, int]) -> None:
        super().__init__(io.BytesIO(content))
        self._sizes = sizes

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that does nothing, whatever is asked for; torch refuses what it does not know."""
        if module == "collections" and name in _CONTAINERS:
            return _CONTAINERS[name]
        return type("Inert", (_Inert,), {"name": name})

    def persistent_load(self, pid: Any) -> Any:
        """Compare the size that the pickle claims for a storage with the one that it has.

        Raises:
            pickle.UnpicklingError: it claims more than there is, or is no storage.
        """
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("it refers to what is no storage")
        _, kind, key, _, count = pid
        width = _STORAGE_WIDTHS.get(getattr(kind, "name", "").removesuffix("Storage"))
        if width is None:
            raise pickle.UnpicklingError("it has a storage of an unknown kind")
        if type(count) is not int or count < 0 or count * width > self._sizes.get(key, -1):
            raise pickle.UnpicklingError(f"storage {key} is smaller than the pickle says")
        return _Inert()


def is_torn(path: str | os.PathLike[str]) -> bool:
    """Say whether a checkpoint file (.pt) is not what was once written: cut off, or other bytes; it is read through.

    Raises:
        CheckpointError: it cannot be read at all, which says nothing about what it holds.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return True
    except OSError as error:
        if error.errno != errno.EINVAL:  # a damaged directory's offsets
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        return True
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, LookupError):
        return True
    # The directory of the archive has no checksum; neither zipfile nor torch notices every damage of it.
    try:
        load_checkpoint_file(path)
    except UnsafeCheckpointError:
        raise
    except CheckpointError:
        return True
    return False


# What the metadata of a sharded checkpoint is made of (torch.distributed.checkpoint, Composer 0.32, torch 2.6 to 2.11).
_SHARDED_NAMES = {
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.filesystem._StoragePrefix",
    "torch.Size",
    "torch.serialization._get_layout",
    "pathlib.PosixPath",
    "collections.OrderedDict",
}


class _ShardedUnpickler(_InertUnpickler):
    """Walk through the metadata of a sharded checkpoint, which torch unpickles without a limit."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that does nothing for what such metadata are made of.

        Raises:
            pickle.UnpicklingError: something else is asked for.
        """
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if f"{module}.{name}" in _SHARDED_NAMES or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def check_sharded(folder: str | os.PathLike[str]) -> None:
    """Look at what torch.distributed unpickles of a sharded checkpoint, a folder.

    Raises:
        CheckpointError: it would run code, or is damaged.
    """
    for path in sorted(Path(folder).rglob(".metadata")):
        try:
            _ShardedUnpickler(path.read_bytes(), {}).load()
        except pickle.UnpicklingError as error:
            raise UnsafeCheckpointError(f"{path} is refused: {_reason(error)}") from error
        except (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, struct.error) as error:
            raise CheckpointError(f"{path} is not the metadata of a checkpoint: {error}") from error


def _reason(error: Exception) -> str:
    asked_for = re.search(r"GLOBAL ([\w.]+)", str(error))
    if asked_for:
        return f"reading it would run code: it asks for {asked_for[1]}"
    # Not torch's whole message, which recommends to read it without this safety.
    said = str(error).rpartition("WeightsUnpickler error: ")[2].splitlines()
    return f"it is damaged, or no checkpoint ({said[0].strip() if said else type(error).__name__})"
