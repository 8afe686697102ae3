"""What the kernel tests share."""

import torch

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
DTYPES = tuple(TOLERANCES)


def relative_error(value, reference):
    """Norm of the difference relative to the norm of the reference."""
    reference = reference.detach().double()
    return ((value.detach().double() - reference).norm() / reference.norm()).item()


def in_double(*tensors):
    """Copies in fp64 that want gradients."""
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def assert_close(value, reference, dtype, what="value"):
    error = relative_error(value, reference)
    assert error < TOLERANCES[dtype], f"{what}: relative error {error:.1e}"  # also when it is not a number


def run(function, inputs, grad):
    """The function's output and the gradients of its inputs, from a fresh start."""
    for tensor in inputs:
        tensor.grad = None
    out = function(*inputs)
    out.backward(grad)
    return [out.detach(), *(tensor.grad for tensor in inputs)]


def assert_repeatable(function, inputs, grad, results):
    """A second run gives the same bits; the interpreter's could not differ."""
    if inputs[0].is_cuda:
        again = run(function, inputs, grad)
        assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
