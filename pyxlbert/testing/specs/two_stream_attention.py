"""Inputs of two_stream_attention."""

from __future__ import annotations

from typing import Any

import torch

from pyxlbert.ops.two_stream_attention import two_stream_attention
from pyxlbert.reference.philox import Tag
from pyxlbert.testing.specs._spec import Arguments, Bad, Case, Spec, randn, replace
from pyxlbert.testing.specs.relative_attention import (
    SHARED_BAD,
    draw_ranks,
    draw_relative,
    rounding_of,
    stream,
    stream_terms,
)

# What belongs to one stream; the rest of the differentiable arguments is shared.
_STREAMS = ("content_query", "query_query")


def plain(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A plain relative attention for each stream."""
    content, query = streams(arguments)
    return stream(**content), stream(**query)


def streams(arguments: Arguments) -> tuple[Arguments, Arguments]:
    """The arguments of one relative attention for each stream: what a target has is taken at its position."""
    shared = dict(arguments)
    queries = [shared.pop(name) for name in _STREAMS]
    targets = shared.pop("target_positions", None)
    if shared.get("offset") is None:
        shared["offset"] = queries[0].shape[1]
    see_self = shared.get("query_rank") is not None or shared.get("attention_mask") is not None
    content = shared | {"query": queries[0], "see_self": see_self}
    own: Arguments = {"query": queries[1], "tag": Tag.QUERY_STREAM}
    if targets is not None:
        own["query_positions"] = targets
        rows = targets.long().clamp(min=0)
        for name in ("query_rank", "query_segments"):
            if shared.get(name) is not None:
                own[name] = _taken(shared[name], rows, 1)
        mask = shared.get("attention_mask")
        if mask is not None and mask.shape[2] != 1:
            own["attention_mask"] = _taken(mask, rows[:, None, :, None], 2)
    return content, shared | own


def _taken(x: torch.Tensor, rows: torch.Tensor, dim: int) -> torch.Tensor:
    """x at the rows; of no position at all, one of zeros stands for the target that is not there."""
    if x.shape[dim] == 0:
        x = x.new_zeros((*x.shape[:dim], 1, *x.shape[dim + 1 :]))
    return torch.take_along_dim(x, rows, dim)


def _terms(name: str, a: Arguments, cotangents: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    if any(a[n].numel() == 0 for n in (*_STREAMS, "key")):
        return None
    found = [
        stream_terms(dout.double(), rounding=rounding_of(dout), **options)
        for options, dout in zip(streams(a), cotangents, strict=True)
    ]
    if name.startswith("out"):
        return found[int(name.removeprefix("out "))]["out"]
    wanted = name.removeprefix("grad ")
    if wanted in _STREAMS:
        return found[_STREAMS.index(wanted)]["query"]
    return found[0][wanted] + found[1][wanted]


def _case(
    id: str,
    rows: int,
    targets: tuple[tuple[int, ...], ...] | None,
    keys: int | None = None,
    *,
    batch: int = 2,
    heads: int = 2,
    head_size: int = 16,
    tables: int = 0,
    table_rows: int | None = None,
    biases: str = "uvse",
    float32: bool = False,
    lengths: tuple[int, ...] | None = None,
    mask: tuple[int, ...] | None = None,
    hidden: float = 0.3,
    ranks: bool = False,
    layout: str = "fused",
    magnitude: float = 1.0,
    small: bool = True,
    **options: Any,
) -> Case:
    """`rows` is T; with `targets` None the query stream has a row for every position."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Arguments:
        def draw(*shape: int) -> torch.Tensor:
            return randn(generator, *shape, dtype=dtype, device=device, scale=magnitude)

        def parameters(*shape: int) -> torch.Tensor:
            wide = torch.float32 if float32 and dtype is not torch.float64 else dtype
            return randn(generator, *shape, dtype=wide, device=device, scale=magnitude)

        arguments: Arguments = dict(options)
        key_count = rows if keys is None else keys
        count = rows if targets is None else len(targets[0]) if targets else 0
        if layout == "fused" and key_count == rows:
            content, k, v = draw(batch, rows, 3, heads, head_size).unbind(2)
            query = draw(batch, count, heads, head_size)
        elif layout == "strided":
            content, k, v, query = (
                draw(batch, t, heads, 2 * head_size)[..., ::2] for t in (rows, key_count, key_count, count)
            )
        elif layout == "heads first":
            content, k, v, query = (
                draw(batch, heads, t, head_size).transpose(1, 2) for t in (rows, key_count, key_count, count)
            )
        else:
            content, k, v, query = (draw(batch, t, heads, head_size) for t in (rows, key_count, key_count, count))
        arguments |= {"content_query": content, "query_query": query, "key": k, "value": v}
        offset = options.get("offset", rows)
        draw_relative(
            parameters if float32 else draw,
            arguments,
            heads,
            head_size,
            offset + key_count if table_rows is None else table_rows,
            tables=tables,
            biases=biases,
            parameters=parameters,
        )
        shapes = (batch, rows), (batch, key_count)
        if "e" in biases:
            for name, shape in zip(("query_segments", "key_segments"), shapes, strict=True):
                arguments[name] = torch.randint(0, 3, shape, generator=generator).to(device)
        if ranks:
            arguments["query_rank"], arguments["key_rank"] = draw_ranks(generator, *shapes, device)
        if targets is not None:
            positions = torch.tensor(targets, dtype=torch.int32, device=device)
            arguments["target_positions"] = positions.view(batch, count)
        if lengths is not None:
            arguments["key_lengths"] = torch.tensor(lengths, dtype=torch.int32, device=device)
        if mask is not None:
            arguments["attention_mask"] = (torch.rand(mask, generator=generator) >= hidden).to(device)
        return arguments

    return Case(id, make, small=small)


def _targets(**changes: Any) -> Any:
    """target_positions of the first case with a change."""
    return replace(target_positions=lambda a: changes["of"](a["target_positions"]))


def _every(n: int, step: int) -> tuple[int, ...]:
    return tuple(range(0, n, step))


SPEC = Spec(
    name="two_stream_attention",
    function=two_stream_attention,
    plain=plain,
    differentiable=(
        *_STREAMS,
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
            ((6, 0, 3), (2, -1, 2)),
            11,
            tables=2,
            table_rows=20,
            lengths=(11, 4),
            ranks=True,
            mask=(2, 1, 7, 11),
            dropout_p=0.2,
            seed=3,
        ),
        _case("XLNet", 48, ((40, 3, 17, 22, 9, 31, 47, 0),) * 2, head_size=64, ranks=True),
        _case("XLNet, memory, two tables", 24, ((1, 5), (20, 8), (3, -1), (23, 0)), 44, batch=4, tables=2, ranks=True),
        _case("no masks", 20, ((4, 19), (0, 7))),
        _case("a row a position", 21, None, ranks=True),
        _case("a row a position, mask", 21, None, 30, mask=(2, 2, 21, 30)),
        _case("no targets", 12, ((), ()), ranks=True),
        _case("no target is real", 12, ((-1, -1), (-1, -1)), ranks=True),
        _case("one target, no biases", 33, ((32,), (0,)), biases="", ranks=True),
        _case("one token", 1, ((0,), (0,)), ranks=True),
        _case("few rows", 2, ((1,), (0,)), 19, ranks=True, mask=(2, 1, 2, 19), head_size=40),
        _case("few rows, long", 1, ((0, -1), (-1, 0)), 530, ranks=True, head_size=80, small=False),
        _case("no rows", 0, ((), ()), 5),
        _case("no rows, targets", 0, ((-1, -1), (-1, -1)), 5, ranks=True),
        _case("no rows, targets, mask", 0, ((-1,), (-1,)), 5, mask=(2, 1, 0, 5)),
        _case("no keys", 4, None, 0, biases="uv"),
        _case("no batch", 4, (), batch=0),
        _case("more targets than positions", 3, ((0, 1, 2, 2, 1, 0), (2,) * 6), ranks=True),
        _case("lengths", 30, ((29, 2), (5, 20), (0, 1)), batch=3, lengths=(30, 0, 1)),
        _case("mask of keys", 26, ((3, 4, 5), (25, 24, 0)), mask=(2, 1, 1, 26), hidden=0.6),
        _case("mask of all sequences", 26, ((3, 4, 5), (25, 24, 0)), mask=(1, 1, 26, 26), hidden=0.6),
        _case("mask of every head", 26, ((3, 4, 5), (25, 24, 0)), 32, mask=(2, 2, 26, 32)),
        *(
            _case(f"head size {d}", 25, ((24, 3), (5, 5)), head_size=d, ranks=True, layout="heads first")
            for d in (1, 33, 80)
        ),
        _case("offset T - 1", 18, ((17, 0), (5, 6)), offset=17, biases="uv"),
        _case("long", 540, (_every(540, 6),), batch=1, ranks=True, small=False),
        _case("memory, long", 64, (_every(64, 6),), 1100, batch=1, ranks=True, small=False),
        _case("uniform", 15, ((3, 14, -1), (0, 1, 2)), 22, ranks=True, lengths=(22, 9), masked_rows="uniform"),
        _case("dropout", 30, (_every(30, 3),) * 2, ranks=True, dropout_p=0.3, seed=-5),
        _case("dropout of everything", 10, ((1,), (2,)), dropout_p=1.0, seed=0),
        _case("float32 parameters", 23, ((1, 2), (9, 22)), float32=True, ranks=True),
        _case("strided", 21, ((1, 2), (9, 20)), ranks=True, layout="strided"),
        _case("scale negative", 15, ((1, 2), (9, 14)), scale=-0.3),
        _case("huge", 25, ((1, 2), (9, 24)), ranks=True, magnitude=20.0),
        _case("tiny", 25, ((1, 2), (9, 24)), ranks=True, magnitude=1e-3),
    ),
    bad=(
        Bad(
            "content query no tensor",
            replace(content_query=lambda a: [1.0]),
            TypeError,
            ("content_query", "list", "wanted a tensor"),
        ),
        Bad(
            "query query dtype",
            replace(query_query=lambda a: a["query_query"].half()),
            TypeError,
            ("query_query", "float16", "float32"),
        ),
        Bad(
            "query query heads",
            replace(query_query=lambda a: a["query_query"][:, :, :1]),
            ValueError,
            ("query_query", "[2, 3, 1, 16]", "[2, 3, 2, 16]"),
        ),
        Bad(
            "query query rows",
            replace(target_positions=lambda a: None),
            ValueError,
            ("query_query", "[2, 3, 2, 16]", "[2, 7, 2, 16]", "target_positions"),
        ),
        Bad("targets dtype", _targets(of=lambda t: t.long()), TypeError, ("target_positions", "int64", "int32")),
        Bad("targets shape", _targets(of=lambda t: t[:, :2]), ValueError, ("target_positions", "[2, 2]", "[2, 3]")),
        Bad("targets outside", _targets(of=lambda t: t + 1), ValueError, ("target_positions", "7", "[-1, 6]")),
        Bad("targets negative", _targets(of=lambda t: t - 1), ValueError, ("target_positions", "-2", "[-1, 6]")),
        *SHARED_BAD,
    ),
    tiles=True,
    terms=_terms,
    flops=lambda a: 6 * (a["content_query"].numel() + a["query_query"].numel()) * a["key"].shape[1],
    bytes_moved=lambda a: sum(
        a[n].numel() * a[n].element_size() for n in (*_STREAMS, *_STREAMS, "key", "value", "position_key")
    ),
)
