"""linear and linear_gelu in training with a weight that stays in float32, and so does its gradient.

Under autocast a weight would be rounded to bfloat16 in every call and its gradient be widened again, each a tensor of
the weight's size and a pass over it.  Where the CPU's kernel takes the weight as it is, these calls do not come to the
ops, which have one dtype for all that they are given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert import checks
from pyxlbert.launch.rows import lies_transposed
from pyxlbert.ops._autograd import OpFunction, backward_backend, single_backward
from pyxlbert.ops._memory import KeptMemory, memory_of
from pyxlbert.ops._torch import apply, intercepted, is_zerotensor

try:
    from pyxlbert.cpu import _products
    from pyxlbert.cpu.bias_gelu import gelu_bwd, gelu_fwd
except ImportError:  # backend "cpu" is not here
    _products = None  # type: ignore[assignment]


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes plain tensors x `[..., K]`, bfloat16, and a weight `[N, K]`, float32, as they are."""
    return (
        _products is not None
        and not torch.compiler.is_compiling()
        and not intercepted()
        and all(type(one) in (Tensor, torch.nn.Parameter) and _in_memory(one) for one in (x, weight))
        and _products.multiplies(x, weight)
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """See `pyxlbert.cpu._products.forward`."""
    return _products.forward(x, weight, bias, y)


def softmax_slope(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    """See `pyxlbert.cpu._products.softmax_slope`."""
    return _products.softmax_slope(logits, labels, scale)


def to_rows(dy: Tensor, weight: Tensor) -> Tensor:
    """See `pyxlbert.cpu._products.to_rows`."""
    return _products.to_rows(dy, weight)


def to_weight(dy: Tensor, x: Tensor, weight: Tensor, memory: KeptMemory | None, sum: Tensor) -> Tensor:
    """dyᵀ x in float32, lying as the weight does.

    Args:
        memory: where the gradient is to lie; None takes fresh memory.
        sum: what it is added to, or a tensor without elements.
    """
    if sum.numel():
        return _products.to_weight(dy, x, sum, add=True)
    shape = weight.t().shape if lies_transposed(weight) else weight.shape
    empty = weight.new_empty(shape) if memory is None else memory.empty(shape, torch.float32)
    return _products.to_weight(dy, x, empty.t() if lies_transposed(weight) else empty)


class _WideLinear(OpFunction):
    op = "linear"

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _products.forward(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.memory = memory_of(weight)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)

    @staticmethod
    @single_backward("linear")
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None
        _, _, needs_bias = ctx.needs_input_grad
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype) if needs_bias else None
        return *_gradients(ctx, dy, *ctx.saved_tensors), dbias


class _WideLinearGelu(OpFunction):
    op = "linear_gelu"

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
        preactivation = _products.forward(x, weight, None if bias is None else bias.to(x.dtype))
        return gelu_fwd(preactivation, None, approximate), preactivation

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, ctx.approximate = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.memory = memory_of(weight)
        ctx.save_for_backward(output[1], x if ctx.needs_input_grad[1] else None, weight)

    @staticmethod
    @single_backward("linear_gelu")
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        _, _, needs_bias, _ = ctx.needs_input_grad
        preactivation, x, weight = ctx.saved_tensors
        dpreactivation, dbias = gelu_bwd(dy, preactivation, None, ctx.approximate, needs_bias)
        dx, dweight = _gradients(ctx, dpreactivation, x, weight)
        return dx, dweight, dbias.to(ctx.bias_dtype) if needs_bias else None, None


def _gradients(ctx: Any, dy: Tensor, x: Tensor | None, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """dx and dweight, where they are needed; x is there if dweight is."""
    dx = to_rows(dy, weight) if ctx.needs_input_grad[0] else None
    return dx, None if x is None else to_weight(dy, x, weight, ctx.memory, dy.new_empty(0))


def linear(op: Any, backend: str | None, x: Any, weight: Any, bias: Any) -> Tensor | None:
    """`linear`, or None if the call is to go the usual way."""
    rows = _rows(op, backend, x, weight, bias)
    return None if rows is None else apply(_WideLinear, rows, weight, bias)


def linear_gelu(op: Any, backend: str | None, x: Any, weight: Any, bias: Any, approximate: str) -> Tensor | None:
    """`linear_gelu`, or None if the call is to go the usual way."""
    rows = _rows(op, backend, x, weight, bias) if approximate in ("none", "tanh") else None
    return None if rows is None else apply(_WideLinearGelu, rows, weight, bias, approximate)[0]


def _rows(op: Any, backend: str | None, x: Any, weight: Any, bias: Any) -> Tensor | None:
    """x in bfloat16 if all is as the kernel takes it and a gradient is to come; what is wrong, the checks say."""
    given = (x, weight) if bias is None else (x, weight, bias)
    if (
        _products is None
        or not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or intercepted()
        or not all(type(one) in _PLAIN and one.layout is torch.strided and one.is_cpu for one in given)
        or not any(one.requires_grad for one in given)
        or weight.dtype is not torch.float32
        or weight.dim() != 2
        or not x.dim()
        or weight.shape[1] != x.shape[-1]
        or (bias is not None and (bias.shape != weight.shape[:1] or bias.dtype not in _DTYPES))
    ):
        return None
    if torch.is_autocast_enabled("cpu"):
        if torch.get_autocast_dtype("cpu") is not torch.bfloat16 or x.dtype not in _DTYPES:
            return None
    elif x.dtype is not torch.bfloat16:
        return None
    if not all(_in_memory(one) for one in given):
        return None
    rows = x.to(torch.bfloat16)
    if not _products.multiplies(rows, weight):
        return None
    backend = op.resolve(backend, rows)
    return rows if backend == "cpu" and backward_backend(backend) == "cpu" else None


_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16)


def _in_memory(x: Tensor) -> bool:
    return not (x.is_neg() or is_zerotensor(x)) and checks.short_storage(x) is None
