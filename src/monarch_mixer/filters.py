"""Implicit (Hyena) filters: the taps of a long convolution as a small network of the position (Poli et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monarch_mixer.kernels import support
from monarch_mixer.kernels.support import exact_in_fp32

# The decay rates span these: the fastest channel falls to TARGET at 0.3 of the maximum length, the slowest at 1.5.
DECAY_TARGET = 1e-2
FAST_DECAY_FRACTION = 0.3
SLOW_DECAY_FRACTION = 1.5
# How a filter is made longer: see `extend_positions`.
EXTENSION_MODES = ("keep-taps", "tile", "interpolate")


class FilterNetwork(nn.Module):
    """Four linear layers with sines between them: position features (length, features) to taps (length, channels)."""

    def __init__(self, num_features: int, order: int, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Linear(num_features, order),
                nn.Linear(order, order),
                nn.Linear(order, order),
                nn.Linear(order, channels, bias=False),
            ]
        )

    def forward(self, features: Tensor, frequency: Tensor, dtype: torch.dtype) -> Tensor:
        """Return taps (length, channels) in `dtype`, the last product's; the others' is that of the features.

        `frequency` (order,) scales the argument of every sine. The parameters may be held in any dtype.
        """
        hidden = features
        *inner, last = self.layers
        for layer in inner:
            product = F.linear(hidden, layer.weight.to(hidden.dtype), layer.bias.to(hidden.dtype))
            hidden = torch.sin(frequency * product)
        return F.linear(hidden.to(dtype), last.weight.to(dtype))


def evaluation_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to evaluate filters' sines in for convolutions that are computed in `dtype`.

    Each sine multiplies what came before it, rounding too, by its frequency: in fp32 taps differ by some 1e-6 of their
    size, and gradients by 1e-5, with the order of sums, so with the length of a batch. Where all else is exact to fp32
    all but the last product is fp64, and in training with the GPU's kernels that too (`two_sided_taps`).
    """
    return torch.float64 if exact_in_fp32(dtype, device) else torch.promote_types(dtype, torch.float32)


class ImplicitFilter(nn.Module):
    """The filter of one long convolution: its taps, forward and backward, and its skip weight.

    Taps are computed in fp32 (or better, see `evaluation_dtype`) whatever autocast says: in bf16 neighbouring positions
    become equal (of 8,192 positions 4,874 remain distinct). The position grid and the decay are tied to `max_length`:
    the taps of a shorter sequence are the first ones of the full grid. In evaluation without gradients they are kept
    until a weight changes.
    """

    def __init__(
        self,
        channels: int,
        max_length: int,
        *,
        order: int = 128,
        num_position_features: int = 5,
        sine_frequency: float = 10.0,
        frequency_scale: float = 1.0,
        bidirectional: bool = True,
        learn_positions: bool = True,
    ) -> None:
        """Make the filter.

        Args:
            channels: filters, one a channel.
            max_length: length of the position grid; the longest sequence.
            order: width of the network.
            num_position_features: odd, at least 3: the time, then cosines and sines of it.
            sine_frequency: initial value of the learned frequency of the sines.
            frequency_scale: constant factor on that frequency.
            bidirectional: whether there are backward taps.
            learn_positions: whether the position features are trained.

        Raises:
            ValueError: `num_position_features` is even or under 3, or a size is not positive.
        """
        super().__init__()
        if num_position_features < 3 or num_position_features % 2 == 0:
            raise ValueError(f"num_position_features must be odd and at least 3, got {num_position_features}")
        if min(channels, max_length, order) < 1:
            raise ValueError(f"sizes must be positive, got {channels=}, {max_length=}, {order=}")
        self.channels = channels
        self.max_length = max_length
        self.num_position_features = num_position_features
        self.sine_frequency = sine_frequency
        self.frequency_scale = frequency_scale
        positions = torch.empty(max_length, num_position_features)
        if learn_positions:
            self.position_features = nn.Parameter(positions)
        else:
            self.register_buffer("position_features", positions)
        self.register_buffer("times", torch.empty(max_length))
        self.register_buffer("decay_rates", torch.empty(channels))
        self.frequency = nn.Parameter(torch.empty(order))
        self.forward_network = FilterNetwork(num_position_features, order, channels)
        self.backward_network = FilterNetwork(num_position_features, order, channels) if bidirectional else None
        self.skip = nn.Parameter(torch.empty(channels))
        self._cached_taps: tuple[object, tuple[Tensor, Tensor | None]] | None = None
        self.reset_parameters()

    times: Tensor
    decay_rates: Tensor

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the position grid, the decay and the frequency, and draw the skip weight from N(0, 1).

        The networks' linear layers keep their own initialisation.
        """
        if self.times.is_meta:  # Hugging Face's 5.x builds models without memory, and loads every value afterwards
            return
        times, features = position_grid(self.max_length, self.num_position_features)
        self.times.copy_(times)
        self.position_features.copy_(features)
        slow, fast = (math.log(DECAY_TARGET) / part for part in (SLOW_DECAY_FRACTION, FAST_DECAY_FRACTION))
        self.decay_rates.copy_(torch.linspace(slow, fast, self.channels))
        self.frequency.fill_(self.sine_frequency)
        self.skip.normal_()

    def check_length(self, length: int) -> None:
        """Raise ValueError where `length` is over `max_length`."""
        if length > self.max_length:
            raise ValueError(f"{length} positions, but the filter was made for at most {self.max_length}")

    def forward(
        self, length: int, cache: bool = True, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor | None]:
        """Return the forward and the backward taps, each (length, channels) in fp32 (fp64 for an fp64 model).

        Backward taps are None for a causal filter; their row j is lag -(j + 1).

        Args:
            length: positions of a sequence.
            cache: whether the taps may be kept in evaluation.
            dtype: what sines are evaluated in, or better for a model held in better; see `evaluation_dtype`.

        Raises:
            ValueError: `length` is over `max_length`.
        """
        self.check_length(length)
        if not cache or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._cached_taps = None
            return self._compute_taps(length, dtype)
        key = self._state_key(length, dtype)
        if key is None:
            return self._compute_taps(length, dtype)
        if self._cached_taps is None or self._cached_taps[0] != key:
            self._cached_taps = (key, self._compute_taps(length, dtype))
        return self._cached_taps[1]

    def _state_key(self, length: int, dtype: torch.dtype) -> object:
        """Return what weights and arguments change; None where nothing tells, of a model made in inference mode."""
        # In-place updates raise a tensor's version, replacements change its address.
        tensors = [*self.parameters(), *self.buffers()]
        if any(tensor.is_inference() for tensor in tensors):
            return None
        return length, dtype, tuple((t.data_ptr(), t._version, t.dtype) for t in tensors)

    def _compute_taps(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(self.times.device.type, enabled=False):
            taps_dtype = torch.promote_types(self.position_features.dtype, torch.float32)
            dtype = torch.promote_types(taps_dtype, dtype)
            features = self.position_features[:length].to(dtype)
            frequency = self.frequency_scale * self.frequency.to(dtype)
            decay = torch.exp(-self.times[:length, None].to(taps_dtype) * self.decay_rates.to(taps_dtype).abs())
            forward_taps = self.forward_network(features, frequency, taps_dtype) * decay
            if self.backward_network is None:
                return forward_taps, None
            return forward_taps, self.backward_network(features, frequency, taps_dtype) * decay

    def tensors(self) -> list[Tensor]:
        """Return all that the taps depend on, in the order of `two_sided_taps`."""
        networks = [self.forward_network, *([] if self.backward_network is None else [self.backward_network])]
        layers = [layer for network in networks for layer in network.layers]
        weights = [tensor for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None]
        return [self.position_features, self.times, self.decay_rates, self.frequency, *weights]

    def extra_repr(self) -> str:
        """Return the sizes, for printing."""
        return (
            f"channels={self.channels}, max_length={self.max_length}, order={self.frequency.numel()}, "
            f"bidirectional={self.backward_network is not None}"
        )


def two_sided_taps(
    filters: Sequence[Sequence[Tensor]], length: int, frequency_scale: float, dtype: torch.dtype
) -> Tensor:
    """Evaluate many filters of one shape together, whatever autocast says.

    Args:
        filters: each `ImplicitFilter.tensors()`: position features, times, decay rates, frequency, then the weights and
            biases of the forward and, where there is one, the backward network.
        length: positions of a sequence, at most the filters' maximum.
        frequency_scale: constant factor on the frequency.
        dtype: what sines are evaluated in, or better for a model held in better; see `evaluation_dtype`.

    Returns:
        (filters, channels, 2 * length - 1) in fp32 (fp64 for an fp64 model): taps from lag -(length - 1) up; zero at
        negative lags of a causal filter.
    """
    with torch.autocast(filters[0][0].device.type, enabled=False):
        positions, times, decay_rates, frequency, *weights = (
            torch.stack(group) for group in zip(*filters, strict=True)
        )
        taps_dtype = torch.promote_types(positions.dtype, torch.float32)
        dtype = torch.promote_types(taps_dtype, dtype)
        features = positions[:, :length].to(dtype)
        frequency = frequency_scale * frequency[:, None].to(dtype)
        decay = torch.exp(-decay_rates.abs()[:, :, None].to(taps_dtype) * times[:, None, :length].to(taps_dtype))
        networks = [weights[start : start + 7] for start in range(0, len(weights), 7)]
        forward, *backward = (_stacked_taps(features, frequency, network, taps_dtype) * decay for network in networks)
        past = backward[0][..., : length - 1].flip(2) if backward else torch.zeros_like(forward[..., : length - 1])
        return torch.cat([past, forward], 2)


def taps_for_training(
    filters: Sequence[Sequence[Tensor]], length: int, frequency_scale: float, dtype: torch.dtype
) -> Tensor:
    """Evaluate many filters of one shape together for the GPU's kernels, in training.

    Where all is exact to fp32, sequences that take the largest block of the transforms get taps to the end of their
    last block, as far as the filter goes: a text then has the same transforms, however long its batch is. The lags over
    `length` meet no input and have no gradient.

    Args:
        filters: as `two_sided_taps` takes them.
        length: positions of a sequence.
        frequency_scale: constant factor on the frequency.
        dtype: what the convolutions are computed in.

    Returns:
        (filters, channels, 2 * positions - 1), from the most negative lag up; at least `length` positions.
    """
    device, longest = filters[0][0].device, length
    block = support.LARGEST_EXACT_BLOCK
    if exact_in_fp32(dtype, device) and length > block // 2:
        longest = min(-(-length // block) * block, filters[0][0].shape[0])
    taps = two_sided_taps(filters, longest, frequency_scale, evaluation_dtype(dtype, device))
    if longest == length:
        return taps
    unmet = longest - length
    near = taps[..., unmet : unmet + 2 * length - 1]
    return torch.cat([taps[..., :unmet].detach(), near, taps[..., unmet + 2 * length - 1 :].detach()], -1)


def _stacked_taps(features: Tensor, frequency: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Do what `FilterNetwork` does for networks (filters, ...), channels first: taps (filters, channels, length).

    The last product is in the sines' dtype too: the gradient of its weights is a sum over all positions, which cuBLAS
    does not split for a batch of networks as it does for one; in fp32 it was off by 1.3e-5 at 8,192 on an H200.
    """
    hidden = features
    for weight, bias in zip(weights[0:6:2], weights[1:6:2], strict=True):
        product = torch.baddbmm(bias[:, None].to(hidden.dtype), hidden, weight.mT.to(hidden.dtype))
        hidden = torch.sin(frequency * product)
    return torch.bmm(weights[6].to(hidden.dtype), hidden.mT).to(dtype)


def position_grid(max_length: int, num_features: int, period: int | None = None) -> tuple[Tensor, Tensor]:
    """Return times (max_length,) and the initial position features (max_length, num_features).

    Features: the time, then cosines and negative sines of 2 pi l / period at frequencies from 1e-4 up.

    Args:
        max_length: positions.
        num_features: odd, at least 3.
        period: positions of the grid, over which times go from 0 to 1; None: all. Fewer than `max_length`, and the
            grid goes on past 1 with its spacing.
    """
    period = max_length if period is None else period
    times = torch.linspace(0, (max_length - 1) / max(1, period - 1), max_length)
    num_bands = (num_features - 1) // 2
    bands = torch.linspace(1e-4, num_bands - 1, num_bands)
    angles = 2 * math.pi * torch.arange(max_length)[:, None] / period * bands
    return times, torch.cat([times[:, None], angles.cos(), -angles.sin()], dim=1)


def extend_positions(features: Tensor, times: Tensor, length: int, mode: str) -> tuple[Tensor, Tensor]:
    """Extend what a filter knows of positions, and so the filter itself, to a greater length.

    A filter's tap at lag l is `network(features[l]) * exp(-times[l] * rate)`, so that these two tensors, and nothing
    else in it, depend on the length. By mode:

    - "keep-taps": rows and times of the old lags stay as they are, bit for bit, and with them the taps. The grid goes
      on past them with its spacing (times past 1), each feature displaced from it by what training moved the last row.
      The decay goes on too: at first the new taps are small.
    - "tile": rows repeat; times are spread anew over their old span, [0, 1], so that every channel decays more slowly,
      by the ratio of the lengths. What the original code does to extend its models, but that it zeroes the first rows.
    - "interpolate": the old filter at stretched lags. The tap at lag l is the old one at lag
      l * (old - 1) / (length - 1); between two old lags the rows are interpolated linearly.

    Args:
        features: (old, num_features), learned.
        times: (old,), evenly spaced from 0; past 1 where "keep-taps" extended them before.
        length: the new one, greater than `old`.
        mode: one of EXTENSION_MODES.

    Returns:
        Features (length, num_features) and times (length,), in the dtypes given.

    Raises:
        ValueError: an unknown mode, a length that is not greater, or times that are not evenly spaced from 0.
    """
    old, num_features = features.shape
    if mode not in EXTENSION_MODES:
        raise ValueError(f"mode '{mode}' is none of {', '.join(EXTENSION_MODES)}")
    if length <= old or old < 2:
        raise ValueError(f"a filter of {old} positions cannot be extended to {length}")
    last = times[-1].item()
    even = torch.linspace(0, last, old, dtype=torch.float64)
    if not last > 0 or (times.double() - even).abs().max() > 0.1 * last / (old - 1):
        raise ValueError("the filter's times are not evenly spaced from 0, so that they cannot be continued")
    if mode == "keep-taps":
        period = round((old - 1) / last) + 1
        new_times, grid = position_grid(length, num_features, period)
        moved = features[-1] - grid[old - 1].to(features)
        new_features = grid.to(features) + moved
        new_features[:old], new_times[:old] = features, times
    else:
        new_times = torch.linspace(0, last, length)
        new_features = extend_rows(features, length, mode)
    return new_features, new_times.to(times)


def extend_rows(rows: Tensor, length: int, mode: str) -> Tensor:
    """Extend a learned table (old, width) to `length` rows: repeated, or interpolated linearly for "interpolate"."""
    if mode != "interpolate":
        return rows.repeat(-(-length // len(rows)), 1)[:length]
    return F.interpolate(rows.t()[None].float(), size=length, mode="linear", align_corners=True)[0].t().to(rows.dtype)
