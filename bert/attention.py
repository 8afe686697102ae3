"""The attention baseline: the same model with self-attention in the place of the Monarch sequence mixer."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert.configuration import M2BertConfig

# Far below any score, and finite: a row whose keys are all padding stays a number.
PADDING_SCORE = -1e4


class SelfAttention(nn.Module):
    """Multi-head self-attention with residual and LayerNorm after it, by PyTorch's fused kernels.

    With ALiBi (Press et al., 2022) the scores get `-slope * |i - j|`; FlexAttention adds it inside the kernel where the
    model is compiled for a GPU, so that no (heads, length, length) table is read.
    """

    def __init__(self, config: M2BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv_projection = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output_projection = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.hidden_dropout = config.hidden_dropout_prob
        self.attention_dropout = config.attention_probs_dropout_prob
        self.alibi = config.attention_alibi

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Attend over x (batch, length, hidden); `attention_mask` (batch, length) is 0 at padding."""
        qkv = self.qkv_projection(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        dropout = self.attention_dropout if self.training else 0.0
        if self.alibi and x.is_cuda and torch.compiler.is_compiling() and not dropout:
            attended = self._flex_attention(query, key, value, attention_mask)
        else:
            bias = self._score_bias(x.shape[1], attention_mask, query)
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        out = self.output_projection(attended.transpose(1, 2).flatten(2))
        return self.norm(F.dropout(out, self.hidden_dropout, self.training) + x)

    def _score_bias(self, length: int, attention_mask: Tensor | None, query: Tensor) -> Tensor | None:
        bias = None
        if self.alibi:
            position = torch.arange(length, device=query.device)
            distance = (position[:, None] - position[None, :]).abs()
            bias = -alibi_slopes(self.num_heads, query.device)[:, None, None] * distance
        if attention_mask is not None:
            padding = (1 - attention_mask[:, None, None, :].to(query.dtype)) * PADDING_SCORE
            bias = padding if bias is None else bias + padding
        return None if bias is None else bias.to(query.dtype)

    def _flex_attention(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        slopes = alibi_slopes(self.num_heads, query.device)

        def score(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            score = score - slopes[head] * (i - j).abs()
            if attention_mask is not None:
                score = torch.where(attention_mask[batch, j] != 0, score, PADDING_SCORE)
            return score

        return cast(Tensor, flex_attention(query, key, value, score_mod=score))


def alibi_slopes(num_heads: int, device: torch.device) -> Tensor:
    """Return ALiBi's slope for each head, (num_heads,): a geometric sequence, interleaved for odd numbers of heads."""
    power = 2 ** int(math.log2(num_heads))
    # Made on the device: a table copied there would make every step wait for it.
    head = torch.arange(num_heads, device=device)
    exponent = torch.where(head < power, (head + 1) / power, (2 * (head - power) + 1) / (2 * power))
    return torch.exp2(-8 * exponent)
