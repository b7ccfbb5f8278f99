"""Our functions beside the values of published code: the same loss, and the same gradient."""

import torch
from torch.testing import assert_close

RTOL = 1e-9


def tensors(values):
    """NumPy arrays of `published` as tensors, under the same keys."""
    return {key: torch.from_numpy(value) for key, value in values.items()}


def agrees(loss, x, expected, expected_gradient, rtol=RTOL, atol=1e-12):
    """Whether `loss` at `x` has the expected value, and the sum of its values the expected gradient."""
    x = x.clone().requires_grad_()
    value = loss(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert_close(value.detach(), expected, rtol=rtol, atol=atol)
    assert_close(gradient, expected_gradient, rtol=rtol, atol=atol)
