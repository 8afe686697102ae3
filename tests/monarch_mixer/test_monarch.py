"""Monarch matrices against golden tensors, explicit matrices, torch.fft, direct sums and the SVD's own bounds."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from monarch_mixer.monarch import (
    MonarchLinear,
    balanced_sizes,
    dft_factors,
    digit_reversal,
    monarch_convolution,
    monarch_dense,
    monarch_dense_order_p,
    monarch_dft,
    monarch_init_,
    monarch_multiply,
    monarch_multiply_order_p,
    monarch_operation_count,
    monarch_parameter_count,
    monarch_shapes,
    project_to_monarch,
)

GOLDENS = Path(__file__).parents[1] / "fixtures" / "goldens" / "ops"


def golden_cases(name: str, prefix: str) -> list[str]:
    cases = json.loads((GOLDENS / f"{name}.json").read_text())["cases"]
    chosen = [case for case in cases if case.startswith(prefix)]
    assert chosen
    return chosen


def golden(name: str, case: str) -> dict[str, Tensor]:
    """The tensors of one case; the complex ones are stored as pairs of reals."""
    is_complex = json.loads((GOLDENS / f"{name}.json").read_text())["cases"][case].get("complex", False)
    tensors = {
        key.split(".", 1)[1]: value
        for key, value in load_file(GOLDENS / f"{name}.safetensors").items()
        if key.startswith(f"{case}.")
    }
    if not is_complex:
        return tensors
    return {key: torch.view_as_complex(v.contiguous()) if v.is_floating_point() else v for key, v in tensors.items()}


def random_factors(sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in monarch_shapes(sizes)]


def index_transpose(rows: int, columns: int) -> Tensor:
    """The matrix of the stride permutation, entry by entry from its definition."""
    matrix = torch.zeros(rows * columns, rows * columns, dtype=torch.float64)
    for i, j in itertools.product(range(rows), range(columns)):
        matrix[j * rows + i, i * columns + j] = 1
    return matrix


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# -- order 2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden_cases("mm_ops", "butterfly"))
def test_order_2_golden_output_and_gradients(case: str) -> None:
    g = golden("mm_ops", case)
    x, w1, w2 = (g[key].requires_grad_() for key in ("x", "w1", "w2"))
    out = monarch_multiply(x, w1, w2)
    torch.testing.assert_close(out, g["out"], rtol=1e-5, atol=1e-5)
    out.backward(g["cotangent"])
    for leaf, key in ((x, "dx"), (w1, "dw1"), (w2, "dw2")):
        torch.testing.assert_close(leaf.grad, g[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape1", "shape2"), [((3, 6, 4), (2, 7, 9)), ((4, 5, 6), (5, 3, 4)), ((1, 4, 5), (4, 3, 1))])
def test_order_2_is_the_product_of_permutations_and_block_diagonals(shape1, shape2) -> None:
    w1, w2 = torch.randn(shape1, dtype=torch.float64), torch.randn(shape2, dtype=torch.float64)
    (blocks, out_size, in_size) = shape2
    explicit = (
        index_transpose(blocks, out_size)
        @ torch.block_diag(*w2)
        @ index_transpose(in_size, blocks)
        @ torch.block_diag(*w1)
    )
    torch.testing.assert_close(monarch_dense(w1, w2), explicit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_order_2_every_dtype_equals_its_dense_matrix(dtype: torch.dtype) -> None:
    x, w1, w2 = (
        torch.randn(2, 1, 3, 12, dtype=dtype),
        torch.randn(3, 6, 4, dtype=dtype),
        torch.randn(2, 5, 9, dtype=dtype),
    )
    out = monarch_multiply(x, w1, w2)
    assert out.dtype == dtype
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = x.to(wide) @ monarch_dense(w1.to(wide), w2.to(wide)).mT
    tolerance = {torch.bfloat16: 0.15, torch.float32: 1e-5, torch.complex64: 1e-5}.get(dtype, 1e-12)
    torch.testing.assert_close(out.to(wide), expected, rtol=0, atol=tolerance)


def test_real_and_complex_mix() -> None:
    complex_factors, real_factors = random_factors((4, 3), torch.complex128), random_factors((4, 3), torch.float64)
    x = torch.randn(2, 12, dtype=torch.float32)
    expected = x.to(torch.complex128) @ monarch_dense(*complex_factors).mT
    torch.testing.assert_close(monarch_multiply(x, *complex_factors), expected)
    expected = expected @ monarch_dense(*real_factors).to(torch.complex128).mT
    torch.testing.assert_close(monarch_multiply(monarch_multiply(x, *complex_factors), *real_factors), expected)


@pytest.mark.parametrize("shape", [(12,), (0, 12), (2, 3, 12)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    factors = random_factors((4, 3))
    x = torch.randn(shape, dtype=torch.float64)
    expected = x @ monarch_dense(*factors).mT
    torch.testing.assert_close(monarch_multiply(x, *factors), expected)
    torch.testing.assert_close(monarch_multiply_order_p(x, factors), expected)


def test_batched_factors_broadcast() -> None:
    w1, w2 = torch.randn(5, 4, 3, 3, dtype=torch.float64), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    dense = monarch_dense(w1, w2)
    torch.testing.assert_close(dense, torch.stack([monarch_dense(*pair) for pair in zip(w1, w2, strict=True)]))
    torch.testing.assert_close(monarch_dense_order_p([w1, w2]), dense)


@pytest.mark.parametrize(
    ("n", "shape1", "shape2"), [(11, (3, 4, 4), (4, 3, 3)), (12, (3, 4, 4), (5, 3, 3)), (12, (3, 4, 4), (4, 3, 4))]
)
def test_sizes_that_do_not_fit_are_refused(n, shape1, shape2) -> None:
    x, w1, w2 = torch.randn(2, n), torch.randn(shape1), torch.randn(shape2)
    with pytest.raises(ValueError, match="takes vectors of"):
        monarch_multiply(x, w1, w2)
    with pytest.raises(ValueError, match="takes vectors of"):
        monarch_multiply_order_p(x, [w1, w2])


# -- order p -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(7,), (4, 6), (2, 3, 5), (4, 1, 3), (2, 3, 2, 4)])
def test_order_p_is_the_product_of_permutations_and_block_diagonals(sizes: tuple[int, ...]) -> None:
    factors = random_factors(sizes)
    explicit = torch.eye(math.prod(sizes), dtype=torch.float64)
    for weight in factors:
        explicit = index_transpose(weight.shape[0], weight.shape[1]) @ torch.block_diag(*weight) @ explicit
    torch.testing.assert_close(monarch_dense_order_p(factors), explicit)
    x = torch.randn(2, 3, math.prod(sizes), dtype=torch.float64)
    torch.testing.assert_close(monarch_multiply_order_p(x, factors), x @ explicit.mT)


@pytest.mark.parametrize("sizes", [(4, 4), (6, 4), (2, 5)])
def test_order_p_with_two_factors_is_order_2(sizes: tuple[int, int]) -> None:
    factors = random_factors(sizes)
    torch.testing.assert_close(monarch_dense_order_p(factors), monarch_dense(*factors), rtol=0, atol=0)


def test_kronecker_products_are_monarch() -> None:
    # The factors replace each axis in its place, so equal blocks give the Kronecker product in the order of `sizes`.
    sizes = (2, 3, 4)
    blocks = [torch.randn(size, size, dtype=torch.float64) for size in sizes]
    factors = [block.expand(shape) for block, shape in zip(reversed(blocks), monarch_shapes(sizes), strict=True)]
    expected = torch.kron(torch.kron(blocks[0], blocks[1]), blocks[2])
    torch.testing.assert_close(monarch_dense_order_p(factors), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_order_p_gradients(dtype: torch.dtype) -> None:
    factors = [weight.requires_grad_() for weight in random_factors((2, 3, 2), dtype)]
    x = torch.randn(2, 12, dtype=dtype, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *factors: monarch_multiply_order_p(x, factors), (x, *factors))


def test_rectangular_factors_of_order_3() -> None:
    # 2 x 3 x 4 inputs to 3 x 5 x 2 outputs, an axis at a time.
    shapes = [(6, 2, 4), (4, 5, 3), (10, 3, 2)]
    factors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    x = torch.randn(3, 24, dtype=torch.float64)
    y = torch.einsum("zabc,abgc->zabg", x.view(3, 2, 3, 4), factors[0].view(2, 3, 2, 4))
    y = torch.einsum("zabg,gafb->zafg", y, factors[1].view(2, 2, 5, 3))
    y = torch.einsum("zafg,fgea->zefg", y, factors[2].view(5, 2, 3, 2))
    torch.testing.assert_close(monarch_multiply_order_p(x, factors), y.reshape(3, 30))


@pytest.mark.parametrize(
    ("n", "order", "sizes"),
    [(24, 2, (6, 4)), (36, 2, (6, 6)), (15, 2, (5, 3)), (7, 2, (7, 1)), (60, 3, (5, 4, 3)), (64, 3, (4, 4, 4)),
     (16, 4, (2, 2, 2, 2)), (1, 2, (1, 1)), (10, 1, (10,)), (768, 2, (32, 24))],
)  # fmt: skip
def test_balanced_sizes(n: int, order: int, sizes: tuple[int, ...]) -> None:
    assert balanced_sizes(n, order) == sizes


def test_balanced_sizes_have_the_fewest_parameters() -> None:
    for n in (48, 72, 210):
        triples = [t for t in itertools.product(range(1, n + 1), repeat=2) if n % (t[0] * t[1]) == 0]
        assert sum(balanced_sizes(n, 3)) == min(a + b + n // (a * b) for a, b in triples)


@pytest.mark.parametrize("sizes", [(6, 4), (4, 4, 4), (5, 4, 3), (2,) * 6])
def test_counts_are_exact(sizes: tuple[int, ...]) -> None:
    factors = random_factors(sizes, torch.float32)
    assert monarch_parameter_count(sizes) == sum(weight.numel() for weight in factors)
    rows = 3
    with FlopCounterMode(display=False) as counter:
        monarch_multiply_order_p(torch.randn(rows, math.prod(sizes)), factors)
    assert counter.get_total_flops() == rows * monarch_operation_count(sizes)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_equal_sizes_cost_p_n_to_the_p_plus_1_over_p(order: int) -> None:
    n = 3**order
    assert monarch_parameter_count(balanced_sizes(n, order)) == order * round(n ** ((order + 1) / order))


# -- initialisation and the module -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(32, 16), (16, 8, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_initialisation_keeps_the_variance(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    factors = random_factors(sizes, dtype)
    monarch_init_(factors)
    dense = monarch_dense_order_p(factors)
    assert (dense.abs() ** 2).mean().item() * math.prod(sizes) == pytest.approx(1, rel=0.1)
    out = monarch_multiply_order_p(torch.randn(200, math.prod(sizes), dtype=dtype), factors)
    assert (out.abs() ** 2).mean().item() == pytest.approx(1, rel=0.1)
    for weight in factors:
        assert (weight.abs() ** 2).mean().item() * weight.shape[-1] == pytest.approx(1, rel=0.1)


def test_module_multiplies_by_its_dense_matrix_and_adds_its_bias() -> None:
    layer = MonarchLinear(60, order=3, dtype=torch.float64)
    assert layer.sizes == (5, 4, 3)
    assert sum(p.numel() for p in layer.parameters()) == monarch_parameter_count((5, 4, 3)) + 60
    assert layer.bias is not None
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 7, 60, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ layer.dense().mT + layer.bias)
    assert "features=60" in repr(layer) and "sizes=5 x 4 x 3" in repr(layer)


def test_module_takes_sizes_and_refuses_wrong_ones() -> None:
    layer = MonarchLinear(24, sizes=(2, 12), bias=False)
    assert [tuple(weight.shape) for weight in layer.factors] == [(2, 12, 12), (12, 2, 2)]
    assert len(list(layer.parameters())) == 2
    with pytest.raises(ValueError, match="product"):
        MonarchLinear(24, sizes=(5, 5))
    with pytest.raises(ValueError, match="order"):
        MonarchLinear(24, order=0)


def test_module_state_dict_round_trip_and_gradients() -> None:
    layer, other = MonarchLinear(12), MonarchLinear(12)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), other(x), rtol=0, atol=0)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_module_under_autocast_computes_and_returns_bfloat16() -> None:
    layer = MonarchLinear(64, order=3)
    x = torch.randn(8, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), layer(x), rtol=0, atol=0.1)
    low.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


# -- DFT and convolution -----------------------------------------------------------------------------------------------

DFT_SIZES = [
    (4, 3),
    (3, 4),
    (6, 5),
    (6, 6),
    (8, 8),
    (16, 4),
    (13, 1),
    (7,),
    (5, 4, 3),
    (3, 5, 4),
    (2,) * 6,
    (2, 3, 2, 5),
]


@pytest.mark.parametrize("sizes", DFT_SIZES)
def test_dft_and_inverse(sizes: tuple[int, ...]) -> None:
    n = math.prod(sizes)
    x = torch.randn(2, 3, n, dtype=torch.complex128)
    spectrum = monarch_multiply_order_p(digit_reversal(x, sizes), dft_factors(n, sizes, dtype=torch.complex128))
    torch.testing.assert_close(spectrum, torch.fft.fft(x))
    torch.testing.assert_close(monarch_dft(x, sizes), torch.fft.fft(x))
    torch.testing.assert_close(monarch_dft(x, sizes, inverse=True), torch.fft.ifft(x))


def test_order_2_dft_is_a_stride_permutation_and_an_order_2_product() -> None:
    x = torch.randn(30, dtype=torch.complex128)
    factors = dft_factors(30, (6, 5), dtype=torch.complex128)
    permuted = x.view(5, 6).T.flatten()
    torch.testing.assert_close(digit_reversal(x, (6, 5)), permuted)
    torch.testing.assert_close(monarch_multiply(permuted, *factors), torch.fft.fft(x))


def test_digit_reversal_of_twos_is_bit_reversal() -> None:
    reversed_bits = [int(f"{i:04b}"[::-1], 2) for i in range(16)]
    assert digit_reversal(torch.arange(16), (2, 2, 2, 2)).tolist() == reversed_bits


@pytest.mark.parametrize("n", [1, 12, 17, 36, 60, 1024])
def test_dft_of_real_input_with_default_sizes(n: int) -> None:
    x = torch.randn(2, n)
    out = monarch_dft(x)
    assert out.dtype == torch.complex64
    torch.testing.assert_close(out, torch.fft.fft(x), rtol=1e-4, atol=1e-4)


def test_large_dft_keeps_its_precision() -> None:
    x = torch.randn(4096, dtype=torch.float64)
    torch.testing.assert_close(monarch_dft(x, (16, 16, 16)), torch.fft.fft(x), rtol=0, atol=1e-11)


def test_dft_refuses_wrong_sizes() -> None:
    with pytest.raises(ValueError, match="must be 12"):
        dft_factors(12, (3, 3))


def circulant(kernel: Tensor) -> Tensor:
    n = len(kernel)
    return torch.stack([torch.stack([kernel[(i - j) % n] for j in range(n)]) for i in range(n)])


@pytest.mark.filterwarnings("error")  # torch warns where an imaginary part is dropped unasked
@pytest.mark.parametrize(("n", "sizes"), [(12, None), (7, None), (30, (5, 3, 2)), (36, (4, 9))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_circular_convolution_is_the_circulant_matrix(n, sizes, dtype: torch.dtype) -> None:
    x, kernel = torch.randn(2, 3, n, dtype=dtype), torch.randn(n, dtype=dtype)
    out = monarch_convolution(x, kernel, sizes=sizes)
    assert out.dtype == dtype
    torch.testing.assert_close(out, x @ circulant(kernel).mT)


def test_circulant_matrix_is_monarch_diagonal_inverse_monarch() -> None:
    sizes, kernel = (4, 3), torch.randn(12, dtype=torch.complex128)
    permutation = digit_reversal(torch.eye(12, dtype=torch.complex128), sizes).mT
    forward = monarch_dense_order_p(dft_factors(12, sizes, dtype=torch.complex128)) @ permutation
    product = torch.linalg.inv(forward) @ torch.diag(forward @ kernel) @ forward
    torch.testing.assert_close(product, circulant(kernel))


@pytest.mark.parametrize(
    ("n", "taps", "sizes"),
    [(9, 9, None), (8, 3, None), (5, 11, None), (5, 11, (3, 3)), (1, 1, None), (7, 7, (4, 2, 2))],
)
def test_causal_convolution_is_the_direct_sum(n: int, taps: int, sizes) -> None:
    x, kernel = torch.randn(2, 3, n, dtype=torch.float64), torch.randn(3, taps, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for i in range(n):
        for j in range(min(i + 1, taps)):
            expected[..., i] += kernel[:, j] * x[..., i - j]
    torch.testing.assert_close(monarch_convolution(x, kernel, causal=True, sizes=sizes), expected)


def test_convolution_gradients_and_low_precision() -> None:
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(6, dtype=torch.float64, requires_grad=True)
    for causal in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, k, causal=causal: monarch_convolution(x, k, causal=causal), (x, kernel)
        )
    low_x, low_kernel = x.detach().bfloat16(), kernel.detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = monarch_convolution(low_x, low_kernel)
    assert low.dtype == torch.bfloat16
    expected = monarch_convolution(low_x.double(), low_kernel.double())
    torch.testing.assert_close(low, expected.bfloat16(), rtol=0.01, atol=0.01)


def test_convolution_refuses_what_would_wrap() -> None:
    with pytest.raises(ValueError, match="at most 6 taps"):
        monarch_convolution(torch.randn(6), torch.randn(7))
    with pytest.raises(ValueError, match="needs 11 points"):
        monarch_convolution(torch.randn(6), torch.randn(6), causal=True, sizes=(5, 2))


# -- projection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden_cases("fly_projection", ""))
def test_projection_golden(case: str) -> None:
    description = json.loads((GOLDENS / "fly_projection.json").read_text())["cases"][case]
    g = golden("fly_projection", case)
    if case.startswith("einsum_rank"):
        w1, w2 = project_to_monarch(g["M"], (description["nblocks1"], description["nblocks2"]), description["rank"])
    else:
        w1, w2 = project_to_monarch(g["M"], description["sizes_arg"])
    assert w1.shape == g["w1"].shape and w2.shape == g["w2"].shape
    torch.testing.assert_close(monarch_dense(w1, w2), g["reconstruction"], rtol=1e-5, atol=1e-5)
    if "true_w1" in g:
        torch.testing.assert_close(monarch_dense(g["true_w1"], g["true_w2"]), g["M"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("sizes", [(6, 4), (3, 8), (12, 2)])
def test_projection_is_exact_on_monarch_matrices_and_batched(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    dense = torch.stack([monarch_dense(*random_factors(sizes, dtype)) for _ in range(6)]).view(2, 3, 24, 24)
    w1, w2 = project_to_monarch(dense, sizes)
    assert w1.shape == (2, 3, *monarch_shapes(sizes)[0]) and w1.dtype == dtype
    torch.testing.assert_close(monarch_dense(w1, w2), dense)


@pytest.mark.parametrize("sizes", [(4, 4), (6, 4), (5, 6)])
def test_projection_is_exact_on_the_dft_after_a_stride_permutation(sizes: tuple[int, int]) -> None:
    n = math.prod(sizes)
    fourier = torch.fft.fft(torch.eye(n, dtype=torch.complex128))
    permuted = digit_reversal(fourier, sizes)  # the columns: F P with P the transpose, so that F = (F P) P_0
    torch.testing.assert_close(monarch_dense(*project_to_monarch(permuted, sizes)), permuted)
    torch.testing.assert_close(monarch_dense(*dft_factors(n, sizes, dtype=torch.complex128)), permuted)


@pytest.mark.parametrize(("sizes", "rank"), [((6, 4), 1), ((4, 6), 1), ((4, 3), 1), ((4, 3), 2)])
def test_projection_residual_is_what_the_singular_values_leave(sizes: tuple[int, int], rank: int) -> None:
    dense = torch.randn(24, 24, dtype=torch.float64)
    k, l = sizes  # noqa: E741
    discarded = 0.0
    for i, j in itertools.product(range(k), range(l)):
        block = dense[j::l, i * 24 // k : (i + 1) * 24 // k]
        discarded += torch.linalg.svdvals(block)[rank:].square().sum().item()
    w1, w2 = project_to_monarch(dense, sizes, rank)
    residual = (dense - monarch_dense(w1, w2)).square().sum().item()
    assert residual == pytest.approx(discarded, rel=1e-10)
    # The nearest: a stationary point of the squared distance, and no perturbed pair is nearer.
    w1, w2 = w1.requires_grad_(), w2.requires_grad_()
    for gradient in torch.autograd.grad((dense - monarch_dense(w1, w2)).square().sum(), (w1, w2)):
        assert gradient.abs().max() < 1e-9
    for _ in range(10):
        near1, near2 = w1 + 0.05 * torch.randn_like(w1), w2 + 0.05 * torch.randn_like(w2)
        assert (dense - monarch_dense(near1, near2)).square().sum() > residual


def test_projection_in_bfloat16() -> None:
    dense = monarch_dense(*random_factors((4, 4), torch.float32)).bfloat16()
    w1, w2 = project_to_monarch(dense)
    assert w1.dtype == w2.dtype == torch.bfloat16
    torch.testing.assert_close(monarch_dense(w1, w2).float(), dense.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("shape", "sizes", "rank", "message"),
    [((6, 8), None, 1, "not square"), ((12, 12), (5, 3), 1, "dividing"), ((12, 12), (4, 3), 4, "rank 4"),
     ((12, 12), (2, 2, 3), 1, "must be two"), ((12, 12), (4, 3), 0, "rank 0")],
)  # fmt: skip
def test_projection_refuses(shape, sizes, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        project_to_monarch(torch.randn(shape), sizes, rank)
