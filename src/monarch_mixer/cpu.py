"""Faster forms of the dense and block-diagonal products on CPUs, in fp32 and fp64, with gradients.

Two things make them faster than plain PyTorch. Products go to oneDNN, which torch.compile uses too, and which on AMD
processors is up to 1.7 times as fast as the default library (MKL). And the gated MLP works on one output block and some
tokens at a time: its intermediate, eight times as wide as the input, never exists whole, and the backward pass computes
it again, which is cheaper than writing it to memory.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Bounds what is in memory at once, whatever the batch: 1,024 tokens of a block 768 wide are 3 MB in fp32.
TOKENS_AT_A_TIME = 1024
# Dropout compares 16 random bits with the probability, so its resolution is 2**-16.
LEVELS = 1 << 16


def cpu_path_applies(x: Tensor, weight: Tensor) -> bool:
    """Say whether an op on these tensors may take the forms of this module."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear map, as torch.nn.functional.linear: x (..., in), weight (out, in), bias (out,)."""
    if not cpu_path_applies(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias of matrices, without a gradient."""
    if x.dtype == torch.float32 and torch.backends.mkldnn.is_available() and x.numel():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            grad @ weight if needs_x else None,
            grad.t() @ x if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def gated_block_diagonal_mlp(x: Tensor, input_weight: Tensor, output_weight: Tensor, dropout: float) -> Tensor:
    """Return the gated block-diagonal MLP without bias; see `monarch_mixer.gated_block_diagonal_mlp`.

    Args:
        x: (tokens, num_blocks * in_block).
        input_weight: (num_blocks, 2 * inner_block, in_block), num_blocks even.
        output_weight: (num_blocks, out_block, inner_block).
        dropout: probability with which an intermediate feature is dropped; 0 outside training.

    Returns:
        (tokens, num_blocks * out_block).
    """
    dropped = None
    if dropout > 0:
        num_blocks, _, inner_block = output_weight.shape
        dropped = draw_dropped((num_blocks, x.shape[0], inner_block), dropout)
    return _GatedMlp.apply(x, input_weight, output_weight, dropped, 1 / (1 - dropout))


def draw_dropped(shape: tuple[int, ...], dropout: float) -> Tensor:
    """Return True where a feature is dropped, from torch's CPU generator; four features a drawn number."""
    count = math.prod(shape)
    bits = torch.empty(math.ceil(count / 4), dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)
    return (bits[:count] < round(dropout * LEVELS) - LEVELS // 2).view(shape)


class _Block:
    """What output block `index` reads: of two input blocks, the rows that make its gates and its values."""

    def __init__(self, index: int, num_blocks: int, inner_block: int) -> None:
        self.index = index
        self.gate_input = index // 2
        self.value_input = num_blocks // 2 + index // 2
        self.rows = slice(index % 2 * inner_block, (index % 2 + 1) * inner_block)


def _pieces(num_tokens: int, output_weight: Tensor) -> list[tuple[slice, _Block]]:
    num_blocks, _, inner_block = output_weight.shape
    chunks = [slice(start, start + TOKENS_AT_A_TIME) for start in range(0, num_tokens, TOKENS_AT_A_TIME)]
    return [(chunk, _Block(index, num_blocks, inner_block)) for chunk in chunks for index in range(num_blocks)]


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, input_weight, output_weight, dropped, scale):
        blocks = x.view(len(x), len(input_weight), -1)
        y = x.new_empty(len(x), *output_weight.shape[:2])
        for tokens, block in _pieces(len(x), output_weight):
            gates = _product(blocks[tokens, block.gate_input], input_weight[block.gate_input, block.rows])
            values = _product(blocks[tokens, block.value_input], input_weight[block.value_input, block.rows])
            inner = torch.ops.aten.gelu_(gates).mul_(values)
            if dropped is not None:
                inner.masked_fill_(dropped[block.index, tokens], 0)
            y[tokens, block.index] = _product(inner, output_weight[block.index])
        ctx.save_for_backward(x, input_weight, output_weight, dropped)
        ctx.scale = scale
        return y.flatten(1) if dropped is None else y.flatten(1).mul_(scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, input_weight, output_weight, dropped = ctx.saved_tensors
        blocks = x.view(len(x), len(input_weight), -1)
        grad = (grad if dropped is None else grad * ctx.scale).view(len(x), *output_weight.shape[:2])
        grad_blocks = torch.zeros_like(blocks)
        grad_input_weight, grad_output_weight = torch.zeros_like(input_weight), torch.zeros_like(output_weight)
        for tokens, block in _pieces(len(x), output_weight):
            gate_input, value_input = blocks[tokens, block.gate_input], blocks[tokens, block.value_input]
            gate_weight = input_weight[block.gate_input, block.rows]
            value_weight = input_weight[block.value_input, block.rows]
            gates, values = _product(gate_input, gate_weight), _product(value_input, value_weight)
            activated = F.gelu(gates)
            inner = activated * values
            grad_out = grad[tokens, block.index]
            grad_inner = grad_out @ output_weight[block.index]
            if dropped is not None:
                inner.masked_fill_(dropped[block.index, tokens], 0)
                grad_inner.masked_fill_(dropped[block.index, tokens], 0)
            grad_output_weight[block.index].addmm_(grad_out.t(), inner)
            grad_gates = torch.ops.aten.gelu_backward(values.mul_(grad_inner), gates)
            grad_values = grad_inner.mul_(activated)
            grad_input_weight[block.gate_input, block.rows].addmm_(grad_gates.t(), gate_input)
            grad_input_weight[block.value_input, block.rows].addmm_(grad_values.t(), value_input)
            grad_blocks[tokens, block.gate_input].addmm_(grad_gates, gate_weight)
            grad_blocks[tokens, block.value_input].addmm_(grad_values, value_weight)
        return grad_blocks.flatten(1), grad_input_weight, grad_output_weight, None, None
