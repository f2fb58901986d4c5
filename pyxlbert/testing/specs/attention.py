"""Inputs of attention."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from pyxlbert.ops.attention import attention
from pyxlbert.reference.philox import keep_scores
from pyxlbert.testing.specs._spec import Arguments, Bad, Case, Spec, randn, replace


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
    kept, _ = _weights(query, key, **options)
    return torch.matmul(kept.to(value.dtype), value.transpose(1, 2)).transpose(1, 2)


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
    """Softmax weights `[B, H, Tq, Tk]` after dropout, and what dropout multiplied them by."""
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
    return p * factor, factor


def _case(
    id: str,
    queries: int,
    keys: int | None = None,
    *,
    batch: int = 2,
    heads: int = 2,
    head_size: int = 16,
    lengths: tuple[int, ...] | None = None,
    packed: tuple[int, ...] | None = None,
    mask: tuple[int, ...] | None = None,
    bias: tuple[int, ...] | None = None,
    bias_float32: bool = False,
    hidden: float = 0.0,
    magnitude: float = 1.0,
    layout: str = "fused",
    small: bool = True,
    full_only: bool = False,
    **options: Any,
) -> Case:
    """`mask` and `bias` are shapes; `hidden` is the share of mask or -inf bias elements that may not attend."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Arguments:
        def draw(*shape: int) -> torch.Tensor:
            return randn(generator, *shape, dtype=dtype, device=device, scale=magnitude)

        def share(shape: tuple[int, ...]) -> torch.Tensor:
            return (torch.rand(shape, generator=generator) < hidden).to(device)

        arguments: Arguments = dict(options)
        key_count = queries if keys is None else keys
        if packed is not None:
            q, k, v = draw(sum(packed), 3, heads, head_size).unbind(1)
            offsets = torch.tensor((0, *packed)).cumsum(0).to(device=device, dtype=torch.int32)
            arguments["cu_seqlens"] = offsets
            arguments["max_seqlen"] = max((0, *packed))
        elif layout == "fused" and key_count == queries:
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
        if lengths is not None:
            arguments["key_lengths"] = torch.tensor(lengths, dtype=torch.int32, device=device)
        if mask is not None:
            arguments["attention_mask"] = ~share(mask)
        if bias is not None:
            wide = torch.float32 if bias_float32 and dtype is not torch.float64 else dtype
            arguments["bias"] = randn(generator, *bias, dtype=wide, device=device, scale=magnitude)
            if mask is None and hidden:
                arguments["bias"] = arguments["bias"].masked_fill(share(bias), -torch.inf)
        return {"query": q, "key": k, "value": v} | arguments

    return Case(id, make, small=small, full_only=full_only)


def _one_sign(id: str, queries: int, keys: int) -> Case:
    """Values of one sign, nearly equal weights: a sum over the keys that drifts where it is one chain."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Arguments:
        def draw(length: int) -> torch.Tensor:
            return randn(generator, 1, length, 1, 64, dtype=dtype, device=device, scale=0.01)

        value = torch.linspace(0.1, 0.9, 64).to(dtype=dtype, device=device).expand(1, keys, 1, 64)
        return {"query": draw(queries), "key": draw(keys), "value": value}

    return Case(id, make, small=False)


def _pack(**changes: Any) -> Any:
    """The first case's tensors as one packed batch of lengths 5 and 6, with further changes."""

    def change(a: Arguments) -> Arguments:
        rows = {name: a[name][0, :11] for name in ("query", "key", "value")}
        return (
            rows | {"cu_seqlens": torch.tensor([0, 5, 11], dtype=torch.int32)} | {n: v(a) for n, v in changes.items()}
        )

    return change


def _terms(name: str, a: Arguments, cotangents: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    """Sums of absolute terms.  Where a row's keys fill more than one block, a backward that saves only out and lse
    takes delta = dout . out from the rounded out, so that rounding, in float32's eps, counts as a term."""
    rounding = torch.finfo(cotangents[0].dtype).eps / torch.finfo(torch.float32).eps
    options = {n: v for n, v in a.items() if n not in ("query", "key", "value")}
    scale = a.get("scale") if a.get("scale") is not None else a["query"].shape[-1] ** -0.5

    def of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dout: torch.Tensor, **options: Any) -> Any:
        kept, factor = _weights(query, key, **options)
        q, k, v, g = (x.abs().transpose(1, 2) for x in (query, key, value, dout))
        if name == "out 0":
            return torch.matmul(kept, v).transpose(1, 2)
        if name == "grad value":
            return torch.matmul(kept.transpose(-1, -2), g).transpose(1, 2)
        p = _weights(query, key, **{**options, "dropout_p": 0.0})[0]
        dp = torch.matmul(g, v.transpose(-1, -2)) * factor
        ds = p * (dp + max(1.0, rounding) * (p * dp).sum(-1, keepdim=True))
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


def _flops(a: Arguments) -> int:
    if a.get("cu_seqlens") is not None:
        lengths = a["cu_seqlens"].diff().long()
        return int(4 * (lengths * lengths).sum() * a["query"].shape[-1] * a["query"].shape[-2])
    batch, queries, heads, head_size = a["query"].shape
    return 4 * batch * heads * queries * a["key"].shape[1] * head_size


_INT32 = torch.int32

SPEC = Spec(
    name="attention",
    function=attention,
    plain=plain,
    differentiable=("query", "key", "value", "bias"),
    cases=(
        _case("bias and lengths", 13, 11, lengths=(11, 4), bias=(1, 2, 13, 11), dropout_p=0.2, seed=3),
        _case("fused", 37, head_size=64),
        _case("one token", 1, head_size=32),
        _case("one query, many keys", 1, 530, head_size=32, layout="apart", small=False),
        _one_sign("values of one sign", 24, 8192),
        _case("few queries", 4, 21, head_size=40, lengths=(21, 10), mask=(2, 1, 4, 21), layout="apart"),
        _case(
            "few queries, causal", 3, 530, head_size=80, causal=True, dropout_p=0.2, seed=2, layout="apart", small=False
        ),
        _case("few queries, bias", 2, 19, head_size=7, bias=(2, 2, 2, 19), layout="strided"),
        _case("many queries, one key", 50, 1, layout="apart"),
        _case("more queries than keys", 70, 19, head_size=24, layout="apart"),
        _case("no queries", 0, 7, layout="apart"),
        _case("no keys", 5, 0, layout="apart"),
        _case("no batch", 5, batch=0),
        _case("one head", 20, heads=1, head_size=40),
        _case("lengths 0, 1 and all", 33, batch=4, lengths=(0, 1, 33, 17)),
        *(
            _case(f"head size {d}", 35, head_size=d, lengths=(35, 20), layout="heads first")
            for d in (1, 3, 33, 80, 96, 128)
        ),
        _case("head size 200", 20, head_size=200),
        _case("two key blocks", 30, 600, head_size=32, lengths=(600, 300), layout="apart", small=False),
        _case("long", 530, batch=1, head_size=64, small=False),
        _case("few heads, long", 64, 1200, batch=1, heads=1, head_size=32, layout="apart", small=False),
        _case("causal", 61, causal=True),
        _case("causal, memory", 20, 43, causal=True, layout="apart"),
        _case("causal, fewer keys", 43, 20, causal=True, layout="apart"),
        _case("causal, long", 560, batch=1, causal=True, lengths=(500,), dropout_p=0.1, seed=1, small=False),
        _case("mask of every pair", 29, 41, mask=(2, 2, 29, 41), hidden=0.4, layout="apart"),
        _case("mask of keys", 29, mask=(2, 1, 1, 29), hidden=0.5),
        _case("mask of queries", 29, mask=(1, 1, 29, 1), hidden=0.3),
        _case("all masks", 40, lengths=(40, 9), mask=(1, 2, 40, 40), bias=(2, 1, 1, 40), hidden=0.3, causal=True),
        *(
            _case(f"bias {'x'.join(map(str, shape))}", 23, 37, bias=shape, hidden=0.1, layout="apart")
            for shape in ((2, 2, 23, 37), (1, 2, 23, 37), (2, 1, 1, 37), (1, 1, 23, 37), (1, 1, 1, 1), (2, 1, 23, 1))
        ),
        _case("float32 bias", 23, bias=(1, 2, 23, 23), bias_float32=True),
        _case("bias, long", 70, 1100, batch=1, bias=(1, 1, 70, 1100), layout="apart", small=False),
        _case("bias of queries, long", 70, 1100, batch=1, bias=(1, 1, 70, 1), layout="apart", small=False),
        _case("dropout", 30, 50, dropout_p=0.3, seed=-5, layout="apart"),
        _case("dropout of everything", 10, dropout_p=1.0, seed=0),
        _case("packed", 0, packed=(5, 0, 1, 33, 18), head_size=32),
        _case("packed, causal, dropout", 0, packed=(40, 7, 64), causal=True, dropout_p=0.2, seed=2**40),
        _case("packed, nothing", 0, packed=()),
        _case("packed, empty sequences", 0, packed=(0, 0)),
        _case("strided", 21, layout="strided"),
        _case("expanded", 21, layout="expanded"),
        _case("scale 0", 15, scale=0.0),
        _case("scale negative", 15, scale=-0.3, lengths=(15, 6)),
        _case("huge", 25, magnitude=30.0),
        _case("tiny", 25, magnitude=1e-3),
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
    flops=_flops,
    bytes_moved=lambda a: sum(a[n].numel() * a[n].element_size() for n in ("query", "query", "key", "value")),
)
