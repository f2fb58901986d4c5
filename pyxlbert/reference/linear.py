"""linear in plain PyTorch, any dtype and device; the definition the other backends are held to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def supports(*tensors: Tensor | None) -> None:
    """Every input that the contract allows."""
    return None


def linear_fwd(call: Any) -> Tensor:
    """y = x weightᵀ + bias, in x's dtype."""
    return torch.nn.functional.linear(call.x, call.weight, call.bias)


def linear_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """dx (empty without `weight`), dweight (empty without `x`), dbias (empty unless `needs_bias`)."""
    return product_bwd(call.dy, call.x, call.weight, call.needs_bias)


def product_bwd(dy: Tensor, x: Tensor | None, weight: Tensor | None, needs_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dx (empty without `weight`), dweight (empty without `x`) and dbias (empty unless `needs_bias`).

    dx = dy weight, dweight = dyᵀ x, dbias = the sum of dy over its rows.  dweight lies as `weight` does, if that is
    given: a transposed parameter then takes its gradient as it is, and not a transposed copy of it.
    """
    rows = dy.reshape(dy.shape[:-1].numel(), dy.shape[-1])
    dx = dweight = dbias = dy.new_empty(0)
    if weight is not None:
        dx = (rows @ weight).view(*dy.shape[:-1], weight.shape[1])
    if x is not None:
        columns = x.reshape(rows.shape[0], x.shape[-1])
        transposed = weight is not None and weight.t().is_contiguous() and not weight.is_contiguous()
        dweight = (columns.t() @ rows).t() if transposed else rows.t() @ columns
    if needs_bias:
        dbias = rows.sum(0)
    return dx, _own(dweight, dx), _own(dbias, dx, dweight)


def _own(result: Tensor, *others: Tensor) -> Tensor:
    # Results of an op may not be one tensor twice.
    return result.new_empty(0) if any(result is other for other in others) else result
