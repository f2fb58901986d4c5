"""layer_norm: y = (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

Source: Ba, Kiros and Hinton, "Layer Normalization", https://arxiv.org/abs/1607.06450, equations 3 and 4;
`LayerNorm` of BERT and `layer_norm` of XLNet (both with eps = 1e-12).
"""

from __future__ import annotations

from typing import Any

import torch

from pyxlbert import checks
from pyxlbert.ops._autograd import OpFunction, backward_backend, single_backward
from pyxlbert.ops._define import Op
from pyxlbert.ops._torch import apply

OP = Op("layer_norm", ("torch", "cpu", "triton", "cuda"))


def _fwd_fake(call: Any) -> list[torch.Tensor]:
    y = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    if not call.save:
        return [y]
    mean = call.x.new_empty(call.x.shape[:-1], dtype=torch.promote_types(call.x.dtype, torch.float32))
    return [y, mean, torch.empty_like(mean)]


def _bwd_fake(call: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = call.x.shape[-1] if call.needs_parameters else 0
    dx = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    return dx, call.weight.new_empty(n), call.bias.new_empty(n)


Forward, _fwd = OP.define(
    "fwd",
    "(Tensor x, Tensor weight, Tensor bias, float eps, bool save, str backend) -> Tensor[]",
    _fwd_fake,
    shapes={"x": "=*N", "weight": "N", "bias": "N"},
)
Backward, _bwd = OP.define(
    "bwd",
    "(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, bool needs_parameters, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    shapes={"dy": "=*N", "x": "=*N", "weight": "N", "bias": "~N", "mean": "~4|*", "rstd": "~4|*"},
)


_usual, _on_cpu = OP.usual("=*N", "^N", "^N", run="layer_norm_out")


class _LayerNorm(OpFunction):
    op = "layer_norm"

    @staticmethod
    def forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return tuple(_fwd(Forward(*arguments[:-1])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, weight, bias, *_, ctx.backend = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)

    @staticmethod
    @single_backward("layer_norm")
    def backward(ctx: Any, dy: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dx, dweight, dbias = _bwd(Backward(dy, *ctx.saved_tensors, needs_weight or needs_bias, ctx.backend))
        return (
            dx if needs_x else None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            *(None,) * 4,
        )


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float = 1e-12, backend: str | None = None
) -> torch.Tensor:
    """LayerNorm over the last dimension, statistics in float32 (float64 for float64 input).

    Args:
        x: `[..., N]`, float32, bfloat16 or float16 (float64 on backend "torch"); any strides.
        weight: `[N]`, x's dtype or float32.
        bias: `[N]`, x's dtype or float32.
        eps: added to the variance; at least 0.
        backend: one of `pyxlbert.backends.NAMES`; None takes the first that supports the inputs.

    Returns:
        `[..., N]` in x's dtype, contiguous.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype that is not listed above.
        ValueError: a shape, a device or eps is wrong.
        RuntimeError: the named backend cannot run here.
    """
    if type(eps) is float and eps >= 0.0 and _usual(backend, x, weight, bias):
        return _on_cpu(x, weight, bias, eps)
    OP.refuse_transforms(x, weight, bias)
    if not (checks.usual_rows(x, weight, bias) and type(eps) is float and eps >= 0.0):
        eps = _check_arguments(x, weight, bias, eps)
    backend = OP.resolve(backend, x)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return apply(_LayerNorm, x, weight, bias, eps, True, backend, backward_backend(backend))[0]
    return _fwd(Forward(x, weight, bias, eps, False, backend))[0]


def _check_arguments(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> float:
    """eps as a float."""
    checks.rows("layer_norm", x, weight=weight, bias=bias)
    return checks.non_negative("layer_norm", "eps", eps)
