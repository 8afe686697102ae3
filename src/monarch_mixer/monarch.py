"""Monarch matrices: products, dense form, initialisation, costs, DFT, convolution, projection.

A Monarch matrix of order p (Fu et al., arXiv 2310.12109) is a product of p block-diagonal factors interleaved with
fixed permutations, `M = P_p B_p ... P_2 B_2 P_1 B_1`. A factor is a tensor (blocks, out, in): block i maps its own `in`
inputs to `out` outputs. A stride permutation reads a vector as a row-major matrix and transposes it, so no dense matrix
and no index table is ever formed.

Square matrices of any order are described by `sizes = (d_1, ..., d_p)` with `n = d_1 ... d_p`: a vector is a tensor of
that shape, the first factor acts on its last axis, and every permutation P_t moves the axis just produced to the front.
After p factors each axis has been replaced once and is back in its place, so each dense entry is a product of
exactly one entry per factor. Order 2 (Dao et al., arXiv 2204.00595) also has rectangular factors: `monarch_multiply`.

Factors and vectors are real or complex. Leading dimensions of factors, if any, broadcast against those of the vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn


def _block_multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply each slice of the last axis of `x` (..., blocks * in) by its block of `weight` (blocks, out, in)."""
    blocks, out_size, in_size = weight.shape[-3:]
    if x.shape[-1] != blocks * in_size:
        raise ValueError(
            f"a Monarch factor of shape {(blocks, out_size, in_size)} takes vectors of {blocks} * {in_size} = "
            f"{blocks * in_size} entries, got {x.shape[-1]}"
        )
    if x.is_complex() != weight.is_complex():
        dtype = torch.promote_types(x.dtype, weight.dtype)
        x, weight = x.to(dtype), weight.to(dtype)
    x = x.unflatten(-1, (blocks, in_size))
    return torch.einsum("...kp,...kqp->...kq", x, weight).flatten(-2)


def _stride_permute(x: Tensor, columns: int) -> Tensor:
    """Read the last axis of `x` as a row-major matrix of `columns` columns and transpose it."""
    return x.unflatten(-1, (-1, columns)).mT.flatten(-2)


def monarch_multiply(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Multiply vectors by the Monarch matrix of order 2 with (rectangular) factors `w1` and `w2`.

    The result is `P_2 B_2 P_1 B_1 x`: P_1 transposes (r, l) to (l, r), P_2 transposes (l, s) to (s, l).

    Args:
        x: (..., n) vectors, n = k p.
        w1: (k, q, p) first factor, k q = l r.
        w2: (l, s, r) second factor.

    Returns:
        (..., m) vectors, m = l s.

    Raises:
        ValueError: the sizes of `x`, `w1` and `w2` do not fit together.
    """
    hidden = _block_multiply(x, w1)
    if hidden.shape[-1] % w2.shape[-3] == 0:  # otherwise _block_multiply names the shapes that do not fit
        hidden = _stride_permute(hidden, w2.shape[-3])
    return _stride_permute(_block_multiply(hidden, w2), w2.shape[-2])


def monarch_multiply_order_p(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Multiply vectors by the Monarch matrix of order p with the given factors, the first of which acts first.

    Factor t is followed by the stride permutation that transposes (blocks, out) to (out, blocks). With two factors
    and `w2` of as many blocks as `w1` has outputs (every square matrix), this is `monarch_multiply`.

    Args:
        x: (..., n) vectors.
        factors: p tensors (blocks, out, in); blocks * in is the length of what comes in (n for the first).

    Returns:
        (..., m) vectors, m = blocks * out of the last factor.

    Raises:
        ValueError: a factor does not fit the length of the vectors that reach it.
    """
    for weight in factors:
        x = _stride_permute(_block_multiply(x, weight), weight.shape[-2])
    return x


def monarch_dense(w1: Tensor, w2: Tensor) -> Tensor:
    """Return the dense (..., m, n) matrix M with `monarch_multiply(x, w1, w2) == x @ M.mT`."""
    return monarch_multiply(_identity_for(w1), w1.unsqueeze(-4), w2.unsqueeze(-4)).mT


def monarch_dense_order_p(factors: Sequence[Tensor]) -> Tensor:
    """Return the dense (..., m, n) matrix M with `monarch_multiply_order_p(x, factors) == x @ M.mT`."""
    return monarch_multiply_order_p(_identity_for(factors[0]), [weight.unsqueeze(-4) for weight in factors]).mT


def _identity_for(first: Tensor) -> Tensor:
    return torch.eye(first.shape[-3] * first.shape[-1], dtype=first.dtype, device=first.device)


@cache
def balanced_sizes(n: int, order: int = 2) -> tuple[int, ...]:
    """Return the `order` sizes with product `n` and the least sum, largest first: the fewest parameters.

    For order 2 it is the factor pair nearest to sqrt(n). A prime n has only (n, 1, ...), which is as large as dense.
    """
    if n < 1 or order < 1:
        raise ValueError(f"a Monarch matrix needs a positive size and order, got size {n} and order {order}")
    if order == 1:
        return (n,)
    candidates = [(d, *balanced_sizes(n // d, order - 1)) for d in range(1, n + 1) if n % d == 0]
    return tuple(sorted(min(candidates, key=sum), reverse=True))


def _checked_sizes(n: int, sizes: Sequence[int] | None, order: int = 2) -> tuple[int, ...]:
    """Return `sizes` as a tuple after checking that their product is `n`; the balanced ones where there are none."""
    if sizes is None:
        return balanced_sizes(n, order)
    if not sizes or min(sizes) < 1 or math.prod(sizes) != n:
        raise ValueError(f"the product of the Monarch sizes {tuple(sizes)} must be {n}")
    return tuple(sizes)


def monarch_shapes(sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return the shapes (blocks, out, in) of the factors of a square Monarch matrix, in the order they act."""
    n = math.prod(sizes)
    return [(n // size, size, size) for size in reversed(sizes)]


def monarch_parameter_count(sizes: Sequence[int]) -> int:
    """Return the entries of all factors, n (d_1 + ... + d_p); with equal sizes p n^((p+1)/p)."""
    return math.prod(sizes) * sum(sizes)


def monarch_operation_count(sizes: Sequence[int]) -> int:
    """Return the operations to multiply one vector, a multiply-add counting as two, in the arithmetic of its dtype."""
    return 2 * monarch_parameter_count(sizes)


def monarch_init_(factors: Sequence[Tensor]) -> None:
    """Fill the factors, in place, with normal values that keep the variance of what passes through.

    An output of a factor sums `in` independent products, so entries of variance 1/in keep the variance at each factor
    and so through all of them. A dense entry is one product of p entries: its variance is 1/(d_1 ... d_p) = 1/n,
    as in a dense matrix with the same property. Complex entries have this variance in total.
    """
    for weight in factors:
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)


class MonarchLinear(nn.Module):
    """A linear map of `features` to `features` whose matrix is a Monarch matrix of order p.

    Args:
        features: size n of the square matrix.
        order: number of factors p; ignored where `sizes` are given.
        sizes: sizes of the blocks, with product n; None takes `balanced_sizes(features, order)`.
        bias: add a learned (n,) vector, which starts at zero.
        device: where the parameters live.
        dtype: their type, real or complex.

    Raises:
        ValueError: the product of `sizes` is not `features`.
    """

    def __init__(
        self,
        features: int,
        order: int = 2,
        sizes: Sequence[int] | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = features
        self.sizes = _checked_sizes(features, sizes, order)
        self.factors = nn.ParameterList(
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in monarch_shapes(self.sizes)
        )
        self.bias = nn.Parameter(torch.empty(features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the factors anew (`monarch_init_`) and set the bias to zero."""
        monarch_init_(list(self.factors))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., features) to (..., features)."""
        y = monarch_multiply_order_p(x, list(self.factors))
        # Under autocast the product comes in the low precision, and as with nn.Linear the bias must not undo that.
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense(self) -> Tensor:
        """Return the (features, features) matrix that `forward` multiplies by."""
        return monarch_dense_order_p(list(self.factors))

    def extra_repr(self) -> str:
        """Describe the layer in `print(model)`."""
        sizes = " x ".join(str(size) for size in self.sizes)
        return f"features={self.features}, order={len(self.sizes)}, sizes={sizes}, bias={self.bias is not None}"


def digit_reversal(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Reverse the mixed-radix digits of the last axis of `x`: a tensor of reversed `sizes` becomes one of `sizes`.

    For order 2 it is a stride permutation, for sizes all 2 the bit reversal.
    """
    digits = x.unflatten(-1, tuple(reversed(sizes)))
    leading = x.dim() - 1
    return digits.permute(*range(leading), *range(digits.dim() - 1, leading - 1, -1)).flatten(leading)


def dft_factors(
    n: int,
    sizes: Sequence[int] | None = None,
    *,
    inverse: bool = False,
    dtype: torch.dtype = torch.complex64,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Return factors that make the discrete Fourier transform of size n a Monarch product.

    The DFT matrix is `F = M P_0`: the digit reversal P_0 comes before the factors, nothing after them, so
    `monarch_multiply_order_p(digit_reversal(x, sizes), dft_factors(n, sizes)) == torch.fft.fft(x)`.

    Args:
        n: number of points.
        sizes: sizes with product n, any order; None takes `balanced_sizes(n)`.
        inverse: return the factors of the inverse transform (with its 1/n), which has the same P_0.
        dtype: complex type of the factors.
        device: where to put them.

    Raises:
        ValueError: the product of `sizes` is not n.
    """
    factors = []
    points = 1  # the size of the transforms that are complete after this factor
    for size in reversed(_checked_sizes(n, sizes)):
        points *= size
        # Factor t joins `size` transforms of points/size points: the entry from input digit i to output j of
        # the joined transform is exp(-2 pi i j / points).
        products = torch.outer(torch.arange(points), torch.arange(size))
        angle = products.double() * (2 * math.pi / points if inverse else -2 * math.pi / points)
        entries = torch.polar(torch.full_like(angle, 1 / size if inverse else 1.0), angle)
        # The block is chosen by the low digits of j, (size, points/size) -> (points/size, size), and by the digits
        # that are still to be transformed, on which the entries do not depend.
        blocks = entries.unflatten(0, (size, points // size)).transpose(0, 1).repeat_interleave(n // points, dim=0)
        factors.append(blocks.to(device=device, dtype=dtype))
    return factors


def monarch_dft(x: Tensor, sizes: Sequence[int] | None = None, *, inverse: bool = False) -> Tensor:
    """Return the DFT (or its inverse) of the last axis of `x`, as a Monarch product.

    Args:
        x: (..., n), real or complex; low precisions are computed in fp32, as no complex type exists for them.
        sizes: sizes with product n, any order; None takes `balanced_sizes(n)`.
        inverse: the inverse transform, with its factor 1/n.

    Returns:
        (..., n) complex.
    """
    n = x.shape[-1]
    sizes = _checked_sizes(n, sizes)
    dtype = torch.promote_types(x.dtype, torch.complex64)
    factors = dft_factors(n, sizes, inverse=inverse, dtype=dtype, device=x.device)
    return monarch_multiply_order_p(digit_reversal(x.to(dtype), sizes), factors)


def monarch_convolution(
    x: Tensor, kernel: Tensor, *, causal: bool = False, sizes: Sequence[int] | None = None
) -> Tensor:
    """Convolve through Monarch matrices: `F^-1 diag(F kernel) F x`, with the DFT F a Monarch product.

    This states the paper's identity (a convolution is Monarch, diagonal, Monarch) and builds its factors anew at each
    call: it is for study and tests, not the fast path of the sequence mixer.

    Args:
        x: (..., n) inputs.
        kernel: (..., taps), leading dimensions broadcast against those of `x`; at most n taps unless causal.
        causal: False is circular, `y_i = sum_j kernel_j x_((i - j) mod n)`; True is linear,
            `y_i = sum_(j <= i) kernel_j x_(i - j)`, through zero padding.
        sizes: sizes of the DFT, of any order: product n if circular, and at least n + taps - 1 if causal (taps beyond n
            count for nothing). None takes balanced sizes of order 2.

    Returns:
        (..., n), real if both are real, in the promoted type of `x` and `kernel`.

    Raises:
        ValueError: a circular kernel longer than x, or sizes with a wrong product.
    """
    n = x.shape[-1]
    if causal:
        kernel = kernel[..., :n]
        needed = n + kernel.shape[-1] - 1
        if sizes is None:
            side = math.isqrt(needed - 1) + 1
            sizes = (side, -(-needed // side))
        points = math.prod(sizes)
        if points < needed:
            raise ValueError(
                f"a causal convolution of {n} inputs and {kernel.shape[-1]} taps needs {needed} points, "
                f"the sizes {tuple(sizes)} have {points}"
            )
    else:
        points = n
        if kernel.shape[-1] > n:
            raise ValueError(f"a circular convolution of {n} points takes at most {n} taps, got {kernel.shape[-1]}")
    spectra = [monarch_dft(nn.functional.pad(t, (0, points - t.shape[-1])), sizes) for t in (x, kernel)]
    y = monarch_dft(spectra[0] * spectra[1], sizes, inverse=True)[..., :n]
    dtype = torch.promote_types(x.dtype, kernel.dtype)
    return (y if dtype.is_complex else y.real).to(dtype)


def project_to_monarch(dense: Tensor, sizes: Sequence[int] | None = None, rank: int = 1) -> tuple[Tensor, Tensor]:
    """Return the factors of the Monarch matrix of order 2 nearest to `dense` in the Frobenius norm.

    For each (l', i), the rows s' l + l' and columns i p + j of a Monarch matrix form a block that is the product of a
    column of `w2` and a row of `w1`, and no two blocks share entries. So the truncated SVD of every block is the
    nearest (arXiv 2204.00595), and it gives back any matrix that is Monarch. Each factor takes the square root of the
    singular values; the sign (phase) of a pair is arbitrary, so compare reconstructions.

    Args:
        dense: (..., m, n) matrices, real or complex; low precisions are computed in fp32.
        sizes: blocks (k, l) of the two factors; k divides n and l divides m. Square Monarch matrices have k l = n.
            None, for square matrices only, takes `balanced_sizes(n)`.
        rank: rank of each block; more than one gives factors `rank` times as wide between them.

    Returns:
        w1 (..., k, l rank, n / k) and w2 (..., l, m / l, k rank): `monarch_dense(w1, w2)` is the projection.

    Raises:
        ValueError: sizes that do not divide the matrix, no sizes for one that is not square, or a rank that no block
            has.
    """
    rows, columns = dense.shape[-2:]
    if sizes is None:
        if rows != columns:
            raise ValueError(f"a {rows} x {columns} matrix is not square: name the sizes (blocks of w1, blocks of w2)")
        sizes = balanced_sizes(columns)
    if len(sizes) != 2 or min(sizes) < 1 or columns % sizes[0] or rows % sizes[1]:
        raise ValueError(f"sizes {tuple(sizes)} must be two, dividing the {columns} columns and the {rows} rows")
    k, l = sizes  # noqa: E741 - the paper's name
    if not 1 <= rank <= min(rows // l, columns // k):
        raise ValueError(f"rank {rank} is outside 1 to {min(rows // l, columns // k)}, the size of a block")
    compute = dense.float() if dense.dtype in (torch.bfloat16, torch.float16) else dense
    blocks = compute.unflatten(-1, (k, columns // k)).unflatten(-3, (rows // l, l))  # (..., s, l, k, p)
    u, sigma, vh = torch.linalg.svd(blocks.movedim(-4, -2), full_matrices=False)  # (..., l, k, s, p)
    root = sigma[..., :rank].sqrt()
    left = u[..., :rank] * root.unsqueeze(-2)  # (..., l, k, s, rank)
    right = root.unsqueeze(-1) * vh[..., :rank, :]  # (..., l, k, rank, p)
    w1 = right.movedim(-4, -2).flatten(
        -3, -2
    )  # (..., k, rank l, p): the permutation between the factors counts l fastest
    w2 = left.transpose(-3, -2).flatten(-2)  # (..., l, s, k rank)
    return w1.to(dense.dtype), w2.to(dense.dtype)
