"""Inputs of linear."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyxlbert.ops.linear import linear
from pyxlbert.testing.specs._spec import Arguments, Bad, Case, Spec, randn, replace

VENDOR = "oneDNN and MKL divide a long sum among threads as they see fit, so its last bits depend on their number"


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The affine map by torch.nn.functional, parameters in x's dtype as it demands."""
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def case(
    id: str, *shape: int, n: int, bias: bool = True, wide: bool = False, scale: float = 1.0, small: bool = True
) -> Case:
    """x of `shape`, its last dimension K, to N columns; parameters in float32 when `wide`."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Arguments:
        k = shape[-1]
        parameter = torch.float32 if wide and dtype is not torch.float64 else dtype
        arguments = {
            "x": randn(generator, *shape, dtype=dtype, device=device, scale=scale),
            "weight": randn(generator, n, k, dtype=parameter, device=device, scale=max(k, 1) ** -0.5),
        }
        if bias:
            arguments["bias"] = randn(generator, n, dtype=parameter, device=device, scale=scale)
        return arguments

    return Case(id, make, small=small)


def view(id: str, **changes: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    """x `[6, 5, 40]`, weight `[24, 40]`, bias `[24]`, each cut by its change out of a larger tensor."""
    sizes = {"x": (6, 5, 3 * 40), "weight": (3 * 24, 3 * 40), "bias": (3 * 24,)}
    usual = {"x": lambda t: t[..., :40], "weight": lambda t: t[:24, :40], "bias": lambda t: t[:24]}

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Arguments:
        whole = {name: randn(generator, *size, dtype=dtype, device=device) for name, size in sizes.items()}
        return {name: (usual | changes)[name](tensor) for name, tensor in whole.items()}

    return Case(id, make)


VIEWS = (
    view("slice of a wider buffer", x=lambda t: t[..., 40:80]),
    view("every other row", x=lambda t: t[::2, :, :40]),
    view("transposed", x=lambda t: t[..., :40].transpose(0, 1)),
    view("last dimension strided", x=lambda t: t[..., ::3]),
    view("expanded", x=lambda t: t[:1, :, :40].expand(4, 5, 40)),
    view("expanded along K", x=lambda t: t[..., :1].expand(6, 5, 40)),
    view("weight strided", weight=lambda t: t[::3, ::3]),
    view("weight transposed", weight=lambda t: t[:40, :24].t()),
    view("weight expanded", weight=lambda t: t[:1, :40].expand(24, 40)),
    view("bias strided", bias=lambda t: t[::3]),
    view("bias expanded", bias=lambda t: t[:1].expand(24)),
)

CASES = (
    case("odd", 3, 5, 37, n=29),
    case("hidden 384", 2, 9, 384, n=384),
    case("hidden 768 to 3072", 33, 768, n=3072, small=False),
    case("hidden 3072 to 768", 20, 3072, n=768, small=False),
    case("one dimension", 24, n=16),
    case("one row", 1, 64, n=48),
    case("one column out", 7, 32, n=1),
    case("one column in", 7, 1, n=12),
    case("two classes", 5, 50, n=2),
    case("no rows", 2, 0, 24, n=16),
    case("nothing in", 3, 0, n=4),
    case("nothing out", 3, 24, n=0),
    case("no bias", 9, 48, n=40, bias=False),
    case("float32 parameters", 6, 96, n=64, wide=True),
    case("huge", 4, 65, n=33, scale=1e3),
    case("tiny", 4, 65, n=33, scale=1e-3),
    case("many rows", 1100, 100, n=70, small=False),
    *VIEWS,
)


BAD = (
    Bad("x no tensor", replace(x=lambda a: [1.0]), TypeError, ("x", "list", "wanted a tensor")),
    Bad("x integer", replace(x=lambda a: a["x"].long()), TypeError, ("x", "int64", "float32")),
    Bad("x scalar", replace(x=lambda a: a["x"].sum()), ValueError, ("x", "scalar")),
    Bad("x meta", replace(x=lambda a: a["x"].to("meta")), ValueError, ("x", "meta")),
    Bad("weight no tensor", replace(weight=lambda a: None), TypeError, ("weight", "NoneType", "wanted a tensor")),
    Bad("weight meta", replace(weight=lambda a: a["weight"].to("meta")), ValueError, ("weight", "meta")),
    Bad("weight narrow", replace(weight=lambda a: a["weight"][:, 1:]), ValueError, ("weight", "[29, 36]", "[N, 37]")),
    Bad("weight a vector", replace(weight=lambda a: a["weight"][0]), ValueError, ("weight", "[37]", "[N, 37]")),
    Bad("weight dtype", replace(weight=lambda a: a["weight"].double()), TypeError, ("weight", "float64")),
    Bad("weight integer", replace(weight=lambda a: a["weight"].int()), TypeError, ("weight", "int32")),
    Bad("bias short", replace(bias=lambda a: a["bias"][1:]), ValueError, ("bias", "[28]", "[29]")),
    Bad("bias dtype", replace(bias=lambda a: a["bias"].half()), TypeError, ("bias", "float16", "float32")),
    Bad("bias no tensor", replace(bias=lambda a: 0.0), TypeError, ("bias", "float", "wanted a tensor")),
    Bad("backend unknown", replace(backend=lambda a: "mkl"), ValueError, ("backend", "mkl", "cpu")),
    Bad("backend list", replace(backend=lambda a: ["cpu"]), ValueError, ("backend", "['cpu']", "cpu")),
)


def terms(name: str, a: Arguments, cotangents: tuple[torch.Tensor, ...]) -> torch.Tensor | float | None:
    """The same products of absolute values."""
    x, weight = a["x"].abs(), a["weight"].abs()
    dy = cotangents[0].double().abs()
    rows = dy.reshape(dy.shape[:-1].numel(), dy.shape[-1])
    if name == "out 0":
        return plain(x, weight, a["bias"].abs() if "bias" in a else None)
    if name == "grad x":
        return dy @ weight
    if name == "grad weight":
        return rows.t() @ x.reshape(rows.shape[0], x.shape[-1])
    return rows.sum(0)


def flops(arguments: Arguments) -> int:
    """Two per product."""
    return 2 * arguments["x"].shape[:-1].numel() * arguments["weight"].numel()


def bytes_moved(arguments: Arguments) -> int:
    """x and the weight read, y written, once."""
    x, weight = arguments["x"], arguments["weight"]
    return (x.numel() + weight.numel() + x.shape[:-1].numel() * weight.shape[0]) * x.element_size()


SPEC = Spec(
    name="linear",
    function=linear,
    plain=plain,
    differentiable=("x", "weight", "bias"),
    cases=CASES,
    bad=BAD,
    terms=terms,
    vendor=VENDOR,
    bytes_moved=bytes_moved,
    flops=flops,
)
