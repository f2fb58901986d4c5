"""Word, position and token-type embeddings with their LayerNorm and dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert.nn.layer_norm import LayerNorm
from pyxlbert.ops.embedding_layer_norm import embedding_layer_norm


class Embeddings(torch.nn.Module):
    """``dropout(LayerNorm(word[id] + token_type[type] + position[place]))`` in one pass.

    Args:
        vocab_size, hidden_size: the word table is ``[vocab_size, hidden_size]``.
        max_position_embeddings: rows of the position table.
        type_vocab_size: rows of the token-type table.
        padding_idx: the word row that receives no gradient.
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
        eps: float = 1e-12,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__()
        self.word_embeddings = torch.nn.Embedding(vocab_size, hidden_size, padding_idx=padding_idx)
        self.position_embeddings = torch.nn.Embedding(max_position_embeddings, hidden_size)
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
            self.position_embeddings.weight,
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
