"""ONNX: the models as a graph for any batch and any length up to theirs, which no FFT stands in the way of."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert.errors import RecipeError
from bert.export.folder import Model
from monarch_mixer import MonarchSequenceMixer
from monarch_mixer.filters import ImplicitFilter

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INSTALL = "pip install 'monarch-mixer-bert[onnx]', or pip install " + " ".join(PACKAGES)


def check_installed() -> None:
    """Raise RecipeError where a package of the export is not installed."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise RecipeError(f"--to onnx needs {', '.join(missing)}: {INSTALL}")


class ToeplitzConvolution(nn.Module):
    """A long convolution with constant taps, as the product with their Toeplitz matrix.

    The filter of each length is the first taps of the longest one's, so that one table serves all lengths. Each output
    reads the whole table: `length * (2 * max_length - 1)` products a channel, where an FFT takes length * log(length).
    """

    weight: Tensor

    def __init__(self, implicit_filter: ImplicitFilter) -> None:
        super().__init__()
        with torch.no_grad():
            forward, backward = implicit_filter(implicit_filter.max_length, False)
            past = torch.zeros_like(forward) if backward is None else backward
            # Lag max_length - 1 first, as a correlation reads them; lag 0 has the skip weight too.
            lags = torch.cat([forward[1:].flip(0), forward[:1] + implicit_filter.skip, past[:-1]])
        self.register_buffer("weight", lags.t()[:, None, None].contiguous())  # (channels, 1, 1, 2 * max_length - 1)

    def forward(self, image: Tensor) -> Tensor:
        """Filter (batch, channels, 1, length), whose length may be any up to max_length."""
        margin = self.weight.shape[-1] // 2
        return F.conv2d(image, self.weight, padding=(0, margin), groups=image.shape[1])


class ToeplitzMixer(nn.Module):
    """`MonarchSequenceMixer` with constant filters, in ops that export.

    Between the projections it works on images of height 1, whose depthwise convolutions onnxruntime does directly: as
    one-dimensional ones they are copied for a matrix product first, three times as slow.
    """

    def __init__(self, mixer: MonarchSequenceMixer) -> None:
        super().__init__()
        self.norm = mixer.norm
        self.input_projection, self.output_projection = mixer.input_projection, mixer.output_projection
        self.short_weight, self.short_bias = mixer.short_weight, mixer.short_bias
        self.convolution = ToeplitzConvolution(mixer.filter)
        self.residual_convolution = (
            None if mixer.residual_filter is None else ToeplitzConvolution(mixer.residual_filter)
        )

    def forward(self, x: Tensor, _taps: Any = None, _cache: bool = True, lengths: Tensor | None = None) -> Tensor:
        """Mix x (batch, length, channels); `lengths` (batch,) are the real positions where padding is left out."""
        if self.norm is not None:
            x = self.norm(x)
        image = _image(x)
        projected = _image(self.input_projection(x))
        taps = self.short_weight.shape[-1]
        short = F.conv2d(
            F.pad(projected, (taps - 1, 0)), self.short_weight[:, :, None], self.short_bias, groups=projected.shape[1]
        )
        gate_before, gate_after, value = short.chunk(3, dim=1)
        gated = value * gate_before
        if lengths is not None:
            padding = torch.arange(x.shape[1]) >= lengths[:, None, None, None]
            gated, image = gated.masked_fill(padding, 0), image.masked_fill(padding, 0)
        y = self.convolution(gated) * gate_after
        if self.residual_convolution is not None:
            y = y + self.residual_convolution(image)
        return self.output_projection(y.squeeze(2).transpose(1, 2))


def _image(x: Tensor) -> Tensor:
    return x.transpose(1, 2).unsqueeze(2)


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
            layer.sequence_mixer = ToeplitzMixer(layer.sequence_mixer)
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
