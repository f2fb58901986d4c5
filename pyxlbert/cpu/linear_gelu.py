"""linear_gelu on CPU: gelu is the product's epilogue if nothing is saved for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert.cpu import _few_rows, _onednn
from pyxlbert.cpu._onednn import note, supports
from pyxlbert.cpu.bias_gelu import gelu_bwd, gelu_fwd
from pyxlbert.cpu.linear import product_bwd, product_fwd

__all__ = ["linear_gelu_bwd", "linear_gelu_fwd", "note", "supports"]


def linear_gelu_fwd(call: Any) -> tuple[Tensor, Tensor]:
    """See `pyxlbert.reference.linear_gelu.linear_gelu_fwd`; without the second result gelu is the epilogue."""
    empty = call.x.numel() == 0 or call.weight.numel() == 0
    if not call.needs_preactivation and not empty and _onednn.few_rows(call.x) and call.weight.is_contiguous():
        return _few_rows.linear_fwd(call.x, call.weight, call.bias, call.approximate), call.x.new_empty(0)
    if call.needs_preactivation or empty or _onednn.torch_is_faster(call.x, call.weight.shape[0], saves=True):
        preactivation = product_fwd(call.x, call.weight, call.bias)
        if call.needs_preactivation:
            return gelu_fwd(preactivation, None, call.approximate), preactivation
        # In place: a second result of this size would cost more for its fresh pages than for its values.
        return torch.ops.aten.gelu_.default(preactivation, approximate=call.approximate), call.x.new_empty(0)
    return _onednn.product(call.x, call.weight, call.bias, call.approximate), call.x.new_empty(0)


def linear_gelu_bwd(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.linear_gelu.linear_gelu_bwd`."""
    dpreactivation, dbias = gelu_bwd(call.dy, call.preactivation, None, call.approximate, call.needs_bias)
    dx, dweight, _ = product_bwd(dpreactivation, call.x, call.weight, False)
    return dx, dweight, dbias
