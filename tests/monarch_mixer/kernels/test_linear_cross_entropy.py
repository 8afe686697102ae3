import pytest
import torch
import torch.nn.functional as F

from bert import masked_lm
from bert.composer_models import build_masked_lm
from monarch_mixer.kernels import linear_cross_entropy as kernels
from monarch_mixer.kernels.linear_cross_entropy import linear_cross_entropy
from tests.bert.test_composer_models import FIELDS, RATES, make_batch
from tests.monarch_mixer.kernels.support import DTYPES, assert_close, assert_repeatable, in_double, relative_error, run


def make(rows, features, classes, dtype, device, ignored_share=0.3):
    tensors = torch.randn(rows, features), torch.randn(classes, features) / features**0.5, torch.randn(classes)
    labels = torch.randint(0, classes, (rows,))
    labels[torch.rand(rows) < ignored_share] = -100
    return [t.to(device, dtype).requires_grad_() for t in tensors], labels.to(device)


def check(inputs, labels, dtype, factor=0.37, **options):
    factor = torch.tensor(factor, device=labels.device)

    def function(*inputs):
        return linear_cross_entropy(*inputs, labels, **options)[0]

    results = run(function, inputs, factor)
    expected = run(
        lambda *copies: F.cross_entropy(F.linear(*copies), labels, reduction="sum"), in_double(*inputs), factor.double()
    )
    for what, result, value in zip(("loss", "rows", "weight", "bias"), results, expected, strict=True):
        assert_close(result, value, dtype, what)
    assert_repeatable(function, inputs, factor, results)


def count_correct(inputs, labels):
    """Right predictions by the logits as the kernel sees them: rounded to the dtype."""
    return ((F.linear(*inputs).argmax(-1) == labels) & (labels != -100)).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "features", "classes", "chunk_rows"),
    [(1, 32, 50, 4096), (21, 32, 9, 16), (8, 48, 4500, 30), (7, 48, 64, 3)],
)
def test_loss_hits_and_gradients(rows, features, classes, chunk_rows, dtype, device):
    inputs, labels = make(rows, features, classes, dtype, device)
    labels[0] = 3  # at least one counts
    check(inputs, labels, dtype, chunk_rows=chunk_rows)
    loss, correct = linear_cross_entropy(*inputs, labels, chunk_rows=chunk_rows)
    assert loss.dtype == torch.float32 and correct.dtype == torch.int64
    assert loss.requires_grad and not correct.requires_grad
    if dtype == torch.float32:
        assert correct == count_correct(inputs, labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5000])
def test_loss_and_gradients_of_real_sizes(rows, dtype):
    inputs, labels = make(rows, 768, 30528, dtype, "cuda", ignored_share=0.1)
    labels[0] = 30527
    check(inputs, labels, dtype)


def test_hits_are_the_first_of_the_largest(device):
    weight = torch.zeros(5000, 2, device=device)
    weight[[7, 8, 4500], 0] = 1.0
    rows = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 2, device=device)
    labels = torch.tensor([7, 8, 4500, -100, 7, 0, 1], device=device)
    _, correct = linear_cross_entropy(rows, weight, torch.zeros(5000, device=device), labels)
    assert correct == 3


def test_extreme_logits_stay_finite(device):
    inputs, labels = make(6, 4, 10, torch.float32, device, ignored_share=0.0)
    inputs = [tensor.detach().mul(1000).requires_grad_() for tensor in inputs]
    check(inputs, labels, torch.float32)


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_counts(rows, device):
    inputs, labels = make(rows, 8, 12, torch.float32, device, ignored_share=1.1)
    loss, correct = linear_cross_entropy(*inputs, labels)
    loss.backward()
    assert loss == 0 and correct == 0
    assert all(tensor.grad.count_nonzero() == 0 for tensor in inputs)


def test_evaluation_makes_no_gradients(device):
    inputs, labels = make(20, 8, 33, torch.float32, device)
    expected = linear_cross_entropy(*inputs, labels)
    with torch.no_grad():
        values = linear_cross_entropy(*inputs, labels)
        outputs = kernels._linear_cross_entropy(*inputs, labels, -100, 4096, torch.float32, False)
    assert not values[0].requires_grad and all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
    assert [output.numel() for output in outputs] == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_returns_gradients_in_the_parameters_dtype(dtype, device):
    inputs, labels = make(40, 32, 70, torch.float32, device)
    with torch.autocast(device, dtype=dtype):
        loss, _ = linear_cross_entropy(*inputs, labels, chunk_rows=16)
    (loss / 1000).backward()
    double = in_double(*inputs)
    expected = F.cross_entropy(F.linear(*double), labels, reduction="sum")
    (expected / 1000).backward()
    assert_close(loss, expected, dtype)
    for tensor, copy in zip(inputs, double, strict=True):
        assert tensor.grad.dtype == torch.float32
        assert_close(tensor.grad, copy.grad, dtype)


@pytest.mark.parametrize("needs_gradients", [False, True])
def test_registration(needs_gradients, device):
    inputs, labels = make(5, 8, 12, torch.float32, device)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*inputs, labels, -100, 4096, torch.float32, needs_gradients)
    torch.library.opcheck(kernels._linear_cross_entropy, arguments, test_utils=checks)


def test_compiled_in_one_graph(device):
    inputs, labels = make(9, 8, 12, torch.float32, device)

    def function(*inputs):
        loss, correct = linear_cross_entropy(*inputs, labels, chunk_rows=4)
        return loss * 2 + correct

    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    one = torch.ones((), device=device)
    for result, value in zip(run(compiled, inputs, one), run(function, inputs, one), strict=True):
        assert relative_error(result, value) < 1e-5


@pytest.mark.parametrize("name", ["m2_bert", "hf_bert"])
def test_models_through_the_kernel(name, device, monkeypatch):
    """Loss, metrics and gradients of a whole step are those without the kernel; on a GPU also in one compiled graph."""
    model = build_masked_lm(name, {**FIELDS[name], "attention_probs_dropout_prob": 0.0}, **RATES).to(device)
    batch = {key: value.to(device) for key, value in make_batch(batch=2, length=12).items()}

    def step(model):
        model.zero_grad()
        outputs = model(batch)
        outputs["loss"].backward()
        return {key: value.detach() for key, value in outputs.items()}, [
            p.grad.clone() for p in model.parameters() if p.grad is not None
        ]

    monkeypatch.setattr(masked_lm, "kernels_apply", lambda *_: False)
    expected, expected_gradients = step(model)
    monkeypatch.setattr(masked_lm, "kernels_apply", lambda *_: True)
    versions = [model]
    if device == "cuda":
        torch._dynamo.reset()
        versions.append(torch.compile(model, fullgraph=True))
    for version in versions:
        outputs, gradients = step(version)
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
        for gradient, value in zip(gradients, expected_gradients, strict=True):
            assert relative_error(gradient, value) < 1e-4 or value.norm() < 1e-6
    with torch.no_grad():
        assert model.model(**batch).logits is None


def test_mistakes_are_named():
    (rows, weight, bias), labels = make(5, 8, 12, torch.float32, "cpu")
    for arguments in (
        (rows, weight, bias[1:], labels),
        (rows, weight, bias, labels[1:]),
        (rows[:, 1:], weight, bias, labels),
    ):
        with pytest.raises(ValueError, match="sizes do not fit"):
            linear_cross_entropy(*arguments)
