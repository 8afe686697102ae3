"""The contrastive objective as a ComposerModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.nn.functional as collectives
import torch.nn.functional as F
from composer.models import ComposerModel
from composer.utils import dist
from torch import Tensor
from torchmetrics import Metric

from bert.composer_models import HuggingFaceBert
from bert.inference import pool
from bert.modeling import M2BertForMaskedLM


class _Mean(Metric):
    """The mean over queries of what `key` names among the outputs."""

    full_state_update = False
    key: str
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, outputs: Mapping[str, Tensor]) -> None:
        """Add a batch's outputs (see `ContrastiveModel.forward`)."""
        self.total += outputs[self.key].sum()
        self.count += outputs[self.key].numel()

    def compute(self) -> Tensor:
        """Return the mean; 0 where there were no queries."""
        return self.total / self.count.clamp(min=1)


class ContrastiveCrossEntropy(_Mean):
    """Cross entropy of finding a query's document among those of its batch, in nats."""

    key = "cross_entropies"


class ContrastiveAccuracy(_Mean):
    """Accuracy@1 within the batch: fraction of queries that are nearest to their own document."""

    key = "correct"


class ContrastiveModel(ComposerModel):
    """Encoder trained so that a query is nearer to its document than to the batch's others (InfoNCE, arXiv 1807.03748).

    The network keeps its prediction head, frozen, so that a checkpoint is one of the same model as before.
    """

    def __init__(
        self,
        network: M2BertForMaskedLM | HuggingFaceBert,
        *,
        temperature: float,
        pooling: str,
        gather_negatives: bool = True,
    ) -> None:
        super().__init__()
        self.model = network
        self.temperature = temperature
        self.pooling = pooling
        self.gather_negatives = gather_negatives
        encoder = {id(parameter) for parameter in network.base_model.parameters()}
        for parameter in network.parameters():
            if id(parameter) not in encoder:
                parameter.requires_grad_(False)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return fp32 vectors of length 1, (batch, hidden), of tokens (batch, length)."""
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask)[0]
        return F.normalize(pool(hidden, mask, self.pooling), dim=-1)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return loss (a scalar), and cross_entropies and correct, each (queries,).

        In training on several ranks the documents of all ranks are negatives, with gradients (`gather_negatives`).
        """
        queries = self.embed(batch["query_ids"], batch["query_mask"])
        documents = self.embed(batch["document_ids"], batch["document_mask"])
        targets = torch.arange(len(queries), device=queries.device)
        if self.training and self.gather_negatives and dist.get_world_size() > 1:
            # Its backward pass adds the ranks' gradients, and data parallelism divides by their number: as one batch.
            documents = torch.cat(collectives.all_gather(documents))
            targets = targets + dist.get_global_rank() * len(queries)
        with torch.autocast(queries.device.type, enabled=False):
            scores = queries @ documents.T / self.temperature
        losses = F.cross_entropy(scores, targets, reduction="none")
        return {
            "loss": losses.mean(),
            "cross_entropies": losses.detach(),
            "correct": (scores.detach().argmax(-1) == targets).float(),
        }

    def loss(self, outputs: Mapping[str, Tensor], batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss computed in `forward`."""
        return outputs["loss"]

    def eval_forward(self, batch: Any, outputs: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        """Return the outputs of an evaluation batch (or those of the training step, for its metrics)."""
        return self.forward(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        """Return new metrics by name."""
        return {type(metric).__name__: metric for metric in (ContrastiveCrossEntropy(), ContrastiveAccuracy())}

    def update_metric(self, batch: Any, outputs: Mapping[str, Tensor], metric: Metric) -> None:
        """Add a batch's outputs to a metric."""
        metric.update(outputs)
