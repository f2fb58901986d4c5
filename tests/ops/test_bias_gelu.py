"""What is special to bias_gelu."""

from __future__ import annotations

import pytest
import torch

import pyxlbert
from pyxlbert import backends


def device_of(backend: str) -> str:
    """Where a backend runs; the test is skipped where it runs nowhere."""
    if (why := backends.unavailable(backend)) is not None:
        pytest.skip(why)
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_hand_written_gradient(approximate: str) -> None:
    """The reference's backward against numerical differentiation in float64."""
    generator = torch.Generator().manual_seed(0)
    x, bias = (
        (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_() for shape in ((5, 7), (7,))
    )
    assert torch.autograd.gradcheck(
        lambda *a: pyxlbert.bias_gelu(*a, approximate=approximate, backend="torch"), (x, bias)
    )


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("backend", ["torch", "cpu", "triton", "cuda"])
def test_infinities_and_nan(approximate: str, backend: str) -> None:
    """inf stays, -inf becomes a zero and not 0 x inf, NaN stays in its place; the slopes there are 1 and 0."""
    numbers = [float("inf"), -float("inf"), float("nan"), 1e30, -1e30, 0.0]
    x = torch.tensor(numbers, device=device_of(backend), requires_grad=True)
    y = pyxlbert.bias_gelu(x, approximate=approximate, backend=backend)
    y.backward(torch.ones_like(y))
    nothing = 1000 * torch.finfo(torch.float32).tiny
    assert y[0] == float("inf") and y[3] == x[3] and y[5] == 0 and y[2].isnan()
    assert y[1].abs() < nothing and y[4].abs() < nothing
    assert x.grad[[0, 3]].tolist() == [1.0, 1.0] and x.grad[2].isnan()
    assert (x.grad[5] - 0.5).abs() <= torch.finfo(torch.float32).eps
    assert (x.grad[[1, 4]].abs() < nothing).all()


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_negative_tail_keeps_its_digits(dtype: torch.dtype, backend: str) -> None:
    """1 + erf(x / sqrt 2) has none left at -6; the kernels have most of them, and all of bfloat16's."""
    x = torch.linspace(-9, -3, 1000).to(dtype)
    truth = 0.5 * x.double() * torch.special.erfc(-x.double() * 0.5**0.5)
    found = pyxlbert.bias_gelu(x.to(device_of(backend)), backend=backend).cpu().double()
    relative = ((found - truth) / truth).abs().max()
    assert relative < (64 if dtype == torch.float32 else 0.51) * torch.finfo(dtype).eps


def test_gradients_that_nobody_wants_are_not_computed() -> None:
    bias = torch.randn(9, requires_grad=True)
    pyxlbert.bias_gelu(torch.randn(4, 9), bias).sum().backward()
    assert bias.grad.shape == (9,)
    x = torch.randn(4, 9)
    for backend in ("torch", "cpu"):
        dx, dbias = torch.ops.pyxlbert.bias_gelu_bwd(torch.ones(4, 9), x, bias.detach(), "none", False, backend)
        assert dx.shape == x.shape and dbias.numel() == 0
