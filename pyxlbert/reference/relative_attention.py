"""relative_attention in plain PyTorch, any dtype and device; the definition the other backends are held to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyxlbert.reference._attention import drop, gradients_in_order, hide, of_seen_rows, pad, softmax, unpad, wide
from pyxlbert.reference.philox import Tag

# A key of this rank is seen by no row, not even by see_self.
UNSEEN_RANK = 2**31 - 1

# What is added to a masked score where a row without any key averages over all of them.
UNIFORM_SCORE = -1e30


def supports(*tensors: Tensor | None) -> None:
    """Every input that the contract allows."""
    return None


class Stream(NamedTuple):
    """What a stream of queries has of its own; the rest it shares with the other stream of its call.

    Attributes:
        query, segments, positions, rank: of the queries, `query_segments` and so on of a call.
        see_self, mask: as `see_self` and `attention_mask` of a call.
        tag: of the dropout bits.
        cu_seqlens, max_seqlen, causal: as in a call.
    """

    query: Tensor
    segments: Tensor | None
    positions: Tensor | None
    rank: Tensor | None
    see_self: bool
    mask: Tensor | None
    tag: Tag
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    causal: bool = False


def relative_attention_fwd(call: Any) -> tuple[Tensor, Tensor]:
    """out, shaped as query, and lse `[B, H, Tq]` (packed: `[H, total]`) in float32, or float64 for float64 input.

    With the scores s of `Scores`: p = softmax(s), out = dropout(p) v, lse = log(sum(exp(s))).  A row that may see
    nothing has p = 0, out = 0 and lse = +inf.
    """
    out, lse = _scores(call).forward()
    return out.to(call.query.dtype), lse


def relative_attention_with_weights(call: Any) -> tuple[Tensor, Tensor]:
    """out as in `relative_attention_fwd`, and dropout(p) `[B, H, Tq, Tk]` in query's dtype; autograd differentiates
    both.  Of packed rows Tq and Tk are max_seqlen, with zeros behind every sequence.
    """
    return _scores(call).with_weights(call.query.dtype)


def relative_attention_bwd(call: Any) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, position_key, content_bias, position_bias, segment_bias, segment_embedding.

    Each has its tensor's shape and dtype, or is empty where its flag in `needs` is False.  `Scores.backward` has the
    formulas; out and lse are what a kernel starts from, here they are computed again.
    """
    tensors = (
        *(call.query, call.key, call.value, call.position_key, call.content_bias, call.position_bias),
        *(call.segment_bias, call.segment_embedding),
    )
    return gradients_in_order(_scores(call).backward(call.dout), tensors, call.needs)


def _scores(call: Any) -> Scores:
    stream = Stream(
        *(call.query, call.query_segments, call.query_positions, call.query_rank, call.see_self, call.attention_mask),
        *(Tag.RELATIVE_ATTENTION, call.cu_seqlens, call.max_seqlen, call.causal),
    )
    return Scores(call, stream)


class Scores:
    """One call in `[B, T, H, D]` and in the wide dtype: its scores, its softmax and their gradients.

    s[b, h, i, j] = scale * ((q_i + u) . k_j + (q_i + v) . r[c + j - p_i] + (q_i + s) . e[segment_i != segment_j])

    with u the content bias, v the position bias, s the segment bias, c the offset, p_i the position of row i (i
    unless `query_positions` says otherwise).  Masked scores are -inf.  With `uniform_rows` UNIFORM_SCORE is added to
    them instead, as XLNet does: nothing is left of s in the sum, but its derivative is, so a row that averages over
    all keys has a gradient.  What `causal` hides may lie outside the table: it is UNIFORM_SCORE alone.  A row without
    a target and the keys of other packed sequences are -inf always.

    Args:
        call: of relative_attention or two_stream_attention.
        stream: the queries of this stream.
    """

    def __init__(self, call: Any, stream: Stream) -> None:
        self.cu_seqlens, self.max_seqlen, self.total = stream.cu_seqlens, stream.max_seqlen, stream.query.shape[0]
        self.scale, self.dropout_p, self.seed, self.tag = call.scale, call.dropout_p, call.seed, stream.tag
        query, key, value, query_segments, key_segments, query_rank, key_rank = (
            None if x is None else self._padded(x)
            for x in (
                *(stream.query, call.key, call.value, stream.segments, call.key_segments, stream.rank, call.key_rank),
            )
        )
        batch, queries, heads, _ = query.shape
        keys = key.shape[1]
        i = torch.arange(queries, device=query.device)[:, None]
        j = torch.arange(keys, device=query.device)

        # Keys that a row may see at all; the others are not read into a product.
        present = torch.ones(batch, keys, dtype=torch.bool, device=query.device)
        if call.key_lengths is not None:
            present = present & (j < call.key_lengths[:, None])
        if key_rank is not None:
            present = present & (key_rank != UNSEEN_RANK)

        past = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device)
        if stream.causal:
            past = past & (j <= i + keys - queries)
        allowed = past if stream.mask is None else past & stream.mask
        if query_rank is not None and key_rank is not None:
            allowed = allowed & (query_rank[:, None, :, None] > key_rank[:, None, None, :])
        if stream.see_self:
            allowed = allowed | (j == i + keys - queries)
        if stream.mask is not None:
            present = present & allowed.any(2).any(1)
        self.masked = ~(allowed & present[:, None, None])
        self.uniform_rows = call.uniform_rows
        # Pairs whose score is a constant.
        self.constant = ~past if call.uniform_rows else self.masked
        self.absent = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=query.device)
        if stream.cu_seqlens is not None:
            self.absent = (j >= stream.cu_seqlens.diff()[:, None])[:, None, None]
        if stream.positions is not None:
            target = stream.positions >= 0
            query = hide(query, target)
            self.absent = self.absent | ~target[:, None, :, None]
        if stream.cu_seqlens is not None:
            present = present & (j < stream.cu_seqlens.diff()[:, None])

        # A row without any key averages all of them where rows are uniform, so all of them are read.
        self.k, self.v = (wide(x) if call.uniform_rows else hide(wide(x), present) for x in (key, value))

        q = wide(query)
        self.q_content = q if call.content_bias is None else q + call.content_bias
        self.q_position = q if call.position_bias is None else q + call.position_bias
        self.tables = 1 if call.position_key.dim() == 3 else call.position_key.shape[0]
        self.shared_table = call.position_key.dim() == 3
        # The products of every backend take one element type.
        table = wide(call.position_key.to(query.dtype)).reshape(self.tables, 1, *call.position_key.shape[-3:])
        table = table.expand(-1, batch // self.tables, -1, -1, -1)
        place = i if stream.positions is None else stream.positions[:, :, None]
        self.r = table.reshape(batch, *call.position_key.shape[-3:])
        self.place, self.key_lengths = place, None if call.uniform_rows else call.key_lengths
        self.offset, self.causal = call.offset, stream.causal
        band = (call.offset + j - place).clamp(0, max(self.r.shape[1] - 1, 0)).long()
        self.band = band.expand(batch, queries, keys)[:, None].expand(batch, heads, queries, keys)

        self.e = self.q_segment = self.differs = None
        if call.segment_embedding is not None and query_segments is not None and key_segments is not None:
            self.e = wide(call.segment_embedding)
            self.q_segment = q if call.segment_bias is None else q + call.segment_bias
            self.differs = (query_segments[:, :, None] != key_segments[:, None, :])[:, None]

    def _hide_unmet_rows(self) -> None:
        """Before gradients are taken: zeros in rows of the table that no query meets by its place, whatever masks and
        ranks hide, since 0 times what they hold may be NaN.
        """
        queries, keys = self.masked.shape[2:]
        if queries == 0:
            return
        there = self.place >= 0
        last, first = self.place.amax(-2), self.place.masked_fill(~there, 2**31 - 1).amin(-2)  # [1] or [B, 1]
        end = torch.full_like(last, keys)
        if self.key_lengths is not None:
            end = torch.minimum(end, self.key_lengths[:, None])
        if self.cu_seqlens is not None:
            lengths = self.cu_seqlens.diff()[:, None]
            last, end = torch.minimum(last, lengths - 1), torch.minimum(end, lengths)
        row = torch.arange(self.r.shape[1], device=self.r.device)
        met = (row >= self.offset - last) & (row < self.offset + end - first) & (end > 0)  # [R] or [B, R]
        if self.causal:
            met = met & (row <= self.offset + keys - queries)
        if met.dim() == 1 and self.tables == 1:  # one table for all stays one
            self.r = hide(self.r[:1], met[None]).expand_as(self.r)
        else:
            self.r = hide(self.r, met.expand(self.r.shape[:2]))

    def weights(self) -> tuple[Tensor, Tensor]:
        """Softmax weights `[B, H, Tq, Tk]`, zero in rows that may see nothing, and lse `[B, H, Tq]`."""
        s = torch.einsum("bihd,bjhd->bhij", self.q_content, self.k)
        s = s + torch.einsum("bihd,brhd->bhir", self.q_position, self.r).gather(3, self.band)
        if self.e is not None:
            same, other = torch.einsum("bihd,shd->sbhi", self.q_segment, self.e)[..., None]
            s = s + torch.where(self.differs, other, same)
        s = self.scale * s
        if self.uniform_rows:
            s = torch.where(self.masked, s.masked_fill(self.constant, 0.0) + UNIFORM_SCORE, s)
        else:
            s = s.masked_fill(self.masked, -torch.inf)
        return softmax(s.masked_fill(self.absent, -torch.inf))

    def forward(self) -> tuple[Tensor, Tensor]:
        """out in the wide dtype and lse, packed if the call is."""
        out, _, lse = self._mixed()
        return out, lse if self.cu_seqlens is None else self._packed(lse.transpose(1, 2)).t().contiguous()

    def with_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """out, packed if the call is, and the weights after dropout `[B, H, Tq, Tk]`, both in `dtype`."""
        self._hide_unmet_rows()
        out, kept, _ = self._mixed()
        if self.cu_seqlens is not None:
            # Keys behind a sequence are absent, rows behind it are nobody's.
            kept = kept.masked_fill(self.absent.transpose(2, 3), 0.0)
        return out.to(dtype), kept.to(dtype)

    def _mixed(self) -> tuple[Tensor, Tensor, Tensor]:
        p, lse = self.weights()
        kept = self._dropped(p)
        out = torch.einsum("bhij,bjhd->bihd", kept, self.v)
        return out.contiguous() if self.cu_seqlens is None else self._packed(out), kept, lse

    def backward(self, dout: Tensor) -> tuple[Tensor, ...]:
        """Gradients, in the wide dtype, of query, key, value, table, content, position and segment bias, embedding.

        With p and its dropped copy p' = keep * p / (1 - dropout_p) as in forward: dvalue = p'^T dout,
        dp = keep * (dout v^T) / (1 - dropout_p), g = scale * p * (dp - sum_j(p * dp)), zero where s is a constant.
        Then with g_r[i, x] = g[i, x - c + p_i], which is g moved into the table's columns, and g_e[i, 0 or 1] = the
        sum of g over the keys of the same or of another segment:

        dq_content = g k, dq_position = g_r r, dq_segment = g_e e, and dquery is their sum, each bias's gradient the
        sum of its part over all rows; dkey = g^T (q + u), dr = g_r^T (q + v), de = g_e^T (q + s).
        """
        self._hide_unmet_rows()
        p, lse = self.weights()
        do = of_seen_rows(wide(self._padded(dout)), lse)
        dvalue = torch.einsum("bhij,bihd->bjhd", self._dropped(p), do)
        dp = self._dropped(torch.einsum("bihd,bjhd->bhij", do, self.v))
        g = self.scale * p * (dp - (p * dp).sum(-1, keepdim=True))
        g = g.masked_fill(self.constant, 0.0)

        dq_content = torch.einsum("bhij,bjhd->bihd", g, self.k)
        dkey = torch.einsum("bhij,bihd->bjhd", g, self.q_content)

        g_r = g.new_zeros(*g.shape[:3], self.r.shape[1]).scatter_add_(3, self.band, g)
        dq_position = torch.einsum("bhir,brhd->bihd", g_r, self.r)
        dr = torch.einsum("bhir,bihd->brhd", g_r, self.q_position)
        dtable = dr.view(self.tables, dr.shape[0] // self.tables, *dr.shape[1:]).sum(1)

        dq_segment, de = g.new_zeros(0), g.new_zeros(0)
        dquery = dq_content + dq_position
        if self.e is not None:
            other = g.masked_fill(~self.differs, 0.0).sum(-1)
            g_e = torch.stack([g.sum(-1) - other, other])
            dq_segment = torch.einsum("sbhi,shd->bihd", g_e, self.e)
            de = torch.einsum("sbhi,bihd->shd", g_e, self.q_segment)
            dquery = dquery + dq_segment
        if self.cu_seqlens is not None:
            dquery, dkey, dvalue = (self._packed(x) for x in (dquery, dkey, dvalue))
        return (
            dquery,
            dkey,
            dvalue,
            dtable[0] if self.shared_table else dtable,
            dq_content.sum((0, 1)),
            dq_position.sum((0, 1)),
            dq_segment.sum((0, 1)) if self.e is not None else dq_segment,
            de,
        )

    def _dropped(self, x: Tensor) -> Tensor:
        return drop(x, self.dropout_p, self.seed, self.tag)

    def _padded(self, x: Tensor) -> Tensor:
        return x if self.cu_seqlens is None else pad(x, self.cu_seqlens, self.max_seqlen)

    def _packed(self, x: Tensor) -> Tensor:
        return unpad(x, self.cu_seqlens, self.total)
