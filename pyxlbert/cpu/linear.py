"""linear on CPU: the vendor's product, or for few rows a kernel of ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from pyxlbert.cpu import _few_rows, _onednn
from pyxlbert.cpu._onednn import note, supports
from pyxlbert.launch.rows import lies_transposed

__all__ = ["linear_bwd", "linear_fwd", "note", "supports"]


def linear_fwd(call: Any) -> Tensor:
    """See `pyxlbert.reference.linear.linear_fwd`."""
    return product_fwd(call.x, call.weight, call.bias)


def linear_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.linear.linear_bwd`."""
    return product_bwd(call.dy, call.x, call.weight, call.needs_bias)


def product_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weightᵀ + bias by whichever product is fastest."""
    if x.numel() == 0 or weight.numel() == 0:
        return F.linear(x, weight, bias)
    if _onednn.few_rows(x) and weight.is_contiguous():
        return _few_rows.linear_fwd(x, weight, bias, None)
    if _onednn.torch_is_faster(x, weight.shape[0]):
        return F.linear(x, weight, bias)
    return _onednn.product(x, weight, bias)


def product_bwd(dy: Tensor, x: Tensor | None, weight: Tensor | None, needs_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, which lies as `weight` does, and dbias, each empty if it is not needed."""
    multiply = _onednn.torch_product if _onednn.torch_goes_back(dy, x, weight) else _onednn.product
    rows = dy.reshape(dy.shape[:-1].numel(), dy.shape[-1])
    dx = dweight = dbias = None
    if weight is not None:
        dx = multiply(rows, weight.t(), None).view(*dy.shape[:-1], weight.shape[1])
    if x is not None:
        columns = x.reshape(rows.shape[0], x.shape[-1])
        if lies_transposed(weight):
            dweight = multiply(columns.t(), rows.t(), None).t()
        else:
            dweight = multiply(rows.t(), columns.t(), None)
    if needs_bias:
        dbias = rows.sum(0)
    return tuple(dy.new_empty(0) if one is None else one for one in (dx, dweight, dbias))  # type: ignore[return-value]
