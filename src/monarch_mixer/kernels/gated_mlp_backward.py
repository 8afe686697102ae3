"""The gradients of the gated MLP's gates and values, which are computed again. See `gated_mlp` for the layouts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from monarch_mixer.kernels.gated_mlp_elements import (
    for_each_element,
    gates_and_values,
    gelu_slope,
    kept,
    normal_cdf,
    place_of,
)


def gated_backward(
    grad: Tensor, x: Tensor, input_weight: Tensor, output_weight: Tensor, seed: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of gates and values, and the intermediate again.

    Args:
        grad: gradient of the output, (num_blocks, tokens, out_block), any strides.
        x: (tokens, num_blocks * in_block), any strides.
        input_weight: (num_blocks, 2 * inner_block, in_block).
        output_weight: (num_blocks, out_block, inner_block).
        seed: that of the forward pass.
        dropout: that of the forward pass.

    Returns:
        (num_blocks, tokens, 2 * inner_block), by input block: gates' gradients in the first half of the blocks, values'
        in the second; and the intermediate (num_blocks, tokens, inner_block), times `support.stored_share`.
    """
    # Each thread reads its elements of both, then puts the results there: loads and stores are of the same places.
    both, inner = gates_and_values(x, input_weight), torch.bmm(grad, output_weight)
    if inner.numel():
        for_each_element(_backward_kernel, both, inner, seed, dropout)
    return both, inner


@triton.jit
def _backward_kernel(
    both_ptr,  # gates and values, and then their gradients
    inner_ptr,  # the intermediate's gradient, and then the intermediate
    seed_ptr,
    num_tokens,
    PAIRS: tl.constexpr,
    INNER: tl.constexpr,
    GELU: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    SCALE: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows, columns, inside, place, gates_at, to_values = place_of(num_tokens, PAIRS, INNER, BLOCK_T, BLOCK_N)
    gates = tl.load(both_ptr + gates_at, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(both_ptr + to_values + gates_at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(inner_ptr + place, mask=inside, other=0.0).to(tl.float32)
    cdf = normal_cdf(gates, GELU)
    activated = gates * cdf
    inner = activated * values
    if DROP_BELOW > 0:
        keep = kept(seed_ptr, rows, columns, DROP_BELOW)
        inner = tl.where(keep, inner * SCALE, 0.0)
        grad = tl.where(keep, grad * SCALE, 0.0)
    if STORED != 1.0:
        inner *= STORED
    dtype = inner_ptr.dtype.element_ty
    tl.store(inner_ptr + place, inner.to(dtype), mask=inside)
    tl.store(both_ptr + gates_at, (grad * values * gelu_slope(gates, cdf, GELU)).to(dtype), mask=inside)
    tl.store(both_ptr + to_values + gates_at, (grad * activated).to(dtype), mask=inside)
