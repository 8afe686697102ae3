"""Tokenizers: load one from anywhere, tell whether two are the same, train a WordPiece one.

`transformers` is imported inside the functions: the processes that `prepare` starts import this package, and need
only `tokenizers`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert.errors import DataError
from bert.files import is_local

if TYPE_CHECKING:
    from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

ROLES = ("pad", "unk", "cls", "sep", "mask")
# In a bare tokenizer.json nothing says which token plays which part; these are the names in use.
_KNOWN_NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
# What a folder with a tokenizer has one of, in the order they are looked for.
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.txt")
_BERT_TOKENS = tuple(names[0] for names in _KNOWN_NAMES.values())


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer; code that a repository brings is never run.

    Args:
        name_or_path: a Hub name, a folder (of `save_pretrained`, or with a tokenizer.json or a vocab.txt), a
            `tokenizer.json`, or a bare WordPiece `vocab.txt` (read as bert-base-uncased: lower-cased).

    Raises:
        DataError: there is no such tokenizer, it cannot be read, or it lacks one of the five special tokens.
    """
    path = Path(name_or_path)
    if path.is_dir():
        tokenizer = _from_folder(path)
    elif path.is_file():
        tokenizer = _from_file(path)
    elif path.suffix in {".txt", ".json"} or is_local(name_or_path):
        raise DataError(f"tokenizer '{name_or_path}': there is no such file or folder (the Hub was not asked)")
    else:
        tokenizer = _from_pretrained(name_or_path)
    missing = [role for role in ROLES if getattr(tokenizer, f"{role}_token_id", None) is None]
    if missing:
        raise DataError(
            f"tokenizer '{name_or_path}' has no {', '.join(missing)} token: masked-language modelling needs "
            f"{', '.join(ROLES)}. Choose a BERT-style tokenizer, such as bert-base-uncased"
        )
    return tokenizer


def special_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return the ids of the five special tokens by role: "pad", "unk", "cls", "sep", "mask"."""
    return {role: getattr(tokenizer, f"{role}_token_id") for role in ROLES}


def backend_json(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the tokenizer as `tokenizers` serialises it, without the truncation and padding set by its last use."""
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({**values, "truncation": None, "padding": None}, sort_keys=True)


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a hash that two tokenizers share exactly when they turn text into the same tokens the same way.

    It is taken from the backend's JSON, so a vocab.txt, a tokenizer.json and a saved folder of one tokenizer agree.
    """
    return hashlib.sha256(backend_json(tokenizer).encode()).hexdigest()[:32]


def train_wordpiece(texts: Sequence[str] | Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a lower-cased WordPiece tokenizer on `texts`, with BERT's normalisation and special tokens.

    The same texts give the same vocabulary, in the same order.

    Raises:
        DataError: `vocab_size` cannot hold the special tokens and the characters of the text.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    documents = list(texts)
    characters = set().union(*(tokenizer.normalizer.normalize_str(text) for text in documents))
    # The trainer numbers the continuing characters in the order of a hash map, which changes from run to run and, by
    # breaking ties, the vocabulary too. Named beforehand, they have a fixed order.
    first = [*_BERT_TOKENS, *(f"##{c}" for c in sorted(characters) if not c.isspace())]
    if vocab_size < 2 * len(first):
        raise DataError(f"a vocabulary of {vocab_size} is too small for this text: give at least {2 * len(first)}")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=first,
        limit_alphabet=vocab_size,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("".join(f"{token}\n" for token, _ in vocabulary), encoding="utf-8")
        return load_tokenizer(str(path))


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    if (folder / "tokenizer_config.json").is_file():
        return _from_pretrained(str(folder))
    for name in ("tokenizer.json", "vocab.txt"):
        if (folder / name).is_file():
            return _from_file(folder / name)
    raise DataError(f"tokenizer '{folder}': the folder has no tokenizer_config.json, tokenizer.json or vocab.txt")


def _from_file(path: Path) -> PreTrainedTokenizerFast:
    return _from_json(path) if path.suffix == ".json" else _from_vocabulary(path)


def _from_vocabulary(path: Path) -> PreTrainedTokenizerFast:
    from transformers import BertTokenizerFast

    try:
        tokens = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"tokenizer '{path}' is not a vocabulary: it is not UTF-8 text ({error})") from error
    missing = [token for token in _BERT_TOKENS if token not in tokens]
    if missing:
        raise DataError(f"tokenizer '{path}': a WordPiece vocabulary needs {', '.join(missing)}, one token a line")
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise DataError(f"tokenizer '{path}': '{twice}' is in more than one line, and ids are the lines' numbers")
    return BertTokenizerFast(vocab_file=str(path))


def _from_json(path: Path) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

    try:
        # `Tokenizer.from_str` raises bare `Exception`s, so the likely mistakes are ruled out first.
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            raise DataError(f"tokenizer '{path}' is not a tokenizer.json: it has no 'model'")
        backend = Tokenizer.from_str(json.dumps(values))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"tokenizer '{path}' cannot be read as a tokenizer.json: {error}") from error
    vocabulary = backend.get_vocab(with_added_tokens=True)
    named: dict[str, Any] = {}
    for role, names in _KNOWN_NAMES.items():
        found = [name for name in names if name in vocabulary]
        if found:
            named[f"{role}_token"] = found[0]
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def _from_pretrained(name_or_path: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer
    from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, use_fast=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file makes `transformers` or `tokenizers` raise
        raise DataError(
            f"tokenizer '{name_or_path}' cannot be loaded: {error}. Give a Hub name (network needed the first time), "
            "a folder, a tokenizer.json or a vocab.txt"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"tokenizer '{name_or_path}' has no fast version (tokenizer.json), which preparation needs")
    # Of no use here, and the library writes each template to a file of the name that the folder gives it, "../" too.
    tokenizer.chat_template = None
    return tokenizer
