"""BERT masking as a pure function of (seed, epoch, sample, position); without a generator whose state could differ."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from bert.errors import RecipeError

IGNORED_LABEL = -100  # positions that carry no loss
MASKED_FRACTION = 0.8  # of the chosen positions become [MASK] ...
RANDOM_FRACTION = 0.1  # ... and these a random token; the rest stay as they are (Devlin et al. 2019, section 3.1)

# splitmix64 (Steele, Lea and Flood 2014): a Weyl sequence with this step, then two multiply-xorshift rounds.
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_UINT64_BITS = 0xFFFFFFFFFFFFFFFF

# The draws of one position, each with a hash of its own.
_CHOOSE, _ACTION, _REPLACEMENT = range(3)


def mask_tokens(
    input_ids: NDArray[np.integer],
    sample_ids: NDArray[np.integer],
    *,
    seed: int,
    epoch: int,
    rate: float,
    mask_id: int,
    special_ids: Iterable[int],
    vocab_size: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose positions of a batch for prediction and corrupt them.

    A row depends on its own tokens, its sample id, `seed` and `epoch` alone: not on the other rows, the length it is
    padded to, the worker or the rank.

    Args:
        input_ids: (batch, length) token ids, padded.
        sample_ids: (batch,) the number of each sample in its dataset.
        seed: of the whole run.
        epoch: 0 in every evaluation, so that each sees the same masks.
        rate: the probability that an ordinary token is chosen, from 0 to 1.
        mask_id: the id of [MASK].
        special_ids: every special token: never chosen, never drawn as a replacement.
        vocab_size: the tokenizer's number of entries; replacements are uniform over those that are not special.

    Returns:
        The corrupted ids and the labels, both (batch, length) int64; labels are -100 where nothing was chosen.

    Raises:
        RecipeError: the rate is no probability, or no entry of the vocabulary is left to draw.
    """
    special = np.unique(np.fromiter(special_ids, dtype=np.int64))
    if not 0.0 <= rate <= 1.0:
        raise RecipeError(f"mlm_probability is {rate}; give a probability from 0 to 1, such as 0.3")
    if len(special) >= vocab_size:
        raise RecipeError(f"a vocabulary of {vocab_size} with {len(special)} special tokens has no ordinary token")

    masked = input_ids.astype(np.int64)
    keys = _row_keys(seed, epoch, sample_ids)
    positions = np.arange(1, masked.shape[1] + 1, dtype=np.uint64) * _STEP
    chosen = _uniform(_hash(_draw_keys(keys, _CHOOSE)[:, None] + positions)) < rate
    for token in special:
        chosen &= masked != token
    rows, columns = np.nonzero(chosen)

    labels = np.full_like(masked, IGNORED_LABEL)
    original = masked[rows, columns]
    labels[rows, columns] = original

    action = _uniform(_hash(_draw_keys(keys, _ACTION)[rows] + positions[columns]))
    drawn = _hash(_draw_keys(keys, _REPLACEMENT)[rows] + positions[columns])
    replacement = _ordinary_token(drawn, special, vocab_size)
    masked[rows, columns] = np.where(
        action < MASKED_FRACTION,
        mask_id,
        np.where(action < MASKED_FRACTION + RANDOM_FRACTION, replacement, original),
    )
    return masked, labels


def _hash(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix each 64-bit state (splitmix64's output function); arrays only, whose overflow wraps silently."""
    state = (state ^ (state >> _SHIFTS[0])) * _MULTIPLIERS[0]
    state = (state ^ (state >> _SHIFTS[1])) * _MULTIPLIERS[1]
    return state ^ (state >> _SHIFTS[2])


def _row_keys(seed: int, epoch: int, sample_ids: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Return one 64-bit key a row, (batch,): each ingredient is mixed before the next joins it."""
    key = np.zeros(len(sample_ids), dtype=np.uint64)
    for ingredient in (np.uint64(seed & _UINT64_BITS), np.uint64(epoch), sample_ids.astype(np.uint64)):
        key = _hash((key ^ ingredient) + _STEP)
    return key


def _draw_keys(keys: NDArray[np.uint64], draw: int) -> NDArray[np.uint64]:
    return _hash(keys + np.uint64(draw + 1))


def _uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Map 64 random bits to [0, 1) with all 53 bits of a double."""
    return (bits >> np.uint64(11)) * 2.0**-53


def _ordinary_token(bits: NDArray[np.uint64], special: NDArray[np.int64], vocab_size: int) -> NDArray[np.int64]:
    """Map random bits to the entries that are not in `special` (sorted), uniformly."""
    inside = special[(special >= 0) & (special < vocab_size)]
    token = (bits % np.uint64(vocab_size - len(inside))).astype(np.int64)
    for skipped in inside:
        token += token >= skipped
    return token
