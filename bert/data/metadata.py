"""`metadata.json`: what a folder of tokenised shards holds, written by `prepare` and checked by training."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bert.errors import DataError, nearest

FILE_NAME = "metadata.json"
FORMAT_VERSION = 1
_ROLES = {"pad", "unk", "cls", "sep", "mask"}


@dataclass
class DatasetMetadata:
    """One split of tokenised text (one `index.json`), and what made it.

    The unit of every count is in its name; `unigram_entropy_nats` is the entropy of the split's own token
    frequencies, special tokens left out: the cross entropy of the best model that ignores context.
    """

    layout: str  # "concat" (windows of exactly seq_len) or "truncate" (one document a sample, at most seq_len)
    seq_len: int  # tokens in a sample, special tokens included
    token_dtype: str  # "uint16" or "uint32"
    tokenizer_name: str  # as the user gave it; for people to read
    tokenizer_fingerprint: str  # bert.data.tokenizer.fingerprint
    vocab_size: int
    special_token_ids: dict[str, int]  # "pad", "unk", "cls", "sep", "mask"
    source: dict[str, Any]  # kind, paths or hub name, split, text column ...
    num_samples: int
    num_tokens: int  # stored tokens, special tokens included
    num_documents: int
    num_skipped_documents: int  # empty after tokenisation, or unreadable
    unigram_entropy_nats: float
    format_version: int = FORMAT_VERSION
    settings: dict[str, Any] = field(default_factory=dict)  # everything else that changes the samples

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `metadata.json` into `folder` (to a temporary name, then renamed)."""
        path = Path(folder) / FILE_NAME
        temporary = path.with_name(f".{FILE_NAME}.tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> DatasetMetadata:
        """Read `metadata.json` from `folder`.

        Raises:
            DataError: the file is missing, is not JSON, or has other fields; the message says what to do.
        """
        path = Path(folder) / FILE_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{path} is missing: '{folder}' is not (or not yet wholly) prepared. "
                f"Make it with: python -m bert.data.prepare --help"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path} cannot be read ({error}); prepare the folder again") from error
        if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
            raise DataError(f"{path} is not version {FORMAT_VERSION} of the format; prepare the folder again")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise DataError(f"{path} has an unknown field '{name}': {nearest(name, fields)}")
        missing = [
            name
            for name, f in fields.items()
            if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise DataError(f"{path} lacks {', '.join(missing)}; prepare the folder again")
        wrong = [name for name, value in values.items() if not _fits(value, str(fields[name].type))]
        if wrong:
            raise DataError(
                f"{path}: {wrong[0]} is {values[wrong[0]]!r}, not {fields[wrong[0]].type}; prepare it again"
            )
        metadata = cls(**values)
        if lacking := sorted(_ROLES - metadata.special_token_ids.keys()):
            raise DataError(f"{path}: special_token_ids lacks {', '.join(lacking)}; prepare the folder again")
        return metadata


def _fits(value: Any, annotation: str) -> bool:
    """Say whether a value read from JSON is of the type that a field is annotated with; counts are not negative."""
    if annotation == "int":
        return type(value) is int and value >= 0
    if annotation == "float":
        return type(value) in (int, float)
    if annotation == "str":
        return isinstance(value, str)
    if annotation == "dict[str, int]":
        return isinstance(value, dict) and all(type(number) is int and number >= 0 for number in value.values())
    return isinstance(value, dict)
