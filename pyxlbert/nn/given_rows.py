"""Products of rows of which the first are given: no gradient of those is computed.

An XLNet makes keys and values of what it remembers too, which is most of the rows where memories are as long as the
original's, and the product of their gradient with the weight would be thrown away.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyxlbert.ops import _wide
from pyxlbert.ops._autograd import OpFunction, single_backward
from pyxlbert.ops._memory import KeptMemory, memory_of
from pyxlbert.ops._torch import apply, in_memory, intercepted, transformed
from pyxlbert.ops.linear import gradients, linear, takes_wide_weight


def leaves_out_gradient(given: Tensor, rows: Tensor, *weights: Tensor) -> bool:
    """Whether `products_behind` takes these, and has a gradient to leave out."""
    return (
        torch.is_grad_enabled()
        and rows.requires_grad
        and not given.requires_grad
        and given.shape[1] > 0
        and rows.numel() > 0
        and given.dtype is rows.dtype
        and not _is_cast(rows)
        and not (torch.compiler.is_compiling() or transformed() or intercepted())
        and all(type(one) in (Tensor, torch.nn.Parameter) for one in (given, rows, *weights))
    )


def _is_cast(rows: Tensor) -> bool:
    """Whether autocast would multiply these rows in another dtype than theirs."""
    device = rows.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is not rows.dtype


def products_behind(given: Tensor, rows: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """The rows of both, one behind the other in each sequence, times each weight.

    Args:
        given: ``[B, M, K]``, which gets no gradient.
        rows: ``[B, T, K]``, likewise in the dtype of the products.
        weights: ``[N, K]``, in that dtype or rounded to it.

    Returns:
        ``[B, M + T, N]`` of each weight.

    Raises:
        RuntimeError: a second derivative is asked for.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return apply(_ProductsBehind, given, rows, *weights)[:-1]


class _Place(NamedTuple):
    """Where a weight's gradient goes.

    Attributes:
        layout: the weight's.
        memory: kept for it.
        dtype: the weight's.
        wide: whether the weight was not rounded.
    """

    layout: _wide.Layout
    memory: KeptMemory | None
    dtype: torch.dtype
    wide: bool

    @classmethod
    def of(cls, weight: Tensor, seen: Tensor) -> _Place:
        return cls(_wide.Layout.of(weight), memory_of(weight), weight.dtype, takes_wide_weight(seen, weight))

    def gradient(self, dy: Tensor, seen: Tensor) -> Tensor:
        """dyᵀ seen."""
        if self.wide:
            return _wide.to_weight(dy, seen, self.layout, self.memory, dy.new_empty(0))
        return gradients(dy, seen, None)[1].to(self.dtype)


class _ProductsBehind(OpFunction):
    op = "linear"

    @staticmethod
    def forward(given: Tensor, rows: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        seen = torch.cat([given, rows], dim=1)  # [B, M + T, K]
        made = []
        for weight in weights:
            if takes_wide_weight(seen, weight):
                made.append(_wide.product(seen, weight, None, seen.new_empty(*seen.shape[:-1], weight.shape[0])))
            else:
                made.append(linear(seen, weight.to(seen.dtype)))
        return *made, seen

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        given, _, *weights = inputs
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.given = given.shape[1]
        ctx.places = [_Place.of(one, output[-1]) for one in weights]
        # dweight needs the rows, drows a weight; what is frozen keeps nothing alive.
        needs_rows, needs_weights = ctx.needs_input_grad[1], ctx.needs_input_grad[2:]
        kept = [one if needs_rows else None for one in weights]
        ctx.save_for_backward(output[-1] if any(needs_weights) else None, *kept)

    @staticmethod
    @single_backward("linear")
    def backward(ctx: Any, *gradients_of: Tensor | None) -> tuple[Tensor | None, ...]:
        seen, *weights = ctx.saved_tensors
        needed, drows, dweights = ctx.needs_input_grad[2:], None, []
        for dy, weight, place, needs in zip(gradients_of[:-1], weights, ctx.places, needed, strict=True):
            if dy is None:
                dweights.append(None)
                continue
            dy = in_memory(dy)
            if weight is not None:
                one = _to_rows(dy[:, ctx.given :], weight)
                drows = one if drows is None else drows.add_(one)
            dweights.append(place.gradient(dy, seen) if needs else None)
        return None, drows, *dweights


def _to_rows(dy: Tensor, weight: Tensor) -> Tensor:
    """``[B, T, K]`` of dy ``[B, T, N]``."""
    if takes_wide_weight(dy, weight):
        return _wide.to_rows(dy, weight)
    return gradients(dy.contiguous(), None, weight.to(dy.dtype))[0]
