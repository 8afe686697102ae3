"""Files that are there wholly or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def is_local(name: str) -> bool:
    """Say whether a name of which nothing is there was meant for a file or folder here, not for one on the Hub."""
    first, slash, _ = name.partition("/")
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or bool(slash and Path(first).is_dir())


def is_remote(name: str) -> bool:
    """Say whether a folder's name is a URI (s3://..., dbfs:/...)."""
    return "://" in name or name.startswith("dbfs:/")


@contextmanager
def written_whole(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a temporary name, which becomes `path` when the block ends; where it fails, the file is removed.

    Args:
        path: in a folder that is made where it is not there.
        shared: other processes may write this file at the same time; the last one counts.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # it may be what fills the disk
        raise


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a text file; `shared` as in `written_whole`."""
    with written_whole(path, shared=shared) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any, *, shared: bool = False) -> None:
    """Write a JSON file; `shared` as in `written_whole`."""
    write_text(path, json.dumps(values, indent=2) + "\n", shared=shared)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error


def save_figure(figure: Figure, path: Path) -> None:
    """Draw a figure of matplotlib as PNG."""
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
