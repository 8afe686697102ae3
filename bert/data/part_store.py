"""The folder that `prepare` writes: parts of MDS shards, a record of progress, a lock, and a remote copy.

A part is written under a temporary name, renamed, uploaded if there is a remote, and only then counted in
`progress.json`. Whatever a killed run left beyond that record is removed and made again, from the same text to the
same bytes. `metadata.json` comes last: where it is, the folder is whole.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from streaming import MDSWriter
from streaming.base.storage import CloudDownloader, CloudUploader

from bert.data.metadata import FILE_NAME as METADATA
from bert.data.metadata import DatasetMetadata
from bert.errors import DataError

log = logging.getLogger(__name__)

COLUMN = "input_ids"
PROGRESS = "progress.json"
INDEX = "index.json"
_LOCK = ".prepare.lock"


@dataclass
class Progress:
    """What the finished parts hold, and where the next one begins. Counts are over all parts so far."""

    identity: dict[str, Any]  # the settings that decide the samples
    parts: int = 0
    complete: bool = False  # the last part ends with the last document
    source_state: dict[str, Any] | None = None
    carry: list[int] = field(default_factory=list)  # tokens since the last whole window
    num_documents: int = 0
    num_skipped: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    histogram: list[int] = field(default_factory=list)  # stored tokens by id


class TokenWriter(MDSWriter):
    """An `MDSWriter` of one column of tokens; fixed-length samples are encoded without a check of each."""

    def encode_sample(self, sample: dict[str, Any]) -> bytes:
        """Encode a sample; a column of fixed shape is stored as its bare bytes."""
        # The generic way takes ten times as long, and all samples pass through the one main process.
        return sample[COLUMN].tobytes() if self.column_sizes[0] else super().encode_sample(sample)


class PartStore:
    """The parts of one split, in a local folder (and in a remote one, for which the local one is the staging)."""

    def __init__(self, folder: Path, remote: str | None) -> None:
        """Open or make the folder.

        Raises:
            DataError: it holds something else, or the remote cannot be reached.
        """
        self.folder = folder
        self.remote = remote
        known = (METADATA, PROGRESS, _LOCK)
        if folder.exists() and os.listdir(folder) and not any((folder / name).exists() for name in known):
            raise DataError(f"{folder} holds files that `prepare` did not make; choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        if remote is not None:
            self._uploader = _uploader(folder, remote)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; the operating system lets go of it when the process ends, however it ends.

        Raises:
            DataError: another process holds it.
        """
        lock = FileLock(self.folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise DataError(f"another `prepare` is writing to {self.folder}; wait for it, or end it") from None
        try:
            yield
        finally:
            lock.release()

    def finished(self) -> DatasetMetadata | None:
        """Return the metadata of a folder that is whole, else None."""
        self._restore(METADATA)
        if not (self.folder / METADATA).exists():
            return None
        (self.folder / PROGRESS).unlink(missing_ok=True)  # killed just before its own removal of it
        return DatasetMetadata.load(self.folder)

    def load_progress(self) -> Progress | None:
        """Return the record of progress, and remove what lies beyond it; None in a new folder."""
        self._restore(PROGRESS)
        path = self.folder / PROGRESS
        try:
            progress = Progress(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            progress = None
        except (ValueError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}); remove {self.folder} and prepare it again") from error
        kept = {_part_name(number) for number in range(progress.parts if progress else 0)}
        for entry in self.folder.glob("*part-*"):
            if entry.name not in kept:
                shutil.rmtree(entry)
        return progress

    def save_progress(self, progress: Progress) -> None:
        """Write the record of progress."""
        self._write_json(PROGRESS, vars(progress))
        self._upload(PROGRESS)

    def new_part(self, number: int, column: str, compression: str | None, hashes: list[str]) -> TokenWriter:
        """Return a writer of part `number`, under a temporary name."""
        return TokenWriter(
            columns={COLUMN: column},
            out=str(self.folder / f".{_part_name(number)}.tmp"),
            compression=compression,
            hashes=hashes,
            max_workers=1,
        )

    def commit_part(self, writer: TokenWriter, progress: Progress) -> None:
        """Make the part that `writer` wrote the last of those that `progress` counts."""
        writer.finish()
        temporary = Path(writer.local)
        name = _part_name(progress.parts - 1)
        for file in temporary.iterdir():
            _flush_to_disk(file)
        os.replace(temporary, self.folder / name)
        for file in sorted((self.folder / name).iterdir()):
            self._upload(f"{name}/{file.name}")
            if self.remote is not None and file.name != INDEX:
                file.unlink()  # the remote has it; only the indices are needed here again
        self.save_progress(progress)

    def finish(self, metadata: DatasetMetadata, parts: int) -> int:
        """Merge the parts' indices and write `metadata.json`; return the size of all shards in bytes."""
        shards = [shard for number in range(parts) for shard in self._shards(_part_name(number))]
        self._write_json(INDEX, {"version": 2, "shards": shards})
        tokenizer = self.folder / "tokenizer"
        for name in [INDEX, *sorted(f"tokenizer/{file.name}" for file in tokenizer.iterdir())]:
            self._upload(name)
        metadata.save(self.folder)
        self._upload(METADATA)
        (self.folder / PROGRESS).unlink()
        return sum((shard["zip_data"] or shard["raw_data"])["bytes"] for shard in shards)

    def _shards(self, part: str) -> list[dict[str, Any]]:
        """Return the shards of one part's index, named from the top folder."""
        index = f"{part}/{INDEX}"
        self._restore(index)
        shards = json.loads((self.folder / index).read_text(encoding="utf-8"))["shards"]
        for shard in shards:
            for data in (shard["raw_data"], shard["zip_data"]):
                if data:
                    data["basename"] = f"{part}/{data['basename']}"
        return shards

    def _write_json(self, name: str, value: Any) -> None:
        temporary = self.folder / f".{name}.tmp"
        temporary.write_text(json.dumps(value, sort_keys=True), encoding="utf-8")
        _flush_to_disk(temporary)
        os.replace(temporary, self.folder / name)

    def _upload(self, name: str) -> None:
        if self.remote is None:
            return
        try:
            self._uploader.upload_file(name)
        except Exception as error:  # every provider raises its own
            raise DataError(
                f"{name} could not be uploaded to {self.remote}: {error}. Run the same command again to go on from here"
            ) from error

    def _restore(self, name: str) -> None:
        """Fetch a file that only the remote has: another machine began, or the staging folder was lost."""
        if self.remote is None or (self.folder / name).exists():
            return
        try:
            listed = self._uploader.list_objects(name) or []
        except NotImplementedError:
            log.warning("%s cannot be listed: whether it holds a dataset already is not known", self.remote)
            return
        if any(key.endswith(name) for key in listed):
            CloudDownloader.direct_download(f"{self.remote.rstrip('/')}/{name}", str(self.folder / name))


def _part_name(number: int) -> str:
    return f"part-{number:05d}"


def _uploader(folder: Path, remote: str) -> Any:
    try:
        return CloudUploader.get((str(folder), remote), keep_local=True, exist_ok=True)
    except Exception as error:  # every provider raises its own
        raise DataError(
            f"{remote} cannot be written to: {error or type(error).__name__}. Check the address, the credentials and "
            "that the provider's package is installed"
        ) from error


def staging_folder(remote: str) -> Path:
    """Return where the parts of a remote dataset are written before their upload, by default."""
    return Path(".prepare-staging") / re.sub(r"[^A-Za-z0-9.-]+", "-", remote)


def _flush_to_disk(path: Path) -> None:
    """Have the file on the disk before its rename is, so that a power cut leaves no torn file under a final name."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
