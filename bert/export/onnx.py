"""ONNX: the models as a graph for any batch and any length up to theirs, which onnxruntime runs.

ONNX knows FFTs, but runtimes do them slowly or not at all. The long convolutions are Monarch matrix products instead,
whose size follows the length (`MonarchTransform`): O(length^1.5) where an FFT takes O(length log(length)).
"""

from __future__ import annotations

import importlib.util
import logging
import math
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert.errors import RecipeError
from bert.export.folder import Model
from monarch_mixer import MonarchSequenceMixer
from monarch_mixer.filters import ImplicitFilter
from monarch_mixer.long_convolution import short_convolution

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
ANY = 2**20  # a size that nothing limits; the exporter wants a number
INSTALL = "pip install 'monarch-mixer-bert[onnx]', or pip install " + " ".join(PACKAGES)


def check_installed() -> None:
    """Raise RecipeError where a package of the export is not installed."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise RecipeError(f"--to onnx needs {', '.join(missing)}: {INSTALL}")


class MonarchTransform(nn.Module):
    """The discrete Fourier transform of real sequences, of a size that follows their length, in matrix products alone.

    Of n = p q points it is a Monarch matrix of order 2 (paper, section 3.1): position i q + j goes to frequency k + p m
    by a DFT over i, the same for all j, and then for each k by a matrix over j. p is fixed, q follows the length, so
    that a short sequence in a long model costs little. Of real inputs half the k suffice: the others are conjugates.
    """

    dft: Tensor
    inverse: Tensor

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.points = 2 * round(math.sqrt(longest))  # p; even, and 2 q at the longest: the fewest products
        self.rows = self.points // 2 + 1  # of k
        rows, columns = torch.arange(self.rows), torch.arange(self.points)
        angles = (rows[:, None] * columns % self.points).double() * (2 * math.pi / self.points)
        dft = torch.stack([angles.cos(), -angles.sin()], 1).flatten(0, 1)  # real and imaginary part of each k
        # The first and the last k have their conjugates among themselves; those of the others are left out.
        counts = torch.full((self.rows,), 2.0, dtype=torch.double)
        counts[0] = counts[-1] = 1
        self.register_buffer("dft", dft.float())
        self.register_buffer("inverse", (dft.t() * counts.repeat_interleave(2)).float())

    def blocks(self, length: int) -> Tensor:
        """Return the second factor (rows, 2 q, 2 q), complex matrices as real ones, for n of at least 2 length - 1."""
        # By way of a tensor: the exporter then takes q for a size of its own, and makes no cases of it.
        q = cast(int, (torch.full((), 2 * length - 2, dtype=torch.long) // self.points + 2).item())
        torch._check(q >= 2)
        k, j = torch.arange(self.rows), torch.arange(q)
        size = torch.full((), self.points * q, dtype=torch.long)
        turns = (k[:, None, None] + self.points * j[:, None]) * j % size
        angles = turns.float() / size.float() * (2 * math.pi)
        cosine, sine = angles.cos(), angles.sin()
        return torch.cat([torch.cat([cosine, sine], 2), torch.cat([-sine, cosine], 2)], 1)

    def forward(self, x: Tensor, blocks: Tensor) -> Tensor:
        """Return the spectrum (batch, rows, 2, q, channels), real and imaginary, of x (batch, length, channels)."""
        batch, length, channels = x.shape
        q = blocks.shape[1] // 2
        # All that is past the end reads a row of zeros.
        points = F.pad(x, (0, 0, 0, 1)).index_select(1, torch.arange(self.points * q).clamp(max=length))
        y = torch.matmul(self.dft, points.view(batch, self.points, q * channels))
        y = torch.matmul(blocks, y.view(batch, self.rows, 2 * q, channels))
        return y.view(batch, self.rows, 2, q, channels)

    def back(self, spectrum: Tensor, blocks: Tensor) -> Tensor:
        """Return the sequences (batch, n, channels) of a spectrum."""
        batch, rows, _, q, channels = spectrum.shape
        y = torch.matmul(blocks.mT, spectrum.view(batch, rows, 2 * q, channels))
        y = torch.matmul(self.inverse, y.view(batch, 2 * rows, q * channels))
        return y.view(batch, self.points * q, channels) / torch.full((), self.points * q, dtype=torch.float)


class ExportableMixer(nn.Module):
    """`MonarchSequenceMixer` with constant filters, in ops that export."""

    taps: Tensor

    def __init__(self, mixer: MonarchSequenceMixer, transform: MonarchTransform) -> None:
        super().__init__()
        self.norm = mixer.norm
        self.input_projection, self.output_projection = mixer.input_projection, mixer.output_projection
        self.short_weight, self.short_bias = mixer.short_weight, mixer.short_bias
        self.ahead = mixer.ahead
        self.has_residual = mixer.residual_filter is not None
        self.longest = mixer.filter.max_length
        self.transform = transform
        # The residual convolution's channels after the gated one's.
        self.register_buffer("taps", torch.cat([constant_taps(each) for each in mixer.filters()], 1))

    def forward(self, x: Tensor, blocks: Tensor, padding: Tensor | None) -> Tensor:
        """Mix x (batch, length, channels); `padding` (batch, length, 1) is true where it is left out."""
        if self.norm is not None:
            x = self.norm(x)
        projected = self.input_projection(x)
        if padding is not None and self.ahead:
            projected = projected.masked_fill(padding, 0)
        short = short_convolution(projected, self.short_weight, self.short_bias, self.ahead)
        gate_before, gate_after, value = short.chunk(3, dim=-1)
        inputs = value * gate_before
        if self.has_residual:
            inputs = torch.cat([inputs, x], 2)
        y = self._convolve(inputs if padding is None else inputs.masked_fill(padding, 0), blocks)
        if self.has_residual:
            gated, residual = y.chunk(2, dim=-1)
            return self.output_projection(gated * gate_after + residual)
        return self.output_projection(y * gate_after)

    def _convolve(self, x: Tensor, blocks: Tensor) -> Tensor:
        length = x.shape[1]
        taps = self.taps.index_select(0, torch.arange(2 * length - 1) + (self.longest - length))
        a, b = self.transform(x, blocks), self.transform(taps[None], blocks)
        a_real, a_imaginary, b_real, b_imaginary = a.select(2, 0), a.select(2, 1), b.select(2, 0), b.select(2, 1)
        product = [a_real * b_real - a_imaginary * b_imaginary, a_real * b_imaginary + a_imaginary * b_real]
        y = self.transform.back(torch.stack(product, 2), blocks)
        # Lags count from -(length - 1), so the result comes that much later; what wraps round falls before it.
        return y.index_select(1, torch.arange(length) + (length - 1))


@torch.no_grad()
def constant_taps(implicit_filter: ImplicitFilter) -> Tensor:
    """Return a filter's taps (2 * max_length - 1, channels): lag -(max_length - 1) first; lag 0 has the skip weight."""
    forward, backward = implicit_filter(implicit_filter.max_length, False, torch.float64)
    past = torch.zeros_like(forward) if backward is None else backward
    return torch.cat([past[:-1].flip(0), forward[:1] + implicit_filter.skip, forward[1:]])


class ExportableEncoder(nn.Module):
    """`bert.modeling.Encoder` of Monarch mixers, in ops that export; the transform is set up once for all layers."""

    def __init__(self, layers: nn.ModuleList, longest: int) -> None:
        super().__init__()
        self.transform = MonarchTransform(longest)
        self.sequence_mixers = nn.ModuleList(ExportableMixer(each.sequence_mixer, self.transform) for each in layers)
        self.dimension_mixers = nn.ModuleList(each.dimension_mixer for each in layers)

    def forward(self, hidden: Tensor, lengths: Tensor | None, _output_hidden_states: bool) -> tuple[Tensor, None]:
        """Encode hidden (batch, length, channels); `lengths` (batch,) are the real positions, or None for all."""
        length = hidden.shape[1]
        padding = None if lengths is None else torch.arange(length)[:, None] >= lengths[:, None, None]
        blocks = self.transform.blocks(length)
        for sequence_mixer, dimension_mixer in zip(self.sequence_mixers, self.dimension_mixers, strict=True):
            hidden = dimension_mixer(sequence_mixer(hidden, blocks, padding))
        return hidden, None


class _Graph(nn.Module):
    """What is exported: ids, mask and types to logits."""

    room: Tensor | None

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        limit = model.config.max_sequence_length
        self.register_buffer("room", None if limit is None else torch.zeros(limit, dtype=torch.long))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        if self.room is not None:
            # A graph raises nothing: of a sequence over the limit this reads past the end, which is an error.
            input_ids = input_ids + self.room.index_select(0, torch.arange(input_ids.shape[1]))
        return cast(Tensor, self.model(input_ids, attention_mask, token_type_ids).logits)


def exportable(model: Model) -> Model:
    """Change a model in place to ops that export, and return it: constant filters, and no FFT."""
    if model.config.monarch_mixer_sequence_mixing:
        encoder = ExportableEncoder(model.bert.encoder.layers, model.config.long_conv_l_max)
        model.bert.encoder = cast(Any, encoder)
    return model.requires_grad_(False).eval()


def export_onnx(model: Model, path: Path) -> None:
    """Write a model as ONNX, in fp32; the model is used up.

    Inputs: input_ids, attention_mask, token_type_ids, (batch, length) in int64. Output: logits. Of a model with
    `mask_padding` a zero of the mask before the last one counts as a real token; a length over the model's is an error
    of the runtime. The taps of all filters are in the file, 4 bytes * 2 * max length * channels each; what goes over
    1.5 GB goes to a second file beside it, `path` with .data at its end.

    Raises:
        RecipeError: a package is missing, the model returns no logits, or it takes no more than two tokens.
    """
    check_installed()
    if model.config.gather_sentence_embeddings:
        raise RecipeError("--to onnx: a model with gather_sentence_embeddings has no logits")
    limit = model.config.max_sequence_length or ANY
    if limit < 3:
        raise RecipeError(f"--to onnx: a model of at most {limit} tokens has no lengths to choose from")
    # Three tensors: one that is given twice would be one input.
    inputs = tuple(torch.ones(2, 3, dtype=torch.long) for _ in INPUTS)
    sizes = {0: torch.export.Dim("batch", max=ANY), 1: torch.export.Dim("length", max=limit)}
    with torch.no_grad():
        # Not by torch.onnx.export, which after a failure tries other ways, one of which fixes the sizes.
        graph = _Graph(exportable(model.float()))
        program = torch.export.export(graph, inputs, dynamic_shapes=dict.fromkeys(INPUTS, sizes), strict=False)
    # It warns of ops that no model here has.
    logging.getLogger("torch.onnx._internal.exporter._schemas").setLevel(logging.ERROR)
    torch.onnx.export(
        program,
        f=str(path),
        input_names=INPUTS,
        output_names=["logits"],
        dynamic_shapes=({0: "batch", 1: "length"}, {}, {}),  # their names in the file
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def run_onnx(path: Path, ids: Tensor, mask: Tensor) -> Tensor:
    """Run a file that `export_onnx` wrote in onnxruntime, on the CPU: logits of ids and mask (batch, length)."""
    check_installed()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = zip(INPUTS, (ids, mask, torch.zeros_like(ids)), strict=True)
    return torch.from_numpy(session.run(["logits"], {name: value.numpy() for name, value in given})[0])
