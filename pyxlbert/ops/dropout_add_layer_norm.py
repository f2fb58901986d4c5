"""dropout_add_layer_norm: y = LN(residual + dropout(x + x_bias)) over the last dimension, in one pass.

Source: the sub-layer output of Vaswani et al., "Attention Is All You Need", https://arxiv.org/abs/1706.03762,
section 5.4; `BertSelfOutput` and `BertOutput` of BERT, `post_attention` of XLNet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert import checks
from pyxlbert.ops._autograd import OpFunction, backward_backend, single_backward
from pyxlbert.ops._define import Op
from pyxlbert.ops._dropout import dropout_of
from pyxlbert.ops._torch import apply

OP = Op("dropout_add_layer_norm", ("torch", "cpu", "triton", "cuda"))

_COPIES = (torch.float32, *checks.LOW_PRECISION)


def _fwd_fake(call: Any) -> list[Tensor]:
    y = torch.empty_like(call.residual, memory_format=torch.contiguous_format)
    outputs = [y] if call.copy_dtype is None else [y, torch.empty_like(y, dtype=call.copy_dtype)]
    if call.save:
        mean = call.x.new_empty(call.x.shape[:-1], dtype=torch.promote_types(call.x.dtype, torch.float32))
        outputs += [torch.empty_like(y), mean, torch.empty_like(mean)]
    return outputs


def _bwd_fake(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    s = call.s
    n = s.shape[-1]
    return (
        torch.empty_like(s, dtype=call.x_dtype) if call.needs_x else s.new_empty(0, dtype=call.x_dtype),
        torch.empty_like(s) if call.needs_residual else s.new_empty(0),
        call.weight.new_empty(n if call.needs_parameters else 0),
        call.bias.new_empty(n if call.needs_parameters else 0),
        (s if call.x_bias is None else call.x_bias).new_empty(n if call.needs_x_bias else 0),
    )


Forward, _fwd = OP.define(
    "fwd",
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? x_bias, float dropout_p, Tensor? seed, float eps,"
    " ScalarType? copy_dtype, bool save, str backend) -> Tensor[]",
    _fwd_fake,
    shapes={"x": "*N", "residual": "*N", "weight": "N", "bias": "N", "x_bias": "N", "seed": "8?"},
)
Backward, _bwd = OP.define(
    "bwd",
    "(Tensor? dy, Tensor? dy_copy, Tensor s, Tensor weight, Tensor bias, Tensor? x_bias, Tensor mean, Tensor rstd,"
    " float dropout_p, Tensor? seed, ScalarType x_dtype, bool needs_x, bool needs_residual, bool needs_parameters,"
    " bool needs_x_bias, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    shapes={
        **{"dy": "=*N", "dy_copy": "*N", "s": "~=|*N", "weight": "N", "bias": "~N", "x_bias": "~N"},
        **{"mean": "~4|*", "rstd": "~4|*", "seed": "8?"},
    },
)


_usual, _on_cpu = OP.usual("=*N", "^*N", "^N", "^N", "/^N", run="add_layer_norm_out")


class _DropoutAddLayerNorm(OpFunction):
    op = "dropout_add_layer_norm"

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(_fwd(Forward(*arguments[:-1])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, ctx.backend = Forward(*inputs[:-1]), inputs[-1]
        s, mean, rstd = output[-3:]
        ctx.dropout_p, ctx.x_dtype, ctx.copied = call.dropout_p, call.x.dtype, call.copy_dtype is not None
        ctx.mark_non_differentiable(s, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(s, call.weight, call.bias, call.x_bias, mean, rstd, call.seed)

    @staticmethod
    @single_backward("dropout_add_layer_norm")
    def backward(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        dy_copy = others[0] if ctx.copied else None
        if dy is None and dy_copy is None:
            return (None,) * 12
        *saved, seed = ctx.saved_tensors
        s = saved[0]
        needs_x, needs_residual, needs_weight, needs_bias, needs_x_bias, *_ = ctx.needs_input_grad
        # Without dropout the two gradients are one; autograd takes the same tensor for both.
        one = seed is None and ctx.x_dtype is s.dtype
        needs = (
            needs_x and not one,
            needs_residual or (needs_x and one),
            needs_weight or needs_bias,
            needs_x_bias,
        )
        call = Backward(dy, dy_copy, *saved, ctx.dropout_p, seed, ctx.x_dtype, *needs, ctx.backend)
        dx, dresidual, dweight, dbias, dx_bias = _bwd(call)
        return (
            (dresidual if one else dx) if needs_x else None,
            dresidual if needs_residual else None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            dx_bias if needs_x_bias else None,
            *(None,) * 7,
        )


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    eps: float = 1e-12,
    copy_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of residual + dropout(x + x_bias) over the last dimension; the sum is never rounded before y is.

    Args:
        x: `[..., N]`, float32, bfloat16 or float16 (float64 on backend "torch"); any strides.
        residual: x's shape, x's dtype or float32; any strides.
        weight, bias: `[N]`, x's dtype or float32.
        x_bias: `[N]`, x's dtype or float32, added to x before dropout; None adds nothing.
        dropout_p: probability that an element of x + x_bias is zeroed; the others are scaled by 1 / (1 - p).
        seed: int64 tensor of one element or an int that decides which; None draws one from the device's default
            generator. Row i, column j takes word j % 4 of the Philox counter (j // 4, i, 0, op).
        eps: added to the variance; at least 0.
        copy_dtype: asks for a copy of y in this dtype out of the same pass: the operand of the next product, while
            the residual stream stays in float32. Gradients of y and its copy are summed.
        backend: one of `pyxlbert.backends.NAMES`; None takes the first that supports the inputs.

    Returns:
        y `[..., N]` in residual's dtype, contiguous; with `copy_dtype` the pair (y, y in that dtype).

    Raises:
        TypeError: an argument is not a tensor, or has a dtype that is not listed above.
        ValueError: a shape, a device, eps, dropout_p or the seed is wrong.
        RuntimeError: the named backend cannot run here.
    """
    if (
        seed is None
        and type(dropout_p) is float
        and dropout_p == 0.0
        and type(eps) is float
        and eps >= 0.0
        and (copy_dtype is None or copy_dtype in _COPIES)
        and _usual(backend, x, residual, weight, bias, x_bias)
    ):
        return _on_cpu(x, residual, weight, bias, x_bias, eps, copy_dtype)
    OP.refuse_transforms(x, residual, weight, bias, x_bias, seed)
    usual = checks.usual_rows(x, weight, bias) if x_bias is None else checks.usual_rows(x, weight, bias, x_bias)
    if not (
        usual
        and isinstance(residual, Tensor)
        and residual.layout is torch.strided
        and not residual.is_nested
        and residual.shape == x.shape
        and residual.device == x.device
        and residual.dtype in (x.dtype, torch.float32)
        and x.dtype is not torch.float64
        and type(eps) is float
        and eps >= 0.0
        and (copy_dtype is None or copy_dtype in _COPIES)
    ):
        eps = _check_arguments(x, residual, weight, bias, x_bias, eps, copy_dtype)
    if type(dropout_p) is not float or dropout_p != 0.0 or seed is not None:
        dropout_p, seed = dropout_of("dropout_add_layer_norm", dropout_p, seed, x.device)
    backend = OP.resolve(backend, x)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or residual.requires_grad
        or weight.requires_grad
        or bias.requires_grad
        or (x_bias is not None and x_bias.requires_grad)
    ):
        call = Forward(x, residual, weight, bias, x_bias, dropout_p, seed, eps, copy_dtype, True, backend)
        outputs = apply(_DropoutAddLayerNorm, *call, backward_backend(backend))
    else:
        outputs = _fwd(Forward(x, residual, weight, bias, x_bias, dropout_p, seed, eps, copy_dtype, False, backend))
    return outputs[0] if copy_dtype is None else (outputs[0], outputs[1])


def _check_arguments(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    eps: float,
    copy_dtype: torch.dtype | None,
) -> float:
    """eps as a float."""
    op = "dropout_add_layer_norm"
    checks.rows(op, x, weight=weight, bias=bias, **({} if x_bias is None else {"x_bias": x_bias}))
    checks.tensor(op, "residual", residual)
    checks.same_device(op, "residual", residual, "x", x)
    checks.parameter_dtype(op, "residual", residual, x)
    checks.shape(op, "residual", residual, tuple(x.shape), "x's")
    eps = checks.non_negative(op, "eps", eps)
    checks.output_dtype(op, "copy_dtype", copy_dtype, x)
    return eps
