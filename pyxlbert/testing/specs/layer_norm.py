"""Inputs of layer_norm."""

from __future__ import annotations

import torch

from pyxlbert.ops.layer_norm import layer_norm
from pyxlbert.testing.specs._spec import Arguments, Bad, Case, Spec, randn, replace


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float = 1e-12) -> torch.Tensor:
    """LayerNorm by torch.nn.functional, parameters in x's dtype as it demands."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def _case(
    id: str,
    *shape: int,
    scale: float = 1.0,
    shift: float = 0.0,
    eps: float = 1e-5,
    wide: bool = False,
    small: bool = True,
) -> Case:
    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Arguments:
        n = shape[-1]
        parameter = torch.float32 if wide and dtype is not torch.float64 else dtype
        return {
            "x": randn(generator, *shape, dtype=dtype, device=device, scale=scale) + shift,
            "weight": randn(generator, n, dtype=parameter, device=device) * 0.5 + 1,
            "bias": randn(generator, n, dtype=parameter, device=device),
            "eps": eps,
        }

    return Case(id, make, small=small)


def _view(id: str, change: str) -> Case:
    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Arguments:
        x = randn(generator, 6, 5, 3 * 40, dtype=dtype, device=device)
        x = {
            "slice": lambda: x[..., 40:80],
            "rows": lambda: x[::2, :, :40],
            "transposed": lambda: x[..., :40].transpose(0, 1),
            "last dimension strided": lambda: x[..., ::3],
            "expanded": lambda: x[:1, :, :40].expand(4, 5, 40),
        }[change]()
        return {
            "x": x,
            "weight": randn(generator, 40, dtype=dtype, device=device),
            "bias": randn(generator, 80, dtype=dtype, device=device)[::2],
            "eps": 1e-12,
        }

    return Case(id, make)


def _few_sizes(id: str, columns: int) -> Case:
    """Long rows whose deviations from the mean have few sizes: sums of squares that drift where they are one chain."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Arguments:
        x = torch.full((2, columns), 0.3)
        x[:, ::2] *= -1
        x[:, ::5] *= 2
        weight, bias = (randn(generator, columns, dtype=dtype, device=device) for _ in range(2))
        return {"x": x.to(dtype=dtype, device=device), "weight": weight, "bias": bias, "eps": 1e-12}

    return Case(id, make, small=False)


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
    differentiable=("x", "weight", "bias"),
    cases=(
        _case("odd", 4, 7, 35),
        _case("hidden 384", 2, 9, 384),
        _case("hidden 768", 33, 768),
        _case("one row", 1, 64),
        _case("one dimension", 50),
        _few_sizes("long rows of few sizes", 60_001),
        _case("no rows", 0, 48),
        _case("one column", 5, 1),
        _case("two columns", 300, 2),
        _case("float32 parameters", 6, 96, wide=True),
        _case("large mean", 8, 100, shift=200.0),
        _case("huge", 3, 65, scale=1e4),
        _case("tiny", 3, 65, scale=1e-3, eps=1e-12),
        _case("many rows", 1500, 129, small=False),
        _view("slice of a wider buffer", "slice"),
        _view("every other row", "rows"),
        _view("transposed", "transposed"),
        _view("last dimension strided", "last dimension strided"),
        _view("expanded", "expanded"),
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
    bytes_moved=lambda a: 2 * a["x"].numel() * a["x"].element_size(),
)
