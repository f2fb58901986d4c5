"""Inputs of dropout_add_layer_norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyxlbert.ops.dropout_add_layer_norm import dropout_add_layer_norm
from pyxlbert.reference.philox import Tag, keep_rows
from pyxlbert.testing.specs._spec import (
    BOTH,
    HALF,
    ROWS,
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

SEED = 20181011


def _branch(x: torch.Tensor, x_bias: torch.Tensor | None, dropout_p: float, seed: torch.Tensor | int) -> torch.Tensor:
    """dropout(x + x_bias) in x's dtype with the public dropout bits."""
    h = x if x_bias is None else x + x_bias.to(x.dtype)
    if dropout_p == 0.0:
        return h
    if dropout_p == 1.0:
        return torch.zeros_like(h)
    keep = keep_rows(torch.as_tensor(seed), dropout_p, x[..., 0].numel(), x.shape[-1], Tag.DROPOUT_ADD_LAYER_NORM).view(
        x.shape
    )
    return torch.where(keep, h / (1.0 - dropout_p), 0.0)


def plain(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    x_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | int = SEED,
    eps: float = 1e-12,
    copy_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The sum by eager operators, LayerNorm by torch.nn.functional in the sum's dtype, the copy by a cast."""
    s = _branch(x, x_bias, dropout_p, seed) + residual
    y = torch.nn.functional.layer_norm(s, s.shape[-1:], weight.to(s.dtype), bias.to(s.dtype), eps)
    return y if copy_dtype is None else (y, y.to(copy_dtype))


@dataclass(frozen=True)
class Inputs:
    """x and residual of `shape`, or views by their name in VIEWS; `stream`: the residual in float32, `wide`: the
    parameters; `copy`: copy_dtype, True for x's."""

    shape: tuple[int, ...] = ()
    view: str = ""
    x_bias: bool = False
    dropout_p: float = 0.0
    stream: bool = False
    wide: bool = False
    copy: torch.dtype | bool | None = None
    scale: float = 1.0
    shift: float = 0.0
    eps: float = 1e-12

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))


def make(inputs: Inputs, draw: Draw) -> Arguments:
    """See `Spec`."""
    if inputs.view:
        return {
            "x": view_of(draw, inputs.view, 0),
            "residual": view_of(draw, inputs.view, 1),
            "weight": draw.normal(40),
            "bias": draw.normal(80)[::2],
            "x_bias": draw.normal(80)[1::2],
            "dropout_p": inputs.dropout_p,
            "seed": SEED,
        }
    n, parameter = inputs.shape[-1], draw.single if inputs.wide else draw.dtype
    stream = draw.single if inputs.stream else draw.dtype
    arguments: Arguments = {
        "x": draw.normal(*inputs.shape, scale=inputs.scale),
        "residual": draw.normal(*inputs.shape, scale=inputs.scale, dtype=stream) + inputs.shift,
        "weight": draw.normal(n, dtype=parameter) * 0.5 + 1,
        "bias": draw.normal(n, dtype=parameter),
        "eps": inputs.eps,
    }
    if inputs.x_bias:
        arguments["x_bias"] = draw.normal(n, dtype=parameter)
    if inputs.dropout_p:
        arguments |= {"dropout_p": inputs.dropout_p, "seed": draw.numbers([SEED], torch.int64)}
    if inputs.copy is not None:
        arguments["copy_dtype"] = draw.dtype if inputs.copy is True else inputs.copy
    return arguments


def _terms(name: str, a: Arguments, cotangents: tuple[torch.Tensor, ...]) -> torch.Tensor | float | None:
    """As layer_norm's, of the sum: every result carries the rounding of the sum's terms, scaled by rstd."""
    x, residual, weight, p = a["x"], a["residual"], a["weight"], a.get("dropout_p", 0.0)
    if x.numel() == 0:
        return None
    x_bias, grown = a.get("x_bias"), 1 / (1 - p) if p < 1 else 0.0
    s = _branch(x, x_bias, p, a.get("seed", SEED)) + residual
    size = residual.abs() + grown * (x.abs() if x_bias is None else x.abs() + x_bias.abs())
    rstd = ((s - s.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + a.get("eps", 1e-12)).rsqrt()
    reach = rstd * size.amax(-1, keepdim=True)
    if name.startswith("out"):
        return reach * weight.abs() + a["bias"].abs()
    dy = sum(c.double().abs() for c in cotangents)
    n = x.shape[-1]
    if name == "grad weight":
        return (dy * reach).reshape(-1, n).sum(0)
    if name == "grad bias":
        return dy.reshape(-1, n).sum(0)
    ds = rstd * (1 + reach) * (dy * weight.abs()).amax(-1, keepdim=True)
    if name == "grad residual":
        return ds
    return grown * (ds if name == "grad x" else ds.expand(x.shape).reshape(-1, n).sum(0))


def _bytes_moved(a: Arguments, backward: bool) -> int:
    """x and residual read, their sum written, its copy too; backward reads dy and both again and writes two."""
    copy = a["x"].numel() * getattr(a.get("copy_dtype"), "itemsize", 0)
    each = bytes_of(a["x"], a["residual"])
    return each + bytes_of(a["residual"]) + copy + (2 * each + bytes_of(a["residual"]) if backward else 0)


SPEC = Spec(
    name="dropout_add_layer_norm",
    function=dropout_add_layer_norm,
    plain=plain,
    make=make,
    differentiable=("x", "residual", "weight", "bias", "x_bias"),
    cases=(
        Case("odd", Inputs((4, 7, 35), x_bias=True, dropout_p=0.1, copy=torch.bfloat16)),
        Case("sum only", Inputs((4, 7, 35))),
        Case("hidden 384", Inputs((2, 9, 384))),
        Case("hidden 768 float32 stream", Inputs((33, 768), stream=True, copy=torch.bfloat16)),
        Case("dropout", Inputs((6, 200), dropout_p=0.3)),
        Case("dropout of all", Inputs((6, 40), x_bias=True, dropout_p=1.0)),
        Case("bias", Inputs((6, 65), x_bias=True)),
        Case("float32 parameters", Inputs((6, 96), x_bias=True, wide=True)),
        Case("all mixed", Inputs((5, 130), x_bias=True, dropout_p=0.5, stream=True, wide=True, copy=torch.float16)),
        Case("copy in float32", Inputs((5, 48), copy=torch.float32)),
        Case("one row", Inputs((1, 64), dropout_p=0.1)),
        Case("one dimension", Inputs((50,), x_bias=True)),
        Case("no rows", Inputs((0, 48), x_bias=True, dropout_p=0.1, copy=torch.bfloat16)),
        Case("one column", Inputs((5, 1))),
        Case("two columns", Inputs((300, 2), dropout_p=0.25, eps=1e-5)),
        Case("large mean", Inputs((8, 100), shift=200.0)),
        Case("huge", Inputs((3, 65), scale=1e4)),
        Case("many rows", Inputs((1500, 129), dropout_p=0.1), small=False),
        *(Case(name, Inputs(view=name, dropout_p=0.1)) for name in VIEWS),
        Case("emulated", Inputs((21, 768), x_bias=True, dropout_p=0.2, stream=True), {Use.EMULATION: HALF}),
        *(
            Case(f"4096x{n} stream{kind}", Inputs((4096, n), stream=True, copy=True, **options), {use: BOTH})
            for n, use in ((768, Use.AHEAD), (384, Use.AHEAD_ALL), (1024, Use.AHEAD_ALL))
            for kind, options in (("", {}), (" with bias, dropout", {"x_bias": True, "dropout_p": 0.1}))
        ),
        *(case for shape in ((16, 384), (1024, 768), (4096, 384)) for case in timed(Inputs(shape), {Use.RACE: BOTH})),
        *timed(Inputs((ROWS, 768)), {Use.TARGET: HALF, Use.DECIDE: HALF}),
        *(case for n in (384, 1024) for case in timed(Inputs((ROWS, n)), {Use.GPU: HALF})),
        *(
            case
            for rows in (128, 2048, ROWS)
            for case in timed(Inputs((rows, 768), dropout_p=0.1), both={Use.PREFER: BOTH}, kind=" dropout 0.1")
        ),
    ),
    bad=(
        Bad("x no tensor", replace(x=lambda a: None), TypeError, ("x", "NoneType", "wanted a tensor")),
        Bad("x scalar", replace(x=lambda a: a["x"].sum()), ValueError, ("x", "scalar")),
        Bad("residual no tensor", replace(residual=lambda a: 0), TypeError, ("residual", "int", "wanted a tensor")),
        Bad("residual shape", replace(residual=lambda a: a["residual"][0]), ValueError, ("residual", "[7, 35]", "x's")),
        Bad("residual dtype", replace(residual=lambda a: a["residual"].half()), TypeError, ("residual", "float16")),
        Bad("residual meta", replace(residual=lambda a: a["residual"].to("meta")), ValueError, ("residual", "meta")),
        Bad("weight short", replace(weight=lambda a: a["weight"][:-1]), ValueError, ("weight", "[34]", "[35]")),
        Bad("bias none", replace(bias=lambda a: None), TypeError, ("bias", "NoneType")),
        Bad("x_bias shape", replace(x_bias=lambda a: a["x_bias"][None]), ValueError, ("x_bias", "[1, 35]", "[35]")),
        Bad("dropout_p", replace(dropout_p=lambda a: 1.5), ValueError, ("dropout_p", "1.5", "[0, 1]")),
        Bad("dropout_p nan", replace(dropout_p=lambda a: float("nan")), ValueError, ("dropout_p", "nan")),
        Bad("seed", replace(seed=lambda a: 0.5), TypeError, ("seed", "float", "int64")),
        Bad("seed dtype", replace(seed=lambda a: torch.zeros(1)), TypeError, ("seed", "float32", "int64")),
        Bad("seed shape", replace(seed=lambda a: torch.zeros(2).long()), ValueError, ("seed", "[2]", "one element")),
        Bad("copy_dtype", replace(copy_dtype=lambda a: torch.int8), TypeError, ("copy_dtype", "int8", "bfloat16")),
        Bad("copy float64", replace(copy_dtype=lambda a: torch.float64), TypeError, ("copy_dtype", "float64")),
        Bad("eps negative", replace(eps=lambda a: -1.0), ValueError, ("eps", "-1.0")),
        Bad("eps text", replace(eps=lambda a: "a"), TypeError, ("eps", "str", "a number of at least 0")),
        Bad("dropout_p text", replace(dropout_p=lambda a: "a"), TypeError, ("dropout_p", "str", "[0, 1]")),
        Bad("dropout_p none", replace(dropout_p=lambda a: None), TypeError, ("dropout_p", "NoneType", "[0, 1]")),
        Bad("backend unknown", replace(backend=lambda a: "mkl"), ValueError, ("backend", "mkl", "cpu")),
    ),
    terms=_terms,
    bytes_moved=_bytes_moved,
)
