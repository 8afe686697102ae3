"""Cross entropy of a linear map's logits that never exist whole: a chunk of rows at a time, gradients at once.

Once a chunk's logits are there, everything about them is computed: losses, hits, and in place of the logits their own
gradient, from which the chunk's parts of all gradients follow. The backward pass only scales, as in Liger-Kernel
(Hsu et al., 2024, arXiv:2410.10989).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from monarch_mixer.kernels import support

# 250 MB of bf16 logits with BERT's vocabulary; large enough for the products to run at full speed.
CHUNK_ROWS = 4096
BLOCK_V = 4096
WARPS = 8
# Stands for "no logit yet": below any logit, and differences with it are numbers.
LOWEST = tl.constexpr(-1e38)


def linear_cross_entropy(
    rows: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ignored: int = -100, chunk_rows: int = CHUNK_ROWS
) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross entropies of `rows @ weight.T + bias`, in nats, and the number of right predictions.

    Computed in autocast's dtype where it is on, else in that of the rows: logits are rounded to it, sums are fp32. A
    prediction is the largest logit, the first of equal ones. Nothing waits for the device.

    Args:
        rows: (rows, features).
        weight: (classes, features).
        bias: (classes,).
        labels: int64 (rows,): a class, or `ignored`, whose rows count nowhere.
        ignored: the label that marks them.
        chunk_rows: rows whose logits exist at once.

    Returns:
        fp32 scalar, with gradients to rows, weight and bias; int64 scalar.

    Raises:
        ValueError: sizes do not fit.
    """
    if rows.dim() != 2 or weight.shape != (bias.shape[0], rows.shape[1]) or labels.shape != rows.shape[:1]:
        raise ValueError(
            f"sizes do not fit: rows {tuple(rows.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}, "
            f"labels {tuple(labels.shape)}"
        )
    needs_gradients = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad or bias.requires_grad)
    loss, correct, *_ = _linear_cross_entropy(
        rows, weight, bias, labels, ignored, chunk_rows, support.compute_dtype(rows), needs_gradients
    )
    return loss, correct


@torch.library.custom_op(
    "monarch_mixer::linear_cross_entropy",
    mutates_args=(),
    schema=(
        "(Tensor rows, Tensor weight, Tensor bias, Tensor labels, int ignored, int chunk_rows, ScalarType dtype,"
        " bool needs_gradients) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _linear_cross_entropy(rows, weight, bias, labels, ignored, chunk_rows, dtype, needs_gradients):
    device = rows.device
    losses = support.empty(rows.shape[0], dtype=torch.float32, device=device)
    hits = support.empty(rows.shape[0], dtype=torch.int32, device=device)
    grad_rows, grad_weight, grad_bias = _gradients(rows, weight, bias, needs_gradients)
    # Casting here, not before the op, gives the weight a gradient that was added up, and comes back, in its own dtype.
    cast_weight, cast_bias = weight.to(dtype), bias.to(dtype)
    for start in range(0, rows.shape[0], chunk_rows):
        chunk = slice(start, start + chunk_rows)
        chunk_of_rows = rows[chunk].to(dtype)
        logits = torch.addmm(cast_bias, chunk_of_rows, cast_weight.t())
        _cross_entropy[(logits.shape[0],)](
            logits,
            labels[chunk].contiguous(),
            losses[chunk],
            hits[chunk],
            ignored,
            NUM_CLASSES=logits.shape[1],
            NEEDS_GRADIENTS=needs_gradients,
            BLOCK=min(BLOCK_V, triton.next_power_of_2(logits.shape[1])),
            num_warps=WARPS,
        )
        if needs_gradients:
            grad_rows[chunk] = torch.mm(logits, cast_weight)
            grad_weight += torch.mm(logits.t(), chunk_of_rows)
            grad_bias += logits.sum(0, dtype=torch.float32)
    gradients = (grad_rows, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype))
    return losses.sum(), hits.sum(dtype=torch.int64), *gradients


def _gradients(rows: Tensor, weight: Tensor, bias: Tensor, needed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return where gradients go: that of the rows empty, those that are added up zero and in fp32; or nothing."""
    if not needed:
        return rows.new_empty(0), weight.new_empty(0), bias.new_empty(0)
    return (
        support.empty(*rows.shape, dtype=rows.dtype, device=rows.device),
        torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format),
        torch.zeros_like(bias, dtype=torch.float32),
    )


@_linear_cross_entropy.register_fake
def _(rows, weight, bias, labels, ignored, chunk_rows, dtype, needs_gradients):
    loss = rows.new_empty((), dtype=torch.float32)
    correct = rows.new_empty((), dtype=torch.int64)
    shapes = (rows.shape, weight.shape, bias.shape) if needs_gradients else ((0,), (0,), (0,))
    return loss, correct, rows.new_empty(shapes[0]), weight.new_empty(shapes[1]), bias.new_empty(shapes[2])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output[2:])


def _backward(ctx, grad_loss, *_):
    # In fp32, since a factor such as 1 / 20,000 loses digits in 16 bits.
    gradients = [(gradient.float() * grad_loss).to(gradient.dtype) for gradient in ctx.saved_tensors]
    return *gradients, None, None, None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


@triton.jit
def _cross_entropy(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    hits_ptr,
    ignored,
    NUM_CLASSES: tl.constexpr,
    NEEDS_GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program: its loss, whether its prediction is right, and its logits' gradient in their place."""
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    counts = label != ignored
    logits_ptr += row.to(tl.int64) * NUM_CLASSES
    lanes = tl.arange(0, BLOCK)
    # Each lane keeps its own largest logit, where it first was, and its sum of exponentials relative to it.
    highest = tl.full((BLOCK,), LOWEST, tl.float32)
    where = tl.full((BLOCK,), NUM_CLASSES, tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, NUM_CLASSES, BLOCK):
        classes = start + lanes
        inside = classes < NUM_CLASSES
        logits = tl.load(logits_ptr + classes, mask=inside, other=0.0).to(tl.float32)
        logits = tl.where(inside, logits, LOWEST)
        where = tl.where(logits > highest, classes, where)
        raised = tl.maximum(highest, logits)
        total = total * tl.exp(highest - raised) + tl.where(inside, tl.exp(logits - raised), 0.0)
        highest = raised
    maximum = tl.max(highest, 0)
    total_all = tl.sum(total * tl.exp(highest - maximum), 0)
    predicted = tl.min(tl.where(highest == maximum, where, NUM_CLASSES), 0)
    target = tl.load(logits_ptr + tl.where(counts, label, 0)).to(tl.float32)
    loss = tl.log(total_all) + maximum - target
    tl.store(losses_ptr + row, tl.where(counts, loss, 0.0))
    tl.store(hits_ptr + row, (counts & (predicted == label)).to(tl.int32))
    if NEEDS_GRADIENTS:
        # All threads have read the label's logit before any of them overwrites it.
        tl.debug_barrier()
        scale = tl.where(counts, 1.0 / total_all, 0.0)
        one = tl.where(counts, 1.0, 0.0)
        for start in range(0, NUM_CLASSES, BLOCK):
            classes = start + lanes
            inside = classes < NUM_CLASSES
            logits = tl.load(logits_ptr + classes, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.exp(logits - maximum) * scale - tl.where(classes == label, one, 0.0)
            tl.store(logits_ptr + classes, gradient.to(logits_ptr.dtype.element_ty), mask=inside)
