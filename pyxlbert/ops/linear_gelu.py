"""linear_gelu: y = gelu(x weightᵀ + bias), the activation being the product's epilogue where nothing is saved.

With a gradient to come, gelu's argument is kept in x's dtype and gelu runs over it; without one it never
reaches memory, nor is it rounded.

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", https://arxiv.org/abs/1606.08415; the
intermediate layer of BERT.
"""

from __future__ import annotations

from typing import Any

import torch

from pyxlbert.ops import _wide
from pyxlbert.ops._autograd import OpFunction, backward_backend, single_backward
from pyxlbert.ops._define import Op
from pyxlbert.ops._linear import prepare, requires_grad, weight_gradient
from pyxlbert.ops._torch import apply

OP = Op("linear_gelu", ("torch", "cpu"))


def _fwd_fake(call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    y = call.x.new_empty(*call.x.shape[:-1], call.weight.shape[0])
    return y, torch.empty_like(y) if call.needs_preactivation else y.new_empty(0)


def _bwd_fake(call: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dy, n = call.dy, call.dy.shape[-1]
    return (
        dy.new_empty(0) if call.weight is None else dy.new_empty(*dy.shape[:-1], call.weight.shape[1]),
        dy.new_empty(0) if call.x is None else weight_gradient(n, call.x, call.weight),
        dy.new_empty(n if call.needs_bias else 0),
    )


Forward, _fwd = OP.define(
    "fwd",
    "(Tensor x, Tensor weight, Tensor? bias, str approximate, bool needs_preactivation, str backend)"
    " -> (Tensor, Tensor)",
    _fwd_fake,
    shapes={"x": "*K", "weight": "NK", "bias": "N"},
)
Backward, _bwd = OP.define(
    "bwd",
    "(Tensor dy, Tensor preactivation, Tensor? x, Tensor? weight, bool needs_bias, str approximate, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    shapes={"dy": "*N", "preactivation": "*N", "x": "*K", "weight": "NK"},
)


_usual, _on_cpu = OP.usual("=*K", "=NK", "/=N")


class _LinearGelu(OpFunction):
    op = "linear_gelu"

    @staticmethod
    def forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return _fwd(Forward(*arguments[:-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        x, weight, _, ctx.approximate, *_, ctx.backend = inputs
        _, preactivation = output
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.mark_non_differentiable(preactivation)
        ctx.set_materialize_grads(False)
        # dweight needs x, dx needs weight; a frozen side keeps nothing alive.
        ctx.save_for_backward(preactivation, x if needs_weight else None, weight if needs_x else None)

    @staticmethod
    @single_backward("linear_gelu")
    def backward(ctx: Any, dy: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dx, dweight, dbias = _bwd(Backward(dy, *ctx.saved_tensors, needs_bias, ctx.approximate, ctx.backend))
        return (
            dx if needs_x else None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            *(None,) * 4,
        )


def linear_gelu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    approximate: str = "none",
    backend: str | None = None,
) -> torch.Tensor:
    """gelu of the affine map x weightᵀ + bias of every row of x.

    Args:
        x: `[..., K]`, float32, bfloat16 or float16 (float64 on backend "torch"); any strides.
        weight: `[N, K]`, x's dtype, or float32, which is rounded to x's on every call.
        bias: `[N]`, likewise; None adds nothing.
        approximate: "none", gelu(z) = z Φ(z) by erf, or "tanh", its approximation.
        backend: one of `pyxlbert.backends.NAMES`; None takes the first that supports the inputs.

    Returns:
        `[..., N]` in x's dtype (under autocast in its dtype), contiguous.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype that is not listed above.
        ValueError: a shape, a device or `approximate` is wrong.
        RuntimeError: the named backend cannot run here.
    """
    if approximate in ("none", "tanh") and _usual(backend, x, weight, bias) and OP.refusal("cpu", x) is None:
        return _on_cpu(Forward(x, weight, bias, approximate, False, "cpu"))[0]
    OP.refuse_transforms(x, weight, bias)
    wide = _wide.linear_gelu(OP, backend, x, weight, bias, approximate)
    if wide is not None:
        return wide
    x, weight, bias = prepare("linear_gelu", x, weight, bias)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"linear_gelu: approximate: got {approximate!r}, wanted 'none' or 'tanh'")
    backend = OP.resolve(backend, x)
    if requires_grad(x, weight, bias):
        return apply(_LinearGelu, x, weight, bias, approximate, True, backend, backward_backend(backend))[0]
    return _fwd(Forward(x, weight, bias, approximate, False, backend))[0]
