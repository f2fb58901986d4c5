"""Multi-head self-attention with separate query, key and value projections."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert.nn.layout import TokenLayout
from pyxlbert.nn.linear import Linear
from pyxlbert.nn.packing import Packable
from pyxlbert.ops._weights import attention_with_weights
from pyxlbert.ops.attention import attention


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, dropout_p: float, output_attentions: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention over the rows of a layout.

    Args:
        query, key, value: ``[B, T, H, D]`` or packed ``[total, H, D]``.
        layout: where the rows lie, with the masks.
        dropout_p: probability that an attention weight is dropped.
        output_attentions: also return the weights.

    Returns:
        The mixed values ``[B, T, E]`` or ``[total, E]``, and None or the weights ``[B, H, T, T]``.
    """
    options = {
        "cu_seqlens": layout.cu_seqlens,
        "max_seqlen": layout.max_seqlen,
        "attention_mask": layout.attention_mask,
        "bias": layout.bias,
        "dropout_p": dropout_p,
    }
    if not output_attentions:
        return attention(query, key, value, **options).flatten(-2), None
    mixed, weights = attention_with_weights(query, key, value, **options)
    return mixed.flatten(-2), layout.restore_weights(weights)


class SelfAttention(Packable):
    """``softmax(q kᵀ / √D) v`` for every head, with q, k and v projected from one input.

    Args:
        hidden_size: length of a row.
        num_attention_heads: H; the head size is D = hidden_size / H.
        dropout_p: probability that an attention weight is dropped while training.

    Shape:
        x ``[B, T, E]`` or packed ``[total, E]``, and the same out.

    Raises:
        ValueError: the number of heads does not divide the hidden size.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int, dropout_p: float = 0.0) -> None:
        super().__init__()
        if num_attention_heads < 1 or hidden_size % num_attention_heads:
            raise ValueError(
                f"num_attention_heads: got {num_attention_heads}, wanted a divisor of hidden_size {hidden_size}"
            )
        self.num_attention_heads = num_attention_heads
        self.head_size = hidden_size // num_attention_heads
        self.dropout_p = dropout_p
        self.query = Linear(hidden_size, hidden_size)
        self.key = Linear(hidden_size, hidden_size)
        self.value = Linear(hidden_size, hidden_size)

    def packed_layers(self, product: str = "") -> tuple[torch.nn.Linear, ...]:
        return self.query, self.key, self.value

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each ``[..., H, D]``; slices of one buffer when the weights are packed."""
        heads = (self.num_attention_heads, self.head_size)
        together = self.packed_product(x)
        if together is not None:
            return together.view(*x.shape[:-1], 3, *heads).unbind(-3)
        return tuple(layer(x).view(*x.shape[:-1], *heads) for layer in (self.query, self.key, self.value))

    def forward(self, x: Tensor, layout: TokenLayout, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            x: the rows.
            layout: where they lie, with the masks.
            output_attentions: also return the weights, which holds a Tq×Tk tensor per head.

        Returns:
            The mixed values, shaped as x, and None or the weights ``[B, H, T, T]`` in their dtype, after dropout: zeros
            for queries that are padding.
        """
        dropout_p = self.dropout_p if self.training else 0.0
        return attend(*self.project(x), layout, dropout_p, output_attentions)

    def extra_repr(self) -> str:
        return f"heads={self.num_attention_heads}, head_size={self.head_size}, dropout_p={self.dropout_p}"
