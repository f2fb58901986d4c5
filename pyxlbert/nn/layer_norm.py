"""LayerNorm alone, and LayerNorm of a residual sum."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert.ops.dropout_add_layer_norm import dropout_add_layer_norm
from pyxlbert.ops.layer_norm import layer_norm


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension, computed by the op `layer_norm`.

    It is a subclass so that whatever looks for LayerNorms (weight-decay groups, say) finds it.

    Shape:
        x ``[..., hidden_size]``, and the same out.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-12) -> None:
        super().__init__(hidden_size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


class DropoutAddLayerNorm(LayerNorm):
    """``LayerNorm(residual + dropout(x))`` in one pass.

    Args:
        hidden_size: length of a row.
        eps: added to the variance.
        dropout_p: probability that an element of x is dropped while training.

    Shape:
        x and residual ``[..., hidden_size]``, and the same out.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-12, dropout_p: float = 0.0) -> None:
        super().__init__(hidden_size, eps=eps)
        self.dropout_p = dropout_p

    def forward(
        self, x: Tensor, residual: Tensor, copy_dtype: torch.dtype | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns y in the residual's dtype, with ``copy_dtype`` the pair (y, y in that dtype)."""
        return dropout_add_layer_norm(
            x,
            residual,
            self.weight,
            self.bias,
            dropout_p=self.dropout_p if self.training else 0.0,
            eps=self.eps,
            copy_dtype=copy_dtype,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout_p={self.dropout_p}"


def rows_and_stream(y: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What an op with `copy_dtype` returned, as (rows for the next product, residual stream)."""
    return (y[1], y[0]) if isinstance(y, tuple) else (y, y)
