"""Inputs of two_stream_attention."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any, Self

import torch

from pyxlbert.ops.two_stream_attention import two_stream_attention
from pyxlbert.reference.philox import Tag
from pyxlbert.testing.specs._attention import HEAD_SIZES, compiled, lengths_of, mask_of, query_key_value, rows
from pyxlbert.testing.specs._relative import SHARED_BAD, RelativeInputs
from pyxlbert.testing.specs._relative_plain import rounding_of, stream, stream_terms
from pyxlbert.testing.specs._spec import (
    BOTH,
    HALF,
    Arguments,
    Bad,
    Case,
    Draw,
    Spec,
    Use,
    bytes_of,
    replace,
    timed,
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
    if any(a[n].numel() == 0 for n in ("content_query", "key")):
        return None
    # A stream without rows adds nothing.
    found = [
        stream_terms(dout.double(), rounding=rounding_of(dout), **options) if dout.numel() else {}
        for options, dout in zip(streams(a), cotangents, strict=True)
    ]
    if name.startswith("out"):
        return found[int(name.removeprefix("out "))].get("out")
    wanted = name.removeprefix("grad ")
    if wanted in _STREAMS:
        return found[_STREAMS.index(wanted)].get("query")
    return sum(terms[wanted] for terms in found if terms)


@dataclass(frozen=True)
class Inputs(RelativeInputs):
    """See `RelativeInputs`; `queries` is T.

    Attributes:
        targets: target_positions; how many, the last ones by `ranks` "order"; None: the query stream has a row for
            every position.
    """

    biases: str = "uvse"
    targets: tuple[tuple[int, ...], ...] | int | None = None

    @property
    def target_count(self) -> int:
        """Rows of the query stream."""
        if self.targets is None:
            return self.queries
        if isinstance(self.targets, int):
            return self.targets
        return len(self.targets[0]) if self.targets else 0

    def sized(self, batch: int, length: int, head_size: int, heads: int | None = None) -> Self:
        """The same call with this many keys per sequence, and as many targets in proportion."""
        sized = super().sized(batch, length, head_size, heads)
        if isinstance(self.targets, int):
            sized = changed(sized, targets=self.targets * length // self.key_count)
        return sized

    def __str__(self) -> str:
        return super().__str__() + (f" M={self.targets}" if isinstance(self.targets, int) else "")


def make(inputs: Inputs, draw: Draw) -> Arguments:
    """See `Spec`."""
    arguments: Arguments = inputs.options("offset", "masked_rows")
    content, k, v = query_key_value(inputs, draw)
    query = rows(inputs, draw, inputs.target_count)
    arguments |= {"content_query": content, "query_query": query, "key": k, "value": v}
    arguments |= inputs.relative_arguments(draw, inputs.queries)
    arguments |= inputs.segment_arguments(draw)
    arguments |= inputs.rank_arguments(draw)
    if isinstance(inputs.targets, int):
        last = arguments["query_rank"].argsort(1)[:, inputs.queries - inputs.targets :]
        arguments["target_positions"] = last.sort(1).values.to(torch.int32)
    elif inputs.targets is not None:
        arguments["target_positions"] = draw.numbers(inputs.targets).view(inputs.batch, inputs.target_count)
    arguments |= lengths_of(inputs, draw, arguments)
    return arguments | mask_of(inputs, draw)


def _targets(**changes: Any) -> Any:
    """target_positions of the first case with a change."""
    return replace(target_positions=lambda a: changes["of"](a["target_positions"]))


def _every(n: int, step: int) -> tuple[int, ...]:
    return tuple(range(0, n, step))


def _flops(a: Arguments, backward: bool) -> int:
    """Three products of both streams' rows forward; backward repeats two and makes six more."""
    rows = a["content_query"].numel() + a["query_query"].numel()
    return 2 * (11 if backward else 3) * rows * a["key"].shape[1]


def _bytes_moved(a: Arguments, backward: bool) -> int:
    """As relative_attention's, of two queries."""
    each = bytes_of(*(a[n] for n in (*_STREAMS, *_STREAMS, "key", "value", "position_key")))
    return (3 if backward else 1) * each


def _xlnet(batch: int, length: int, head_size: int = 64) -> Inputs:
    """XLNet-base's pretraining: a permutation by ranks, a sixth of the tokens at its end are the targets."""
    return Inputs(
        length,
        targets=length // 6,
        batch=batch,
        heads=12,
        head_size=head_size,
        biases="uv",
        table_scale=0.5,
        bias_scale=0.3,
        ranks="order",
    )


_RANKS = Inputs(6, targets=1, layout="by head", ranks="order", dropout_p=0.1)

SPEC = Spec(
    name="two_stream_attention",
    function=two_stream_attention,
    plain=plain,
    make=make,
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
        Case(
            "everything",
            Inputs(
                7,
                11,
                targets=((6, 0, 3), (2, -1, 2)),
                tables=2,
                table_rows=20,
                lengths=(11, 4),
                ranks="random",
                mask=(2, 1, 7, 11),
                dropout_p=0.2,
                seed=3,
            ),
        ),
        Case("XLNet", Inputs(48, targets=((40, 3, 17, 22, 9, 31, 47, 0),) * 2, head_size=64, ranks="random")),
        Case(
            "XLNet, memory, two tables",
            Inputs(24, 44, targets=((1, 5), (20, 8), (3, -1), (23, 0)), batch=4, tables=2, ranks="random"),
        ),
        Case("no masks", Inputs(20, targets=((4, 19), (0, 7)))),
        Case("a row a position", Inputs(21, ranks="random")),
        Case("a row a position, mask", Inputs(21, 30, mask=(2, 2, 21, 30))),
        Case("no targets", Inputs(12, targets=((), ()), ranks="random")),
        Case("no target is real", Inputs(12, targets=((-1, -1), (-1, -1)), ranks="random")),
        Case("one target, no biases", Inputs(33, targets=((32,), (0,)), biases="", ranks="random")),
        Case("one token", Inputs(1, targets=((0,), (0,)), ranks="random")),
        Case("few rows", Inputs(2, 19, targets=((1,), (0,)), ranks="random", mask=(2, 1, 2, 19), head_size=40)),
        Case("few rows, long", Inputs(1, 530, targets=((0, -1), (-1, 0)), ranks="random", head_size=80), small=False),
        Case("no rows", Inputs(0, 5, targets=((), ()))),
        Case("no rows, targets", Inputs(0, 5, targets=((-1, -1), (-1, -1)), ranks="random")),
        Case("no rows, targets, mask", Inputs(0, 5, targets=((-1,), (-1,)), mask=(2, 1, 0, 5))),
        Case("no keys", Inputs(4, 0, biases="uv")),
        Case("no batch", Inputs(4, targets=(), batch=0)),
        Case("more targets than positions", Inputs(3, targets=((0, 1, 2, 2, 1, 0), (2,) * 6), ranks="random")),
        Case("lengths", Inputs(30, targets=((29, 2), (5, 20), (0, 1)), batch=3, lengths=(30, 0, 1))),
        Case("mask of keys", Inputs(26, targets=((3, 4, 5), (25, 24, 0)), mask=(2, 1, 1, 26), hidden=0.6)),
        Case("mask of all sequences", Inputs(26, targets=((3, 4, 5), (25, 24, 0)), mask=(1, 1, 26, 26), hidden=0.6)),
        Case("mask of every head", Inputs(26, 32, targets=((3, 4, 5), (25, 24, 0)), mask=(2, 2, 26, 32))),
        *(
            Case(
                f"head size {d}",
                Inputs(25, targets=((24, 3), (5, 5)), head_size=d, ranks="random", layout="heads first"),
            )
            for d in (1, 33, 80)
        ),
        Case("offset T - 1", Inputs(18, targets=((17, 0), (5, 6)), offset=17, biases="uv")),
        Case("long", Inputs(540, targets=(_every(540, 6),), batch=1, ranks="random"), small=False),
        Case("memory, long", Inputs(64, 1100, targets=(_every(64, 6),), batch=1, ranks="random"), small=False),
        Case(
            "uniform",
            Inputs(15, 22, targets=((3, 14, -1), (0, 1, 2)), ranks="random", lengths=(22, 9), masked_rows="uniform"),
        ),
        Case("dropout", Inputs(30, targets=(_every(30, 3),) * 2, ranks="random", dropout_p=0.3, seed=-5)),
        Case("dropout of everything", Inputs(10, targets=((1,), (2,)), dropout_p=1.0, seed=0)),
        Case("float32 parameters", Inputs(23, targets=((1, 2), (9, 22)), wide=True, ranks="random")),
        Case("strided", Inputs(21, targets=((1, 2), (9, 20)), ranks="random", layout="strided")),
        Case("scale negative", Inputs(15, targets=((1, 2), (9, 14)), scale=-0.3)),
        Case("huge", Inputs(25, targets=((1, 2), (9, 24)), ranks="random", magnitude=20.0)),
        Case("tiny", Inputs(25, targets=((1, 2), (9, 24)), ranks="random", magnitude=1e-3)),
        Case(
            "emulated",
            Inputs(200, targets=40, batch=1, head_size=64, layout="apart", ranks="order"),
            {Use.EMULATION: HALF},
        ),
        *(
            Case(f"D={d}", _RANKS.sized(2, 512, d, 12), compiled(d, HALF if d == 64 else ()))
            for d in HEAD_SIZES
            if d <= 128
        ),
        *(
            case
            for batch, length in ((8, 128), (4, 512))
            for case in timed(_xlnet(batch, length), {Use.RACE: BOTH}, {Use.RACE: BOTH})
        ),
        *timed(_xlnet(1, 2048), {Use.RACE: BOTH}, {Use.RACE: BOTH, Use.PREFER: BOTH}),
        *(
            case
            for batch, length, head_size in ((1, 128, 64), (8, 2048, 64), (1, 128, 128), (1, 2048, 128), (8, 2048, 128))
            for case in timed(_xlnet(batch, length, head_size), both={Use.PREFER: BOTH})
        ),
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
    rounded={"position_key": "content_query"},
    tiles=True,
    terms=_terms,
    flops=_flops,
    bytes_moved=_bytes_moved,
)
