"""Multi-head attention with Transformer-XL's relative positions, for one stream or XLNet's two."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyxlbert.nn.layout import TokenLayout
from pyxlbert.nn.packing import Packable, Projection
from pyxlbert.ops.linear import linear
from pyxlbert.ops.relative_attention import relative_attention
from pyxlbert.ops.two_stream_attention import two_stream_attention

MASKED_SCORE = -1e30


@dataclass(frozen=True, eq=False)
class RelativeLayout:
    """What the attention of every layer shares for one batch: places, distances, who sees whom, and the targets.

    Everything that masks is combined by "and"; the content stream sees itself whatever they say.

    Attributes:
        tokens: where the rows of the content stream lie.
        positions: ``[R, E]`` or ``[G, R, E]``, the embeddings of distances: row c + j - i is for query i and key j,
            with c the number of queries (packed: the longest sequence).
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
            The two streams' results, shaped as the streams, and the weights ``[B, H, T, Tk]``, with a query stream
            a pair of them, or None.
        """
        seen = content
        if memory is not None:
            seen = torch.cat([memory.transpose(0, 1).to(content.dtype), content], dim=1)
        key, value = self.project(seen, "kv")
        (table,) = self.project(layout.positions, "r")  # [R, H, D] or [G, R, H, D]
        content_query = self.project(content, "q")[0] if content_needed else None
        target_query = None if query is None else self.project(query, "q")[0]
        attend = self._explicit if output_attentions else self._fused
        mixed, target, weights = attend(content_query, target_query, key, value, table, layout)
        return self.back(mixed), self.back(target), weights

    def back(self, mixed: Tensor | None) -> Tensor | None:
        """``[..., H, D]`` to ``[..., E]``."""
        if mixed is None:
            return None
        rows = mixed.flatten(-2)
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
        given = {**self._terms(layout), **layout.masks(), **options}
        return relative_attention(query, key, value, table, causal=layout.causal, **given)

    def _fused(
        self,
        content: Tensor | None,
        query: Tensor | None,
        key: Tensor,
        value: Tensor,
        table: Tensor,
        layout: RelativeLayout,
    ) -> tuple[Tensor | None, Tensor | None, None]:
        terms, masks = self._terms(layout), layout.masks()
        positions = layout.target_positions
        if content is not None and positions is not None:
            mixed, target = two_stream_attention(
                content, query, key, value, table, target_positions=positions, **terms, **masks
            )
            return mixed, target, None
        mixed = target = None
        if content is not None:
            mixed = self.look(
                content,
                key,
                value,
                table,
                layout,
                cu_seqlens=layout.tokens.cu_seqlens,
                max_seqlen=layout.tokens.max_seqlen,
                see_self=layout.see_self,
            )
        if query is None:
            return mixed, None, None
        if positions is not None:
            there = layout.at(positions)
            given = {**self._terms(there), **there.masks(), "query_positions": positions}
            target = relative_attention(query, key, value, table, offset=layout.tokens.length, **given)
        else:
            mapping = layout.target_mapping.to(query.dtype)
            spread = torch.einsum("bmt,bmhd->bthd", mapping, query)
            target = self.look(spread, key, value, table, layout)
            target = torch.einsum("bmt,bthd->bmhd", mapping, target)
        return mixed, target, None

    def _explicit(
        self,
        content: Tensor | None,
        query: Tensor | None,
        key: Tensor,
        value: Tensor,
        table: Tensor,
        layout: RelativeLayout,
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        """As `_fused`, in plain PyTorch, with the weights."""
        batch, length = layout.tokens.batch, layout.tokens.length
        places = torch.arange(length, device=key.device).expand(batch, length)
        mixed = content_weights = None
        if content is not None:
            content_weights = self._weights(content, key, table, places, layout, layout.see_self)
            mixed = torch.einsum("bhij,bjhd->bihd", content_weights, value)
        if query is None:
            return mixed, None, content_weights
        if layout.target_positions is not None:
            real = layout.target_positions >= 0
            weights = self._weights(query, key, table, layout.target_positions.clamp(min=0).long(), layout, False)
            weights = weights * real[:, None, :, None]
            target = torch.einsum("bhij,bjhd->bihd", weights, value)
        else:
            mapping = layout.target_mapping.to(query.dtype)
            spread = torch.einsum("bmt,bmhd->bthd", mapping, query)
            weights = self._weights(spread, key, table, places, layout, False)
            target = torch.einsum("bhij,bjhd->bihd", weights, value)
            target = torch.einsum("bmt,bthd->bmhd", mapping, target)
        return mixed, target, (content_weights, weights)

    def _weights(
        self, query: Tensor, key: Tensor, table: Tensor, places: Tensor, layout: RelativeLayout, see_self: bool
    ) -> Tensor:
        """Softmax of the scores [B, H, M, Tk], for queries [B, M, H, D] that stand at `places` [B, M]."""
        layout = layout.at(places)
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key, table = query.to(wide), key.to(wide), table.to(wide)
        batch, count, heads, _ = query.shape
        keys = key.shape[1]
        numbers = torch.arange(keys, device=query.device)
        scores = torch.einsum("bihd,bjhd->bhij", query + self.r_w_bias, key)
        tables = (table[None] if table.dim() == 3 else table).repeat_interleave(
            batch // (1 if table.dim() == 3 else max(table.shape[0], 1)), dim=0
        )
        by_row = torch.einsum("bihd,brhd->bhir", query + self.r_r_bias, tables)
        rows = (layout.tokens.length + numbers - places[..., None]).clamp(max=tables.shape[1] - 1)  # [B, M, Tk]
        scores = scores + by_row.gather(-1, rows[:, None].expand(batch, heads, count, keys))
        if layout.query_segments is not None:
            other = layout.query_segments[:, :, None] != layout.key_segments[:, None, :]
            same_score, other_score = torch.einsum("bihd,shd->sbhi", query + self.r_s_bias, self.seg_embed.to(wide))
            scores = scores + torch.where(other[:, None], other_score[..., None], same_score[..., None])
        scores = scores * self.head_size**-0.5
        visible = self._visible(places, keys, layout, see_self)
        if visible is not None:
            # A finite number is taken off, as in XLNet: a row that may see nothing is uniform, and its gradient that of
            # scores that differ. It is made zero where that is wanted.
            scores = scores + torch.where(visible, 0.0, MASKED_SCORE)
        weights = torch.softmax(scores, dim=-1)
        if visible is not None and layout.masked_rows == "zero":
            weights = weights * visible
        return F.dropout(weights, self.dropout_p, self.training).to(query.dtype if wide == query.dtype else wide)

    @staticmethod
    def _visible(places: Tensor, keys: int, layout: RelativeLayout, see_self: bool) -> Tensor | None:
        """Bool [B, 1, M, Tk], or None where every row sees every key; `layout` is that of the places."""
        numbers = torch.arange(keys, device=places.device)
        own = places[:, None, :, None] + (keys - layout.tokens.length)
        visible = None
        if layout.causal:
            visible = numbers <= own
        if layout.key_rank is not None:
            seen = (layout.query_rank[:, :, None] > layout.key_rank[:, None, :])[:, None]
            visible = seen if visible is None else visible & seen
        if layout.attention_mask is not None:
            visible = layout.attention_mask if visible is None else visible & layout.attention_mask
        if visible is not None and see_self:
            visible = visible | (numbers == own)
        return visible

    def extra_repr(self) -> str:
        return f"heads={self.num_attention_heads}, head_size={self.head_size}, dropout_p={self.dropout_p}"
