"""Inputs of attention."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from pyxlbert.ops.attention import attention
from pyxlbert.reference.philox import keep_scores
from pyxlbert.testing import tolerances
from pyxlbert.testing.specs._attention import (
    HEAD_SIZES,
    WHOLE,
    Scores,
    compiled,
    flops_of,
    lengths_of,
    mask_of,
    packing,
    query_key_value,
    rounding_of_lse,
)
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


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """Two matrix products and a softmax in query's dtype; packed sequences one after the other."""
    return _by_sequence(_plain, query, key, value, **options)


def _by_sequence(
    function: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
) -> torch.Tensor:
    offsets = options.pop("cu_seqlens", None)
    options.pop("max_seqlen", None)
    if offsets is None:
        return function(query, key, value, **options)
    if query.shape[0] == 0:
        return value * query
    rows = [slice(*ends) for ends in pairwise(offsets.tolist())]
    heads = query.shape[1]
    return torch.cat(
        [
            function(query[r][None], key[r][None], value[r][None], first_plane=b * heads, **options)[0]
            for b, r in enumerate(rows)
        ]
    )


def _plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    p, factor = _weights(query, key, **options)
    return torch.matmul((p * factor).to(value.dtype), value.transpose(1, 2)).transpose(1, 2)


def _weights(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    key_lengths: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    first_plane: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax weights `[B, H, Tq, Tk]`, and what dropout multiplies them by."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    s = torch.matmul(query.transpose(1, 2), key.permute(0, 2, 3, 1)) * scale
    if bias is not None:
        s = s + bias
    (batch, heads, queries, keys), device = s.shape, s.device
    allowed = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=device)
    if key_lengths is not None:
        allowed = allowed & (torch.arange(keys, device=device) < key_lengths[:, None, None, None])
    if causal:
        allowed = allowed & torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if attention_mask is not None:
        allowed = allowed & attention_mask
    s = s.masked_fill(~allowed, -torch.inf)
    seen = (s > -torch.inf).any(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(~seen, 0.0), -1).masked_fill(~seen, 0.0)
    factor = torch.ones_like(p)
    if dropout_p > 0:
        planes = first_plane + batch * heads
        keep = keep_scores(torch.tensor([seed]), dropout_p, 1, planes, queries, keys)[0, first_plane:]
        factor = keep.view(p.shape).to(p.dtype) * (1 / (1 - dropout_p) if dropout_p < 1 else 0)
    return p, factor


@dataclass(frozen=True)
class Inputs(Scores):
    """See `Scores`.

    Attributes:
        bias: its shape, with WHOLE for the sizes themselves; of one without a mask `hidden` is -inf.
        bias_float32: the bias in float32.
        one_sign: values of one sign and nearly equal weights: a sum over the keys that drifts where it is one chain.
    """

    hidden: float = 0.0
    bias: tuple[int, ...] | None = None
    bias_float32: bool = False
    one_sign: bool = False


def make(inputs: Inputs, draw: Draw) -> Arguments:
    """See `Spec`."""
    q, k, v = query_key_value(inputs, draw)
    arguments = {"query": q, "key": k, "value": v, **inputs.options(), **packing(inputs, draw)}
    arguments |= lengths_of(inputs, draw, arguments)
    arguments |= mask_of(inputs, draw)
    if inputs.one_sign:
        arguments["value"] = torch.linspace(0.1, 0.9, v.shape[-1]).to(v).expand_as(v)
    if inputs.bias is not None:
        shape, wide = inputs.whole(inputs.bias), draw.single if inputs.bias_float32 else draw.dtype
        arguments["bias"] = draw.normal(*shape, scale=inputs.magnitude, dtype=wide)
        if inputs.mask is None and inputs.hidden:
            arguments["bias"] = arguments["bias"].masked_fill(draw.share(inputs.hidden, shape), -torch.inf)
    return arguments


def _pack(**changes: Any) -> Any:
    """The first case's tensors as one packed batch of lengths 5 and 6, with further changes."""

    def change(a: Arguments) -> Arguments:
        rows = {name: a[name][0, :11] for name in ("query", "key", "value")}
        return (
            rows | {"cu_seqlens": torch.tensor([0, 5, 11], dtype=torch.int32)} | {n: v(a) for n, v in changes.items()}
        )

    return change


def _terms(name: str, a: Arguments, cotangents: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    """Sums of absolute terms.

    Where a row's keys fill more than one block, a backward that saves only out and lse takes delta = dout . out from
    the rounded out, so that rounding, in float32's eps, counts as a term.  A score is itself a sum of terms: once their
    rounding is a change of the score, and a weight changes by as much and by the mean of its row.  Plain PyTorch's
    scores of few queries say nothing of it: MKL sums those in another order, half as wrong.  Weights of backward carry
    the rounding of lse too.
    """
    rounding = torch.finfo(cotangents[0].dtype).eps / torch.finfo(torch.float32).eps
    options = {n: v for n, v in a.items() if n not in ("query", "key", "value")}
    scale = a.get("scale") if a.get("scale") is not None else a["query"].shape[-1] ** -0.5

    def of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dout: torch.Tensor, **options: Any) -> Any:
        p, factor = _weights(query, key, **options)
        q, k, v, g = (x.abs().transpose(1, 2) for x in (query, key, value, dout))
        reach = abs(scale) * torch.matmul(q, k.transpose(-1, -2))
        size = reach / tolerances.TERMS
        change = 1.0 + size + (p * size).sum(-1, keepdim=True)
        if name == "out 0":
            return torch.matmul(p * factor * change, v).transpose(1, 2)
        if options.get("bias") is not None:
            bias = options["bias"].abs()
            reach = reach + bias.masked_fill(bias.isinf(), 0.0)
        change = change + rounding_of_lse(p, reach)
        kept = p * factor * change
        if name == "grad value":
            return torch.matmul(kept.transpose(-1, -2), g).transpose(1, 2)
        dp = torch.matmul(g, v.transpose(-1, -2)) * factor
        ds = change * p * (dp + max(1.0, rounding) * (p * dp).sum(-1, keepdim=True))
        if name == "grad query":
            return abs(scale) * torch.matmul(ds, k).transpose(1, 2)
        if name == "grad key":
            return abs(scale) * torch.matmul(ds.transpose(-1, -2), q).transpose(1, 2)
        return ds.sum_to_size(a["bias"].shape)

    dout = cotangents[0].double()
    if a["query"].numel() == 0 or a["key"].numel() == 0:
        return None
    if a.get("cu_seqlens") is None:
        return of(a["query"], a["key"], a["value"], dout, **options)
    offsets = options.pop("cu_seqlens").tolist()
    options.pop("max_seqlen", None)
    rows = [slice(*ends) for ends in pairwise(offsets)]
    heads = a["query"].shape[1]
    return torch.cat(
        [
            of(
                a["query"][r][None],
                a["key"][r][None],
                a["value"][r][None],
                dout[r][None],
                first_plane=b * heads,
                **options,
            )[0]
            for b, r in enumerate(rows)
        ]
    )


_INT32 = torch.int32
_EVERYTHING = Inputs(
    1,
    layout="by head",
    fill=1.0,
    mask=(WHOLE, 1, WHOLE, WHOLE),
    bias=(1, WHOLE, WHOLE, WHOLE),
    causal=True,
    dropout_p=0.1,
)


def _bert(batch: int, length: int, **options: Any) -> Inputs:
    """As BERT-base calls it, every key real unless `fill` says how many."""
    return Inputs(length, batch=batch, **{"heads": 12, "head_size": 64, "fill": 1.0, **options})


SPEC = Spec(
    name="attention",
    function=attention,
    plain=plain,
    make=make,
    differentiable=("query", "key", "value", "bias"),
    cases=(
        Case("bias and lengths", Inputs(13, 11, lengths=(11, 4), bias=(1, 2, 13, 11), dropout_p=0.2, seed=3)),
        Case("fused", Inputs(37, head_size=64)),
        Case("one token", Inputs(1, head_size=32)),
        Case("one query, many keys", Inputs(1, 530, head_size=32, layout="apart"), small=False),
        Case(
            "values of one sign",
            Inputs(24, 8192, batch=1, heads=1, head_size=64, magnitude=0.01, layout="apart", one_sign=True),
            small=False,
        ),
        Case("few queries", Inputs(4, 21, head_size=40, lengths=(21, 10), mask=(2, 1, 4, 21), layout="apart")),
        Case(
            "few queries, causal",
            Inputs(3, 530, head_size=80, causal=True, dropout_p=0.2, seed=2, layout="apart"),
            small=False,
        ),
        Case("few queries, bias", Inputs(2, 19, head_size=7, bias=(2, 2, 2, 19), layout="strided")),
        Case("many queries, one key", Inputs(50, 1, layout="apart")),
        Case("more queries than keys", Inputs(70, 19, head_size=24, layout="apart")),
        Case("no queries", Inputs(0, 7, layout="apart")),
        Case("no keys", Inputs(5, 0, layout="apart")),
        Case("no batch", Inputs(5, batch=0)),
        Case("one head", Inputs(20, heads=1, head_size=40)),
        Case("lengths 0, 1 and all", Inputs(33, batch=4, lengths=(0, 1, 33, 17))),
        *(
            Case(f"head size {d}", Inputs(35, head_size=d, lengths=(35, 20), layout="heads first"))
            for d in (1, 3, 33, 80, 96, 128)
        ),
        Case("head size 200", Inputs(20, head_size=200)),
        Case("two key blocks", Inputs(30, 600, head_size=32, lengths=(600, 300), layout="apart"), small=False),
        Case("long", Inputs(530, batch=1, head_size=64), small=False),
        Case("few heads, long", Inputs(64, 1200, batch=1, heads=1, head_size=32, layout="apart"), small=False),
        Case("causal", Inputs(61, causal=True)),
        Case("causal, memory", Inputs(20, 43, causal=True, layout="apart")),
        Case("causal, fewer keys", Inputs(43, 20, causal=True, layout="apart")),
        Case("causal, long", Inputs(560, batch=1, causal=True, lengths=(500,), dropout_p=0.1, seed=1), small=False),
        Case("mask of every pair", Inputs(29, 41, mask=(2, 2, 29, 41), hidden=0.4, layout="apart")),
        Case("mask of keys", Inputs(29, mask=(2, 1, 1, 29), hidden=0.5)),
        Case("mask of queries", Inputs(29, mask=(1, 1, 29, 1), hidden=0.3)),
        Case(
            "all masks", Inputs(40, lengths=(40, 9), mask=(1, 2, 40, 40), bias=(2, 1, 1, 40), hidden=0.3, causal=True)
        ),
        *(
            Case(f"bias {'x'.join(map(str, shape))}", Inputs(23, 37, bias=shape, hidden=0.1, layout="apart"))
            for shape in ((2, 2, 23, 37), (1, 2, 23, 37), (2, 1, 1, 37), (1, 1, 23, 37), (1, 1, 1, 1), (2, 1, 23, 1))
        ),
        Case("float32 bias", Inputs(23, bias=(1, 2, 23, 23), bias_float32=True)),
        Case("bias, long", Inputs(70, 1100, batch=1, bias=(1, 1, 70, 1100), layout="apart"), small=False),
        Case("bias of queries, long", Inputs(70, 1100, batch=1, bias=(1, 1, 70, 1), layout="apart"), small=False),
        Case("dropout", Inputs(30, 50, dropout_p=0.3, seed=-5, layout="apart")),
        Case("dropout of everything", Inputs(10, dropout_p=1.0, seed=0)),
        Case("packed", Inputs(0, packed=(5, 0, 1, 33, 18), head_size=32)),
        Case("packed, causal, dropout", Inputs(0, packed=(40, 7, 64), causal=True, dropout_p=0.2, seed=2**40)),
        Case("packed, nothing", Inputs(0, packed=())),
        Case("packed, empty sequences", Inputs(0, packed=(0, 0))),
        Case("strided", Inputs(21, layout="strided")),
        Case("expanded", Inputs(21, layout="expanded")),
        Case("scale 0", Inputs(15, scale=0.0)),
        Case("scale negative", Inputs(15, scale=-0.3, lengths=(15, 6))),
        Case("huge", Inputs(25, magnitude=30.0)),
        Case("tiny", Inputs(25, magnitude=1e-3)),
        # Four tiles of 64 keys, seven of 32, and seven windows of 32 queries.
        Case("emulated", Inputs(200, batch=1, head_size=64, layout="apart"), {Use.EMULATION: HALF}),
        Case(
            "emulated, everything",
            Inputs(
                200,
                batch=1,
                head_size=64,
                layout="apart",
                mask=(1, 1, WHOLE, WHOLE),
                bias=(1, 1, WHOLE, WHOLE),
                hidden=0.1,
                causal=True,
                dropout_p=0.2,
                seed=5,
            ),
            {Use.EMULATION: HALF},
        ),
        Case(
            "emulated, dropout",
            Inputs(200, batch=1, head_size=64, layout="apart", lengths=(170,), unseen=True, dropout_p=0.2, seed=5),
            {Use.EMULATION: HALF},
        ),
        # A bias without a mask: tiles of which nothing is masked, and rows of theirs that are no queries.
        *(
            Case(
                f"emulated, bias of {keys} keys",
                Inputs(queries, keys, batch=1, head_size=64, layout="apart", bias=(1, 1, WHOLE, WHOLE)),
                {Use.EMULATION: HALF},
            )
            for queries, keys in ((70, 100), (37, 130), (5, 1100))
        ),
        # Three parts of 512 keys, and a sequence that is too short to be split.
        Case(
            "emulated, split keys",
            Inputs(5, 1100, head_size=64, layout="apart", lengths=(1100, 700), unseen=True, dropout_p=0.2, seed=5),
            {Use.EMULATION: HALF},
        ),
        # Three tiles of 128 keys, three windows of 128 queries, the last of each a part.
        *(
            Case(f"Hopper, {id}", Inputs(330, layout=layout, head_size=size, **options), {Use.HOPPER: HALF})
            for id, layout, size, options in (
                ("lengths", "by head", 64, {"lengths": (330, 201), "unseen": True}),
                ("causal", "by head", 64, {"causal": True}),
                ("packed", "by head", 64, {"packed": (200, 1, 459)}),
                ("long heads", "by head", 128, {"lengths": (330, 201), "unseen": True}),
                (
                    "dropout",
                    "by head",
                    64,
                    {"lengths": (330, 201), "unseen": True, "dropout_p": 0.3, "seed": 2**33 + 5},
                ),
                # Strides of 0, which the copy engine does not know: the other kernel's.
                ("expanded", "expanded", 64, {}),
            )
        ),
        *(
            Case(
                f"D={d} {kind}", inputs.sized(2, 512, d, 12), compiled(d, usual) | ({Use.TILES: ()} if d == 64 else {})
            )
            for d in HEAD_SIZES
            for kind, inputs, usual in (
                ("plain", Inputs(1, layout="by head"), HALF if d == 256 else None),
                ("everything", _EVERYTHING, None if d != 256 else ()),
                ("packed", Inputs(1, layout="by head", fill=1.0, packed=True), ()),
            )
        ),
        Case("lengths", Inputs(512, heads=12, head_size=64, layout="by head", fill=1.0), {Use.TILES: ()}),
        *(
            case
            for batch, length in ((32, 16), (32, 32), (16, 64), (2, 512), (1, 8192))
            for case in timed(_bert(batch, length), {Use.RACE: BOTH}, {Use.RACE: BOTH} if length == 512 else {})
        ),
        *timed(_bert(8, 128), {Use.RACE: BOTH}, {Use.RACE: BOTH}),
        *timed(_bert(1, 2048), {Use.RACE: BOTH}, {Use.RACE: BOTH, Use.PREFER: BOTH}),
        *timed(_bert(8, 512, fill=0.56), {Use.RACE: BOTH}),
        *timed(_bert(8, 128, head_size=32), {Use.RACE: BOTH}),
        *(
            case
            for batch, length in ((8, 128), (2, 512), (1, 2048))
            for case in timed(
                _bert(batch, length, dropout_p=0.1),
                {Use.RACE: BOTH} if length == 512 else {},
                {Use.RACE: BOTH},
                " dropout 0.1",
            )
        ),
        *timed(_bert(2, 512, fill=None, bias=(1, WHOLE, WHOLE, WHOLE)), both={Use.RACE: BOTH}, kind=" bias gradient"),
        *timed(_bert(ROWS // 512, 512), {Use.TARGET: HALF}, {Use.TARGET: HALF}),
        *timed(_bert(ROWS // 2048, 2048), {Use.TARGET: HALF, Use.GPU: SINGLE}, {Use.TARGET: HALF, Use.PREFER: BOTH}),
        *timed(_bert(ROWS // 8192, 8192), {Use.TARGET: HALF}, {Use.TARGET: HALF}),
        *(
            case
            for length in (512, 2048)
            for case in timed(_bert(ROWS // length, length, fill=0.5, packed=True), {Use.GPU: HALF}, kind=", packed")
        ),
        *timed(_bert(8, 2048, heads=8, head_size=128), *({Use.GPU: HALF, Use.DECIDE: HALF},) * 2),
        *timed(_bert(8, 2048, fill=0.5), {Use.GPU: HALF}, {Use.GPU: HALF}),
        *timed(_bert(1, 128), both={Use.PREFER: BOTH}),
        *(
            case
            for batch, length in ((1, 128), (1, 2048), (8, 2048))
            for case in timed(_bert(batch, length, head_size=128), both={Use.PREFER: BOTH})
        ),
        *timed(Inputs(16, batch=1, heads=12, head_size=64, layout="apart"), {Use.HOST: HALF}),
    ),
    bad=(
        Bad("query no tensor", replace(query=lambda a: [1.0]), TypeError, ("query", "list", "wanted a tensor")),
        Bad("query integer", replace(query=lambda a: a["query"].long()), TypeError, ("query", "int64", "float32")),
        Bad("query 3-D", replace(query=lambda a: a["query"][0]), ValueError, ("query", "[13, 2, 16]", "4 dimensions")),
        Bad("key meta", replace(key=lambda a: a["key"].to("meta")), ValueError, ("key", "meta")),
        Bad("key dtype", replace(key=lambda a: a["key"].half()), TypeError, ("key", "float16", "float32")),
        Bad("key heads", replace(key=lambda a: a["key"][:, :, :1]), ValueError, ("key", "[2, 11, 1, 16]")),
        Bad("value shape", replace(value=lambda a: a["value"][..., :8]), ValueError, ("value", "[2, 11, 2, 8]")),
        Bad("head size 0", replace(query=lambda a: a["query"][..., :0]), ValueError, ("query", "head size")),
        Bad(
            "lengths float",
            replace(key_lengths=lambda a: a["key_lengths"].float()),
            TypeError,
            ("key_lengths", "float32", "int32"),
        ),
        Bad("lengths shape", replace(key_lengths=lambda a: a["key_lengths"][:1]), ValueError, ("key_lengths", "[1]")),
        Bad("lengths long", replace(key_lengths=lambda a: a["key_lengths"] + 1), ValueError, ("key_lengths", "12")),
        Bad(
            "lengths negative",
            replace(key_lengths=lambda a: a["key_lengths"] - 5),
            ValueError,
            ("key_lengths", "-1", "[0, 11]"),
        ),
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
            ("attention_mask", "[2, 1, 1, 13]", "[2, 2, 13, 11]"),
        ),
        Bad(
            "mask float",
            replace(attention_mask=lambda a: torch.ones(2, 1, 1, 11)),
            TypeError,
            ("attention_mask", "float32", "bool"),
        ),
        Bad("bias 2-D", replace(bias=lambda a: a["bias"][0, 0]), ValueError, ("bias", "[13, 11]", "4 dimensions")),
        Bad("bias dtype", replace(bias=lambda a: a["bias"].double()), TypeError, ("bias", "float64", "float32")),
        Bad("dropout above 1", replace(dropout_p=lambda a: 1.5), ValueError, ("dropout_p", "1.5", "[0, 1]")),
        Bad("dropout nan", replace(dropout_p=lambda a: float("nan")), ValueError, ("dropout_p", "nan")),
        Bad("scale nan", replace(scale=lambda a: float("nan")), ValueError, ("scale", "nan", "finite")),
        Bad("seed float", replace(seed=lambda a: 1.5), TypeError, ("seed", "float")),
        Bad("seed shape", replace(seed=lambda a: torch.zeros(2, dtype=torch.int64)), ValueError, ("seed", "[2]")),
        Bad("max_seqlen alone", replace(max_seqlen=lambda a: 5), ValueError, ("max_seqlen", "cu_seqlens")),
        Bad("packed and bias", _pack(bias=lambda a: a["bias"]), ValueError, ("bias", "cu_seqlens")),
        Bad(
            "packed, padded tensors",
            replace(cu_seqlens=lambda a: torch.zeros(3, dtype=_INT32)),
            ValueError,
            ("query", "3 dimensions"),
        ),
        Bad(
            "offsets int64",
            _pack(cu_seqlens=lambda a: torch.tensor([0, 11])),
            TypeError,
            ("cu_seqlens", "int64", "int32"),
        ),
        Bad(
            "offsets end",
            _pack(cu_seqlens=lambda a: torch.tensor([0, 5, 10], dtype=_INT32)),
            ValueError,
            ("cu_seqlens", "10", "11"),
        ),
        Bad(
            "offsets decrease",
            _pack(cu_seqlens=lambda a: torch.tensor([0, 7, 5, 11], dtype=_INT32)),
            ValueError,
            ("cu_seqlens", "7 before 5"),
        ),
        Bad("max_seqlen small", _pack(max_seqlen=lambda a: 5), ValueError, ("max_seqlen", "5", "at least 6")),
        Bad("max_seqlen float", _pack(max_seqlen=lambda a: 6.0), TypeError, ("max_seqlen", "float", "an int")),
        Bad("max_seqlen text", _pack(max_seqlen=lambda a: "6"), TypeError, ("max_seqlen", "str", "an int")),
        Bad("max_seqlen bool", _pack(max_seqlen=lambda a: True), TypeError, ("max_seqlen", "bool", "an int")),
        Bad("max_seqlen negative", _pack(max_seqlen=lambda a: -1), ValueError, ("max_seqlen", "-1", "at least 0")),
        Bad("scale text", replace(scale=lambda a: "a"), TypeError, ("scale", "str", "finite number")),
        Bad("scale tensor", replace(scale=lambda a: torch.ones(())), TypeError, ("scale", "float32 []", "number")),
        Bad("scale vast", replace(scale=lambda a: 10**400), ValueError, ("scale", "an integer", "finite number")),
        Bad("causal text", replace(causal=lambda a: "no"), TypeError, ("causal", "str", "a bool")),
        Bad("causal number", replace(causal=lambda a: 0), TypeError, ("causal", "int", "a bool")),
        Bad("dropout text", replace(dropout_p=lambda a: "a"), TypeError, ("dropout_p", "str", "[0, 1]")),
        Bad("dropout bool", replace(dropout_p=lambda a: True), TypeError, ("dropout_p", "bool", "[0, 1]")),
        Bad("seed bool", replace(seed=lambda a: True), TypeError, ("seed", "bool", "an int")),
        Bad("seed too long", replace(seed=lambda a: 2**63), ValueError, ("seed", str(2**63), "64-bit")),
        Bad("backend unknown", replace(backend=lambda a: "mkl"), ValueError, ("backend", "mkl", "cpu")),
        Bad("backend list", replace(backend=lambda a: ["cpu"]), ValueError, ("backend", "['cpu']", "cpu")),
    ),
    terms=_terms,
    tiles=True,
    # Two products forward, five backward.
    flops=lambda a, backward: flops_of(7 if backward else 2, a),
    # Backward reads the same and the output's gradient, and writes three.
    bytes_moved=lambda a, backward: (
        (3 if backward else 1) * bytes_of(*(a[n] for n in ("query", "query", "key", "value")))
    ),
)
