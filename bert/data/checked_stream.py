"""A `streaming.Stream` that trusts nothing it reads: index, shard sizes and hashes are checked, damage is not kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from streaming import Stream
from streaming.base.format import FileInfo, Reader, get_index_basename
from streaming.base.hashing import get_hash
from streaming.base.util import retry
from streaming.base.world import World

from bert.errors import DataError

# An MDS shard addresses its bytes by 32-bit numbers; an index of so many bytes would name a petabyte of shards.
_MAXIMUM_SHARD_BYTES = 1 << 32
_MAXIMUM_INDEX_BYTES = 1 << 28
_NOT_AN_INDEX = (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError)
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class CheckedStream(Stream):
    """Streaming's own class, with the checks that it leaves out.

    Streaming keeps a shard whose hash is wrong in the cache, and takes it for good at the next start; it keeps a
    damaged index likewise, joins whatever path an index names, and allocates what a compressed header claims.
    """

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """Read the index (see the base class).

        Raises:
            DataError: it is not one, names files outside its folder, or claims impossible sizes; a downloaded one is
                removed.
        """
        path = os.path.join(self.local, self.split, get_index_basename())
        try:
            if os.path.exists(path) and os.path.getsize(path) > _MAXIMUM_INDEX_BYTES:
                raise DataError(f"it has {os.path.getsize(path):,} bytes")
            shards = super().get_shards(world, allow_unsafe_types)
            if not shards:
                raise DataError("it names no shards")
            for shard in shards:
                _check_shard(shard)
                if self.remote in (None, self.local):
                    _spare_raw_file(shard)
        except _NOT_AN_INDEX as error:
            remedy = "prepare or copy the dataset again"
            if self.remote not in (None, self.local):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)
                remedy = f"it was removed; look at the one in {self.remote}"
            reason = str(error) or type(error).__name__
            raise DataError(f"'{path}' is not the index of a prepared dataset ({reason}): {remedy}") from error
        except Exception as error:  # each storage service raises errors of its own
            raise DataError(f"the index '{path}' cannot be fetched from {self.remote}: {error}") from error
        return shards

    def prepare_shard(self, shard: Reader) -> int:
        """Have a shard here, whole (see the base class); what arrives damaged is removed and fetched again.

        Raises:
            DataError: it is damaged, or cannot be fetched, after all attempts.
        """
        if self.remote in (None, self.local):
            try:
                return self._prepare_and_check(shard)
            except (OSError, ValueError) as error:
                missing = not any(
                    os.path.exists(os.path.join(shard.dirname, shard.split, info.basename))
                    for info in shard.file_pairs[0]
                    if info is not None
                )
                reason = f"'{_raw_path(shard)}' is missing" if missing else str(error)
                raise DataError(f"{reason}; copy the shard again, or prepare the dataset again") from error
        # The base class waits longer after each failed download. What arrived, but damaged, is fetched again here.
        fetch = retry(DamagedShardError, num_attempts=self.download_retry)(self._prepare_or_remove)
        try:
            return fetch(shard)
        except Exception as error:  # each storage service raises errors of its own
            reason = str(error) or type(error).__name__
            raise DataError(
                f"shard '{_raw_path(shard)}' could not be fetched from {self.remote} ({reason}): look at the network "
                "and the remote, and start again"
            ) from error

    def _prepare_or_remove(self, shard: Reader) -> int:
        try:
            return self._prepare_and_check(shard)
        except ValueError as error:
            remove_files(shard)
            raise DamagedShardError(str(error)) from error
        except Exception:
            remove_files(shard)
            raise

    def _prepare_and_check(self, shard: Reader) -> int:
        delta = super().prepare_shard(shard)
        check_size(shard)
        return delta

    def _decompress_shard_part(
        self, zip_info: FileInfo, zip_filename: str, raw_filename: str, compression: str | None
    ) -> None:
        with open(zip_filename, "rb") as file:
            head = file.read(18)
        size = os.path.getsize(zip_filename)
        if size != zip_info.bytes:
            raise ValueError(f"'{zip_filename}' has {size:,} bytes, and its index says {zip_info.bytes:,}")
        claimed = zstd_content_size(head)
        if claimed is not None and claimed > _MAXIMUM_SHARD_BYTES:
            raise ValueError(f"'{zip_filename}' claims to hold {claimed:,} bytes, more than a shard can")
        try:
            super()._decompress_shard_part(zip_info, zip_filename, raw_filename, compression)
        except (OSError, EOFError, MemoryError):
            raise
        except Exception as error:  # each compression raises errors of its own
            raise ValueError(str(error)) from error


class DamagedShardError(ValueError):
    """A shard that arrived, but is not what its index says."""


def check_size(shard: Reader) -> None:
    """Raise ValueError unless the raw file of `shard` has the size that the index says."""
    for raw, _ in shard.file_pairs:
        path = os.path.join(shard.dirname, shard.split, raw.basename)
        size = os.path.getsize(path)
        if size != raw.bytes:
            raise ValueError(f"'{path}' has {size:,} bytes, and its index says {raw.bytes:,}: it is damaged")


def check_hash(shard: Reader, algorithm: str, content: Any) -> None:
    """Raise ValueError unless `content` of the raw file has the hash that the index says."""
    (raw, _), *_ = shard.file_pairs
    if algorithm not in raw.hashes:
        known = ", ".join(sorted(raw.hashes)) or "none"
        raise ValueError(f"validate_hash is {algorithm}, and the index of '{_raw_path(shard)}' has: {known}")
    if get_hash(algorithm, content) != raw.hashes[algorithm]:
        raise ValueError(f"'{_raw_path(shard)}' has not the {algorithm} hash that its index says: it is damaged")


def remove_files(shard: Reader) -> None:
    """Remove a cached shard, raw, compressed and half-written."""
    for pair in shard.file_pairs:
        for info in pair:
            for suffix in ("", ".tmp"):
                if info is not None:
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(os.path.join(shard.dirname, shard.split, info.basename + suffix))


def _raw_path(shard: Reader) -> str:
    return os.path.join(shard.dirname, shard.split, shard.file_pairs[0][0].basename)


def _check_shard(shard: Reader) -> None:
    """Raise DataError for a shard whose entry in the index cannot be."""
    if type(shard.samples) is not int or not 0 < shard.samples < 1 << 32:
        raise DataError(f"a shard of {shard.samples!r} samples")
    for info in (info for pair in shard.file_pairs for info in pair if info is not None):
        if type(info.bytes) is not int or not 0 < info.bytes <= _MAXIMUM_SHARD_BYTES:
            raise DataError(f"a file of {info.bytes!r} bytes")
        if not isinstance(info.basename, str) or not _stays_inside(info.basename):
            raise DataError(f"the file {info.basename!r}, which is not inside the dataset's folder")
    (raw, _), *_ = shard.file_pairs
    if 4 * (shard.samples + 2) > raw.bytes:  # an MDS shard begins with their number and where each begins and ends
        raise DataError(f"a shard of {shard.samples:,} samples in {raw.bytes:,} bytes")


def _spare_raw_file(shard: Any) -> None:
    """Have streaming take a shard whose compressed form is gone for one that never had any.

    It would delete the raw file otherwise, and with it the only copy: so a cache that is read without its remote.
    """
    (raw, packed), *_ = shard.file_pairs
    folder = os.path.join(shard.dirname, shard.split)
    if packed is None or os.path.exists(os.path.join(folder, packed.basename)):
        return
    if os.path.exists(os.path.join(folder, raw.basename)):
        shard.compression, shard.zip_data, shard.file_pairs = None, None, [(raw, None)]


def _stays_inside(name: str) -> bool:
    parts: Sequence[str] = PurePosixPath(name).parts
    return bool(parts) and "\\" not in name and "\0" not in name and parts[0] != "/" and ".." not in parts


def zstd_content_size(head: bytes) -> int | None:
    """Return what the header of a zstd frame (RFC 8878, section 3.1.1) says of its content's size; None: nothing."""
    if len(head) < 6 or head[:4] != _ZSTD_MAGIC:
        return None
    descriptor = head[4]
    single_segment = descriptor >> 5 & 1
    begin = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    width = (single_segment, 2, 4, 8)[descriptor >> 6]
    return int.from_bytes(head[begin : begin + width], "little") + (256 if width == 2 else 0) if width else None
