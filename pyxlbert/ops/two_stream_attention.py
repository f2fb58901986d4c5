"""two_stream_attention: XLNet's content and query stream, which share keys, values and the position table.

Each stream is a `relative_attention`.  The content stream has one row a position and sees itself; the query stream
has one row a target, stands at the target's position, and sees what that position may see, never itself.

Source: Yang et al., "XLNet", https://arxiv.org/abs/1906.08237, section 2.3.
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

OP = Op("two_stream_attention", ("torch", "cpu", "triton", "cuda"))

# Forward's arguments, and backward's after the outputs and their gradients.
_ARGUMENTS = (
    "Tensor content_query, Tensor query_query, Tensor key, Tensor value, Tensor position_key, Tensor? content_bias,"
    " Tensor? position_bias, SymInt offset, Tensor? segment_bias, Tensor? segment_embedding, Tensor? query_segments,"
    " Tensor? key_segments, Tensor? target_positions, Tensor? key_lengths, Tensor? query_rank, Tensor? key_rank,"
    " Tensor? attention_mask, bool uniform_rows, float scale, float dropout_p, Tensor? seed"
)


def _trained(call: Any) -> tuple[torch.Tensor | None, ...]:
    return (
        *(call.content_query, call.query_query, call.key, call.value, call.position_key),
        *(call.content_bias, call.position_bias, call.segment_bias, call.segment_embedding),
    )


def _fwd_fake(call: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(call.content_query, memory_format=torch.contiguous_format),
        _attention.lse_like(call.content_query),
        torch.empty_like(call.query_query, memory_format=torch.contiguous_format),
        _attention.lse_like(call.query_query),
    )


def _bwd_fake(call: Any) -> tuple[torch.Tensor, ...]:
    return _attention.gradients(call.needs, *_trained(call))


def check_values(call: Any) -> None:
    """Lengths within the keys, rows and targets that meet the table, segments of 32 bits."""
    op = "two_stream_attention"
    _relative.check_offset(op, call.offset, call.content_query.shape[1] - 1, "T - 1")
    _attention.check_lengths(op, call.key_lengths, call.key.shape[1])
    _relative.check_positions(op, "target_positions", call.target_positions, call.content_query.shape[1] - 1, "T - 1")
    _relative.check_segment_values(op, query_segments=call.query_segments, key_segments=call.key_segments)


_SHAPES = {
    **{"content_query": "=BTHD", "query_query": "=BMHD", "key": "=BSHD", "value": "=BSHD", "position_key": "?RHD"},
    **{"content_bias": "HD", "position_bias": "HD", "segment_bias": "HD", "segment_embedding": "ZHD"},
    **{"query_segments": "BT", "key_segments": "BS", "target_positions": "BM", "query_rank": "BT", "key_rank": "BS"},
    **{"key_lengths": "B", "attention_mask": "1bhts", "seed": "8?"},
}

Forward, _fwd = OP.define(
    "fwd",
    f"({_ARGUMENTS}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    check_values,
    shapes=_SHAPES,
)
# Backward checks values again: a saved tensor's may have changed since forward, by a way that autograd does not see.
Backward, _bwd = OP.define(
    "bwd",
    "(Tensor? dcontent, Tensor? dquery, Tensor content, Tensor content_lse, Tensor query, Tensor query_lse,"
    f" {_ARGUMENTS}, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    check_values,
    shapes=_SHAPES
    | {
        **{"dcontent": "=BTHD", "dquery": "=BMHD", "content": "=BTHD", "content_lse": "~4BHT"},
        **{"query": "=BMHD", "query_lse": "~4BHM"},
    },
)


class _TwoStreamAttention(OpFunction):
    op = "two_stream_attention"

    @staticmethod
    def forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
        return _fwd(Forward(*arguments[:-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        _, content_lse, _, query_lse = output
        ctx.backend = inputs[-1]
        ctx.mark_non_differentiable(content_lse, query_lse)
        keep(ctx, inputs[:-1], *output)

    @staticmethod
    @single_backward("two_stream_attention")
    def backward(
        ctx: Any, dcontent: torch.Tensor | None, _: None, dquery: torch.Tensor | None, *__: None
    ) -> tuple[torch.Tensor | None, ...]:
        if dcontent is None and dquery is None:
            return (None,) * 23
        results, call = kept(ctx, Forward)
        needs = [*ctx.needs_input_grad[:7], *ctx.needs_input_grad[8:10]]
        found = _bwd(Backward(dcontent, dquery, *results, *tuple(call)[:-1], needs, ctx.backend))
        wanted = [gradient if need else None for gradient, need in zip(found, needs, strict=True)]
        return (*wanted[:7], None, *wanted[7:], *(None,) * 13)


class Given(NamedTuple):
    """The public function's arguments, as a caller gives them."""

    content_query: torch.Tensor
    query_query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    position_key: torch.Tensor
    target_positions: torch.Tensor | None = None
    content_bias: torch.Tensor | None = None
    position_bias: torch.Tensor | None = None
    offset: int | None = None
    segment_bias: torch.Tensor | None = None
    segment_embedding: torch.Tensor | None = None
    query_segments: torch.Tensor | None = None
    key_segments: torch.Tensor | None = None
    key_lengths: torch.Tensor | None = None
    query_rank: torch.Tensor | None = None
    key_rank: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    masked_rows: str = "zero"
    scale: float | None = None
    dropout_p: float = 0.0
    seed: torch.Tensor | int | None = None
    backend: str | None = None


def two_stream_attention(
    content_query: torch.Tensor,
    query_query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_key: torch.Tensor,
    *,
    target_positions: torch.Tensor | None = None,
    content_bias: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    offset: int | None = None,
    segment_bias: torch.Tensor | None = None,
    segment_embedding: torch.Tensor | None = None,
    query_segments: torch.Tensor | None = None,
    key_segments: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    query_rank: torch.Tensor | None = None,
    key_rank: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    masked_rows: str = "zero",
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | int | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both streams of XLNet's attention in one call.

    The content stream equals `relative_attention(content_query, ..., see_self=True)` (without ranks and mask every
    row sees itself anyway), the query stream `relative_attention(query_query, ..., query_positions=target_positions)`
    with ranks, segments and rows of the mask taken at the targets.  Only the dropout bits of the query stream are its
    own.

    Args:
        content_query: `[B, T, H, D]`; float32, bfloat16 or float16 (float64 on backend "torch").  Views with a
            contiguous last dimension are read in place.
        query_query: `[B, M, H, D]`, one row a target; content_query's dtype.
        key: `[B, Tk, H, D]`; content_query's dtype.  With memories Tk > T: position i is key i + Tk - T.
        value: as key.
        position_key: the table r, `[R, H, D]`, or `[G, R, H, D]` with G dividing B: sequence b uses table b * G // B.
            content_query's dtype, or float32, which is rounded to it and gets its gradient in float32.
            R >= offset + Tk.
        target_positions: int32 `[B, M]` in 0 .. T - 1; -1: no target, a row of zeros.  None: M = T and row i stands at
            position i.
        content_bias: `[H, D]`, added to queries where they meet key; content_query's dtype or float32, as the next
            three.
        position_bias: `[H, D]`, added to queries where they meet the table.
        offset: c, the table's row of distance 0, at least T - 1; None: T.
        segment_bias: `[H, D]`, added to queries where they meet the segment embedding.
        segment_embedding: `[2, H, D]`: row 0 for keys of the query's segment, row 1 for the others; goes with
            query_segments and key_segments.
        query_segments: int32 or int64 `[B, T]`, of positions.
        key_segments: int32 or int64 `[B, Tk]`.
        key_lengths: int32 or int64 `[B]`: sequence b has the keys 0 .. key_lengths[b] - 1; None: all.
        query_rank: int32 `[B, T]`, of positions: one may see key j if query_rank > key_rank[j].
        key_rank: int32 `[B, Tk]`; 2**31 - 1: no row sees it.
        attention_mask: boolean, 4-D, broadcastable to `[B, H, T, Tk]`; True: may attend.
        masked_rows: what a row gives that may see nothing: "zero", or "uniform", the average over all Tk keys,
            padding included, with the gradient of scores from which 1e30 was taken, as XLNet does; every key and
            value is read then.
        scale: factor of the scores; None: D ** -0.5.
        dropout_p: probability in [0, 1] of dropping a weight; kept ones are scaled by 1 / (1 - dropout_p).
        seed: int64 tensor of one element or an int; the same seed drops the same weights on every backend.
            None draws one from the device's default generator.
        backend: one of `pyxlbert.backends.NAMES`; None takes the first that supports the inputs.

    Returns:
        content `[B, T, H, D]` and query `[B, M, H, D]`, contiguous, in content_query's dtype.  Under autocast the
        queries, key, value and position_key are cast to its dtype first.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, a device, a length, a position or a probability is wrong.
        RuntimeError: the named backend cannot run here.
    """
    given = Given(
        content_query,
        query_query,
        key,
        value,
        position_key,
        target_positions,
        content_bias,
        position_bias,
        offset,
        segment_bias,
        segment_embedding,
        query_segments,
        key_segments,
        key_lengths,
        query_rank,
        key_rank,
        attention_mask,
        masked_rows,
        scale,
        dropout_p,
        seed,
        backend,
    )
    OP.refuse_transforms(*given)
    call = call_of(given)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in _trained(call)):
        content, _, query, _ = apply(_TwoStreamAttention, *call, backward_backend(call.backend))
    else:
        content, _, query, _ = _fwd(call)
    return content, query


def call_of(given: Given) -> Any:
    """The record of a call: checked, cast under autocast, with what was left out filled in."""
    content_query, query_query, key, value = given.content_query, given.query_query, given.key, given.value
    op, first = "two_stream_attention", "content_query"
    scale = _attention.check_scale(op, given.scale)
    _attention.check_query_key_value(op, content_query, key, value, name=first)
    uniform_rows = _relative.uniform_rows(op, given.masked_rows)
    batch, rows, heads, head_size = content_query.shape
    keys = key.shape[1]
    _attention.check_rows(op, "query_query", query_query, content_query, False, first)
    targets = rows if given.target_positions is None else query_query.shape[1]
    wanted = (batch, targets, heads, head_size)
    letters = "content_query's shape, without target_positions" if given.target_positions is None else "B, M, H, D"
    checks.shape(op, "query_query", query_query, wanted, letters)
    _relative.check_numbers(
        op, "target_positions", given.target_positions, content_query, first, (batch, targets), "B, M", torch.int32
    )
    _attention.check_masks(op, given.key_lengths, given.attention_mask, content_query, keys, first)
    offset = rows if given.offset is None else given.offset
    offset = _relative.check_offset(op, offset, rows - 1, "T - 1")
    why = f"offset {offset} and {keys} keys"
    _relative.check_table(op, given.position_key, content_query, batch, offset + keys, why, first)
    _relative.check_biases(op, content_query, first, given)
    shapes = ((batch, rows), (batch, keys), ("B, T", "B, Tk"))
    _relative.check_segments(op, content_query, first, given, *shapes)
    _relative.check_ranks(op, content_query, first, given, *shapes)
    dropout_p, seed = dropout_of(op, given.dropout_p, given.seed, content_query.device)
    trained = _relative.lower((content_query, query_query, key, value, given.position_key), given)
    content_query, query_query, key, value, position_key = trained[:5]
    content_bias, position_bias, segment_bias, segment_embedding = trained[5:]
    if scale is None:
        scale = head_size**-0.5
    backend = OP.resolve(given.backend, content_query)
    # By place: a record made of names takes longer than all of the checks.
    return Forward(
        content_query,
        query_query,
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
        given.target_positions,
        given.key_lengths,
        given.query_rank,
        given.key_rank,
        given.attention_mask,
        uniform_rows,
        scale,
        dropout_p,
        seed,
        backend,
    )
