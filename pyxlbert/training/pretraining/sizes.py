"""Configurations by a name, with the numbers of the published small BERTs."""

from __future__ import annotations

from typing import NamedTuple

from pyxlbert.models.albert import AlbertConfig
from pyxlbert.models.bert import BertConfig
from pyxlbert.models.xlnet_config import XLNetConfig


class Size(NamedTuple):
    """Layers, hidden size, heads and feed-forward size."""

    layers: int
    hidden: int
    heads: int
    inner: int


SIZES = {
    "tiny": Size(2, 128, 2, 512),
    "mini": Size(4, 256, 4, 1024),
    "small": Size(4, 512, 8, 2048),
    "medium": Size(8, 512, 8, 2048),
    "base": Size(12, 768, 12, 3072),
}


def bert_config(size: str, vocab_size: int, pad_id: int, max_length: int, dropout: float) -> BertConfig:
    """A BERT of a size, with positions for rows of 512 tokens or `max_length`."""
    layers, hidden, heads, inner = _size(size)
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=max(512, max_length),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=pad_id,
    )


def albert_config(size: str, vocab_size: int, pad_id: int, max_length: int, dropout: float) -> AlbertConfig:
    """An ALBERT of a size, whose layers share one set of weights, with embeddings of 128 numbers."""
    layers, hidden, heads, inner = _size(size)
    return AlbertConfig(
        vocab_size=vocab_size,
        embedding_size=128,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=max(512, max_length),
        pad_token_id=pad_id,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        classifier_dropout_prob=0.1,
    )


def xlnet_config(
    size: str, vocab_size: int, pad_id: int, memory: tuple[int, int], bi_data: bool, dropout: float
) -> XLNetConfig:
    """An XLNet of a size; `memory` is mem_len and reuse_len."""
    layers, hidden, heads, inner = _size(size)
    mem_len, reuse_len = memory
    return XLNetConfig(
        vocab_size=vocab_size,
        d_model=hidden,
        n_layer=layers,
        n_head=heads,
        d_inner=inner,
        mem_len=mem_len,
        reuse_len=reuse_len,
        bi_data=bi_data,
        dropout=dropout,
        pad_token_id=pad_id,
    )


def _size(name: str) -> Size:
    if name not in SIZES:
        raise ValueError(f"size: got {name!r}, wanted one of {', '.join(SIZES)}")
    return SIZES[name]
