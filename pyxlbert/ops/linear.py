"""linear: y = x weightᵀ + bias, left to the vendor's matrix product unless the rows are few.

On CPU that is oneDNN or MKL (`pyxlbert/cpu/_onednn.py` says which, and why) or for few rows `csrc/cpu/linear.cpp`,
in backend "torch" whatever `torch.nn.functional.linear` calls.

Source: the dense layers of BERT, Devlin et al., https://arxiv.org/abs/1810.04805.
"""

from __future__ import annotations

from typing import Any

import torch

from pyxlbert.ops import _wide
from pyxlbert.ops._autograd import OpFunction, backward_backend, single_backward
from pyxlbert.ops._define import Op
from pyxlbert.ops._linear import prepare, requires_grad, weight_gradient
from pyxlbert.ops._torch import apply

OP = Op("linear", ("torch", "cpu"))


def _fwd_fake(call: Any) -> torch.Tensor:
    return call.x.new_empty(*call.x.shape[:-1], call.weight.shape[0])


def _bwd_fake(call: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dy, n = call.dy, call.dy.shape[-1]
    return (
        dy.new_empty(0) if call.weight is None else dy.new_empty(*dy.shape[:-1], call.weight.shape[1]),
        dy.new_empty(0) if call.x is None else weight_gradient(n, call.x, call.weight),
        dy.new_empty(n if call.needs_bias else 0),
    )


Forward, _fwd = OP.define(
    "fwd",
    "(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor",
    _fwd_fake,
    shapes={"x": "*K", "weight": "NK", "bias": "N"},
)
Backward, _bwd = OP.define(
    "bwd",
    "(Tensor dy, Tensor? x, Tensor? weight, bool needs_bias, str backend) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    shapes={"dy": "*N", "x": "*K", "weight": "NK"},
)


_usual, _on_cpu = OP.usual("=*K", "=NK", "/=N")


class _Linear(OpFunction):
    op = "linear"

    @staticmethod
    def forward(*arguments: Any) -> torch.Tensor:
        return _fwd(Forward(*arguments[:-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, _, _, ctx.backend = inputs
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.set_materialize_grads(False)
        # dweight needs x, dx needs weight; a frozen side keeps nothing alive.
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)

    @staticmethod
    @single_backward("linear")
    def backward(ctx: Any, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return None, None, None, None, None
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dx, dweight, dbias = _bwd(Backward(dy, *ctx.saved_tensors, needs_bias, ctx.backend))
        return dx if needs_x else None, dweight if needs_weight else None, dbias if needs_bias else None, None, None


def gradients(
    dy: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The products of the gradient rule, for whoever has a rule of its own around them.

    Args:
        dy: `[..., N]`.
        x: `[..., K]`, or None if `dweight` is not needed.
        weight: `[N, K]`, or None if `dx` is not needed.

    Returns:
        dx, dweight, and a tensor without elements; so is what is not needed.
    """
    return _bwd(Backward(dy, x, weight, False, backward_backend(OP.resolve(None, dy))))


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """The affine map x weightᵀ + bias of every row of x.

    Args:
        x: `[..., K]`, float32, bfloat16 or float16 (float64 on backend "torch"); any strides.
        weight: `[N, K]`, x's dtype, or float32, which is rounded to x's on every call.
        bias: `[N]`, likewise; None adds nothing.
        backend: one of `pyxlbert.backends.NAMES`; None takes the first that supports the inputs.

    Returns:
        `[..., N]` in x's dtype (under autocast in its dtype), contiguous.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype that is not listed above.
        ValueError: a shape or a device is wrong.
        RuntimeError: the named backend cannot run here.
    """
    if _usual(backend, x, weight, bias) and OP.refusal("cpu", x) is None:
        return _on_cpu(Forward(x, weight, bias, "cpu"))
    OP.refuse_transforms(x, weight, bias)
    wide = _wide.linear(OP, backend, x, weight, bias)
    if wide is not None:
        return wide
    x, weight, bias = prepare("linear", x, weight, bias)
    backend = OP.resolve(backend, x)
    if requires_grad(x, weight, bias):
        return apply(_Linear, x, weight, bias, backend, backward_backend(backend))
    return _fwd(Forward(x, weight, bias, backend))
