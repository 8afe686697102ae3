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
    """A long convolution as products with Toeplitz matrices of constant taps; O(length^2), and every op exports.

    The filter of each length is the first taps of the longest one's, so that one table serves all lengths.
    """

    taps: Tensor

    def __init__(self, implicit_filter: ImplicitFilter) -> None:
        super().__init__()
        length = implicit_filter.max_length
        with torch.no_grad():
            forward, backward = implicit_filter(length, False)
            past = torch.zeros_like(forward) if backward is None else backward
            # Lag -(length - 1) first, as a correlation reads them; lag 0 has the skip weight too.
            lags = torch.cat([forward[1:].flip(0), forward[:1] + implicit_filter.skip, past[: length - 1]])
        self.register_buffer("taps", lags.t()[:, None].contiguous())  # (channels, 1, 2 * length - 1)
        self.longest = length

    def forward(self, x: Tensor) -> Tensor:
        """Filter x (batch, length, channels)."""
        # The input is padded to the longest, so that the table is used whole: a slice by length would be no constant.
        padded = F.pad(x.transpose(1, 2), (self.longest - 1, self.longest - 1))
        return F.conv1d(padded, self.taps, groups=x.shape[2]).transpose(1, 2)


class ToeplitzMixer(nn.Module):
    """`MonarchSequenceMixer` with constant filters, in ops that export."""

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
        projected = self.input_projection(x).transpose(1, 2)
        taps = self.short_weight.shape[-1]
        short = F.conv1d(F.pad(projected, (taps - 1, 0)), self.short_weight, self.short_bias, groups=projected.shape[1])
        gate_before, gate_after, value = short.transpose(1, 2).chunk(3, dim=-1)
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
