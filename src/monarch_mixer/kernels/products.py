"""Tile products inside kernels."""

# mypy: disable-error-code="valid-type"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return a @ b (+ acc, where it is not None) in fp32; PRECISION as `support.dot_precision` gives it."""
    if PRECISION == "interpreted":
        # Triton 3.3's interpreter takes the bits of bf16 operands for integers.
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), acc=acc)
    elif acc is None:  # its compiler takes a None that is passed on for a tensor
        product = tl.dot(a, b, input_precision=PRECISION)
    else:
        product = tl.dot(a, b, acc=acc, input_precision=PRECISION)
    return product
