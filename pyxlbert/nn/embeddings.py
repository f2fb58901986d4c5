"""Word, position and token-type embeddings with their LayerNorm and dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert.nn.layer_norm import LayerNorm
from pyxlbert.ops.embedding_layer_norm import embedding_layer_norm


class _RowWithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, row: int) -> Tensor:
        ctx.row = row
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        gradient[ctx.row] = 0
        return gradient, None


def without_gradient_of_padding(table: torch.nn.Embedding) -> Tensor:
    """A table's weight; its padding's row, where it has one, receives no gradient of what is looked up in it."""
    weight = table.weight
    if table.padding_idx is None or not weight.requires_grad or not torch.is_grad_enabled():
        return weight
    return _RowWithoutGradient.apply(weight, table.padding_idx)


class Embeddings(torch.nn.Module):
    """``dropout(LayerNorm(word[id] + token_type[type] + position[place]))`` in one pass.

    Args:
        vocab_size, hidden_size: the word table is ``[vocab_size, hidden_size]``.
        max_position_embeddings: rows of the position table.
        type_vocab_size: rows of the token-type table.
        padding_idx: the word row that receives no gradient.
        position_padding_idx: the position row that receives none.
        eps: added to LayerNorm's variance.
        dropout_p: probability that an element is dropped while training.

    Shape:
        input_ids ``[B, T]`` or packed ``[total]``, and ``[..., hidden_size]`` out.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        max_position_embeddings: int,
        type_vocab_size: int,
        *,
        padding_idx: int | None = None,
        position_padding_idx: int | None = None,
        eps: float = 1e-12,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__()
        self.word_embeddings = torch.nn.Embedding(vocab_size, hidden_size, padding_idx=padding_idx)
        self.position_embeddings = torch.nn.Embedding(
            max_position_embeddings, hidden_size, padding_idx=position_padding_idx
        )
        self.token_type_embeddings = torch.nn.Embedding(type_vocab_size, hidden_size)
        self.LayerNorm = LayerNorm(hidden_size, eps=eps)
        self.dropout_p = dropout_p

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        word_table: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        copy_dtype: torch.dtype | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embed the tokens.

        Args:
            input_ids: rows of the word table.
            token_type_ids: rows of the token-type table; zeros by default.
            position_ids: rows of the position table; by default the place in the row, which packed tokens do not have.
            word_table: rows to look up in place of the word embeddings: this is how ready-made vectors enter, with
                `input_ids` counting them.
            out_dtype: dtype of y; the tables' by default.
            copy_dtype: asks for a second copy of y in this dtype.

        Returns:
            y, or with `copy_dtype` the pair (y, y in that dtype).
        """
        words = self.word_embeddings
        return embedding_layer_norm(
            input_ids,
            words.weight if word_table is None else word_table,
            self.token_type_embeddings.weight,
            without_gradient_of_padding(self.position_embeddings),
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            padding_idx=words.padding_idx if word_table is None else None,
            dropout_p=self.dropout_p if self.training else 0.0,
            eps=self.LayerNorm.eps,
            out_dtype=out_dtype,
            copy_dtype=copy_dtype,
        )

    def extra_repr(self) -> str:
        return f"dropout_p={self.dropout_p}"
