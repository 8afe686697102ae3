from __future__ import annotations

import numpy as np
import pytest

from bert.data.masking import IGNORED_LABEL, mask_tokens
from bert.errors import RecipeError

PAD, UNK, CLS, SEP, MASK = SPECIAL = (0, 1, 2, 3, 4)
VOCAB = 1000
ROWS, LENGTH = 2000, 128


def mask(ids, sample_ids=None, **changes):
    options = {"seed": 7, "epoch": 0, "rate": 0.3, "mask_id": MASK, "special_ids": SPECIAL, "vocab_size": VOCAB}
    sample_ids = np.arange(len(ids)) if sample_ids is None else np.asarray(sample_ids)
    return mask_tokens(ids, sample_ids, **{**options, **changes})


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(5, VOCAB, (ROWS, LENGTH)).astype(np.uint16)


def within(count, trials, probability, sigmas=5.0):
    """Whether a binomial count is as expected."""
    return abs(count - trials * probability) < sigmas * np.sqrt(trials * probability * (1 - probability)) + 1


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_rate_and_the_three_actions(ids, rate):
    masked, labels = mask(ids, rate=rate)
    chosen = labels != IGNORED_LABEL
    assert within(chosen.sum(), ids.size, rate)
    count = chosen.sum()
    is_mask = chosen & (masked == MASK)
    same = chosen & (masked == ids)
    other = chosen & ~is_mask & ~same
    assert within(is_mask.sum(), count, 0.8)
    # A random replacement is the original once in VOCAB - 5 times.
    assert within(other.sum(), count, 0.1 * (1 - 1 / (VOCAB - 5)))
    assert within(same.sum(), count, 0.1 + 0.1 / (VOCAB - 5))
    assert (labels[chosen] == ids[chosen]).all()
    assert (masked[~chosen] == ids[~chosen]).all()
    assert masked.dtype == labels.dtype == np.int64


def test_every_position_and_every_row_is_as_likely(ids):
    chosen = mask(ids)[1] != IGNORED_LABEL
    assert all(within(count, ROWS, 0.3, 4.5) for count in chosen.sum(0))
    assert all(within(count, LENGTH, 0.3, 5.0) for count in chosen.sum(1))


def test_replacements_are_uniform_over_ordinary_tokens():
    vocab, special = 20, (0, 7, 19, 4)
    ids = np.full((3000, 64), 5)
    masked, labels = mask(ids, rate=1.0, vocab_size=vocab, special_ids=special, mask_id=4)
    drawn = masked[(labels != IGNORED_LABEL) & (masked != 4) & (masked != 5)]
    counts = np.bincount(drawn, minlength=vocab)
    ordinary = [token for token in range(vocab) if token not in (*special, 5)]
    assert counts.sum() == counts[ordinary].sum()
    assert all(within(counts[token], counts.sum(), 1 / len(ordinary)) for token in ordinary)


def test_special_tokens_are_never_chosen_nor_drawn(ids):
    ids = ids.copy()
    ids[:, 0], ids[:, 50], ids[:, 100:] = CLS, SEP, PAD
    masked, labels = mask(ids, rate=1.0)
    special = np.isin(ids, SPECIAL)
    assert (labels[special] == IGNORED_LABEL).all()
    assert (masked[special] == ids[special]).all()
    assert (labels[~special] == ids[~special]).all()  # rate 1: all others are
    assert not np.isin(masked[~special], (PAD, UNK, CLS, SEP)).any()


def test_label_zero_is_a_label():
    ids = np.zeros((4, 16), dtype=np.uint16)
    labels = mask(ids, rate=1.0, special_ids=(2, 3, 4))[1]
    assert (labels == 0).all()


def test_a_row_depends_on_its_own_sample_alone(ids):
    masked, labels = mask(ids[:50])
    order = np.random.default_rng(1).permutation(50)
    shuffled = mask(ids[order], order)
    assert (shuffled[0] == masked[order]).all() and (shuffled[1] == labels[order]).all()
    alone = mask(ids[17:18], [17])
    assert (alone[0][0] == masked[17]).all() and (alone[1][0] == labels[17]).all()
    padded = np.zeros((50, LENGTH + 31), dtype=np.int64)
    padded[:, :LENGTH] = ids[:50]
    assert (mask(padded)[0][:, :LENGTH] == masked).all()
    assert (mask(ids[:50].astype(np.uint32))[1] == labels).all()


def test_the_numbers_of_this_version_are_kept():
    # A resumed run must see the masks that it would have seen: a new hash is a new recipe.
    labels = mask(np.full((3, 24), 9), [0, 1, 2**40], seed=3, epoch=2)[1]
    assert [np.flatnonzero(row != IGNORED_LABEL).tolist() for row in labels] == [
        [2, 3, 4, 5, 10, 11, 13, 15, 18, 20, 21, 23],
        [0, 2, 3, 4, 7, 10, 12, 16, 22],
        [0, 1, 2, 3, 12, 14, 21, 22, 23],
    ]


@pytest.mark.parametrize("change", [{"epoch": 1}, {"seed": 8}, {"sample_ids": np.arange(ROWS) + 1}])
def test_another_epoch_seed_or_sample_is_independent(ids, change):
    first = mask(ids)[1] != IGNORED_LABEL
    second = mask(ids, **change)[1] != IGNORED_LABEL
    assert within((first & second).sum(), ids.size, 0.09)


def test_neighbouring_rows_and_positions_are_independent(ids):
    chosen = mask(ids)[1] != IGNORED_LABEL
    assert within((chosen[1:] & chosen[:-1]).sum(), chosen[1:].size, 0.09)
    assert within((chosen[:, 1:] & chosen[:, :-1]).sum(), chosen[:, 1:].size, 0.09)


def test_the_action_does_not_depend_on_the_choice(ids):
    # What is chosen at a low rate is chosen at a high one too; its action must not be a function of the first draw.
    low, low_labels = mask(ids, rate=0.05)
    high = mask(ids, rate=0.9)[0]
    chosen = low_labels != IGNORED_LABEL
    assert (high[chosen] == low[chosen]).all()
    assert within((low[chosen] == MASK).sum(), chosen.sum(), 0.8)


def test_the_input_is_left_alone(ids):
    before = ids[:4].copy()
    mask(ids[:4], rate=1.0)
    assert (ids[:4] == before).all()


def test_rate_zero_chooses_nothing(ids):
    masked, labels = mask(ids[:4], rate=0.0)
    assert (masked == ids[:4]).all() and (labels == IGNORED_LABEL).all()


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_a_rate_that_is_no_probability_is_refused(ids, rate):
    with pytest.raises(RecipeError, match="mlm_probability"):
        mask(ids[:2], rate=rate)


def test_a_vocabulary_without_ordinary_tokens_is_refused(ids):
    with pytest.raises(RecipeError, match="no ordinary token"):
        mask(ids[:2], vocab_size=5)
