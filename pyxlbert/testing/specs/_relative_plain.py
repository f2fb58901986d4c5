"""Relative attention by plain products and a gather, and how large the terms of its results are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch

from pyxlbert.reference.philox import Tag, keep_scores
from pyxlbert.testing import tolerances
from pyxlbert.testing.specs._attention import rounding_of_lse
from pyxlbert.testing.specs._relative import UNSEEN_RANK
from pyxlbert.testing.specs._spec import Arguments

# Arguments that have a row a token, so that packed ones are cut by sequence.
_BY_TOKEN = ("query", "key", "value", "query_segments", "key_segments", "query_rank", "key_rank")


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """Matrix products, a gather of the shifted positions and a softmax in query's dtype; packed sequences in turn."""
    return _by_sequence(stream, {"query": query, "key": key, "value": value, **options})


def _by_sequence(function: Any, arguments: Arguments) -> Any:
    """`function` of padded arguments, or of each packed sequence: the rows of tensors with rows joined again."""
    arguments = dict(arguments)
    offsets = arguments.pop("cu_seqlens", None)
    longest = arguments.pop("max_seqlen", None)
    if offsets is None:
        return function(**arguments)
    if arguments.get("offset") is None:
        arguments["offset"] = longest
    table, heads = arguments.pop("position_key"), arguments["query"].shape[1]
    sequences = len(offsets) - 1
    found = []
    for b, ends in enumerate(pairwise(offsets.tolist())):
        own = {n: v[slice(*ends)][None] for n, v in arguments.items() if n in _BY_TOKEN and v is not None}
        own["position_key"] = table if table.dim() == 3 else table[b * table.shape[0] // sequences]
        found.append(function(**{**arguments, **own}, first_plane=b * heads)[0])
    if not found:
        return arguments["value"] * arguments["query"] + 0 * table.sum()
    return torch.cat(found)


def summed_query(query: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """query + bias, rounded once to query's dtype."""
    return query if bias is None else (query + bias).to(query.dtype)


def products(
    q_content: torch.Tensor,
    q_position: torch.Tensor,
    q_segment: torch.Tensor,
    key: torch.Tensor,
    table: torch.Tensor,
    embedding: torch.Tensor | None,
    band: torch.Tensor,
    differs: torch.Tensor | None,
) -> torch.Tensor:
    """The three terms of the scores `[B, H, Tq, Tk]`, not scaled; linear in each tensor."""
    s = torch.matmul(q_content.transpose(1, 2), key.permute(0, 2, 3, 1))
    by_distance = torch.matmul(q_position.transpose(1, 2), table.permute(0, 2, 3, 1))
    s = s + by_distance.gather(3, band.expand(*s.shape))
    if embedding is not None:
        same, other = (torch.einsum("bihd,hd->bhi", q_segment, e)[..., None] for e in embedding)
        s = s + torch.where(differs, other, same)
    return s


class Padded(NamedTuple):
    """One relative attention of padded tensors: the op's arguments, and what tells dropouts apart."""

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
    query_rank: torch.Tensor | None = None
    key_rank: torch.Tensor | None = None
    see_self: bool = False
    attention_mask: torch.Tensor | None = None
    causal: bool = False
    masked_rows: str = "zero"
    scale: float | None = None
    dropout_p: float = 0.0
    seed: int = 0
    tag: Tag = Tag.RELATIVE_ATTENTION
    first_plane: int = 0

    @property
    def factor(self) -> float:
        """Of the scores."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale


def index_of_rows(call: Padded, rows: int) -> torch.Tensor:
    """The table's row of each pair, `[1 or B, 1, Tq, Tk]`; pairs that no mask lets through may lie outside."""
    queries, keys, device = call.query.shape[1], call.key.shape[1], call.query.device
    place = torch.arange(queries, device=device)[None]
    if call.query_positions is not None:
        place = call.query_positions.long()
    offset = queries if call.offset is None else call.offset
    band = offset + torch.arange(keys, device=device) - place[..., None]
    return band.clamp(0, max(rows - 1, 0))[:, None]


def pairs_allowed(call: Padded) -> torch.Tensor:
    """Boolean, broadcastable to `[B, H, Tq, Tk]`."""
    (batch, queries), keys, device = call.query.shape[:2], call.key.shape[1], call.query.device
    allowed = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=device)
    if call.causal:
        allowed = allowed.tril(keys - queries)
    if call.attention_mask is not None:
        allowed = allowed & call.attention_mask
    if call.query_rank is not None:
        allowed = allowed & (call.query_rank[:, None, :, None] > call.key_rank[:, None, None, :])
    if call.see_self:
        eye = torch.ones(queries, keys, dtype=torch.bool, device=device)
        allowed = allowed | (eye.tril(keys - queries) & eye.triu(keys - queries))
    if call.key_rank is not None:
        allowed = allowed & (call.key_rank != UNSEEN_RANK)[:, None, None]
    if call.key_lengths is not None:
        allowed = allowed & (torch.arange(keys, device=device) < call.key_lengths[:, None, None, None])
    if call.query_positions is not None:
        allowed = allowed & (call.query_positions >= 0)[:, None, :, None]
    return allowed


def softmax_and_dropout(
    s: torch.Tensor, allowed: torch.Tensor, future: torch.Tensor, call: Padded
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights before dropout, and what dropout multiplies them by."""
    logits = s.masked_fill(~allowed, -torch.inf)
    seen = (logits > -torch.inf).any(-1, keepdim=True)
    # What is left of s - 1e30 in a row that sees nothing: equal numbers with the derivative of s.
    equal = torch.zeros_like(s) if call.masked_rows == "zero" else (s - s.detach()).masked_fill(future, 0.0)
    p = torch.softmax(torch.where(seen, logits, equal), -1)
    if call.masked_rows == "zero":
        p = p.masked_fill(~seen, 0.0)
    elif call.query_positions is not None:
        p = p.masked_fill((call.query_positions < 0)[:, None, :, None], 0.0)
    factor = torch.ones_like(p)
    if call.dropout_p > 0:
        (batch, heads, queries, keys), first = p.shape, call.first_plane
        planes = first + batch * heads
        keep = keep_scores(torch.tensor([call.seed]), call.dropout_p, 1, planes, queries, keys, call.tag)[0, first:]
        kept = 1 / (1 - call.dropout_p) if call.dropout_p < 1 else 0
        factor = keep.view(batch, heads, queries, keys).to(p.dtype) * kept
    return p, factor


def _parts(call: Padded) -> tuple[tuple[Any, ...], torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tensors of `products`, the weights, what dropout multiplies them by, which scores are constant."""
    query, batch = call.query, call.query.shape[0]
    table = call.position_key.to(query.dtype)
    table = table[None].expand(batch, -1, -1, -1) if table.dim() == 3 else table
    table = table.repeat_interleave(batch // table.shape[0], 0) if batch else table[:0]
    embedding, differs = None, None
    if call.segment_embedding is not None:
        embedding = call.segment_embedding.to(query.dtype)
        differs = (call.query_segments[:, :, None] != call.key_segments[:, None])[:, None]
    tensors = (
        summed_query(query, call.content_bias),
        summed_query(query, call.position_bias),
        summed_query(query, call.segment_bias),
        call.key,
        table,
        embedding,
        index_of_rows(call, table.shape[1]),
        differs,
    )
    allowed = pairs_allowed(call)
    future = torch.zeros_like(allowed[:1])
    if call.causal:
        future = ~torch.ones_like(future).tril(call.key.shape[1] - query.shape[1])
    p, factor = softmax_and_dropout(products(*tensors) * call.factor, allowed, future, call)
    return tensors, p, factor, future if call.masked_rows == "uniform" else ~allowed


def stream(**arguments: Any) -> torch.Tensor:
    """One relative attention of padded tensors: see `Padded`."""
    call = Padded(**arguments)
    _, p, factor, _ = _parts(call)
    return torch.matmul((p * factor).to(call.value.dtype), call.value.transpose(1, 2)).transpose(1, 2)


def stream_terms(dout: torch.Tensor, rounding: float, **arguments: Any) -> dict[str, torch.Tensor]:
    """Sums of absolute terms of a stream's output and gradients: see `Padded`.

    The scores are linear in each of their tensors, so their backward on absolute values, from the absolute terms of
    the gradient of the scores, adds the absolute terms of each gradient.  A backward that saves only out and lse takes
    delta = dout . out from the rounded out: `rounding` is the eps of that, in float32's.

    A score is itself a sum of terms.  Once their rounding (of query + bias in the tested dtype, of the products in
    float32) is a change of the score, and a weight changes by as much and by the mean of its row.  Weights of backward
    carry the rounding of lse too.
    """
    call = Padded(**arguments)
    scale, position_key = call.factor, call.position_key
    with torch.no_grad():
        tensors, p, factor, constant = _parts(call)
        v, g = (x.abs().transpose(1, 2) for x in (call.value, dout))
        *leaves, band, differs = tensors
        reach = abs(scale) * products(*(None if x is None else x.abs() for x in leaves), band, differs)
        biased = call.content_bias is not None or call.position_bias is not None
        size = reach * (max(1.0, rounding) if biased else 1.0) / tolerances.TERMS
        change = 1.0 + size + (p * size).sum(-1, keepdim=True)
        found = {"out": torch.matmul(p * factor * change, v).transpose(1, 2)}
        change = change + rounding_of_lse(p, reach)
        kept = p * factor * change
        found["value"] = torch.matmul(kept.transpose(-1, -2), g).transpose(1, 2)
        dp = torch.matmul(g, v.transpose(-1, -2)) * factor
        ds = p * (dp + max(1.0, rounding) * (p * dp).sum(-1, keepdim=True))
        ds = abs(scale) * change * ds.masked_fill(constant, 0.0)
    leaves = [None if x is None else x.detach().abs().requires_grad_() for x in leaves]
    with torch.enable_grad():
        s = products(*leaves, band, differs)
    d_content, d_position, d_segment, found["key"], d_table, d_embedding = torch.autograd.grad(
        s, [torch.zeros((), requires_grad=True) if x is None else x for x in leaves], ds, allow_unused=True
    )
    found["content_bias"], found["position_bias"] = d_content.sum((0, 1)), d_position.sum((0, 1))
    found["query"] = d_content + d_position
    if d_segment is not None:
        found["query"] = found["query"] + d_segment
        found["segment_bias"], found["segment_embedding"] = d_segment.sum((0, 1)), d_embedding
    tables = 1 if position_key.dim() == 3 else position_key.shape[0]
    grouped = d_table.view(tables, d_table.shape[0] // tables, *d_table.shape[1:]).sum(1)
    found["position_key"] = grouped.view(position_key.shape)
    return found


def rounding_of(cotangent: torch.Tensor) -> float:
    """eps of the output's dtype in multiples of float32's."""
    return torch.finfo(cotangent.dtype).eps / torch.finfo(torch.float32).eps


def terms_of(name: str, a: Arguments, cotangents: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    wanted = "out" if name == "out 0" else name.removeprefix("grad ")
    if any(a[n].numel() == 0 for n in ("query", "key")):
        return None
    rounding, a = rounding_of(cotangents[0]), a | {"dout": cotangents[0].double()}
    if a.get("cu_seqlens") is None:
        return stream_terms(rounding=rounding, **a)[wanted]
    if wanted in ("out", "query", "key", "value"):
        return _by_packed_sequence(a, rounding, wanted, torch.cat)
    return _by_packed_sequence(a, rounding, wanted, sum)


def _by_packed_sequence(a: Arguments, rounding: float, wanted: str, join: Any) -> torch.Tensor:
    """The terms of every packed sequence, joined; a shared tensor's are summed."""
    found, dout, table = [], a["dout"], a["position_key"]
    sequences = len(a["cu_seqlens"]) - 1
    options = {n: v for n, v in a.items() if n not in ("cu_seqlens", "max_seqlen", "dout", "position_key")}
    options["offset"] = a["max_seqlen"] if a.get("offset") is None else a["offset"]
    for b, ends in enumerate(pairwise(a["cu_seqlens"].tolist())):
        rows = slice(*ends)
        own = {n: v[rows][None] for n, v in options.items() if n in _BY_TOKEN and v is not None}
        which = 0 if table.dim() == 3 else b * table.shape[0] // sequences
        if ends[0] == ends[1]:
            continue
        terms = stream_terms(
            dout[rows][None],
            position_key=table if table.dim() == 3 else table[which],
            rounding=rounding,
            first_plane=b * a["query"].shape[1],
            **{**options, **own},
        )[wanted]
        if wanted == "position_key" and table.dim() == 4:
            whole = torch.zeros_like(table)
            whole[which] = terms
            terms = whole
        found.append(terms[0] if join is torch.cat else terms)
    return join(found)
