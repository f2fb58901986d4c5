"""Inputs of relative_attention."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from pyxlbert.ops.relative_attention import relative_attention
from pyxlbert.reference.philox import Tag, keep_scores
from pyxlbert.testing import tolerances
from pyxlbert.testing.specs._spec import Arguments, Bad, Case, Spec, randn, replace

# Arguments that have a row a token, so that packed ones are cut by sequence.
_BY_TOKEN = ("query", "key", "value", "query_segments", "key_segments", "query_rank", "key_rank")

UNSEEN_RANK = 2**31 - 1


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


def index_of_rows(
    queries: int, keys: int, rows: int, offset: int | None, query_positions: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """The table's row of each pair, `[1 or B, 1, Tq, Tk]`; pairs that no mask lets through may lie outside."""
    place = torch.arange(queries, device=device)[None] if query_positions is None else query_positions.long()
    offset = queries if offset is None else offset
    band = offset + torch.arange(keys, device=device) - place[..., None]
    return band.clamp(0, max(rows - 1, 0))[:, None]


def pairs_allowed(
    batch: int,
    queries: int,
    keys: int,
    device: torch.device,
    *,
    key_lengths: torch.Tensor | None = None,
    query_rank: torch.Tensor | None = None,
    key_rank: torch.Tensor | None = None,
    see_self: bool = False,
    attention_mask: torch.Tensor | None = None,
    causal: bool = False,
    query_positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Boolean, broadcastable to `[B, H, Tq, Tk]`."""
    allowed = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=device)
    if causal:
        allowed = allowed.tril(keys - queries)
    if attention_mask is not None:
        allowed = allowed & attention_mask
    if query_rank is not None:
        allowed = allowed & (query_rank[:, None, :, None] > key_rank[:, None, None, :])
    if see_self:
        eye = torch.ones(queries, keys, dtype=torch.bool, device=device)
        allowed = allowed | (eye.tril(keys - queries) & eye.triu(keys - queries))
    if key_rank is not None:
        allowed = allowed & (key_rank != UNSEEN_RANK)[:, None, None]
    if key_lengths is not None:
        allowed = allowed & (torch.arange(keys, device=device) < key_lengths[:, None, None, None])
    if query_positions is not None:
        allowed = allowed & (query_positions >= 0)[:, None, :, None]
    return allowed


def softmax_and_dropout(
    s: torch.Tensor,
    allowed: torch.Tensor,
    future: torch.Tensor,
    masked_rows: str,
    query_positions: torch.Tensor | None,
    dropout_p: float,
    seed: int,
    tag: Tag,
    first_plane: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights before dropout, and what dropout multiplies them by."""
    logits = s.masked_fill(~allowed, -torch.inf)
    seen = (logits > -torch.inf).any(-1, keepdim=True)
    # What is left of s - 1e30 in a row that sees nothing: equal numbers with the derivative of s.
    equal = torch.zeros_like(s) if masked_rows == "zero" else (s - s.detach()).masked_fill(future, 0.0)
    p = torch.softmax(torch.where(seen, logits, equal), -1)
    if masked_rows == "zero":
        p = p.masked_fill(~seen, 0.0)
    elif query_positions is not None:
        p = p.masked_fill((query_positions < 0)[:, None, :, None], 0.0)
    factor = torch.ones_like(p)
    if dropout_p > 0:
        (batch, heads, queries, keys), planes = p.shape, first_plane + p.shape[0] * p.shape[1]
        keep = keep_scores(torch.tensor([seed]), dropout_p, 1, planes, queries, keys, tag)[0, first_plane:]
        factor = keep.view(batch, heads, queries, keys).to(p.dtype) * (1 / (1 - dropout_p) if dropout_p < 1 else 0)
    return p, factor


def _parts(
    query: torch.Tensor,
    key: torch.Tensor,
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
    masked_rows: str = "zero",
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    tag: Tag = Tag.RELATIVE_ATTENTION,
    first_plane: int = 0,
    **masks: Any,
) -> tuple[tuple[Any, ...], torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """The tensors of `products`, the weights, what dropout multiplies them by, which scores are constant, the scale."""
    (batch, queries, _, head_size), keys = query.shape, key.shape[1]
    scale = head_size**-0.5 if scale is None else scale
    table = position_key.to(query.dtype)
    table = table[None].expand(batch, -1, -1, -1) if table.dim() == 3 else table
    table = table.repeat_interleave(batch // table.shape[0], 0) if batch else table[:0]
    band = index_of_rows(queries, keys, table.shape[1], offset, query_positions, query.device)
    differs = None
    if segment_embedding is not None:
        segment_embedding = segment_embedding.to(query.dtype)
        differs = (query_segments[:, :, None] != key_segments[:, None])[:, None]
    tensors = (
        summed_query(query, content_bias),
        summed_query(query, position_bias),
        summed_query(query, segment_bias),
        key,
        table,
        segment_embedding,
        band,
        differs,
    )
    allowed = pairs_allowed(batch, queries, keys, query.device, query_positions=query_positions, **masks)
    future = torch.zeros_like(allowed[:1])
    if masks.get("causal"):
        future = ~torch.ones_like(future).tril(keys - queries)
    p, factor = softmax_and_dropout(
        products(*tensors) * scale, allowed, future, masked_rows, query_positions, dropout_p, seed, tag, first_plane
    )
    return tensors, p, factor, future if masked_rows == "uniform" else ~allowed, scale


def stream(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position_key: torch.Tensor, **options: Any
) -> torch.Tensor:
    """One relative attention of padded tensors."""
    _, p, factor, _, _ = _parts(query, key, position_key, **options)
    return torch.matmul((p * factor).to(value.dtype), value.transpose(1, 2)).transpose(1, 2)


def stream_terms(
    dout: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_key: torch.Tensor,
    rounding: float,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Sums of absolute terms of a stream's output and gradients, padded tensors.

    The scores are linear in each of their tensors, so their backward on absolute values, from the absolute terms of
    the gradient of the scores, adds the absolute terms of each gradient.  A backward that saves only out and lse takes
    delta = dout . out from the rounded out: `rounding` is the eps of that, in float32's.

    A score is itself a sum of terms.  Once their rounding (of query + bias in the tested dtype, of the products in
    float32) is a change of the score, and a weight changes by as much and by the mean of its row.
    """
    with torch.no_grad():
        tensors, p, factor, constant, scale = _parts(query, key, position_key, **options)
        v, g = (x.abs().transpose(1, 2) for x in (value, dout))
        *leaves, band, differs = tensors
        size = abs(scale) * products(*(None if x is None else x.abs() for x in leaves), band, differs)
        biased = options.get("content_bias") is not None or options.get("position_bias") is not None
        size = size * (max(1.0, rounding) if biased else 1.0) / tolerances.TERMS
        change = 1.0 + size + (p * size).sum(-1, keepdim=True)
        kept = p * factor * change
        found = {"out": torch.matmul(kept, v).transpose(1, 2)}
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


def _terms(name: str, a: Arguments, cotangents: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
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


def _flops(a: Arguments) -> int:
    heads, head_size = a["query"].shape[-2:]
    if a.get("cu_seqlens") is not None:
        lengths = a["cu_seqlens"].diff().long()
        return 6 * int((lengths * lengths).sum()) * heads * head_size
    return 6 * a["query"].numel() * a["key"].shape[1]


def draw_relative(
    draw: Any,
    arguments: Arguments,
    heads: int,
    head_size: int,
    rows: int,
    *,
    tables: int,
    biases: str,
    parameters: Any,
) -> None:
    """Adds the table and, as `biases` holds their letters, u, v, s and e."""
    shape = (rows, heads, head_size)
    arguments["position_key"] = draw(*shape) if tables == 0 else draw(tables, *shape)
    for letter, name, wanted in (
        ("u", "content_bias", (heads, head_size)),
        ("v", "position_bias", (heads, head_size)),
        ("s", "segment_bias", (heads, head_size)),
        ("e", "segment_embedding", (2, heads, head_size)),
    ):
        if letter in biases:
            arguments[name] = parameters(*wanted)


def draw_ranks(
    generator: torch.Generator, rows: tuple[int, ...], columns: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks of a random order: about a third of the keys is seen by all, few by none."""
    queries, keys = rows[-1], columns[-1]
    key_rank = torch.randint(0, max(keys, 1), columns, generator=generator)
    key_rank = key_rank.masked_fill(torch.rand(columns, generator=generator) < 0.3, -1)
    key_rank = key_rank.masked_fill(torch.rand(columns, generator=generator) < 0.1, UNSEEN_RANK)
    query_rank = torch.randint(-1, max(queries, 1), rows, generator=generator)
    return query_rank.to(device, torch.int32), key_rank.to(device, torch.int32)


def _case(
    id: str,
    queries: int,
    keys: int | None = None,
    *,
    batch: int = 2,
    heads: int = 2,
    head_size: int = 16,
    tables: int = 0,
    rows: int | None = None,
    biases: str = "uv",
    float32: bool = False,
    lengths: tuple[int, ...] | None = None,
    packed: tuple[int, ...] | None = None,
    mask: tuple[int, ...] | None = None,
    hidden: float = 0.3,
    ranks: bool = False,
    positions: tuple[tuple[int, ...], ...] | None = None,
    magnitude: float = 1.0,
    layout: str = "fused",
    small: bool = True,
    full_only: bool = False,
    **options: Any,
) -> Case:
    """`tables` is G, 0 for a table of three dimensions; `rows` its R, `hidden` the share of masked pairs."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Arguments:
        def draw(*shape: int) -> torch.Tensor:
            return randn(generator, *shape, dtype=dtype, device=device, scale=magnitude)

        def parameters(*shape: int) -> torch.Tensor:
            wide = torch.float32 if float32 and dtype is not torch.float64 else dtype
            return randn(generator, *shape, dtype=wide, device=device, scale=magnitude)

        arguments: Arguments = dict(options)
        key_count = queries if keys is None else keys
        if packed is not None:
            q, k, v = draw(sum(packed), 3, heads, head_size).unbind(1)
            offsets = torch.tensor((0, *packed)).cumsum(0).to(device=device, dtype=torch.int32)
            longest = max((0, *packed))
            arguments |= {"cu_seqlens": offsets, "max_seqlen": longest}
            row_shape = column_shape = (sum(packed),)
            lengthy = longest
        else:
            if layout == "fused" and key_count == queries:
                q, k, v = draw(batch, queries, 3, heads, head_size).unbind(2)
            elif layout == "heads first":
                q, k, v = (draw(batch, heads, t, head_size).transpose(1, 2) for t in (queries, key_count, key_count))
            elif layout == "strided":
                q, k, v = (draw(batch, t, heads, 2 * head_size)[..., ::2] for t in (queries, key_count, key_count))
            elif layout == "expanded":
                q = draw(1, queries, heads, head_size).expand(batch, -1, -1, -1)
                k, v = (draw(batch, key_count, 1, head_size).expand(-1, -1, heads, -1) for _ in range(2))
            else:
                q, k, v = (draw(batch, t, heads, head_size) for t in (queries, key_count, key_count))
            row_shape, column_shape = (batch, queries), (batch, key_count)
            lengthy = key_count
        offset = options.get("offset", lengthy if packed is not None else queries)
        arguments |= {"query": q, "key": k, "value": v}
        table_rows = offset + lengthy if rows is None else rows
        wide_tables = parameters if float32 else draw
        draw_relative(
            wide_tables,
            arguments,
            heads,
            head_size,
            table_rows,
            tables=tables,
            biases=biases,
            parameters=parameters,
        )
        if layout in ("heads first", "strided") and tables == 0:
            arguments["position_key"] = draw(heads, table_rows, head_size).transpose(0, 1)
        if "e" in biases:
            for name, shape in (("query_segments", row_shape), ("key_segments", column_shape)):
                arguments[name] = torch.randint(0, 3, shape, generator=generator).to(device)
        if ranks:
            arguments["query_rank"], arguments["key_rank"] = draw_ranks(generator, row_shape, column_shape, device)
        if positions is not None:
            arguments["query_positions"] = torch.tensor(positions, dtype=torch.int32, device=device)
        if lengths is not None:
            arguments["key_lengths"] = torch.tensor(lengths, dtype=torch.int32, device=device)
        if mask is not None:
            arguments["attention_mask"] = (torch.rand(mask, generator=generator) >= hidden).to(device)
        return arguments

    return Case(id, make, small=small, full_only=full_only)


def _pack(**changes: Any) -> Any:
    """The first case's tensors as one packed batch of lengths 3 and 4, with further changes."""

    def change(a: Arguments) -> Arguments:
        names = ("query", "key", "value", "position_key", "content_bias", "position_bias", "offset")
        good = {name: a[name] for name in names if name in a}
        good |= {name: good[name][0, :7] for name in ("query", "key", "value")}
        good["cu_seqlens"] = torch.tensor([0, 3, 7], dtype=torch.int32)
        return good | {n: v(a) for n, v in changes.items()}

    return change


def _place(**changes: Any) -> Any:
    """The first case with query_positions and all that goes with it, with further changes."""

    def change(a: Arguments) -> Arguments:
        good = a | {"query_positions": torch.zeros(2, 7, dtype=torch.int32), "offset": 7, "see_self": False}
        return good | {n: v(a) for n, v in changes.items()}

    return change


# Bad arguments that relative_attention and two_stream_attention refuse alike; the first case of each has B = 2,
# 7 rows, 11 keys, H = 2, D = 16, two tables of 20 rows, every bias, segments, ranks, lengths and a mask.
SHARED_BAD = (
    Bad("key dtype", replace(key=lambda a: a["key"].half()), TypeError, ("key", "float16", "float32")),
    Bad("key heads", replace(key=lambda a: a["key"][:, :, :1]), ValueError, ("key", "[2, 11, 1, 16]")),
    Bad("value shape", replace(value=lambda a: a["value"][..., :8]), ValueError, ("value", "[2, 11, 2, 8]")),
    Bad("table none", replace(position_key=lambda a: None), TypeError, ("position_key", "NoneType", "tensor")),
    Bad(
        "table integer", replace(position_key=lambda a: a["position_key"].long()), TypeError, ("position_key", "int64")
    ),
    Bad(
        "table float64",
        replace(position_key=lambda a: a["position_key"].double()),
        TypeError,
        ("position_key", "float64", "float32"),
    ),
    Bad(
        "table 2-D",
        replace(position_key=lambda a: a["position_key"][0, 0]),
        ValueError,
        ("position_key", "[2, 16]", "[R, H, D]"),
    ),
    Bad(
        "table heads",
        replace(position_key=lambda a: a["position_key"][:, :, :1]),
        ValueError,
        ("position_key", "[2, 20, 1, 16]", "[2, 16]"),
    ),
    Bad(
        "table short",
        replace(position_key=lambda a: a["position_key"][:, :17]),
        ValueError,
        ("position_key", "17 rows", "at least 18", "offset 7 and 11 keys"),
    ),
    Bad(
        "tables and batch",
        replace(position_key=lambda a: a["position_key"][[0, 1, 0]]),
        ValueError,
        ("position_key", "3 tables", "divides B, 2"),
    ),
    Bad("no tables", replace(position_key=lambda a: a["position_key"][:0]), ValueError, ("position_key", "0 tables")),
    Bad("offset small", replace(offset=lambda a: 5), ValueError, ("offset", "5", "at least 6")),
    Bad("offset negative", replace(offset=lambda a: -1), ValueError, ("offset", "-1", "at least 6")),
    Bad(
        "segments of more bits",
        replace(key_segments=lambda a: a["key_segments"] + 2**32),
        ValueError,
        ("key_segments", str(2**32)[:6], "32 bits"),
    ),
    Bad("offset bool", replace(offset=lambda a: True), TypeError, ("offset", "bool", "int")),
    Bad("scale text", replace(scale=lambda a: "a"), TypeError, ("scale", "str", "finite number")),
    Bad("offset float", replace(offset=lambda a: 7.0), TypeError, ("offset", "float", "int")),
    Bad(
        "content bias shape",
        replace(content_bias=lambda a: a["content_bias"][:1]),
        ValueError,
        ("content_bias", "[1, 16]", "[2, 16]"),
    ),
    Bad(
        "position bias dtype",
        replace(position_bias=lambda a: a["position_bias"].double()),
        TypeError,
        ("position_bias", "float64", "float32"),
    ),
    Bad(
        "segment embedding shape",
        replace(segment_embedding=lambda a: a["segment_embedding"][:1]),
        ValueError,
        ("segment_embedding", "[1, 2, 16]", "[2, 2, 16]"),
    ),
    Bad(
        "segment bias alone",
        replace(segment_embedding=lambda a: None),
        ValueError,
        ("segment_bias", "segment_embedding"),
    ),
    Bad(
        "no query segments",
        replace(query_segments=lambda a: None),
        ValueError,
        ("query_segments", "None", "key_segments"),
    ),
    Bad(
        "key segments shape",
        replace(key_segments=lambda a: a["key_segments"][:, :7]),
        ValueError,
        ("key_segments", "[2, 7]", "[2, 11]"),
    ),
    Bad(
        "segments float",
        replace(query_segments=lambda a: a["query_segments"].float()),
        TypeError,
        ("query_segments", "float32", "int32"),
    ),
    Bad("no key ranks", replace(key_rank=lambda a: None), ValueError, ("key_rank", "None", "query_rank")),
    Bad("no query ranks", replace(query_rank=lambda a: None), ValueError, ("query_rank", "None", "key_rank")),
    Bad(
        "rank dtype", replace(query_rank=lambda a: a["query_rank"].long()), TypeError, ("query_rank", "int64", "int32")
    ),
    Bad(
        "query rank shape", replace(query_rank=lambda a: a["key_rank"]), ValueError, ("query_rank", "[2, 11]", "[2, 7]")
    ),
    Bad("key rank shape", replace(key_rank=lambda a: a["query_rank"]), ValueError, ("key_rank", "[2, 7]", "[2, 11]")),
    Bad(
        "lengths shape", replace(key_lengths=lambda a: a["key_lengths"][:1]), ValueError, ("key_lengths", "[1]", "[2]")
    ),
    Bad(
        "lengths float", replace(key_lengths=lambda a: a["key_lengths"].float()), TypeError, ("key_lengths", "float32")
    ),
    Bad("lengths long", replace(key_lengths=lambda a: a["key_lengths"] + 1), ValueError, ("key_lengths", "12")),
    Bad("lengths negative", replace(key_lengths=lambda a: a["key_lengths"] - 12), ValueError, ("key_lengths", "-8")),
    Bad(
        "mask 2-D",
        replace(attention_mask=lambda a: torch.ones(2, 11, dtype=torch.bool)),
        ValueError,
        ("attention_mask", "[2, 11]", "key_lengths"),
    ),
    Bad(
        "mask shape",
        replace(attention_mask=lambda a: torch.ones(2, 1, 1, 13, dtype=torch.bool)),
        ValueError,
        ("attention_mask", "[2, 1, 1, 13]", "[2, 2, 7, 11]"),
    ),
    Bad(
        "mask float",
        replace(attention_mask=lambda a: a["attention_mask"].float()),
        TypeError,
        ("attention_mask", "float32", "bool"),
    ),
    Bad("masked rows", replace(masked_rows=lambda a: "ones"), ValueError, ("masked_rows", "'ones'", "'zero'")),
    Bad("scale nan", replace(scale=lambda a: float("nan")), ValueError, ("scale", "nan", "finite")),
    Bad("dropout above 1", replace(dropout_p=lambda a: 1.5), ValueError, ("dropout_p", "1.5", "[0, 1]")),
    Bad("seed float", replace(seed=lambda a: 1.5), TypeError, ("seed", "float")),
    Bad("backend unknown", replace(backend=lambda a: "mkl"), ValueError, ("backend", "mkl", "torch")),
)

_INT32 = torch.int32

SPEC = Spec(
    name="relative_attention",
    function=relative_attention,
    plain=plain,
    differentiable=(
        "query",
        "key",
        "value",
        "position_key",
        "content_bias",
        "position_bias",
        "segment_bias",
        "segment_embedding",
    ),
    cases=(
        _case(
            "everything",
            7,
            11,
            tables=2,
            rows=20,
            biases="uvse",
            lengths=(11, 4),
            ranks=True,
            see_self=True,
            mask=(2, 1, 7, 11),
            dropout_p=0.2,
            seed=3,
        ),
        _case("plain", 37, head_size=64),
        _case("no biases", 21, biases=""),
        _case("content bias alone", 21, biases="u"),
        _case("position bias alone", 21, biases="v"),
        _case("Conformer", 40, biases="uv", offset=39, rows=79, lengths=(40, 31)),
        _case("Transformer-XL", 20, 43, biases="uv", offset=19, rows=43, causal=True, layout="apart"),
        _case("Funnel", 15, 33, offset=33, layout="apart"),
        _case("one token", 1, head_size=32, offset=0),
        _case("one query, many keys", 1, 530, head_size=32, layout="apart", small=False),
        _case("many queries, one key", 50, 1, layout="apart"),
        _case("more queries than keys", 70, 19, head_size=24, layout="apart"),
        _case("memory", 20, 47, biases="uvse", layout="apart"),
        _case("no queries", 0, 7, layout="apart"),
        _case("no keys", 5, 0, layout="apart"),
        _case("no batch", 5, batch=0),
        _case("one head", 20, heads=1, head_size=40, biases="uvse"),
        _case("tables of a longer text", 25, rows=90, offset=40),
        _case("a table each", 19, batch=4, tables=4),
        _case("two tables for four", 19, 26, batch=4, tables=2, biases="uvse", layout="apart"),
        _case("one table in four dimensions", 19, tables=1),
        _case("segments without bias", 22, biases="e"),
        _case("segments, memory", 22, 31, biases="se", layout="apart"),
        _case("lengths 0, 1 and all", 33, batch=4, lengths=(0, 1, 33, 17), biases="uvse"),
        *(
            _case(f"head size {d}", 35, head_size=d, lengths=(35, 20), layout="heads first")
            for d in (1, 3, 33, 80, 128)
        ),
        _case("few rows", 4, 23, head_size=40, biases="uvse", ranks=True, see_self=True, lengths=(23, 9)),
        _case("few rows, places", 3, 20, positions=((5, 0, -1), (7, 7, 2)), offset=8, head_size=7, mask=(2, 1, 3, 20)),
        _case("few rows, causal", 2, 530, batch=4, tables=2, rows=531, causal=True, head_size=80, small=False),
        _case("few rows, uniform", 2, 12, rows=14, lengths=(12, 0), ranks=True, causal=True, masked_rows="uniform"),
        _case("few rows, dropout", 1, 600, head_size=64, dropout_p=0.3, seed=4, biases="uvse", small=False),
        _case("long", 530, batch=1, head_size=64, small=False),
        _case("memory, long", 70, 1100, batch=1, head_size=32, biases="uvse", layout="apart", small=False),
        _case("few heads, long", 64, 1200, batch=1, heads=1, head_size=32, layout="apart", small=False),
        _case("causal", 61, causal=True),
        _case("causal, fewer keys", 43, 20, causal=True, rows=21 + 1, offset=43, layout="apart"),
        _case("causal, long", 560, batch=1, causal=True, lengths=(500,), dropout_p=0.1, seed=1, small=False),
        _case("ranks", 50, ranks=True),
        _case("ranks, see self", 50, ranks=True, see_self=True, biases="uvse"),
        _case("ranks, memory, lengths", 30, 47, ranks=True, see_self=True, lengths=(47, 20), layout="apart"),
        _case("ranks, long", 540, batch=1, ranks=True, see_self=True, small=False),
        _case("mask of every pair", 29, 41, mask=(2, 2, 29, 41), layout="apart"),
        _case("mask of keys, see self", 29, mask=(2, 1, 1, 29), see_self=True, hidden=0.9),
        _case("mask of queries", 29, mask=(1, 1, 29, 1)),
        _case("causal, see self, fewer keys", 30, 22, causal=True, see_self=True, layout="apart"),
        _case("positions", 3, 20, positions=((7, 0, 19), (3, 3, 12)), offset=20, layout="apart"),
        _case(
            "positions, none, ranks",
            4,
            26,
            positions=((7, -1, 19, 2), (-1, -1, -1, -1)),
            offset=20,
            ranks=True,
            biases="uvse",
            dropout_p=0.3,
            seed=8,
            layout="apart",
        ),
        _case("uniform", 30, ranks=True, masked_rows="uniform", lengths=(30, 0), biases="uvse"),
        _case("uniform, mask", 20, 33, mask=(2, 1, 20, 1), masked_rows="uniform", layout="apart"),
        _case("uniform, packed", 0, packed=(9, 0, 20), ranks=True, masked_rows="uniform"),
        _case("uniform, positions", 2, 9, positions=((8, -1), (2, 1)), offset=9, ranks=True, masked_rows="uniform"),
        _case("uniform, causal", 20, 33, causal=True, lengths=(33, 9), masked_rows="uniform", layout="apart"),
        _case("dropout", 30, 50, dropout_p=0.3, seed=-5, layout="apart"),
        _case("dropout of everything", 10, dropout_p=1.0, seed=0),
        _case("packed", 0, packed=(5, 0, 1, 33, 18), head_size=32, biases="uvse"),
        _case("packed, causal, dropout", 0, packed=(40, 7, 64), causal=True, dropout_p=0.2, seed=2**40),
        _case("packed, ranks, tables", 0, packed=(12, 30, 7, 9), tables=2, ranks=True, see_self=True, biases="uvse"),
        _case("packed, Conformer", 0, packed=(12, 30), offset=29, rows=59),
        _case("packed, nothing", 0, packed=()),
        _case("packed, empty sequences", 0, packed=(0, 0)),
        _case("float32 parameters", 23, biases="uvse", float32=True, tables=2),
        _case("strided", 21, layout="strided"),
        _case("expanded", 21, layout="expanded"),
        _case("scale 0", 15, scale=0.0),
        _case("scale negative", 15, scale=-0.3, lengths=(15, 6), biases="uvse"),
        _case("huge", 25, magnitude=20.0, biases="uvse"),
        _case("tiny", 25, magnitude=1e-3, biases="uvse"),
    ),
    bad=(
        Bad("query no tensor", replace(query=lambda a: [1.0]), TypeError, ("query", "list", "wanted a tensor")),
        Bad("query 3-D", replace(query=lambda a: a["query"][0]), ValueError, ("query", "[7, 2, 16]", "4 dimensions")),
        *SHARED_BAD,
        Bad(
            "positions dtype",
            _place(query_positions=lambda a: torch.zeros(2, 7, dtype=torch.int64)),
            TypeError,
            ("query_positions", "int64", "int32"),
        ),
        Bad(
            "positions shape",
            _place(query_positions=lambda a: torch.zeros(7, dtype=_INT32)),
            ValueError,
            ("query_positions", "[7]", "[2, 7]"),
        ),
        Bad(
            "positions past the table",
            _place(query_positions=lambda a: torch.full((2, 7), 8, dtype=_INT32)),
            ValueError,
            ("query_positions", "8", "[-1, 7]"),
        ),
        Bad(
            "positions negative",
            _place(query_positions=lambda a: torch.full((2, 7), -2, dtype=_INT32)),
            ValueError,
            ("query_positions", "-2", "[-1, 7]"),
        ),
        Bad(
            "positions, causal", _place(causal=lambda a: True), ValueError, ("causal", "query_positions", "query_rank")
        ),
        Bad(
            "positions, self", _place(see_self=lambda a: True), ValueError, ("see_self", "query_positions", "key_rank")
        ),
        Bad("positions, no offset", _place(offset=lambda a: None), ValueError, ("offset", "None", "query_positions")),
        Bad("max_seqlen alone", replace(max_seqlen=lambda a: 5), ValueError, ("max_seqlen", "cu_seqlens")),
        Bad(
            "packed and mask",
            _pack(attention_mask=lambda a: a["attention_mask"]),
            ValueError,
            ("attention_mask", "cu_seqlens"),
        ),
        Bad(
            "packed and positions",
            _pack(query_positions=lambda a: torch.zeros(7, dtype=_INT32)),
            ValueError,
            ("query_positions", "cu_seqlens"),
        ),
        Bad(
            "packed ranks",
            _pack(query_rank=lambda a: a["query_rank"], key_rank=lambda a: a["key_rank"]),
            ValueError,
            ("query_rank", "[2, 7]", "[7]"),
        ),
        Bad(
            "packed table",
            _pack(position_key=lambda a: a["position_key"][0, :7]),
            ValueError,
            ("position_key", "7 rows", "at least 8"),
        ),
        Bad("packed offset", _pack(offset=lambda a: 2), ValueError, ("offset", "2", "at least 3")),
        Bad(
            "offsets decrease",
            _pack(
                cu_seqlens=lambda a: torch.tensor([0, 6, 5, 7], dtype=_INT32),
                position_key=lambda a: a["position_key"][0],
            ),
            ValueError,
            ("cu_seqlens", "6 before 5"),
        ),
        Bad("max_seqlen float", _pack(max_seqlen=lambda a: 4.0), TypeError, ("max_seqlen", "float", "an int")),
        Bad("max_seqlen bool", _pack(max_seqlen=lambda a: True), TypeError, ("max_seqlen", "bool", "an int")),
        Bad("max_seqlen vast", _pack(max_seqlen=lambda a: 2**70), ValueError, ("position_key", "20 rows", "offset")),
        Bad("causal text", replace(causal=lambda a: "no"), TypeError, ("causal", "str", "a bool")),
        Bad(
            "self a tensor", replace(see_self=lambda a: torch.ones(3)), TypeError, ("see_self", "float32 [3]", "a bool")
        ),
        Bad("max_seqlen small", _pack(max_seqlen=lambda a: 3), ValueError, ("max_seqlen", "3", "at least 4")),
    ),
    tiles=True,
    terms=_terms,
    flops=_flops,
    bytes_moved=lambda a: sum(
        a[n].numel() * a[n].element_size() for n in ("query", "query", "key", "value", "position_key")
    ),
)
