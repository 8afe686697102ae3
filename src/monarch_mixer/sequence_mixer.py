"""Monarch Mixer's sequence mixer: gated long convolutions in the place of attention (paper, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monarch_mixer import cpu
from monarch_mixer.filters import ImplicitFilter, evaluation_dtype, taps_for_training
from monarch_mixer.kernels.support import NO_CENTERED_SHORT_CONVOLUTION, compute_dtype, kernels_apply
from monarch_mixer.long_convolution import long_convolution, short_convolution
from monarch_mixer.normalization import layer_norm

SHORT_CONVOLUTION_TAPS = 3
# The mixer's own LayerNorm; the rest of M2-BERT uses the configuration's 1e-12.
LAYER_NORM_EPS = 1e-5

Taps = tuple[Tensor, Tensor | None, Tensor]  # forward, backward, skip


def gated_long_convolution(
    projected: Tensor,
    residual_input: Tensor,
    short_weight: Tensor,
    short_bias: Tensor,
    taps: Taps,
    residual_taps: Taps | None,
    lengths: Tensor | None = None,
    ahead: int = 0,
) -> Tensor:
    """Do all that the sequence mixer does between its two linear maps, in plain PyTorch or on a CPU.

    Where kernels apply `MonarchSequenceMixer.forward` does it channels first instead, from the projection on.

    With (x1, x2, v) the three parts of the short convolution of `projected`:
    `x2 * long_convolution(x1 * v, taps) + long_convolution(residual_input, residual_taps)`.

    Args:
        projected: (batch, length, 3 * channels), the input projection.
        residual_input: (batch, length, channels), the layer's input.
        short_weight: (3 * channels, 1, taps) of the short convolution.
        short_bias: (3 * channels,).
        taps: forward taps, backward taps or None, and skip weights of the gated convolution.
        residual_taps: the same of the ungated one, or None where there is none.
        lengths: (batch,), the real positions of each sequence; what follows them counts as zeros in both convolutions,
            and in the short one where it looks ahead: a causal one needs no mask. None: there is no padding.
        ahead: positions after the present one that the short convolution reads; see `short_convolution`.

    Returns:
        (batch, length, channels) in the dtype of the gated part, or of the wider of both parts.
    """
    padding = None
    if lengths is not None:
        padding = torch.arange(projected.shape[1], device=lengths.device)[:, None] >= lengths[:, None, None]
        if ahead:
            projected = projected.masked_fill(padding, 0)
    gate_before, gate_after, value = short_convolution(projected, short_weight, short_bias, ahead).chunk(3, dim=-1)
    gated = value * gate_before
    if padding is not None:
        gated = gated.masked_fill(padding, 0)
        residual_input = residual_input.masked_fill(padding, 0)
    mixed = long_convolution(gated, *taps) * gate_after
    if residual_taps is None:
        return mixed
    return mixed + long_convolution(residual_input, *residual_taps)


def _project(layer: nn.Linear, x: Tensor) -> Tensor:
    return cpu.linear(x, layer.weight, layer.bias)


class MonarchSequenceMixer(nn.Module):
    """Mix along the sequence in O(length log length): projection, gates and long convolutions, projection.

    The short convolution is causal also where the long ones look both ways, as in the published models, unless it is
    centered.
    """

    def __init__(
        self,
        channels: int,
        max_length: int,
        *,
        filter_order: int = 128,
        num_position_features: int = 5,
        sine_frequency: float = 10.0,
        frequency_scale: float = 1.0,
        bidirectional: bool = True,
        residual_convolution: bool = True,
        learn_positions: bool = True,
        layer_norm: bool = False,
        short_convolution_centered: bool = False,
    ) -> None:
        """Make the mixer.

        Args:
            channels: width of the model.
            max_length: the longest sequence; the filters' position grid is tied to it.
            filter_order: width of the filters' networks.
            num_position_features: position features the filters see.
            sine_frequency: initial frequency of the filters' sines.
            frequency_scale: constant factor on it.
            bidirectional: whether the long convolutions look forward too.
            residual_convolution: whether a second, ungated long convolution of the input is added.
            learn_positions: whether the filters' position features are trained.
            layer_norm: whether the input is normalised first (`hyena_training_additions` of the published models).
            short_convolution_centered: whether the short convolution reads the positions t - 1, t and t + 1, not t - 2,
                t - 1 and t (`short_conv_centered` of the configuration; an experiment). It has no kernels.

        Raises:
            ValueError: a causal mixer with a centered short convolution, or what `ImplicitFilter` raises.
        """
        super().__init__()
        if short_convolution_centered and not bidirectional:
            raise ValueError("a centered short convolution reads the next position, which a causal mixer must not")

        def make_filter() -> ImplicitFilter:
            return ImplicitFilter(
                channels,
                max_length,
                order=filter_order,
                num_position_features=num_position_features,
                sine_frequency=sine_frequency,
                frequency_scale=frequency_scale,
                bidirectional=bidirectional,
                learn_positions=learn_positions,
            )

        self.norm = nn.LayerNorm(channels, eps=LAYER_NORM_EPS) if layer_norm else None
        self.input_projection = nn.Linear(channels, 3 * channels)
        self.short_weight = nn.Parameter(torch.empty(3 * channels, 1, SHORT_CONVOLUTION_TAPS))
        self.short_bias = nn.Parameter(torch.empty(3 * channels))
        self.filter = make_filter()
        self.residual_filter = make_filter() if residual_convolution else None
        self.output_projection = nn.Linear(channels, channels)
        self.ahead = SHORT_CONVOLUTION_TAPS // 2 if short_convolution_centered else 0  # of the short convolution
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the short convolution uniformly in ±1/sqrt(taps); the parts initialise themselves."""
        bound = 1 / math.sqrt(SHORT_CONVOLUTION_TAPS)
        self.short_weight.uniform_(-bound, bound)
        self.short_bias.uniform_(-bound, bound)

    def filters(self) -> list[ImplicitFilter]:
        """Return the gated convolution's filter and, where there is one, the residual one's."""
        return [self.filter] if self.residual_filter is None else [self.filter, self.residual_filter]

    def kernels_lack(self) -> str | None:
        """Return why the GPU's kernels would not do, or None."""
        return NO_CENTERED_SHORT_CONVOLUTION if self.ahead else None

    def forward(
        self,
        x: Tensor,
        taps: Sequence[Tensor] | None = None,
        cache_filters: bool = True,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Mix x (batch, length, channels) along its length.

        Args:
            x: the input; on a GPU channels-first memory (`x.permute(2, 0, 1)` contiguous) saves a copy.
            taps: what `taps_for_training` gives for `filters()`, where it was evaluated with other layers' already;
                used by the GPU's kernels only.
            cache_filters: whether evaluation may keep the filters' taps until a weight changes; not where weights
                change unseen, as sharded ones do.
            lengths: (batch,) int32, the real positions of each sequence; the outputs there, and all gradients of a loss
                on them, do not see the padding that follows. None: every position is real.

        Raises:
            ValueError: the length is over the maximum length.
        """
        if kernels_apply(x, compute_dtype(x), self.kernels_lack()):
            return self._forward_kernels(x, compute_dtype(x), taps, cache_filters, lengths)
        length, filter_dtype = x.shape[1], evaluation_dtype(compute_dtype(x), x.device)
        if self.norm is not None:
            x = self.norm(x)
        residual_taps = None
        if self.residual_filter is not None:
            residual_taps = (*self.residual_filter(length, cache_filters, filter_dtype), self.residual_filter.skip)
        y = gated_long_convolution(
            _project(self.input_projection, x),
            x,
            self.short_weight,
            self.short_bias,
            (*self.filter(length, cache_filters, filter_dtype), self.filter.skip),
            residual_taps,
            lengths,
            self.ahead,
        )
        # Outside autocast a model held in bf16 wants its own dtype; inside, the projection casts for itself.
        return _project(self.output_projection, y.to(x.dtype))

    def _forward_kernels(
        self,
        x: Tensor,
        dtype: torch.dtype,
        taps: Sequence[Tensor] | None,
        cache_filters: bool,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Mix with everything between the two projections in kernels, channels first: positions are neighbours."""
        from monarch_mixer.kernels.sequence_mixer import channels_first, mix, mix_cached, operand

        batch, length, channels = x.shape
        self.filter.check_length(length)
        if self.norm is not None:
            x = layer_norm(x, self.norm.weight, self.norm.bias, self.norm.eps, channels_first=True)
        u = channels_first(x.to(dtype))
        # The bias of this projection is added inside the kernels.
        projected = torch.mm(self.input_projection.weight.to(dtype), u.view(channels, -1)).view(-1, batch, length)
        biases = torch.stack([self.short_bias, self.input_projection.bias], 1)
        parameters = torch.cat([self.short_weight.flatten(1), biases], 1).float()
        skips = [implicit_filter.skip.float() for implicit_filter in self.filters()]
        scale = self.filter.frequency_scale
        if cache_filters and not torch.is_grad_enabled():
            gated, *residual = (
                (implicit_filter.tensors(), skip) for implicit_filter, skip in zip(self.filters(), skips, strict=True)
            )
            y = mix_cached(projected, parameters, gated, u, residual[0] if residual else None, scale, lengths)
        else:
            if taps is None:
                filters = [f.tensors() for f in self.filters()]
                taps = taps_for_training(filters, length, scale, dtype).unbind()
            operands = [operand(filter_taps, dtype) for filter_taps in taps]
            gated_filter, *residual_filter = zip(operands, skips, strict=True)
            y = mix(projected, parameters, gated_filter, u, residual_filter[0] if residual_filter else None, lengths)
        weight, bias = self.output_projection.weight.to(dtype), self.output_projection.bias.to(dtype)
        return F.linear(y.view(channels, -1).t(), weight, bias).view(batch, length, channels)
