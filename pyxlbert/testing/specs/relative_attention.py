"""Inputs of relative_attention."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

import torch

from pyxlbert.ops.relative_attention import relative_attention
from pyxlbert.testing.specs._attention import (
    HEAD_SIZES,
    WHOLE,
    compiled,
    flops_of,
    lengths_of,
    mask_of,
    packing,
    query_key_value,
)
from pyxlbert.testing.specs._relative import SHARED_BAD, RelativeInputs
from pyxlbert.testing.specs._relative_plain import plain, terms_of
from pyxlbert.testing.specs._spec import (
    BOTH,
    HALF,
    ROWS,
    SINGLE,
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


@dataclass(frozen=True)
class Inputs(RelativeInputs):
    """See `RelativeInputs`.

    Attributes:
        positions: query_positions, or True for the first ones of a random order.
        see_self: argument of the op.
    """

    positions: tuple[tuple[int, ...], ...] | bool = False
    see_self: bool | None = None


def make(inputs: Inputs, draw: Draw) -> Arguments:
    """See `Spec`."""
    arguments: Arguments = inputs.options("offset", "see_self", "masked_rows") | packing(inputs, draw)
    q, k, v = query_key_value(inputs, draw)
    arguments |= {"query": q, "key": k, "value": v}
    offset = inputs.queries if inputs.sequences is None and inputs.positions is not True else inputs.longest
    arguments |= inputs.relative_arguments(draw, offset)
    if inputs.layout in ("heads first", "strided") and inputs.tables == 0:
        count, heads, size = arguments["position_key"].shape
        table = draw.normal(heads, count, size, scale=inputs.magnitude * inputs.table_scale)
        arguments["position_key"] = table.transpose(0, 1)
    arguments |= inputs.segment_arguments(draw)
    arguments |= inputs.rank_arguments(draw)
    if inputs.positions is True:
        arguments["query_positions"] = draw.orders(inputs.batch, inputs.key_count)[:, : inputs.queries].contiguous()
        arguments.setdefault("offset", offset)
    elif inputs.positions:
        arguments["query_positions"] = draw.numbers(inputs.positions)
    arguments |= lengths_of(inputs, draw, arguments)
    return arguments | mask_of(inputs, draw)


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


_INT32 = torch.int32
_PLAIN = Inputs(1, layout="by head")
_SEGMENTS = changed(_PLAIN, biases="uvse")
_RANKS = changed(_SEGMENTS, ranks="order", see_self=True)
_ALL = {"mask": (WHOLE, 1, WHOLE, WHOLE), "hidden": 0.0, "dropout_p": 0.1}
# Kinds of launches that are compiled ahead, and kinds that tiles are searched for, at any sizes.
_KINDS = {
    "plain": changed(_PLAIN, fill=1.0),
    "XLNet": changed(_RANKS, fill=1.0),
    "everything": changed(_RANKS, fill=1.0, **_ALL),
    "positions": changed(_RANKS, fill=1.0, positions=True, see_self=None),
}
_TILES = {
    "plain": _PLAIN,
    "segments": _SEGMENTS,
    "ranks": _RANKS,
    "dropout": changed(_RANKS, dropout_p=0.1),
    "everything": changed(_RANKS, fill=1.0, **_ALL),
}
# A sixth of the keys' rows, each at a position of its own.
_TARGETS = {"queries": 1, "keys": 6, "positions": True, "see_self": None}


def _xlnet(batch: int, length: int, head_size: int = 64) -> Inputs:
    """XLNet-base's term of content and position, no mask, scores of the size that a model's have."""
    return Inputs(length, batch=batch, heads=12, head_size=head_size, table_scale=0.5, bias_scale=0.3)


def _bytes_moved(a: Arguments, backward: bool) -> int:
    """query, key, value and table read, the output written; backward reads them and its gradient and writes four."""
    each = bytes_of(*(a[n] for n in ("query", "query", "key", "value", "position_key")))
    return (3 if backward else 1) * each


SPEC = Spec(
    name="relative_attention",
    function=relative_attention,
    plain=plain,
    make=make,
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
        Case(
            "everything",
            Inputs(
                7,
                11,
                tables=2,
                table_rows=20,
                biases="uvse",
                lengths=(11, 4),
                ranks="random",
                see_self=True,
                mask=(2, 1, 7, 11),
                dropout_p=0.2,
                seed=3,
            ),
        ),
        Case("plain", Inputs(37, head_size=64)),
        Case("no biases", Inputs(21, biases="")),
        Case("content bias alone", Inputs(21, biases="u")),
        Case("position bias alone", Inputs(21, biases="v")),
        Case("Conformer", Inputs(40, biases="uv", offset=39, table_rows=79, lengths=(40, 31))),
        Case("Transformer-XL", Inputs(20, 43, biases="uv", offset=19, table_rows=43, causal=True, layout="apart")),
        Case("Funnel", Inputs(15, 33, offset=33, layout="apart")),
        Case("one token", Inputs(1, head_size=32, offset=0)),
        Case("one query, many keys", Inputs(1, 530, head_size=32, layout="apart"), small=False),
        Case("many queries, one key", Inputs(50, 1, layout="apart")),
        Case("more queries than keys", Inputs(70, 19, head_size=24, layout="apart")),
        Case("memory", Inputs(20, 47, biases="uvse", layout="apart")),
        Case("no queries", Inputs(0, 7, layout="apart")),
        Case("no keys", Inputs(5, 0, layout="apart")),
        Case("no batch", Inputs(5, batch=0)),
        Case("one head", Inputs(20, heads=1, head_size=40, biases="uvse")),
        Case("tables of a longer text", Inputs(25, table_rows=90, offset=40)),
        Case("a table each", Inputs(19, batch=4, tables=4)),
        Case("two tables for four", Inputs(19, 26, batch=4, tables=2, biases="uvse", layout="apart")),
        Case("one table in four dimensions", Inputs(19, tables=1)),
        Case("segments without bias", Inputs(22, biases="e")),
        Case("segments, memory", Inputs(22, 31, biases="se", layout="apart")),
        Case("lengths 0, 1 and all", Inputs(33, batch=4, lengths=(0, 1, 33, 17), biases="uvse")),
        *(
            Case(f"head size {d}", Inputs(35, head_size=d, lengths=(35, 20), layout="heads first"))
            for d in (1, 3, 33, 80, 128)
        ),
        Case("few rows", Inputs(4, 23, head_size=40, biases="uvse", ranks="random", see_self=True, lengths=(23, 9))),
        Case(
            "few rows, places",
            Inputs(3, 20, positions=((5, 0, -1), (7, 7, 2)), offset=8, head_size=7, mask=(2, 1, 3, 20)),
        ),
        Case(
            "few rows, causal",
            Inputs(2, 530, batch=4, tables=2, table_rows=531, causal=True, head_size=80),
            small=False,
        ),
        Case(
            "few rows, uniform",
            Inputs(2, 12, table_rows=14, lengths=(12, 0), ranks="random", causal=True, masked_rows="uniform"),
        ),
        Case("few rows, dropout", Inputs(1, 600, head_size=64, dropout_p=0.3, seed=4, biases="uvse"), small=False),
        Case("long", Inputs(530, batch=1, head_size=64), small=False),
        Case("memory, long", Inputs(70, 1100, batch=1, head_size=32, biases="uvse", layout="apart"), small=False),
        Case("few heads, long", Inputs(64, 1200, batch=1, heads=1, head_size=32, layout="apart"), small=False),
        Case("causal", Inputs(61, causal=True)),
        Case("causal, fewer keys", Inputs(43, 20, causal=True, table_rows=21 + 1, offset=43, layout="apart")),
        Case("causal, long", Inputs(560, batch=1, causal=True, lengths=(500,), dropout_p=0.1, seed=1), small=False),
        Case("ranks", Inputs(50, ranks="random")),
        Case("ranks, see self", Inputs(50, ranks="random", see_self=True, biases="uvse")),
        Case("ranks, memory, lengths", Inputs(30, 47, ranks="random", see_self=True, lengths=(47, 20), layout="apart")),
        Case("ranks, long", Inputs(540, batch=1, ranks="random", see_self=True), small=False),
        Case("mask of every pair", Inputs(29, 41, mask=(2, 2, 29, 41), layout="apart")),
        Case("mask of keys, see self", Inputs(29, mask=(2, 1, 1, 29), see_self=True, hidden=0.9)),
        Case("mask of queries", Inputs(29, mask=(1, 1, 29, 1))),
        Case("causal, see self, fewer keys", Inputs(30, 22, causal=True, see_self=True, layout="apart")),
        Case("positions", Inputs(3, 20, positions=((7, 0, 19), (3, 3, 12)), offset=20, layout="apart")),
        Case(
            "positions, none, ranks",
            Inputs(
                4,
                26,
                positions=((7, -1, 19, 2), (-1, -1, -1, -1)),
                offset=20,
                ranks="random",
                biases="uvse",
                dropout_p=0.3,
                seed=8,
                layout="apart",
            ),
        ),
        Case("uniform", Inputs(30, ranks="random", masked_rows="uniform", lengths=(30, 0), biases="uvse")),
        Case("uniform, mask", Inputs(20, 33, mask=(2, 1, 20, 1), masked_rows="uniform", layout="apart")),
        Case("uniform, packed", Inputs(0, packed=(9, 0, 20), ranks="random", masked_rows="uniform")),
        Case(
            "uniform, positions",
            Inputs(2, 9, positions=((8, -1), (2, 1)), offset=9, ranks="random", masked_rows="uniform"),
        ),
        Case("uniform, causal", Inputs(20, 33, causal=True, lengths=(33, 9), masked_rows="uniform", layout="apart")),
        Case("dropout", Inputs(30, 50, dropout_p=0.3, seed=-5, layout="apart")),
        Case("dropout of everything", Inputs(10, dropout_p=1.0, seed=0)),
        Case("packed", Inputs(0, packed=(5, 0, 1, 33, 18), head_size=32, biases="uvse")),
        Case("packed, causal, dropout", Inputs(0, packed=(40, 7, 64), causal=True, dropout_p=0.2, seed=2**40)),
        Case(
            "packed, ranks, tables",
            Inputs(0, packed=(12, 30, 7, 9), tables=2, ranks="random", see_self=True, biases="uvse"),
        ),
        Case("packed, Conformer", Inputs(0, packed=(12, 30), offset=29, table_rows=59)),
        Case("packed, nothing", Inputs(0, packed=())),
        Case("packed, empty sequences", Inputs(0, packed=(0, 0))),
        Case("float32 parameters", Inputs(23, biases="uvse", wide=True, tables=2)),
        Case("strided", Inputs(21, layout="strided")),
        Case("expanded", Inputs(21, layout="expanded")),
        Case("scale 0", Inputs(15, scale=0.0)),
        Case("scale negative", Inputs(15, scale=-0.3, lengths=(15, 6), biases="uvse")),
        Case("huge", Inputs(25, magnitude=20.0, biases="uvse")),
        Case("tiny", Inputs(25, magnitude=1e-3, biases="uvse")),
        Case("emulated", Inputs(200, batch=1, head_size=64, layout="apart"), {Use.EMULATION: HALF}),
        Case(
            "emulated, everything",
            Inputs(
                200,
                batch=1,
                head_size=64,
                layout="apart",
                biases="uvse",
                ranks="order",
                see_self=True,
                dropout_p=0.2,
                seed=5,
            ),
            {Use.EMULATION: HALF},
        ),
        *(
            Case(
                f"emulated, {id}",
                Inputs(
                    200, batch=1, head_size=64, layout="apart", biases=biases, lengths=(170,), unseen=True, **options
                ),
                {Use.EMULATION: HALF},
            )
            for id, biases, options in (
                ("segments", "uvse", {}),
                ("dropout", "uv", {"dropout_p": 0.2, "seed": 5}),
                ("segments, dropout", "uvse", {"dropout_p": 0.2, "seed": 5}),
            )
        ),
        Case(
            "emulated, split keys",
            Inputs(5, 1100, head_size=64, layout="apart", biases="uv", lengths=(1100, 700), unseen=True, offset=5),
            {Use.EMULATION: HALF},
        ),
        # Three windows of 128 queries and six tiles of 64 keys, more than the table's blocks that are kept.
        *(
            Case(f"Hopper, {id}", Inputs(330, layout="by head", head_size=size, **options), {Use.HOPPER: HALF})
            for id, size, options in (
                ("segments", 64, {"biases": "uvse", "lengths": (330, 201), "unseen": True}),
                ("causal with memory", 64, {"keys": 400, "causal": True, "offset": 400, "table_rows": 730}),
                ("packed, segments", 64, {"biases": "uvse", "packed": (200, 1, 459)}),
                ("short heads", 40, {}),
                ("segments, dropout", 64, {"biases": "uvse", "causal": True, "dropout_p": 0.3, "seed": 2**33 + 5}),
                (
                    "segments, expanded",
                    64,
                    {"biases": "uvse", "lengths": (330, 201), "unseen": True, "table_layout": "expanded"},
                ),
            )
        ),
        *(
            Case(f"D={d} {kind}", inputs.sized(2, 512, d, 12), compiled(d, usual))
            for d in HEAD_SIZES
            if d <= 128
            for kind, inputs in _KINDS.items()
            for usual in (None if kind == "XLNet" else HALF if d == 64 else (),)
        ),
        *(
            Case(f"tiles, {kind}{stream}", changed(inputs, **own).sized(2, 512, 64, 12), {Use.TILES: ()})
            for stream, own in (("", {}), (", positions", _TARGETS))
            for kind, inputs in _TILES.items()
        ),
        *(
            case
            for batch, length in ((8, 128), (2, 512))
            for case in timed(_xlnet(batch, length), {Use.RACE: BOTH}, {Use.RACE: BOTH})
        ),
        *timed(
            _xlnet(1, 2048), {Use.RACE: BOTH, Use.LENGTHS: BOTH}, {Use.RACE: BOTH, Use.LENGTHS: BOTH, Use.PREFER: BOTH}
        ),
        *timed(_xlnet(1, 128), {Use.LENGTHS: BOTH}, {Use.LENGTHS: BOTH, Use.PREFER: BOTH}),
        *(
            case
            for length in (256, 512, 1024, 4096, 8192)
            for case in timed(_xlnet(1, length), {Use.LENGTHS: BOTH}, {Use.LENGTHS: BOTH})
        ),
        *timed(_xlnet(ROWS // 512, 512), {Use.TARGET: HALF}, {Use.TARGET: HALF}),
        *timed(_xlnet(ROWS // 2048, 2048), {Use.TARGET: HALF, Use.GPU: SINGLE}, {Use.TARGET: HALF, Use.PREFER: BOTH}),
        *timed(_xlnet(ROWS // 8192, 8192), {Use.TARGET: HALF}, {Use.TARGET: HALF}),
        *(
            case
            for batch, length in ((1, 128), (1, 2048))
            for case in timed(_xlnet(batch, length, 128), both={Use.PREFER: BOTH})
        ),
        *timed(_xlnet(8, 2048, 128), {Use.DECIDE: HALF}, {Use.DECIDE: HALF, Use.PREFER: BOTH}),
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
    rounded={"position_key": "query"},
    tiles=True,
    terms=terms_of,
    # Three products forward; backward repeats two and makes six more.
    flops=lambda a, backward: flops_of(11 if backward else 3, a),
    bytes_moved=_bytes_moved,
)
