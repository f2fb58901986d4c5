"""Dropout by 16 bits an element, drawn again for the gradient: no mask is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert import checks
from pyxlbert.ops._autograd import OpFunction
from pyxlbert.ops._torch import apply, intercepted

try:
    from pyxlbert.cpu import _dropout
except ImportError:  # backend "cpu" is not here
    _dropout = None  # type: ignore[assignment]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Dropped(OpFunction):
    op = "dropout"

    @staticmethod
    def forward(x: Tensor, limit: int, seed: int) -> Tensor:
        return _dropout.dropout(x, limit, seed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.limit, ctx.seed = inputs
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, None, None]:
        return None if dy is None else apply(_Dropped, dy, ctx.limit, ctx.seed), None, None


def dropped(x: Tensor, limit: int) -> Tensor | None:
    """x with every element zero with probability limit / 2¹⁶ and scaled elsewhere; None where the kernel is not for it.

    The seed is drawn from the default generator.
    """
    if _dropout is None or x.dtype not in _DTYPES or intercepted() or checks.short_storage(x) is not None:
        return None
    seed = int(torch.empty((), dtype=torch.int64).random_(-(2**63), None))
    return apply(_Dropped, x, limit, seed)
