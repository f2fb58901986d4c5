"""relative_attention: attention whose scores hold a term of the distance between query and key.

score[i, j] = scale * ((q_i + u) . k_j + (q_i + v) . r[c + j - p_i] + (q_i + s) . e[segment_i != segment_j])

No Tq x Tk tensor is needed, forward or backward: a tile of queries and keys meets a band of the table r.

Source: Dai et al., "Transformer-XL", https://arxiv.org/abs/1901.02860, section 3.3 and appendix B; the segment term
of Yang et al., "XLNet", https://arxiv.org/abs/1906.08237, section 2.5.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pyxlbert import checks
from pyxlbert.ops import _attention, _relative
from pyxlbert.ops._autograd import OpFunction, backward_backend, keep, kept, single_backward
from pyxlbert.ops._define import Op
from pyxlbert.ops._dropout import dropout_of
from pyxlbert.ops._torch import apply

OP = Op("relative_attention", ("torch", "cpu", "triton", "cuda"))

# Forward's arguments, and backward's after dout, out and lse.
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor position_key, Tensor? content_bias, Tensor? position_bias,"
    " SymInt offset, Tensor? segment_bias, Tensor? segment_embedding, Tensor? query_segments, Tensor? key_segments,"
    " Tensor? query_positions, Tensor? key_lengths, Tensor? cu_seqlens, SymInt max_seqlen, Tensor? query_rank,"
    " Tensor? key_rank, bool see_self, Tensor? attention_mask, bool causal, bool uniform_rows, float scale,"
    " float dropout_p, Tensor? seed"
)


def _trained(call: Any) -> tuple[torch.Tensor | None, ...]:
    return (
        *(call.query, call.key, call.value, call.position_key, call.content_bias, call.position_bias),
        *(call.segment_bias, call.segment_embedding),
    )


def _fwd_fake(call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(call.query, memory_format=torch.contiguous_format), _attention.lse_like(call.query)


def _bwd_fake(call: Any) -> tuple[torch.Tensor, ...]:
    return _attention.gradients(call.needs, *_trained(call))


def check_values(call: Any) -> None:
    """Lengths within the keys, offsets that rise, rows and positions that meet the table, segments of 32 bits."""
    op = "relative_attention"
    longest = call.query.shape[1] if call.cu_seqlens is None else call.max_seqlen
    _relative.check_offset(op, call.offset, 0 if call.query_positions is not None else longest - 1, "Tq - 1")
    _attention.check_lengths(op, call.key_lengths, call.key.shape[1])
    _attention.check_offsets(op, call.cu_seqlens, call.query.shape[0], call.max_seqlen)
    _relative.check_positions(op, "query_positions", call.query_positions, call.offset, "offset")
    _relative.check_segment_values(op, query_segments=call.query_segments, key_segments=call.key_segments)


_BIASES = {"content_bias": "HD", "position_bias": "HD", "segment_bias": "HD", "segment_embedding": "ZHD"}
_PADDED = _BIASES | {
    **{"query": "=BTHD", "key": "=BSHD", "value": "=BSHD", "position_key": "?RHD", "key_lengths": "B"},
    **{"query_segments": "BT", "key_segments": "BS", "query_positions": "BT", "query_rank": "BT", "key_rank": "BS"},
    **{"attention_mask": "1bhts", "seed": "8?"},
}
_PACKED = _BIASES | {
    **{"query": "=NHD", "key": "=NHD", "value": "=NHD", "position_key": "?RHD"},
    **{"query_segments": "N", "key_segments": "N", "query_rank": "N", "key_rank": "N", "seed": "8?"},
}

Forward, _fwd = OP.define(
    "fwd",
    f"({_ARGUMENTS}, str backend) -> (Tensor, Tensor)",
    _fwd_fake,
    check_values,
    shapes=_PADDED,
    packed=_PACKED,
)
# Backward checks values again: a saved tensor's may have changed since forward, by a way that autograd does not see.
Backward, _bwd = OP.define(
    "bwd",
    f"(Tensor dout, Tensor out, Tensor lse, {_ARGUMENTS}, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    check_values,
    shapes=_PADDED | {"dout": "=BTHD", "out": "=BTHD", "lse": "~4BHT"},
    packed=_PACKED | {"dout": "=NHD", "out": "=NHD", "lse": "~4HN"},
)


class _RelativeAttention(OpFunction):
    op = "relative_attention"

    @staticmethod
    def forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return _fwd(Forward(*arguments[:-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        out, lse = output
        ctx.backend = inputs[-1]
        ctx.mark_non_differentiable(lse)
        keep(ctx, inputs[:-1], out, lse)

    @staticmethod
    @single_backward("relative_attention")
    def backward(ctx: Any, dout: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        if dout is None:
            return (None,) * 26
        results, call = kept(ctx, Forward)
        needs = [*ctx.needs_input_grad[:6], *ctx.needs_input_grad[7:9]]
        found = _bwd(Backward(dout, *results, *tuple(call)[:-1], needs, ctx.backend))
        wanted = [gradient if need else None for gradient, need in zip(found, needs, strict=True)]
        return (*wanted[:6], None, *wanted[6:], *(None,) * 17)


class Given(NamedTuple):
    """The public function's arguments, as a caller gives them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    position_key: torch.Tensor
    content_bias: torch.Tensor | None = None
    position_bias: torch.Tensor | None = None
    offset: int | None = None
    segment_bias: torch.Tensor | None = None
    segment_embedding: torch.Tensor | None = None
    query_segments: torch.Tensor | None = None
    key_segments: torch.Tensor | None = None
    query_positions: torch.Tensor | None = None
    key_lengths: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int | None = None
    query_rank: torch.Tensor | None = None
    key_rank: torch.Tensor | None = None
    see_self: bool = False
    attention_mask: torch.Tensor | None = None
    causal: bool = False
    masked_rows: str = "zero"
    scale: float | None = None
    dropout_p: float = 0.0
    seed: torch.Tensor | int | None = None
    backend: str | None = None


def relative_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_key: torch.Tensor,
    *,
    content_bias: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    offset: int | None = None,
    segment_bias: torch.Tensor | None = None,
    segment_embedding: torch.Tensor | None = None,
    query_segments: torch.Tensor | None = None,
    key_segments: torch.Tensor | None = None,
    query_positions: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    query_rank: torch.Tensor | None = None,
    key_rank: torch.Tensor | None = None,
    see_self: bool = False,
    attention_mask: torch.Tensor | None = None,
    causal: bool = False,
    masked_rows: str = "zero",
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention with Transformer-XL's relative term and XLNet's segment term, in memory linear in the lengths.

    Query i meets key j at row `offset + j - i` of the table.  All masks that are given hold together.  Keys that no
    row may see (past their length, hidden by attention_mask from every row in every head, of another packed sequence,
    of rank 2**31 - 1) are not read into a product: a NaN there stays there.

    Args:
        query: `[B, Tq, H, D]`, or packed `[total, H, D]`; float32, bfloat16 or float16 (float64 on backend
            "torch").  Views with a contiguous last dimension are read in place.
        key: `[B, Tk, H, D]`, or packed as query; query's dtype.  With memories Tk > Tq.
        value: as key.
        position_key: the table r, `[R, H, D]`, or `[G, R, H, D]` with G dividing B: sequence b uses table b * G // B.
            query's dtype, or float32, which is rounded to query's dtype and gets its gradient in float32.
            R >= offset + Tk; with `causal` R >= offset + Tk - Tq + 1.
        content_bias: `[H, D]`, added to query where it meets key; query's dtype or float32, as the next three.
        position_bias: `[H, D]`, added to query where it meets the table.
        offset: c, the table's row of distance 0, at least Tq - 1; None: Tq (packed: max_seqlen).  XLNet has Tq,
            Conformer, Parakeet and Transformer-XL have Tq - 1.  With `query_positions` it must be given.
        segment_bias: `[H, D]`, added to query where it meets the segment embedding.
        segment_embedding: `[2, H, D]`: row 0 for keys of the query's segment, row 1 for the others; goes with
            query_segments and key_segments.
        query_segments: int32 or int64 `[B, Tq]`, packed `[total]`.
        key_segments: int32 or int64 `[B, Tk]`, packed `[total]`.
        query_positions: int32 `[B, Tq]`: row i stands at position p_i <= offset and meets key j at row
            offset + j - p_i; -1: the row has no target and gives zeros.  Excludes cu_seqlens, causal, see_self.
        key_lengths: int32 or int64 `[B]`: sequence b has the keys 0 .. key_lengths[b] - 1; None: all.
        cu_seqlens: int32 `[B + 1]`, rising from 0 to total: sequence b is rows cu_seqlens[b] ..
            cu_seqlens[b + 1] - 1 of packed tensors; excludes key_lengths and attention_mask.
        max_seqlen: packed: at least the longest sequence; None reads it from cu_seqlens, which on a GPU waits
            for the device and which compiled code cannot do.
        query_rank: int32 `[B, Tq]`, packed `[total]`: row i may see key j if query_rank[i] > key_rank[j].
        key_rank: int32 `[B, Tk]`, packed `[total]`; 2**31 - 1: no row sees it.
        see_self: row i sees key i + Tk - Tq whatever ranks, attention_mask and causal say; key_lengths and the rank
            2**31 - 1 still hide it.
        attention_mask: boolean, 4-D, broadcastable to `[B, H, Tq, Tk]`; True: may attend.
        causal: query i sees keys j <= i + Tk - Tq (packed: of its own sequence).
        masked_rows: what a row gives that may see nothing: "zero", or "uniform", the average over all Tk keys
            (packed: of its own sequence), padding included, because -1e30 is added to masked scores instead of -inf,
            as XLNet does; the row has the gradient of that sum, and every key and value is read.
        scale: factor of the scores; None: D ** -0.5.
        dropout_p: probability in [0, 1] of dropping a weight; kept ones are scaled by 1 / (1 - dropout_p).
        seed: int64 tensor of one element or an int; the same seed drops the same weights on every backend.
            None draws one from the device's default generator.
        backend: one of `pyxlbert.backends.NAMES`; None takes the first that supports the inputs.

    Returns:
        query's shape and dtype, contiguous.  Under autocast query, key, value and position_key are cast to its dtype
        first.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, a device, a length, a position or a probability is wrong, or two arguments exclude each
            other.
        RuntimeError: the named backend cannot run here.
    """
    given = Given(
        query,
        key,
        value,
        position_key,
        content_bias,
        position_bias,
        offset,
        segment_bias,
        segment_embedding,
        query_segments,
        key_segments,
        query_positions,
        key_lengths,
        cu_seqlens,
        max_seqlen,
        query_rank,
        key_rank,
        see_self,
        attention_mask,
        causal,
        masked_rows,
        scale,
        dropout_p,
        seed,
        backend,
    )
    OP.refuse_transforms(*given)
    call = call_of(given)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in _trained(call)):
        return apply(_RelativeAttention, *call, backward_backend(call.backend))[0]
    return _fwd(call)[0]


def call_of(given: Given) -> Any:
    """The record of a call: checked, cast under autocast, with what was left out filled in."""
    query, key, value, offset, max_seqlen = given.query, given.key, given.value, given.offset, given.max_seqlen
    op = "relative_attention"
    scale = _attention.check_scale(op, given.scale)
    checks.flag(op, "causal", given.causal)
    checks.flag(op, "see_self", given.see_self)
    _attention.check_query_key_value(op, query, key, value, packed=given.cu_seqlens is not None)
    uniform_rows = _relative.uniform_rows(op, given.masked_rows)
    if given.cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError(f"{op}: max_seqlen: got {max_seqlen} without cu_seqlens, wanted None")
        batch, queries, keys, max_seqlen = query.shape[0], query.shape[1], key.shape[1], 0
        rows, columns, letters = (batch, queries), (batch, keys), ("B, Tq", "B, Tk")
        _attention.check_masks(op, given.key_lengths, given.attention_mask, query, keys)
    else:
        max_seqlen = _attention.check_packed(
            op,
            given.cu_seqlens,
            max_seqlen,
            query,
            key_lengths=given.key_lengths,
            attention_mask=given.attention_mask,
            query_positions=given.query_positions,
        )
        if max_seqlen is None:
            if torch.compiler.is_compiling():
                raise ValueError(f"{op}: max_seqlen: got None in compiled code, wanted the longest sequence's length")
            max_seqlen = max(0, int(given.cu_seqlens.diff().max())) if given.cu_seqlens.shape[0] > 1 else 0
        # The default offset is what the caller said; the op needs no more than there are rows.
        batch, queries, keys = given.cu_seqlens.shape[0] - 1, max_seqlen, max_seqlen
        max_seqlen = _attention.within(max_seqlen, query.shape[0])
        rows = columns = (query.shape[0],)
        letters = ("total", "total")
    if given.query_positions is None:
        offset = queries if offset is None else offset
        offset = _relative.check_offset(
            op, offset, queries - 1, "Tq - 1" if given.cu_seqlens is None else "max_seqlen - 1"
        )
    else:
        for name, flag in (("causal", given.causal), ("see_self", given.see_self)):
            if flag:
                raise ValueError(
                    f"{op}: {name}: got True beside query_positions, wanted query_rank and key_rank instead"
                )
        if offset is None:
            raise ValueError(f"{op}: offset: got None beside query_positions, wanted the table's row of distance 0")
        offset = _relative.check_offset(op, offset, 0, "no row before the table")
        _relative.check_numbers(
            op, "query_positions", given.query_positions, query, "query", rows, "B, Tq", torch.int32
        )
    # A row never looks further ahead than its first key, nor with causal further than its own place.
    needed = offset + keys - (max(queries - 1, 0) if given.causal else 0)
    why = f"offset {offset} and {keys} keys" + (", causal" if given.causal else "")
    _relative.check_table(op, given.position_key, query, batch, needed, why, "query")
    _relative.check_biases(op, query, "query", given)
    _relative.check_segments(op, query, "query", given, rows, columns, letters)
    _relative.check_ranks(op, query, "query", given, rows, columns, letters)
    dropout_p, seed = dropout_of(op, given.dropout_p, given.seed, query.device)
    query, key, value, position_key, content_bias, position_bias, segment_bias, segment_embedding = _relative.lower(
        (query, key, value, given.position_key), given
    )
    if scale is None:
        scale = query.shape[-1] ** -0.5
    backend = OP.resolve(given.backend, query)
    # By place: a record made of names takes longer than all of the checks.
    return Forward(
        query,
        key,
        value,
        position_key,
        content_bias,
        position_bias,
        offset,
        segment_bias,
        segment_embedding,
        given.query_segments,
        given.key_segments,
        given.query_positions,
        given.key_lengths,
        given.cu_seqlens,
        max_seqlen,
        given.query_rank,
        given.key_rank,
        given.see_self,
        given.attention_mask,
        given.causal,
        uniform_rows,
        scale,
        dropout_p,
        seed,
        backend,
    )
