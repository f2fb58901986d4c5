"""Inputs of layer_norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyxlbert.ops.layer_norm import layer_norm
from pyxlbert.testing.specs._spec import (
    BOTH,
    HALF,
    ROWS,
    SINGLE,
    VIEWS,
    Arguments,
    Bad,
    Case,
    Draw,
    Spec,
    Use,
    bytes_of,
    replace,
    timed,
    view_of,
)


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float = 1e-12) -> torch.Tensor:
    """LayerNorm by torch.nn.functional, parameters in x's dtype as it demands."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


@dataclass(frozen=True)
class Inputs:
    """x of `shape`, or a view by its name in VIEWS; parameters in float32 if `wide`.

    `few_sizes`: deviations from the mean have few sizes: sums of squares that drift where they are one chain.
    """

    shape: tuple[int, ...] = ()
    view: str = ""
    scale: float = 1.0
    shift: float = 0.0
    eps: float = 1e-5
    wide: bool = False
    few_sizes: bool = False

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))


def make(inputs: Inputs, draw: Draw) -> Arguments:
    """See `Spec`."""
    if inputs.view:
        x = view_of(draw, inputs.view, 1)
        return {"x": x, "weight": draw.normal(40), "bias": draw.normal(80)[::2], "eps": inputs.eps}
    n, parameter = inputs.shape[-1], draw.single if inputs.wide else draw.dtype
    x = draw.normal(*inputs.shape, scale=inputs.scale) + inputs.shift
    if inputs.few_sizes:
        x = torch.full_like(x, 0.3)
        x[..., ::2] *= -1
        x[..., ::5] *= 2
    return {
        "x": x,
        "weight": draw.normal(n, dtype=parameter) * 0.5 + 1,
        "bias": draw.normal(n, dtype=parameter),
        "eps": inputs.eps,
    }


def _terms(name: str, a: Arguments, cotangents: tuple[torch.Tensor, ...]) -> torch.Tensor | float | None:
    """The mean is subtracted from x, so every result carries the rounding of x itself, scaled by rstd."""
    x, weight, dy = a["x"], a["weight"], cotangents[0].double()
    if x.numel() == 0:
        return None
    rstd = ((x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + a["eps"]).rsqrt()
    reach = rstd * x.abs().amax(-1, keepdim=True)  # [..., 1], the terms of xhat
    if name == "out 0":
        return reach * weight.abs() + a["bias"].abs()
    if name == "grad x":
        return rstd * (1 + reach) * (dy * weight).abs().amax(-1, keepdim=True)
    if name == "grad weight":
        return (dy.abs() * reach).reshape(-1, x.shape[-1]).sum(0)
    return dy.abs().reshape(-1, x.shape[-1]).sum(0)


SPEC = Spec(
    name="layer_norm",
    function=layer_norm,
    plain=plain,
    make=make,
    differentiable=("x", "weight", "bias"),
    cases=(
        Case("odd", Inputs((4, 7, 35))),
        Case("hidden 384", Inputs((2, 9, 384))),
        Case("hidden 768", Inputs((33, 768))),
        Case("one row", Inputs((1, 64))),
        Case("one dimension", Inputs((50,))),
        Case("long rows of few sizes", Inputs((2, 60_001), eps=1e-12, few_sizes=True), small=False),
        Case("no rows", Inputs((0, 48))),
        Case("one column", Inputs((5, 1))),
        Case("two columns", Inputs((300, 2))),
        Case("float32 parameters", Inputs((6, 96), wide=True)),
        Case("large mean", Inputs((8, 100), shift=200.0)),
        Case("huge", Inputs((3, 65), scale=1e4)),
        Case("tiny", Inputs((3, 65), scale=1e-3, eps=1e-12)),
        Case("many rows", Inputs((1500, 129)), small=False),
        *(Case(name, Inputs(view=name, eps=1e-12)) for name in VIEWS),
        Case("emulated, long rows", Inputs((21, 2048)), {Use.EMULATION: HALF}),
        Case("emulated, short rows", Inputs((21, 768)), {Use.EMULATION: HALF}),
        *timed(Inputs((16, 384)), {Use.RACE: BOTH}),
        *timed(Inputs((1024, 768)), {Use.RACE: BOTH}, {Use.RACE: BOTH, Use.AHEAD: BOTH}),
        *timed(Inputs((4096, 384)), {Use.RACE: BOTH, Use.AHEAD_ALL: BOTH}),
        *timed(Inputs((4096, 1024)), {Use.AHEAD_ALL: BOTH}),
        *timed(Inputs((16, 768)), {Use.HOST: SINGLE}),
        *timed(
            Inputs((ROWS, 768)),
            {Use.TARGET: HALF, Use.GPU: SINGLE},
            {Use.TARGET: HALF, Use.DECIDE: HALF, Use.PREFER: BOTH},
        ),
        *(case for n in (384, 1024) for case in timed(Inputs((ROWS, n)), {Use.GPU: HALF}, {Use.GPU: HALF})),
        *(case for rows in (128, 2048) for case in timed(Inputs((rows, 768)), both={Use.PREFER: BOTH})),
    ),
    bad=(
        Bad("x no tensor", replace(x=lambda a: [1.0]), TypeError, ("x", "list", "wanted a tensor")),
        Bad("x integer", replace(x=lambda a: a["x"].long()), TypeError, ("x", "int64", "float32")),
        Bad("x scalar", replace(x=lambda a: a["x"].sum()), ValueError, ("x", "scalar")),
        Bad("x meta", replace(x=lambda a: a["x"].to("meta")), ValueError, ("x", "meta")),
        Bad("weight meta", replace(weight=lambda a: a["weight"].to("meta")), ValueError, ("weight", "meta")),
        Bad("weight short", replace(weight=lambda a: a["weight"][:-1]), ValueError, ("weight", "[34]", "[35]")),
        Bad("bias shape", replace(bias=lambda a: a["bias"][None]), ValueError, ("bias", "[1, 35]", "[35]")),
        Bad("weight dtype", replace(weight=lambda a: a["weight"].double()), TypeError, ("weight", "float64")),
        Bad("eps negative", replace(eps=lambda a: -1.0), ValueError, ("eps", "-1.0")),
        Bad("eps nan", replace(eps=lambda a: float("nan")), ValueError, ("eps", "nan")),
        Bad("eps text", replace(eps=lambda a: "a"), TypeError, ("eps", "str", "a number of at least 0")),
        Bad("eps none", replace(eps=lambda a: None), TypeError, ("eps", "NoneType", "a number of at least 0")),
        Bad("eps bool", replace(eps=lambda a: True), TypeError, ("eps", "bool", "a number of at least 0")),
        Bad("backend list", replace(backend=lambda a: ["cpu"]), ValueError, ("backend", "['cpu']", "cpu")),
        Bad("backend unknown", replace(backend=lambda a: "mkl"), ValueError, ("backend", "mkl", "cpu")),
    ),
    terms=_terms,
    bytes_moved=lambda a, backward: (5 if backward else 2) * bytes_of(a["x"]),
)
