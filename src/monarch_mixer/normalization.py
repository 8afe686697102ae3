"""LayerNorm with a choice of the result's layout, by a kernel where one applies."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from monarch_mixer.kernels.support import compute_dtype, kernels_apply

# The widest that the kernel holds in registers.
MAX_KERNEL_WIDTH = 8192


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, channels_first: bool = False) -> Tensor:
    """Normalise the last axis, as torch.nn.functional.layer_norm.

    Under autocast the kernel's result has autocast's dtype; PyTorch's has fp32. Statistics are fp32 in both.

    Args:
        x: (..., width).
        weight: (width,).
        bias: (width,).
        eps: added to the variance.
        channels_first: a hint that the reader would like the channels first in memory. Where the kernel runs,
            `result.movedim(-1, 0)` is then contiguous; elsewhere the hint is ignored.

    Returns:
        (..., width).
    """
    if kernels_apply(x, compute_dtype(x)) and x.shape[-1] <= MAX_KERNEL_WIDTH:
        from monarch_mixer.kernels.layer_norm import block_layer_norm

        return block_layer_norm(None, None, x, weight, bias, eps, channels_first=channels_first)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
