"""The results of a sweep's jobs: one JSON object a line, appended whole, by any number of processes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock


class Results:
    """results.jsonl in a sweep's folder. A job's last line counts; a line torn by a kill is passed over.

    Args:
        folder: of the sweep.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "results.jsonl"
        self._lock = FileLock(self.path.with_suffix(".lock"))

    def append(self, result: Mapping[str, Any]) -> None:
        """Add a result; when this returns it is on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps(result) + "\n").encode()
        with self._lock, self.path.open("a+b") as file:
            if file.tell() and not self._ends_a_line(file):
                line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _ends_a_line(file: Any) -> bool:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"

    def read(self) -> dict[str, dict[str, Any]]:
        """Return the results by the key of their job."""
        found = {}
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return {}
        for line in lines:
            try:
                result = json.loads(line)
                found[result["key"]] = result
            except (ValueError, KeyError, TypeError):
                continue
        return found
