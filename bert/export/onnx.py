"""ONNX: the models as a graph for any batch and any length up to theirs, which no FFT stands in the way of."""

from __future__ import annotations

import importlib.util
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
INSTALL = "pip install 'monarch-mixer-bert[onnx]', or pip install " + " ".join(PACKAGES)


def check_installed() -> None:
    """Raise RecipeError where a package of the export is not installed."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise RecipeError(f"--to onnx needs {', '.join(missing)}: {INSTALL}")


class MonarchConvolution(nn.Module):
    """A long convolution with constant taps, for any length up to theirs, in matrix products alone.

    The discrete Fourier transform of n = p q points is a Monarch matrix of order 2 (paper, section 3.1). Position
    i q + j goes to frequency k + p m by a DFT over i, one matrix, and then for each k by a matrix over j. p is fixed and
    q follows the length, so that a short sequence in a long model costs little. Of real inputs half the k suffice.
    Batch and filter take n (p + 2 q) products a channel each, and the way back the same: O(length^1.5) at the longest.
    """

    taps: Tensor
    dft: Tensor
    inverse: Tensor

    def __init__(self, implicit_filter: ImplicitFilter) -> None:
        super().__init__()
        self.longest = implicit_filter.max_length
        with torch.no_grad():
            forward, backward = implicit_filter(self.longest, False)
            past = torch.zeros_like(forward) if backward is None else backward
            taps = torch.cat([past[:-1].flip(0), forward[:1] + implicit_filter.skip, forward[1:]])
        self.register_buffer("taps", taps)  # (2 * longest - 1, channels), lag -(longest - 1) first
        self.points = 2 * round(math.sqrt(self.longest))  # p; the products are fewest where p = 2 q
        self.rows = self.points // 2 + 1  # of k
        rows, columns = torch.arange(self.rows), torch.arange(self.points)
        angles = (rows[:, None] * columns % self.points).double() * (2 * math.pi / self.points)
        dft = torch.stack([angles.cos(), -angles.sin()], 1).flatten(0, 1)  # real part and imaginary part of each k
        # The k that are left out have the conjugates; those of the first and the last are among their own.
        counts = torch.full((self.rows,), 2.0, dtype=torch.double)
        counts[0] = counts[-1] = 1
        self.register_buffer("dft", dft.float())
        self.register_buffer("inverse", (dft.t() * counts.repeat_interleave(2)).float())

    def forward(self, x: Tensor) -> Tensor:
        """Filter x (batch, length, channels)."""
        batch, length, channels = x.shape
        q = self._columns(length)
        blocks = self._blocks(q)
        taps = self.taps[self.longest - length : self.longest + length - 1] / (self.points * q)
        # Every lag counts from -(length - 1), so the result is that much later; what wraps round falls before it.
        a, b = self._transform(x, blocks, q), self._transform(taps[None], blocks, q)
        real, imaginary = b.select(2, 0), b.select(2, 1)
        y = torch.stack(
            [a.select(2, 0) * real - a.select(2, 1) * imaginary, a.select(2, 0) * imaginary + a.select(2, 1) * real], 2
        )
        y = torch.matmul(blocks.mT, y.view(batch, self.rows, 2 * q, channels))
        y = torch.matmul(self.inverse, y.view(batch, 2 * self.rows, q * channels))
        return y.view(batch, self.points * q, channels).index_select(1, torch.arange(length) + (length - 1))

    def _columns(self, length: int) -> int:
        """Return q: n is at least 2 * length - 1."""
        # By way of a tensor: the exporter takes the result for a new size, and any, and makes no cases of it.
        q = cast(int, (torch.full((), 2 * length - 2) // self.points + 2).item())
        torch._check(q >= 2)
        return q

    def _blocks(self, q: int) -> Tensor:
        """The second factor (rows, 2 q, 2 q): for each k a complex matrix from j to m, as real ones."""
        k, j = torch.arange(self.rows), torch.arange(q)
        size = torch.full((), self.points * q)  # a tensor, for the exporter has no remainder of a number
        turns = (k[:, None, None] + self.points * j[:, None]) * j % size
        angles = turns.float() * (2 * math.pi) / size
        cosine, sine = angles.cos(), angles.sin()
        return torch.cat([torch.cat([cosine, sine], 2), torch.cat([-sine, cosine], 2)], 1)

    def _transform(self, x: Tensor, blocks: Tensor, q: int) -> Tensor:
        """The spectrum (batch, rows, 2, q, channels), real and imaginary, of x (batch, length, channels)."""
        batch, length, channels = x.shape
        # A row of zeros is read for all that is past the end.
        points = F.pad(x, (0, 0, 0, 1)).index_select(1, torch.arange(self.points * q).clamp(max=length))
        y = torch.matmul(self.dft, points.view(batch, self.points, q * channels))
        y = torch.matmul(blocks, y.view(batch, self.rows, 2 * q, channels))
        return y.view(batch, self.rows, 2, q, channels)


class ExportableMixer(nn.Module):
    """`MonarchSequenceMixer` with constant filters, in ops that export."""

    def __init__(self, mixer: MonarchSequenceMixer) -> None:
        super().__init__()
        self.norm = mixer.norm
        self.input_projection, self.output_projection = mixer.input_projection, mixer.output_projection
        self.short_weight, self.short_bias = mixer.short_weight, mixer.short_bias
        self.convolution = MonarchConvolution(mixer.filter)
        self.residual_convolution = None if mixer.residual_filter is None else MonarchConvolution(mixer.residual_filter)

    def forward(self, x: Tensor, _taps: Any = None, _cache: bool = True, lengths: Tensor | None = None) -> Tensor:
        """Mix x (batch, length, channels); `lengths` (batch,) are the real positions where padding is left out."""
        if self.norm is not None:
            x = self.norm(x)
        short = short_convolution(self.input_projection(x), self.short_weight, self.short_bias)
        gate_before, gate_after, value = short.chunk(3, dim=-1)
        gated = value * gate_before
        if lengths is not None:
            padding = torch.arange(x.shape[1])[:, None] >= lengths[:, None, None]
            gated, x = gated.masked_fill(padding, 0), x.masked_fill(padding, 0)
        y = self.convolution(gated) * gate_after
        if self.residual_convolution is not None:
            y = y + self.residual_convolution(x)
        return self.output_projection(y)


class _Graph(nn.Module):
    """What is exported: ids, mask and types to logits."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return cast(Tensor, self.model(input_ids, attention_mask, token_type_ids).logits)


def exportable(model: Model) -> Model:
    """Change a model in place to ops that export, and return it: constant filters, convolutions in place of FFTs."""
    for layer in cast(Any, model.bert.encoder.layers):
        if isinstance(layer.sequence_mixer, MonarchSequenceMixer):
            layer.sequence_mixer = ExportableMixer(layer.sequence_mixer)
    return model.requires_grad_(False).eval()


def export_onnx(model: Model, path: Path) -> None:
    """Write a model as ONNX, in fp32; the model is used up.

    Inputs: input_ids, attention_mask, token_type_ids, (batch, length) in int64. Output: logits.

    Raises:
        RecipeError: a package is missing, or the model returns no logits.
    """
    check_installed()
    if model.config.gather_sentence_embeddings:
        raise RecipeError("--to onnx: a model with gather_sentence_embeddings has no logits")
    limit = model.config.max_sequence_length or 512
    if limit < 3:
        raise RecipeError(f"--to onnx: a model of {limit} tokens has no lengths to choose from")
    batch, length = torch.export.Dim("batch", max=2**20), torch.export.Dim("length", max=limit)
    ids = torch.zeros(2, 3, dtype=torch.long)
    shapes = {0: batch, 1: length}
    with torch.no_grad():
        torch.onnx.export(
            _Graph(exportable(model.float())),
            (ids, torch.ones_like(ids), torch.zeros_like(ids)),
            str(path),
            input_names=["input_ids", "attention_mask", "token_type_ids"],
            output_names=["logits"],
            dynamic_shapes=(shapes, shapes, shapes),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def run_onnx(path: Path, ids: Tensor, mask: Tensor) -> Tensor:
    """Run a file that `export_onnx` wrote in onnxruntime, on the CPU: logits of ids and mask (batch, length)."""
    check_installed()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    names = {entry.name for entry in session.get_inputs()}
    return torch.from_numpy(
        session.run(None, {name: value.numpy() for name, value in given.items() if name in names})[0]
    )
