"""Multi-head attention with Transformer-XL's relative positions, for one stream or XLNet's two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyxlbert.nn.distances import OwnRows
from pyxlbert.nn.given_rows import leaves_out_gradient, products_behind
from pyxlbert.nn.layout import TokenLayout
from pyxlbert.nn.packing import Packable, Projection
from pyxlbert.nn.watch import is_patched
from pyxlbert.ops._weights import relative_attention_with_weights, two_stream_attention_with_weights
from pyxlbert.ops.linear import linear
from pyxlbert.ops.relative_attention import relative_attention
from pyxlbert.ops.two_stream_attention import two_stream_attention


@dataclass(frozen=True, eq=False)
class RelativeLayout:
    """What the attention of every layer shares for one batch: places, distances, who sees whom, and the targets.

    Everything that masks is combined by "and"; the content stream sees itself whatever they say.

    Attributes:
        tokens: where the rows of the content stream lie.
        positions: ``[R, E]`` or ``[G, R, E]``, the embeddings of distances: row c + j - i is for query i and key j,
            with c the number of queries (packed: the longest sequence). With `own_rows` ``[N, E]``, some of them.
        own_rows: which rows of a table for each sequence `positions` are.
        query_rank, key_rank: int32 ``[B, T]`` and ``[B, Tk]``: i may see j where its rank is greater.
        attention_mask: bool, broadcastable to ``[B, 1, T, Tk]``, True where attention is allowed.
        causal: whether i sees only keys up to itself; not together with target_positions.
        query_segments, key_segments: int32 ``[B, T]`` and ``[B, Tk]``, packed ``[total]``; None for no segment term.
        target_positions: int32 ``[B, M]``, the place of each row of the query stream; -1 for no target, a zero row.
        target_mapping: ``[B, M, T]``, in place of positions: how each row spreads over the places.
        masked_rows: what a row that may see nothing is: ``"zero"`` or ``"uniform"``.
    """

    tokens: TokenLayout
    positions: Tensor
    query_rank: Tensor | None = None
    key_rank: Tensor | None = None
    attention_mask: Tensor | None = None
    causal: bool = False
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None
    target_positions: Tensor | None = None
    target_mapping: Tensor | None = None
    masked_rows: str = "zero"
    own_rows: OwnRows | None = None

    @property
    def see_self(self) -> bool:
        """Whether something masks, so that a content row might not see itself."""
        return self.key_rank is not None or self.attention_mask is not None

    def masks(self) -> dict[str, Any]:
        """Arguments that both ops take."""
        return {
            "query_rank": self.query_rank,
            "key_rank": self.key_rank,
            "attention_mask": self.attention_mask,
            "masked_rows": self.masked_rows,
        }

    def at(self, places: Tensor) -> RelativeLayout:
        """The same for queries that stand at `places` [B, M], integers, instead of at every place.

        Their ranks, segments and rows of the mask are those of the places; -1 takes place 0's.
        """
        index = places.clamp(min=0).long()
        rank, segments, mask = self.query_rank, self.query_segments, self.attention_mask
        if mask is not None:
            mask = mask.expand(index.shape[0], 1, *mask.shape[2:])
            mask = mask.gather(2, index[:, None, :, None].expand(-1, 1, -1, mask.shape[3]))
        return replace(
            self,
            query_rank=None if rank is None else rank.gather(1, index),
            query_segments=None if segments is None else segments.gather(1, index),
            attention_mask=mask,
        )


class RelativeAttention(Packable):
    """Attention with relative positions and segments, projected back.

    ``softmax(scale · ((q + u)·k + (q + v)·r[distance] + (q + s)·e[other segment])) v`` for every head.

    Parameters have Hugging Face's names and shapes: q, k, v, r, o ``[E, H, D]``, u = `r_w_bias`, v = `r_r_bias` and
    s = `r_s_bias` ``[H, D]``, e = `seg_embed` ``[2, H, D]``.

    Args:
        hidden_size: E.
        num_attention_heads: H.
        head_size: D.
        dropout_p: probability that an attention weight is dropped while training.

    Source:
        Dai et al., "Transformer-XL", 2019, section 3.3; Yang et al., "XLNet", 2019, section 2.
    """

    # A few rows a call, whose error every score would have.
    never_quantised = ("r",)

    def __init__(self, hidden_size: int, num_attention_heads: int, head_size: int, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.head_size = head_size
        self.dropout_p = dropout_p
        for name in ("q", "k", "v", "o", "r"):
            setattr(self, name, torch.nn.Parameter(torch.empty(hidden_size, num_attention_heads, head_size)))
        for name in ("r_r_bias", "r_s_bias", "r_w_bias"):
            setattr(self, name, torch.nn.Parameter(torch.empty(num_attention_heads, head_size)))
        self.seg_embed = torch.nn.Parameter(torch.empty(2, num_attention_heads, head_size))

    def packed_products(self) -> tuple[str, ...]:
        return ("q", "kv", "r", "o")

    def packed_layers(self, product: str = "") -> tuple[Projection, ...]:
        return tuple(Projection(getattr(self, name), name != "o") for name in product)

    def project(self, x: Tensor, names: str) -> tuple[Tensor, ...]:
        """``[..., E]`` to ``[..., H, D]`` by each of the parameters in `names`, one of `packed_products`."""
        heads = (self.num_attention_heads, self.head_size)
        together = self.packed_product(x, product=names)
        if together is not None:
            return together.view(*x.shape[:-1], len(names), *heads).unbind(-3)
        return tuple(linear(x, getattr(self, name).flatten(1).t()).unflatten(-1, heads) for name in names)

    def forward(
        self,
        content: Tensor,
        query: Tensor | None,
        memory: Tensor | None,
        layout: RelativeLayout,
        *,
        content_needed: bool = True,
        output_attentions: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        """Attend.

        Args:
            content: the content stream's rows ``[B, T, E]`` or ``[total, E]``.
            query: the query stream's rows ``[B, M, E]``, or None.
            memory: ``[mem_len, B, E]``, rows before the first that may be seen but do not look.
            layout: what the layers share.
            content_needed: False leaves the content stream's result out.
            output_attentions: also return the weights, which holds a Tq×Tk tensor per head.

        Returns:
            The two streams' results, shaped as the streams, and None or the weights ``[B, H, T, Tk]`` in the streams'
            dtype, after dropout: with a query stream a pair of them, the second ``[B, H, M, Tk]``, or with a mapping
            ``[B, H, T, Tk]``.
        """
        key, value = self._keys_and_values(content, memory)  # [B, Tk, H, D], packed [total, H, D]
        (table,) = self.project(layout.positions, "r")  # [R, H, D] or [G, R, H, D], with own_rows [N, H, D]
        if layout.own_rows is not None:
            table = layout.own_rows.spread(table)  # [B, R, H, D]
        joined = self.training and not is_patched(self)
        if content_needed and query is not None and joined:
            content_query, target_query = in_one(lambda rows: self.project(rows, "q")[0], content, query)
        else:
            content_query = self.project(content, "q")[0] if content_needed else None  # [B, T, H, D]
            target_query = None if query is None else self.project(query, "q")[0]  # [B, M, H, D]
        mixed, target, weights = self._attend(content_query, target_query, key, value, table, layout, output_attentions)
        if mixed is not None and target is not None and joined:
            return *in_one(self.back, mixed.flatten(-2), target.flatten(-2)), weights
        mixed, target = (None if one is None else self.back(one.flatten(-2)) for one in (mixed, target))
        return mixed, target, weights

    def _keys_and_values(self, content: Tensor, memory: Tensor | None) -> tuple[Tensor, ...]:
        """Of the memory ``[mem_len, B, E]``, where there is one, and of what follows it."""
        if memory is None:
            return self.project(content, "kv")
        given = memory.transpose(0, 1).to(content.dtype)  # [B, mem_len, E]
        weights = [getattr(self, name).flatten(1).t() for name in "kv"]
        # Whoever projects in a way of their own is asked for keys and values too.
        own = not is_patched(self) and type(self).project is RelativeAttention.project
        if not (own and leaves_out_gradient(given, content, *weights)):
            return self.project(torch.cat([given, content], dim=1), "kv")
        heads = (self.num_attention_heads, self.head_size)
        return tuple(one.unflatten(-1, heads) for one in products_behind(given, content, *weights))

    def back(self, rows: Tensor) -> Tensor:
        """``[..., H D]`` to ``[..., E]``."""
        y = self.packed_product(rows, product="o")
        return linear(rows, self.o.flatten(1)) if y is None else y

    def _terms(self, layout: RelativeLayout) -> dict[str, Any]:
        terms = {
            "content_bias": self.r_w_bias,
            "position_bias": self.r_r_bias,
            "dropout_p": self.dropout_p if self.training else 0.0,
        }
        if layout.query_segments is not None:
            terms |= {
                "segment_bias": self.r_s_bias,
                "segment_embedding": self.seg_embed,
                "query_segments": layout.query_segments,
                "key_segments": layout.key_segments,
            }
        return terms

    def look(
        self, query: Tensor, key: Tensor, value: Tensor, table: Tensor, layout: RelativeLayout, **options: Any
    ) -> Tensor:
        """Queries ``[B, T, H, D]`` that stand at the last places of keys and values, all projected already."""
        return self._look(False, query, key, value, table, layout, **options)[0]

    def _look(
        self,
        output_attentions: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: Tensor,
        layout: RelativeLayout,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        given = {**self._terms(layout), **layout.masks(), "causal": layout.causal, **options}
        if output_attentions:
            return relative_attention_with_weights(query, key, value, table, **given)
        return relative_attention(query, key, value, table, **given), None

    def _attend(
        self,
        content: Tensor | None,
        query: Tensor | None,
        key: Tensor,
        value: Tensor,
        table: Tensor,
        layout: RelativeLayout,
        output_attentions: bool,
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        """The streams' results ``[..., H, D]`` and the weights; see `forward`."""
        keys, positions = (key, value, table), layout.target_positions
        if content is not None and positions is not None:
            given = {**self._terms(layout), **layout.masks(), "target_positions": positions}
            return _two_streams(output_attentions, content, query, *keys, **given)
        mixed = target = content_weights = weights = None
        if content is not None:
            given = {
                "cu_seqlens": layout.tokens.cu_seqlens,
                "max_seqlen": layout.tokens.max_seqlen,
                "see_self": layout.see_self,
            }
            mixed, content_weights = self._look(output_attentions, content, *keys, layout, **given)
        if query is None:
            return mixed, None, content_weights
        if positions is not None:
            there = layout.at(positions)
            given = {"query_positions": positions, "offset": layout.tokens.length}
            target, weights = self._look(output_attentions, query, *keys, there, **given)
        else:
            mapping = layout.target_mapping.to(query.dtype)  # [B, M, T]
            spread = torch.einsum("bmt,bmhd->bthd", mapping, query)  # [B, T, H, D]
            target, weights = self._look(output_attentions, spread, *keys, layout)  # [B, T, H, D]
            target = torch.einsum("bmt,bthd->bmhd", mapping, target)  # [B, M, H, D]
        return mixed, target, (content_weights, weights) if output_attentions else None

    def extra_repr(self) -> str:
        return f"heads={self.num_attention_heads}, head_size={self.head_size}, dropout_p={self.dropout_p}"


def in_one(function: Callable[[Tensor], Tensor], content: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """What a function of rows makes of two streams, called once with the rows of both.

    In training the products of both are then one, and so are a weight's gradients, which autograd would have to add.
    The order of dropout's bits follows.

    Args:
        content: ``[..., E]``.
        query: ``[..., E]``.
    """
    streams = (content, query)
    rows = function(torch.cat([one.flatten(0, -2) for one in streams]))  # [rows of both, ...]
    parts = rows.split([one.shape[:-1].numel() for one in streams])
    first, second = (part.unflatten(0, one.shape[:-1]) for part, one in zip(parts, streams, strict=True))
    return first, second


def _two_streams(output_attentions: bool, *tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Both streams, and None or the pair of their weights."""
    if not output_attentions:
        return *two_stream_attention(*tensors, **options), None
    content, query, *weights = two_stream_attention_with_weights(*tensors, **options)
    return content, query, tuple(weights)
