"""How data-parallel ranks add up their gradients: what Composer leaves to DistributedDataParallel's defaults."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel


def set_gradient_reduction(model: torch.nn.Module, reduction: str) -> None:
    """Let the ranks of `model` exchange gradients in "fp32" or "bf16"; one device exchanges nothing.

    In bf16 each rank rounds its gradients, already divided by the number of ranks, and the ranks add up in bf16; what
    is accumulated over microbatches, clipped and given to the optimizer stays fp32.
    """
    if reduction == "bf16" and isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, bf16_compress_hook)


def average_over_ranks(gradients: torch.Tensor, reduction: str) -> None:
    """Replace gradients by their mean over the ranks, exchanged in "fp32" or "bf16" (see `set_gradient_reduction`)."""
    gradients /= torch.distributed.get_world_size()
    exchanged = gradients.bfloat16() if reduction == "bf16" else gradients
    torch.distributed.all_reduce(exchanged)
    if exchanged is not gradients:
        gradients.copy_(exchanged)


@contextlib.contextmanager
def compiled_graphs(*, cut: bool) -> Iterator[None]:
    """Let torch.compile cut a data-parallel model at its gradient buckets, or keep it whole.

    A whole graph hands over all its gradients when its backward pass ends. Cut (torch's default), the last layers' are
    reduced while the first ones' are still computed, which costs fusions at the cuts.
    """
    # Imported where it is used: it takes a second, and only compiled models need it.
    import torch._dynamo

    with torch._dynamo.config.patch(optimize_ddp=cut):
        yield
