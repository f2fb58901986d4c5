"""Inputs of bias_gelu."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyxlbert.ops.bias_gelu import bias_gelu
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


def plain(x: torch.Tensor, bias: torch.Tensor | None = None, *, approximate: str = "none") -> torch.Tensor:
    """GELU by torch.nn.functional, the bias added in x's dtype."""
    z = x if bias is None else x + bias.to(x.dtype)
    return torch.nn.functional.gelu(z, approximate=approximate)


@dataclass(frozen=True)
class Inputs:
    """x of `shape`, a view by its name in VIEWS, or 4001 values from -16 to 16; the bias in float32 if `wide`."""

    shape: tuple[int, ...] = ()
    view: str = ""
    sweep: bool = False
    approximate: str = "none"
    bias: bool = True
    scale: float = 1.0
    wide: bool = False

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.approximate}"


def make(inputs: Inputs, draw: Draw) -> Arguments:
    """See `Spec`."""
    if inputs.view:
        return {"x": view_of(draw, inputs.view, 1), "bias": draw.normal(80)[::2]}
    if inputs.sweep:
        x = torch.linspace(-16, 16, 4001).to(dtype=draw.dtype, device=draw.device)
        return {"x": x.view(1, -1), "approximate": inputs.approximate}
    arguments: Arguments = {
        "x": draw.normal(*inputs.shape, scale=inputs.scale),
        "approximate": inputs.approximate,
    }
    if inputs.bias:
        arguments["bias"] = draw.normal(inputs.shape[-1], dtype=draw.single if inputs.wide else draw.dtype)
    return arguments


def _terms(name: str, a: Arguments, cotangents: tuple[torch.Tensor, ...]) -> torch.Tensor | float | None:
    """The argument carries the rounding of x and of the bias; the slope of gelu stays below 1.13."""
    x, dy = a["x"], cotangents[0].double()
    if x.numel() == 0:
        return None
    bias = a.get("bias")
    terms = x.abs() if bias is None else x.abs() + bias.abs()
    if name == "out 0":
        return terms
    terms = dy.abs() * (1 + terms)
    return terms if name == "grad x" else terms.reshape(-1, x.shape[-1]).sum(0)


SPEC = Spec(
    name="bias_gelu",
    function=bias_gelu,
    plain=plain,
    make=make,
    differentiable=("x", "bias"),
    cases=(
        Case("odd", Inputs((4, 7, 35))),
        Case("odd tanh", Inputs((4, 7, 35), approximate="tanh")),
        Case("without bias", Inputs((9, 67), bias=False)),
        Case("feed-forward 3072", Inputs((5, 3072))),
        Case("feed-forward 3072 tanh", Inputs((5, 3072), approximate="tanh")),
        Case("one dimension", Inputs((9001,))),
        Case("no rows", Inputs((0, 48))),
        Case("one column", Inputs((5, 1))),
        Case("float32 bias", Inputs((6, 96), wide=True)),
        Case("huge", Inputs((3, 65), scale=1e4)),
        Case("huge tanh", Inputs((3, 65), scale=1e4, approximate="tanh")),
        Case("tiny", Inputs((3, 65), scale=1e-3, bias=False)),
        Case("many rows", Inputs((1500, 129)), small=False),
        Case("from -16 to 16", Inputs(sweep=True)),
        Case("from -16 to 16 tanh", Inputs(sweep=True, approximate="tanh")),
        *(Case(name, Inputs(view=name)) for name in VIEWS),
        Case("emulated", Inputs((21, 768)), {Use.EMULATION: HALF}),
        *(
            Case(f"4096x{n} {form}", Inputs((4096, n), approximate=form), {use: BOTH})
            for n, use in ((1536, Use.AHEAD_ALL), (4096, Use.AHEAD_ALL))
            for form in ("none", "tanh")
        ),
        *(
            case
            for form in ("none", "tanh")
            for case in timed(Inputs((1024, 3072), approximate=form), {Use.RACE: BOTH, Use.AHEAD: BOTH})
        ),
        *timed(Inputs((ROWS, 3072)), {Use.TARGET: HALF, Use.DECIDE: HALF}, {Use.PREFER: BOTH}),
        *(case for n in (1536, 4096) for case in timed(Inputs((ROWS, n)), {Use.GPU: HALF})),
        *(case for rows in (128, 2048) for case in timed(Inputs((rows, 3072)), both={Use.PREFER: BOTH})),
    ),
    bad=(
        Bad("x no tensor", replace(x=lambda a: 1.0), TypeError, ("x", "float", "wanted a tensor")),
        Bad("x integer", replace(x=lambda a: a["x"].int()), TypeError, ("x", "int32", "float32")),
        Bad("x scalar", replace(x=lambda a: a["x"].sum()), ValueError, ("x", "scalar")),
        Bad("x meta", replace(x=lambda a: a["x"].to("meta")), ValueError, ("x", "meta")),
        Bad("bias short", replace(bias=lambda a: a["bias"][:-1]), ValueError, ("bias", "[34]", "[35]")),
        Bad("bias dtype", replace(bias=lambda a: a["bias"].half()), TypeError, ("bias", "float16", "float32")),
        Bad("approximate", replace(approximate=lambda a: "sigmoid"), ValueError, ("approximate", "sigmoid", "tanh")),
        Bad("backend unknown", replace(backend=lambda a: "mkl"), ValueError, ("backend", "mkl", "cpu")),
    ),
    terms=_terms,
    bytes_moved=lambda a, backward: (5 if backward else 2) * bytes_of(a["x"]),
)
