"""Inputs of bias_gelu."""

from __future__ import annotations

import torch

from pyxlbert.ops.bias_gelu import bias_gelu
from pyxlbert.testing.specs._spec import Arguments, Bad, Case, Spec, randn, replace


def plain(x: torch.Tensor, bias: torch.Tensor | None = None, *, approximate: str = "none") -> torch.Tensor:
    """GELU by torch.nn.functional, the bias added in x's dtype."""
    z = x if bias is None else x + bias.to(x.dtype)
    return torch.nn.functional.gelu(z, approximate=approximate)


def _case(
    id: str,
    *shape: int,
    approximate: str = "none",
    bias: bool = True,
    scale: float = 1.0,
    wide: bool = False,
    small: bool = True,
) -> Case:
    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Arguments:
        parameter = torch.float32 if wide and dtype is not torch.float64 else dtype
        arguments: Arguments = {
            "x": randn(generator, *shape, dtype=dtype, device=device, scale=scale),
            "approximate": approximate,
        }
        if bias:
            arguments["bias"] = randn(generator, shape[-1], dtype=parameter, device=device)
        return arguments

    return Case(id, make, small=small)


def _view(id: str, change: str) -> Case:
    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Arguments:
        x = randn(generator, 6, 5, 3 * 40, dtype=dtype, device=device)
        x = {
            "slice": lambda: x[..., 40:80],
            "transposed": lambda: x[..., :40].transpose(0, 1),
            "last dimension strided": lambda: x[..., ::3],
            "expanded": lambda: x[:1, :, :40].expand(4, 5, 40),
        }[change]()
        return {"x": x, "bias": randn(generator, 80, dtype=dtype, device=device)[::2]}

    return Case(id, make)


def _sweep(id: str, approximate: str) -> Case:
    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Arguments:
        return {
            "x": torch.linspace(-16, 16, 4001).to(dtype=dtype, device=device).view(1, -1),
            "approximate": approximate,
        }

    return Case(id, make)


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
    differentiable=("x", "bias"),
    cases=(
        _case("odd", 4, 7, 35),
        _case("odd tanh", 4, 7, 35, approximate="tanh"),
        _case("without bias", 9, 67, bias=False),
        _case("feed-forward 3072", 5, 3072),
        _case("feed-forward 3072 tanh", 5, 3072, approximate="tanh"),
        _case("one dimension", 9001),
        _case("no rows", 0, 48),
        _case("one column", 5, 1),
        _case("float32 bias", 6, 96, wide=True),
        _case("huge", 3, 65, scale=1e4),
        _case("huge tanh", 3, 65, scale=1e4, approximate="tanh"),
        _case("tiny", 3, 65, scale=1e-3, bias=False),
        _case("many rows", 1500, 129, small=False),
        _sweep("from -16 to 16", "none"),
        _sweep("from -16 to 16 tanh", "tanh"),
        _view("slice of a wider buffer", "slice"),
        _view("transposed", "transposed"),
        _view("last dimension strided", "last dimension strided"),
        _view("expanded", "expanded"),
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
    bytes_moved=lambda a: 2 * a["x"].numel() * a["x"].element_size(),
)
