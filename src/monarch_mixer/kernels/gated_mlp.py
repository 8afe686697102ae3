"""The gated block-diagonal MLP: GELU, gates and dropout in one kernel, without dropout with the products; its backward.

With nb blocks, output block j takes its gates from input block j // 2 and its values from input block nb / 2 + j // 2,
rows (j % 2) * inner_block onward of each. Blocks 2p and 2p + 1, "pair" p, so share what they read: two input blocks and
all 2 * inner_block rows of the weights there.

Layouts are chosen so that every product is one `torch.bmm` of views. The intermediate is (num_blocks, tokens,
inner_block); gates and values together, and their gradients, are (num_blocks, tokens, 2 * inner_block), by *input*
block. The backward pass computes gates and values again from x, so that a training step keeps no intermediate.

With dropout PyTorch's products and an element-wise kernel at the speed of the memory are faster than one kernel that
does both; without it, for M2-BERT-base in half precision, the one kernel is. docs/performance.md has the timings.

This module has the operator; its kernels are in `gated_mlp_forward` and `gated_mlp_backward`, and what those share in
`gated_mlp_elements`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monarch_mixer.kernels import support
from monarch_mixer.kernels.gated_mlp_backward import gated_backward
from monarch_mixer.kernels.gated_mlp_forward import gated_forward

# Pieces of the batch whose weight gradients are summed apart.
TOKEN_PARTS = 16


def gated_mlp(
    x: Tensor, input_weight: Tensor, output_weight: Tensor, dropout: float, *, as_stored: bool = False
) -> Tensor:
    """Return `W_out (gelu(gates) * values)`, block by block and without bias.

    Computed in autocast's dtype where it is on, else in that of x. Accumulation is fp32.

    Args:
        x: (..., num_blocks * in_block), any strides.
        input_weight: (num_blocks, 2 * inner_block, in_block), num_blocks even.
        output_weight: (num_blocks, out_block, inner_block).
        dropout: probability with which an intermediate feature is dropped; 0 outside training.
        as_stored: whether to return the result times `support.stored_share`, all of which fp16 can hold, for a reader
            that undoes it in fp32 (`block_layer_norm`). The gradient that comes back must be that of the result itself.

    Returns:
        (num_blocks, tokens, out_block): the layout in which the product makes it and `block_layer_norm` reads it.

    Raises:
        ValueError: the sizes do not fit, or dropout is not a probability.
    """
    num_blocks, wide, in_block = input_weight.shape
    if num_blocks % 2 or output_weight.shape[0] != num_blocks or 2 * output_weight.shape[2] != wide:
        raise ValueError(f"weights do not fit: {tuple(input_weight.shape)} and {tuple(output_weight.shape)}")
    if x.shape[-1] != num_blocks * in_block:
        raise ValueError(f"expected {num_blocks} x {in_block} features, got an input of shape {tuple(x.shape)}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
    dtype = support.compute_dtype(x)
    tokens = x.to(dtype).reshape(-1, x.shape[-1])
    # Drawn out here, on the device, so that torch's generator, compilation and checkpointing know of it.
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device) if dropout else None
    return _gated_mlp(tokens, input_weight.to(dtype), output_weight.to(dtype), seed, dropout, as_stored)


@torch.library.custom_op(
    "monarch_mixer::gated_mlp",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor input_weight, Tensor output_weight, Tensor? seed, float dropout, bool as_stored) -> Tensor"
    ),
)
def _gated_mlp(x, input_weight, output_weight, seed, dropout, as_stored):
    inner = gated_forward(x, input_weight, seed, dropout)
    return _product(inner, output_weight.transpose(1, 2), 1.0 if as_stored else 1 / support.stored_share(x.dtype))


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """Return the batched product a @ b, its fp32 sums times a factor."""
    if factor == 1:
        return torch.bmm(a, b)
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=factor)


@_gated_mlp.register_fake
def _(x, input_weight, output_weight, seed, dropout, as_stored):
    return x.new_empty(output_weight.shape[0], x.shape[0], output_weight.shape[1])


@torch.library.custom_op(
    "monarch_mixer::gated_mlp_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor x, Tensor input_weight, Tensor output_weight, Tensor? seed, float dropout)"
        " -> (Tensor, Tensor, Tensor)"
    ),
)
def _gated_mlp_backward(grad, x, input_weight, output_weight, seed, dropout):
    num_blocks, _, in_block = input_weight.shape
    grad_wide, inner = gated_backward(grad, x, input_weight, output_weight, seed, dropout)
    grad_output_weight = _product(grad.transpose(1, 2), inner, 1 / support.stored_share(x.dtype))
    grad_input_weight = _input_weight_gradient(grad_wide, x)
    grad_x = support.empty(x.shape[0], num_blocks, in_block, dtype=x.dtype, device=x.device)
    torch.bmm(grad_wide, input_weight, out=grad_x.transpose(0, 1))
    return grad_x.flatten(1), grad_input_weight, grad_output_weight


def _input_weight_gradient(grad_wide: Tensor, x: Tensor) -> Tensor:
    """Return the sum over the tokens of grad_wide (num_blocks, tokens, wide) times x, (num_blocks, wide, in_block).

    So few, so long sums would leave most of a GPU idle: many tokens are summed in parts first.
    """
    num_blocks, tokens = grad_wide.shape[:2]
    blocks = x.unflatten(1, (num_blocks, -1))
    if tokens < 1024 * TOKEN_PARTS or tokens % TOKEN_PARTS:
        return torch.bmm(grad_wide.transpose(1, 2), blocks.transpose(0, 1))
    shape = (TOKEN_PARTS, tokens // TOKEN_PARTS)
    sums = [
        torch.bmm(grad.unflatten(0, shape).transpose(1, 2), blocks[:, block].unflatten(0, shape)).sum(0)
        for block, grad in enumerate(grad_wide)
    ]
    return torch.stack(sums)


@_gated_mlp_backward.register_fake
def _(grad, x, input_weight, output_weight, seed, dropout):
    return (
        x.new_empty(x.shape),
        input_weight.new_empty(input_weight.shape),
        output_weight.new_empty(output_weight.shape),
    )


def _setup_context(ctx, inputs, output):
    x, input_weight, output_weight, seed, dropout, _ = inputs
    ctx.save_for_backward(x, input_weight, output_weight, seed)
    ctx.dropout = dropout


def _backward(ctx, grad):
    x, input_weight, output_weight, seed = ctx.saved_tensors
    gradients = _gated_mlp_backward(grad, x, input_weight, output_weight, seed, ctx.dropout)
    return *gradients, None, None, None


_gated_mlp.register_autograd(_backward, setup_context=_setup_context)
