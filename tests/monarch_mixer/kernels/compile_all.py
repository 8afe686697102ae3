"""Compile the kernels for Hopper without a GPU, as their own launches ask for it; prints each kernel's name.

Run in a process of its own: the tests' Triton interprets.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from monarch_mixer import (
    DimensionMixer,
    MonarchSequenceMixer,
    dimension_mixer,
    long_convolution,
    normalization,
    sequence_mixer,
)
from monarch_mixer.kernels.linear_cross_entropy import linear_cross_entropy

launch = JITFunction.run
CASES = [(torch.bfloat16, 128), (torch.bfloat16, 2048), (torch.bfloat16, 16384), (torch.float32, 2048)]


class Hopper:
    """What Triton asks of a driver before it compiles."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def compile_only(self, *args, grid, warmup, **options):
    print(f"{self.fn.__module__}.{self.fn.__name__}")  # noqa: T201
    return launch(self, *args, grid=grid, warmup=True, **options)


def train(module, x, **options):
    module(x.requires_grad_(), **options).sum().backward()


driver.set_active(Hopper())
JITFunction.run = compile_only
for layer in (sequence_mixer, dimension_mixer, normalization, long_convolution):
    layer.kernels_apply = lambda *_: True
for dtype, length in CASES:
    lengths = torch.tensor([length, length // 2], dtype=torch.int32)
    train(MonarchSequenceMixer(64, length).to(dtype), torch.randn(2, length, 64, dtype=dtype), lengths=lengths)
for width, dtype in ((96, torch.bfloat16), (96, torch.float32), (768, torch.bfloat16)):
    train(DimensionMixer(width, 4 * width).to(dtype), torch.randn(2, 64, width, dtype=dtype))
rows, weight, bias = torch.randn(64, 96), torch.randn(200, 96), torch.randn(200)
for value in (rows, weight, bias):
    value.requires_grad_()
linear_cross_entropy(rows, weight, bias, torch.randint(200, (64,)), -100)[0].backward()
