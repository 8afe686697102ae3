"""What a recipe says about contrastive training; `task: contrastive` reads it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ContrastiveConfig:
    """Pairs of query and document, told from the other documents of the batch (InfoNCE with in-batch negatives)."""

    checkpoint: str | None = None  # what to start from: anything `bert.load` reads; null: random weights
    temperature: float = 0.05  # of the softmax over cosines
    pooling: str = "mean"  # over all tokens; or first
    query_length: int = 128  # tokens that a query is cut to; documents: max_seq_len
    gather_negatives: bool = True  # on several ranks: documents of all ranks are negatives
