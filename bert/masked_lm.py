"""Masked language modelling on masked rows only: the head never sees, and no loss counts, any other position."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from bert.data.masking import IGNORED_LABEL
from monarch_mixer.kernels.support import compute_dtype, kernels_apply


@dataclass
class MaskedLMRowsOutput(ModelOutput):
    """What a masked language model returns when it is given labels."""

    # ModelOutput wants defaults; all but logits and hidden_states are always there.
    loss: Tensor = None  # type: ignore[assignment]  # mean cross entropy over the masked rows, in nats; 0 where there are none
    logits: Tensor | None = None  # (rows, vocabulary): masked rows only; None where the loss is computed without them
    row_labels: Tensor = None  # type: ignore[assignment]  # (rows,): their labels, IGNORED_LABEL in surplus rows
    num_correct: Tensor = None  # type: ignore[assignment]  # masked rows whose largest logit is their label's, a scalar
    hidden_states: tuple[Tensor, ...] | None = None

    @property
    def num_masked(self) -> Tensor:
        """Number of masked rows, a scalar tensor."""
        return (self.row_labels != IGNORED_LABEL).sum()


def row_bound(num_tokens: int, mask_rate: float) -> int:
    """Return a number of rows that a batch masked at `mask_rate` does not exceed (once in 1e9 batches).

    Expected count plus six standard deviations. A fixed number keeps shapes static, so that nothing waits for the
    device to count and a compiled model is compiled once.
    """
    expected = num_tokens * mask_rate
    return min(num_tokens, math.ceil(expected + 6 * math.sqrt(expected * (1 - mask_rate))))


def select_masked_rows(hidden: Tensor, labels: Tensor, max_rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Gather the positions that have a label.

    Args:
        hidden: (batch, length, features).
        labels: (batch, length), IGNORED_LABEL where there is none.
        max_rows: rows to return, in any case; None for as many as there are labels (this waits for the device; under
            torch.compile every position becomes a row instead). Labels beyond the bound are ignored.

    Returns:
        Rows (rows, features) and their labels (rows,), IGNORED_LABEL in surplus rows.
    """
    hidden = hidden.flatten(0, 1)
    labels = labels.flatten()
    labelled = labels != IGNORED_LABEL
    if max_rows is None and not torch.compiler.is_compiling():
        index = labelled.nonzero().squeeze(1)
        return hidden[index], labels[index]
    rows = labels.numel() if max_rows is None else min(max_rows, labels.numel())
    # The j-th labelled position goes to row j; all others to a row beyond the end, which is cut off.
    rank = labelled.cumsum(0) - 1
    target = torch.where(labelled & (rank < rows), rank, rows)
    position = torch.arange(labels.numel(), device=labels.device)
    index = torch.zeros(rows + 1, dtype=torch.long, device=labels.device).scatter(0, target, position)[:rows]
    filled = torch.arange(rows, device=labels.device) < labelled.sum()
    return hidden.index_select(0, index), labels[index].masked_fill(~filled, IGNORED_LABEL)


def masked_lm_output(
    hidden: Tensor,
    labels: Tensor,
    transform: Callable[[Tensor], Tensor],
    weight: Tensor,
    bias: Tensor,
    max_rows: int | None = None,
) -> MaskedLMRowsOutput:
    """Apply the head and the loss to the masked rows.

    Args:
        hidden: (batch, length, features).
        labels: (batch, length), IGNORED_LABEL where there is none.
        transform: what the head does before its last map, row by row.
        weight: the head's last map, (vocabulary, features).
        bias: its bias (vocabulary,).
        max_rows: see `select_masked_rows`.
    """
    rows, row_labels = select_masked_rows(hidden, labels, max_rows)
    rows = transform(rows)
    total, num_correct, logits = _cross_entropy_sum(rows, row_labels, weight, bias)
    loss = total / (row_labels != IGNORED_LABEL).sum().clamp(min=1)
    return MaskedLMRowsOutput(loss=loss, logits=logits, row_labels=row_labels, num_correct=num_correct)


def _cross_entropy_sum(
    rows: Tensor, labels: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the sum of the rows' cross entropies, how many predictions are right, and the logits if they were made."""
    if kernels_apply(rows, compute_dtype(rows)):
        from monarch_mixer.kernels.linear_cross_entropy import linear_cross_entropy

        return *linear_cross_entropy(rows, weight, bias, labels, IGNORED_LABEL), None
    logits = F.linear(rows, weight, bias)
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    with torch.no_grad():
        num_correct = ((logits.argmax(-1) == labels) & (labels != IGNORED_LABEL)).sum()
    return total, num_correct, logits
