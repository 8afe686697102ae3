"""Fast encoding of whole documents: BERT tokenisers treat each word on its own, so each word is encoded once.

The normaliser, the pre-tokeniser and WordPiece of BERT never look beyond a blank or an ASCII punctuation mark: the
tokens of a text are those of the pieces between them, one after the other. Most pieces of a text were seen before,
so looking them up replaces most of the library's work, with the library's own tokens. Tokenisers of other kinds go
through the library unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

_MAXIMUM_PIECES = 1 << 18  # about 60 MB in a process
# Runs without blanks and ASCII punctuation, or one punctuation mark. Of the blanks only space, tab, line feed and
# carriage return: BERT takes others, such as U+001C, for control characters, and joins what is on their two sides.
_PIECES = re.compile(r"[^ \t\n\r!-/:-@\[-`{-~]+|[!-/:-@\[-`{-~]")


class _Pieces(dict[str, tuple[int, ...]]):
    """Token ids by piece of text; a piece not seen before is encoded when it is asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, piece: str) -> tuple[int, ...]:
        ids = self[piece] = tuple(self._tokenizer.encode(piece, add_special_tokens=False).ids)
        return ids


class DocumentEncoder:
    """Encodes documents to token ids, without special tokens; equal to the library's `encode` for every text."""

    def __init__(self, tokenizer_json: str) -> None:
        """Load the tokenizer from its JSON; truncation and padding set in it are ignored."""
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._pieces = _Pieces(self._tokenizer) if encodes_pieces_alone(self._tokenizer) else None
        self._added = tuple(token.content for token in self._tokenizer.get_added_tokens_decoder().values())

    def encode(self, texts: list[str]) -> Iterator[list[int]]:
        """Yield the token ids of each document."""
        if self._pieces is None:
            for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                yield encoding.ids
            return
        if len(self._pieces) > _MAXIMUM_PIECES:
            self._pieces.clear()  # the frequent ones are soon back
        for text in texts:
            if any(token in text for token in self._added):  # a literal "[SEP]" is one token, not three pieces
                yield self._tokenizer.encode(text, add_special_tokens=False).ids
            else:
                yield list(chain.from_iterable(map(self._pieces.__getitem__, _PIECES.findall(text))))


def encodes_pieces_alone(tokenizer: Tokenizer) -> bool:
    """Say whether a tokenizer is BERT's, with added tokens that match only as they are written.

    Then the tokens of a text without added tokens are those of its pieces between blanks and punctuation marks.
    """
    return (
        isinstance(tokenizer.normalizer, normalizers.BertNormalizer)
        and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
        and isinstance(tokenizer.model, models.WordPiece)
        and not any(token.normalized for token in tokenizer.get_added_tokens_decoder().values())
    )
