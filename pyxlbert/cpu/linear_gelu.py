"""linear_gelu on CPU: gelu is the product's epilogue if nothing is saved for backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyxlbert.cpu import _few_rows, _onednn
from pyxlbert.cpu._onednn import supports
from pyxlbert.cpu.linear import linear_bwd, linear_fwd

__all__ = ["linear_gelu_bwd", "linear_gelu_fwd", "supports"]


def linear_gelu_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, needs_preactivation: bool
) -> tuple[Tensor, Tensor]:
    """See `pyxlbert.reference.linear_gelu.linear_gelu_fwd`; without the second result gelu is the epilogue."""
    empty = x.numel() == 0 or weight.numel() == 0
    if not needs_preactivation and not empty and _onednn.few_rows(x) and weight.is_contiguous():
        return _few_rows.linear_fwd(x, weight, bias, approximate), x.new_empty(0)
    if needs_preactivation or empty or _onednn.torch_is_faster(x, weight.shape[0], saves=True):
        preactivation = linear_fwd(x, weight, bias)
        if needs_preactivation:
            return F.gelu(preactivation, approximate=approximate), preactivation
        # In place: a second result of this size would cost more for its fresh pages than for its values.
        return torch.ops.aten.gelu_.default(preactivation, approximate=approximate), x.new_empty(0)
    return _onednn.product(x, weight, bias, approximate), x.new_empty(0)


def linear_gelu_bwd(
    dy: Tensor, preactivation: Tensor, x: Tensor | None, weight: Tensor | None, needs_bias: bool, approximate: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See `pyxlbert.reference.linear_gelu.linear_gelu_bwd`."""
    dpreactivation = torch.ops.aten.gelu_backward(dy, preactivation, approximate=approximate)
    return linear_bwd(dpreactivation, x, weight, needs_bias)
