"""Inputs of encoder_layer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F

from pyxlbert.ops.encoder_layer import encoder_layer
from pyxlbert.testing.specs import attention
from pyxlbert.testing.specs._spec import BOTH, SINGLE, Arguments, Bad, Case, Draw, Spec, Use, bytes_of, replace, timed

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def plain(x: torch.Tensor, *, num_heads: int, activation: str = "gelu", eps: float = 1e-12, **a: Any) -> torch.Tensor:
    """The layer by torch.nn.functional in x's dtype, parameters in x's dtype too."""
    return _stages(x, num_heads=num_heads, activation=activation, eps=eps, **a)[-1]


def _stages(
    x: torch.Tensor, *, num_heads: int, activation: str = "gelu", eps: float = 1e-12, **a: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What either LayerNorm takes, and the result."""

    def linear(rows: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(rows, a[f"{name}_weight"], a.get(f"{name}_bias"))

    def normalise(rows: torch.Tensor, name: str) -> torch.Tensor:
        parameters = (a[f"{name}_{part}"].to(rows.dtype) for part in ("weight", "bias"))
        return F.layer_norm(rows, rows.shape[-1:], *parameters, eps)

    query, key, value = linear(x, "qkv").unflatten(-1, (3, num_heads, -1)).unbind(-3)
    masks = ("key_lengths", "cu_seqlens", "max_seqlen", "attention_mask", "bias")
    mixed = attention.plain(query, key, value, **{name: a[name] for name in masks if name in a}).flatten(-2)
    first = x + linear(mixed, "out")
    h = normalise(first, "attention_norm")
    second = h + linear(ACTIVATIONS[activation](linear(h, "up")), "down")
    return first, second, normalise(second, "norm")


def _terms(name: str, a: Arguments, cotangents: tuple[torch.Tensor, ...]) -> torch.Tensor | float | None:
    """What either LayerNorm takes is rounded, and its rstd scales that; the second one scales the first one's too."""
    if name != "out 0" or a["x"].numel() == 0:
        return None
    first, second, _ = _stages(**a)
    eps = a.get("eps", 1e-12)
    scales = [(x.var(-1, correction=0, keepdim=True) + eps).rsqrt() for x in (first, second)]
    reach = [scale * x.abs().amax(-1, keepdim=True) for scale, x in zip(scales, (first, second), strict=True)]
    before = a["attention_norm_weight"].abs().max() * reach[0] + a["attention_norm_bias"].abs().max()
    return a["norm_weight"].abs() * (reach[1] + scales[1] * before) + a["norm_bias"].abs()


@dataclass(frozen=True)
class Inputs:
    """x `[batch, length, hidden]` with heads of `head_size`.

    Attributes:
        packed: lengths of packed sequences instead of batch and length.
        lengths: of the keys that each sequence has.
        mask, bias: shapes.
        biases: of the products.
        norms: "float32" for LayerNorm's parameters in float32.
        scale: of x.
    """

    batch: int = 2
    length: int = 7
    hidden: int = 48
    inner: int = 100
    heads: int = 3
    head_size: int = 16
    activation: str = "gelu"
    packed: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    bias: tuple[int, ...] | None = None
    biases: bool = True
    norms: str = ""
    scale: float = 1.0

    def __str__(self) -> str:
        rows = f"{self.batch}x{self.length}" if self.packed is None else f"packed {sum(self.packed)}"
        return f"{rows} {self.hidden}->{self.inner}"


def make(inputs: Inputs, draw: Draw) -> Arguments:
    """See `Spec`."""
    hidden, inner, width = inputs.hidden, inputs.inner, inputs.heads * inputs.head_size
    rows = (inputs.batch, inputs.length) if inputs.packed is None else (sum(inputs.packed),)
    arguments: Arguments = {"x": draw.normal(*rows, hidden, scale=inputs.scale)}
    products = {"qkv": (3 * width, hidden), "out": (hidden, width), "up": (inner, hidden), "down": (hidden, inner)}
    for name, (n, k) in products.items():
        arguments[f"{name}_weight"] = draw.normal(n, k, scale=k**-0.5)
        arguments[f"{name}_bias"] = draw.normal(n, scale=0.3) if inputs.biases else None
    dtype = draw.single if inputs.norms else draw.dtype
    for name in ("attention_norm", "norm"):
        arguments[f"{name}_weight"] = 1 + draw.normal(hidden, scale=0.2, dtype=dtype)
        arguments[f"{name}_bias"] = draw.normal(hidden, scale=0.2, dtype=dtype)
    arguments |= {"num_heads": inputs.heads, "activation": inputs.activation}
    if inputs.packed is not None:
        offsets = [0, *(sum(inputs.packed[: i + 1]) for i in range(len(inputs.packed)))]
        longest = max((end - first for first, end in pairwise(offsets)), default=0)
        arguments |= {"cu_seqlens": draw.numbers(offsets), "max_seqlen": longest}
    if inputs.lengths is not None:
        arguments["key_lengths"] = draw.numbers(inputs.lengths)
    if inputs.mask is not None:
        arguments["attention_mask"] = draw.share(0.7, inputs.mask)
    if inputs.bias is not None:
        arguments["bias"] = draw.normal(*inputs.bias)
    return arguments


CASES = (
    Case("odd", Inputs(), gradients=False),
    Case("one token", Inputs(batch=1, length=1), gradients=False),
    Case("seven rows", Inputs(batch=1, length=7, hidden=64, head_size=16, heads=4), gradients=False),
    Case("hidden 384", Inputs(length=33, hidden=384, inner=1536, heads=12, head_size=32), gradients=False, small=False),
    Case("hidden 768", Inputs(1, 130, hidden=768, inner=3072, heads=12, head_size=64), gradients=False, small=False),
    Case("odd everything", Inputs(hidden=15, inner=37, heads=5, head_size=3), gradients=False),
    Case("narrow heads", Inputs(hidden=40, inner=60, heads=2, head_size=10), gradients=False),
    Case("wide heads", Inputs(hidden=20, inner=30, heads=2, head_size=72), gradients=False),
    Case("packed", Inputs(packed=(5, 1, 0, 70, 3)), gradients=False),
    Case("packed, none", Inputs(packed=()), gradients=False),
    Case("no rows", Inputs(batch=0), gradients=False),
    Case("lengths", Inputs(batch=3, lengths=(7, 0, 2)), gradients=False),
    Case("mask", Inputs(mask=(2, 1, 7, 7)), gradients=False),
    Case("bias", Inputs(bias=(1, 3, 7, 7)), gradients=False),
    Case("no biases", Inputs(biases=False), gradients=False),
    Case("float32 norms", Inputs(norms="float32"), gradients=False),
    Case("gelu_tanh", Inputs(activation="gelu_tanh"), gradients=False),
    Case("relu", Inputs(activation="relu"), gradients=False),
    Case("silu", Inputs(activation="silu"), gradients=False),
    Case("gradients", Inputs()),
    Case("gradients, packed", Inputs(packed=(5, 1, 0, 9))),
    Case("gradients, one row", Inputs(batch=1, length=1)),
    Case("gradients, tanh", Inputs(activation="gelu_tanh", norms="float32")),
    Case("gradients, mask", Inputs(mask=(2, 1, 7, 7))),
    Case("gradients, bias", Inputs(bias=(1, 3, 7, 7), activation="silu")),
    Case("huge", Inputs(scale=1e3), gradients=False),
    Case("tiny", Inputs(scale=1e-3), gradients=False),
)

BAD = (
    Bad("x no tensor", replace(x=lambda a: [1.0]), TypeError, ("x", "list", "wanted a tensor")),
    Bad("x integer", replace(x=lambda a: a["x"].long()), TypeError, ("x", "int64", "float32")),
    Bad("x flat", replace(x=lambda a: a["x"][0]), ValueError, ("x", "[7, 48]", "[B, T, E]")),
    Bad("x narrow", replace(x=lambda a: a["x"][..., :-1]), ValueError, ("qkv_weight", "[144, 48]", "[144, 47]")),
    Bad("x empty", replace(x=lambda a: a["x"][..., :0]), ValueError, ("x", "[2, 7, 0]", "at least 1")),
    Bad("qkv dtype", replace(qkv_weight=lambda a: a["qkv_weight"].half()), TypeError, ("qkv_weight", "float16")),
    Bad("qkv a vector", replace(qkv_weight=lambda a: a["qkv_weight"][0]), ValueError, ("qkv_weight", "[48]")),
    Bad("qkv not thirds", replace(qkv_weight=lambda a: a["qkv_weight"][1:]), ValueError, ("[143, 48]", "3 N")),
    Bad("qkv bias short", replace(qkv_bias=lambda a: a["qkv_bias"][1:]), ValueError, ("qkv_bias", "[143]", "[144]")),
    Bad("out turned", replace(out_weight=lambda a: a["out_weight"][1:]), ValueError, ("out_weight", "[47, 48]")),
    Bad("up narrow", replace(up_weight=lambda a: a["up_weight"][:, 1:]), ValueError, ("up_weight", "[100, 47]")),
    Bad("down narrow", replace(down_weight=lambda a: a["down_weight"][:, 1:]), ValueError, ("down_weight", "[48, 99]")),
    Bad("norm short", replace(norm_weight=lambda a: a["norm_weight"][1:]), ValueError, ("norm_weight", "[47]", "[48]")),
    Bad("norm none", replace(norm_bias=lambda a: None), TypeError, ("norm_bias", "NoneType")),
    Bad("heads", replace(num_heads=lambda a: 5), ValueError, ("num_heads 5", "divisor")),
    Bad("heads none", replace(num_heads=lambda a: 0), ValueError, ("num_heads 0", "divisor")),
    Bad("heads float", replace(num_heads=lambda a: 3.0), TypeError, ("num_heads", "float", "int")),
    Bad("activation", replace(activation=lambda a: "swish"), ValueError, ("activation", "'swish'", "silu")),
    Bad("eps", replace(eps=lambda a: -1.0), ValueError, ("eps", "-1.0", "at least 0")),
    Bad("lengths", replace(key_lengths=lambda a: torch.tensor([8, 1])), ValueError, ("key_lengths", "8", "[0, 7]")),
    Bad("max_seqlen alone", replace(max_seqlen=lambda a: 7), ValueError, ("max_seqlen", "cu_seqlens")),
    Bad(
        "mask shape",
        replace(attention_mask=lambda a: torch.ones(2, 1, 7, 6, dtype=torch.bool)),
        ValueError,
        ("attention_mask", "[2, 1, 7, 6]"),
    ),
    Bad("bias shape", replace(bias=lambda a: torch.zeros(1, 4, 7, 7)), ValueError, ("bias", "[1, 4, 7, 7]")),
    Bad("backend unknown", replace(backend=lambda a: "mkl"), ValueError, ("backend", "mkl", "cpu")),
)


def flops(arguments: Arguments, backward: bool) -> int:
    """Two per product of the four weights and of attention's two."""
    x = arguments["x"]
    rows = x.shape[:-1].numel()
    width, inner = arguments["out_weight"].shape[1], arguments["up_weight"].shape[0]
    if arguments.get("cu_seqlens") is not None:
        pairs = int(arguments["cu_seqlens"].diff().long().square().sum())
    else:
        pairs = x.shape[0] * x.shape[1] ** 2
    products = rows * x.shape[-1] * (4 * width + 2 * inner) + 2 * pairs * width
    return (6 if backward else 2) * products


def bytes_moved(arguments: Arguments, backward: bool) -> int:
    """The weights and x read, y written, once."""
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    return (3 if backward else 1) * (bytes_of(*tensors) + bytes_of(arguments["x"]))


BASE = {"hidden": 768, "inner": 3072, "heads": 12, "head_size": 64}

SPEC = Spec(
    name="encoder_layer",
    function=encoder_layer,
    plain=plain,
    make=make,
    terms=_terms,
    differentiable=("x", "qkv_weight", "out_weight", "up_weight", "down_weight", "norm_weight", "norm_bias"),
    cases=(
        *CASES,
        *(
            case
            for batch, length in ((1, 16), (8, 128))
            for case in timed(Inputs(batch, length, **BASE), {Use.RACE: BOTH}, {Use.RACE: SINGLE})
        ),
    ),
    bad=BAD,
    bytes_moved=bytes_moved,
    flops=flops,
    composed=True,
    tiles=True,
)
