"""What the registration of ops leans on in torch."""

from __future__ import annotations

import torch

from pyxlbert.ops import _define

SCALE = 3.0


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, scale: float) -> torch.Tensor:
        return x * scale

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.scale, None


def test_the_short_way_into_an_autograd_function_is_here() -> None:
    """The one private name behind `apply`: without it every call with a gradient costs 50 us more."""
    assert _define._transforming is not None, "torch._C._are_functorch_transforms_active has moved"
    assert _define._transforming() is False


def test_apply_is_the_functions_own_apply() -> None:
    for call in (lambda x: _define.apply(_Scale, x, SCALE), lambda x: _Scale.apply(x, SCALE)):
        x = torch.ones(2, requires_grad=True)
        y = call(x)
        y.sum().backward()
        assert type(y.grad_fn).__name__ == "_ScaleBackward"
        assert y.tolist() == x.grad.tolist() == [SCALE] * 2
