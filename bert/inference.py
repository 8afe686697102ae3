"""Models to use: `model = load(path)`, then `model.encode(texts)` for embeddings or `model.fill_mask(texts)`."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

from bert.composer_models import HuggingFaceBert
from bert.data.word_cache import encodes_pieces_alone
from bert.errors import DataError, RecipeError, nearest
from bert.modeling import M2BertForMaskedLM
from bert.trained import OWN_POOLING, Network, gives_sentence_embeddings, open_model

log = logging.getLogger(__name__)

POOLINGS = ("mean", "first")
DEVICES = ("cpu", "cuda")
BATCH_TOKENS = 16_384
_CHARACTERS = 6  # of a text, for each token that is wanted: English has 4 to 6 a token, so few texts come twice
_BLANK = re.compile("[ \\n]")
Prediction = list[tuple[str, float]]  # words with their probabilities, the likeliest first


def leaves_padding_out(config: Any) -> bool:
    """Whether outputs at real tokens are the same however much padding follows.

    True for attention and for Monarch mixers with `mask_padding`; the published M2 models take padding for text.
    """
    return getattr(config, "leaves_padding_out", not getattr(config, "monarch_mixer_sequence_mixing", False))


def longest_input(config: Any) -> int:
    """Return the longest input of a model, in tokens."""
    if hasattr(config, "max_sequence_length"):
        return config.max_sequence_length or 1 << 30  # attention with ALiBi has no limit
    return config.max_position_embeddings


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool hidden states (batch, length, hidden) to fp32 (batch, hidden): mean over real tokens, or the first token.

    Args:
        hidden: the encoder's output.
        mask: (batch, length), 0 at padding.
        pooling: "mean" or "first".
    """
    if pooling == "first":
        return hidden[:, 0].float()
    weights = mask[..., None].float()
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)


def check_pooling(pooling: str, known: Sequence[str] = POOLINGS) -> None:
    """Raise RecipeError unless `pooling` is one of those known."""
    if pooling not in known:
        raise RecipeError(f"pooling '{pooling}': {nearest(pooling, known)}")


def length_batches(lengths: Sequence[int], batch_tokens: int, *, equal: bool) -> Iterator[list[int]]:
    """Yield the indices of batches of texts of like lengths, the longest first, which shows at once what memory takes.

    Args:
        lengths: tokens of each text.
        batch_tokens: most tokens of a batch, padding included; a single text may have more.
        equal: put only texts of equal length together.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch:
            width = lengths[batch[0]]
            if (len(batch) + 1) * width > batch_tokens or (equal and lengths[index] != width):
                yield batch
                batch = []
        batch.append(index)
    if batch:
        yield batch


def _tokens_end_at_blanks(tokenizer: Tokenizer) -> bool:
    """Whether the tokens of a text up to a space or line feed are those of the text that ends there."""
    added = tokenizer.get_added_tokens_decoder().values()
    return encodes_pieces_alone(tokenizer) and not any(_BLANK.search(token.content) for token in added)


def _beginning(text: str, characters: int) -> str:
    """Return a text up to the first space or line feed after so many characters, without it; else all of the text.

    Other blanks will not do: BERT takes U+001C, for one, for a control character, and joins what is on its two sides.
    """
    blank = _BLANK.search(text, characters)
    return text if blank is None else text[: blank.start()]


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise RecipeError("texts: a list of texts is wanted, this is one: put it in brackets")


@dataclass
class LoadedModel:
    """A model in evaluation mode, with its tokenizer, on a device."""

    network: Network
    tokenizer: PreTrainedTokenizerFast
    device: torch.device
    record: Mapping[str, Any] = field(default_factory=dict)  # of the recipe that trained it; empty: not ours
    file: Path = Path()  # of the weights
    truncated: int = 0  # texts that `encode` has cut so far
    encoded_tokens: int = 0  # tokens that `encode` has processed so far, padding not counted

    @property
    def max_length(self) -> int:
        """The longest input in tokens, [CLS] and [SEP] included."""
        return longest_input(self.network.config)

    @property
    def hidden_size(self) -> int:
        """The length of a vector."""
        return self.network.config.hidden_size

    @property
    def pooling(self) -> str:
        """How the model was fine-tuned to be pooled, or its "own" way; "mean" where nothing says so."""
        return self.record.get("pooling", "mean")

    def encode(
        self,
        texts: Sequence[str],
        *,
        pooling: str | None = None,
        normalize: bool = True,
        batch_tokens: int = BATCH_TOKENS,
        max_length: int | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> NDArray[np.float32]:
        """Return one vector a text, (texts, hidden), float32, in the order of the texts.

        A vector does not depend on the other texts. Models that leave padding out (`mask_padding`, attention) get
        batches padded to their longest text. The others, which take padding for text, get batches of texts of equal
        token length, without padding: a text alone is what they see. On CUDA matrix products run in bf16 (autocast).

        Args:
            texts: any number; longer ones than the model takes are cut, with one warning a model.
            pooling: "mean" over all tokens, "first", or "own", of a model that gives sentence embeddings itself
                (`gather_sentence_embeddings`); None: as the model was fine-tuned, else "mean".
            normalize: give vectors the length 1, so that their inner product is the cosine.
            batch_tokens: most tokens of a batch, padding included.
            max_length: cut texts to so many tokens, [CLS] and [SEP] included; None: the model's own limit.
            progress: called with the number of texts of each finished batch.

        Raises:
            RecipeError: an unknown pooling, a length that the model does not take, or one text in place of a list.
        """
        _check_texts(texts)
        pooling, limit = self.checked(pooling, max_length)
        ids = self.tokenize(texts, limit)
        vectors = np.empty((len(ids), self.hidden_size), np.float32)
        equal = not leaves_padding_out(self.network.config)
        for batch in length_batches([len(row) for row in ids], batch_tokens, equal=equal):
            pooled = self._pooled([ids[index] for index in batch], pooling)
            if normalize:
                pooled = F.normalize(pooled, dim=-1)
            vectors[batch] = pooled.cpu().numpy()
            self.encoded_tokens += sum(len(ids[index]) for index in batch)
            if progress is not None:
                progress(len(batch))
        return vectors

    def checked(self, pooling: str | None, max_length: int | None) -> tuple[str, int]:
        """Return the pooling and the length in tokens that `encode` takes for these, None being the model's own.

        Raises:
            RecipeError: an unknown pooling, or a length that the model does not take.
        """
        pooling = self.pooling if pooling is None else pooling
        check_pooling(pooling, (*POOLINGS, OWN_POOLING))
        if pooling == OWN_POOLING and not gives_sentence_embeddings(self.network):
            raise RecipeError(f"pooling '{OWN_POOLING}': this model gives no sentence embeddings itself; mean or first")
        limit = self.max_length if max_length is None else max_length
        if not 2 <= limit <= self.max_length:
            raise RecipeError(f"max_length {limit}: this model takes 2 to {self.max_length} tokens")
        return pooling, limit

    def tokenize(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        """Return the token ids of texts, cut to `limit`; counts those that are cut, and warns of the first.

        They are the ids of whole texts. Only so much of a long text is tokenised as gives more than `limit` tokens,
        where the tokenizer's tokens before a blank do not depend on what follows.
        """
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation or backend.padding or backend.encode_special_tokens:  # left by a call of the tokenizer
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = False
        characters = _CHARACTERS * limit if _tokens_end_at_blanks(backend) else sys.maxsize
        ids: list[list[int]] = [[] for _ in texts]
        rest: Sequence[int] = range(len(texts))
        while rest:
            parts = [_beginning(texts[index], characters) for index in rest]
            # Not the tokenizer's own call, which computes offsets as well, and makes lists of masks.
            for index, encoding in zip(rest, backend.encode_batch_fast(parts), strict=True):
                ids[index] = encoding.ids
            # More than the limit, not as many: so it is known that the whole text has more too.
            rest = [
                index
                for index, part in zip(rest, parts, strict=True)
                if len(ids[index]) <= limit and len(part) < len(texts[index])
            ]
            characters *= 2
        long = [index for index, row in enumerate(ids) if len(row) > limit]
        if long and not self.truncated:
            log.warning("a text of more than %d tokens is cut to %d (and others, without a word)", limit, limit)
        self.truncated += len(long)
        for index in long:
            ids[index] = [*ids[index][: limit - 1], ids[index][-1]]  # [SEP] stays last
        return ids

    def fill_mask(self, texts: Sequence[str], *, top: int = 5) -> list[list[Prediction]]:
        """Predict, for each text and each mask in it, the `top` likeliest words.

        A model that takes padding for text gets each text padded to the length that it was trained at.

        Raises:
            DataError: there is no mask, or the text is too long.
            RecipeError: the model has no head for it, `top` is no number of words, or one text in place of a list.
        """
        _check_texts(texts)
        if top < 1:
            raise RecipeError(f"top {top}: at least 1 word a mask")
        if not isinstance(self.network, M2BertForMaskedLM | HuggingFaceBert):
            raise RecipeError("this model has a classifier, and no head that predicts words")
        return [self._fill(text, top) for text in texts]

    def _fill(self, text: str, top: int) -> list[Prediction]:
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        limit = self.max_length
        if len(ids) > limit:
            raise DataError(f"the text has {len(ids)} tokens, the model takes {limit}")
        positions = [place for place, token in enumerate(ids) if token == self.tokenizer.mask_token_id]
        if not positions:
            raise DataError(f"there is no {self.tokenizer.mask_token} in: {text}")
        width = None if leaves_padding_out(self.network.config) else limit
        logits = self.logits_at([ids], [(0, place) for place in positions], width=width)
        likeliest = logits.softmax(-1).topk(min(top, logits.shape[-1]))
        return [
            [(str(self.tokenizer.decode([word])), probability) for word, probability in zip(words, row, strict=True)]
            for words, row in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        ]

    def logits_at(
        self,
        rows: Sequence[Sequence[int]] | NDArray[np.integer],
        places: Sequence[tuple[int, int]] | NDArray[np.integer],
        *,
        width: int | None = None,
    ) -> Tensor:
        """Return the logits (places, entries of the tokenizer), float32 on the device, at places of rows of token ids.

        The head runs on these places alone. On CUDA matrix products run in bf16 (autocast).

        Args:
            rows: token ids of each row, as the model is to see them: nothing is added, cut or masked.
            places: (places, 2), the row and the position in it of each prediction.
            width: tokens that the rows are padded to; None: those of the longest.
        """
        assert isinstance(self.network, M2BertForMaskedLM | HuggingFaceBert)  # else there is nothing to predict with
        hidden, _ = self._hidden(rows, width)
        row, position = torch.as_tensor(np.asarray(places, dtype=np.int64).reshape(-1, 2), device=self.device).unbind(1)
        with torch.inference_mode(), self._precision():
            # The vocabulary is padded to a round number; what is beyond the tokenizer is no word.
            return self.network.predict(hidden[row, position])[:, : len(self.tokenizer)].float()

    def _pooled(self, rows: Sequence[Sequence[int]], pooling: str) -> Tensor:
        """One fp32 vector a row of token ids."""
        if pooling != OWN_POOLING:
            return pool(*self._hidden(rows), pooling)
        ids, mask = self._padded(rows)
        with torch.inference_mode(), self._precision():
            return self.network(input_ids=ids, attention_mask=mask).sentence_embedding.float()

    def _hidden(
        self, rows: Sequence[Sequence[int]] | NDArray[np.integer], width: int | None = None
    ) -> tuple[Tensor, Tensor]:
        ids, mask = self._padded(rows, width)
        with torch.inference_mode(), self._precision():
            return self.network.base_model(input_ids=ids, attention_mask=mask)[0], mask

    def _padded(
        self, rows: Sequence[Sequence[int]] | NDArray[np.integer], width: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Token ids and mask on the device, (rows, width)."""
        width = max(map(len, rows)) if width is None else width
        # NumPy reads a list of integers five times as fast as torch does.
        padded = np.full((len(rows), width), self.tokenizer.pad_token_id, np.int64)
        real = np.zeros_like(padded)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = row
            real[index, : len(row)] = 1
        return torch.from_numpy(padded).to(self.device), torch.from_numpy(real).to(self.device)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()


def load(
    path: str | os.PathLike[str], *, tokenizer: str | None = None, device: str | torch.device | None = None
) -> LoadedModel:
    """Load a model to use.

    Args:
        path: a run's folder or checkpoint, a Hugging Face folder, or a checkpoint of the original code; see
            `bert.trained.open_model`.
        tokenizer: name or path; None: the model's own copy.
        device: such as "cpu" or "cuda:1"; None: a GPU where there is one.

    Raises:
        RecipeError: it cannot be loaded; CheckpointError and DataError say why.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError:
        target = None
    if target is None or target.type not in DEVICES:
        raise RecipeError(f"device '{device}': give {' or '.join(DEVICES)}, or one of several such as cuda:1")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError("torch sees no CUDA device: use --device cpu, or install a CUDA build of torch")
    opened = open_model(path, tokenizer)
    network = opened.network.eval()
    torch.nn.Module.to(network, target)
    return LoadedModel(network, opened.tokenizer, target, opened.record, opened.file)
