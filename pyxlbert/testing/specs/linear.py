"""Inputs of linear."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from pyxlbert.ops.linear import linear
from pyxlbert.testing.specs._spec import (
    BOTH,
    Arguments,
    Bad,
    Case,
    Draw,
    Spec,
    Use,
    replace,
    timed,
)

VENDOR = "oneDNN and MKL divide a long sum among threads as they see fit, so its last bits depend on their number"

# See `Spec.rounded`.
ROUNDED = {"weight": "x", "bias": "x"}


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The affine map by torch.nn.functional, parameters in x's dtype as it demands."""
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@dataclass(frozen=True)
class Inputs:
    """x of `shape`, its last dimension K, to `outputs` columns; parameters in float32 if `wide`.

    `views`: of tensors three times as large, what x `[6, 5, 40]`, weight `[24, 40]` and bias `[24]` are cut out as.
    """

    shape: tuple[int, ...] = (6, 5, 40)
    outputs: int = 24
    bias: bool = True
    wide: bool = False
    scale: float = 1.0
    views: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] | None = None

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}->{self.outputs}"


def make(inputs: Inputs, draw: Draw) -> Arguments:
    """See `Spec`."""
    (*rows, k), n = inputs.shape, inputs.outputs
    if inputs.views is not None:
        whole = {"x": draw.normal(*rows, 3 * k), "weight": draw.normal(3 * n, 3 * k), "bias": draw.normal(3 * n)}
        usual = {"x": lambda t: t[..., :k], "weight": lambda t: t[:n, :k], "bias": lambda t: t[:n]}
        return {name: (usual | dict(inputs.views))[name](tensor) for name, tensor in whole.items()}
    parameter = draw.single if inputs.wide else draw.dtype
    arguments = {
        "x": draw.normal(*inputs.shape, scale=inputs.scale),
        "weight": draw.normal(n, k, dtype=parameter, scale=max(k, 1) ** -0.5),
    }
    if inputs.bias:
        arguments["bias"] = draw.normal(n, dtype=parameter, scale=inputs.scale)
    return arguments


def view(id: str, **views: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    """See `Inputs`."""
    return Case(id, Inputs(views=views))


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
    Case("odd", Inputs((3, 5, 37), outputs=29)),
    Case("hidden 384", Inputs((2, 9, 384), outputs=384)),
    Case("hidden 768 to 3072", Inputs((33, 768), outputs=3072), small=False),
    Case("hidden 3072 to 768", Inputs((20, 3072), outputs=768), small=False),
    Case("one dimension", Inputs((24,), outputs=16)),
    Case("one row", Inputs((1, 64), outputs=48)),
    Case("one column out", Inputs((7, 32), outputs=1)),
    Case("one column in", Inputs((7, 1), outputs=12)),
    Case("two classes", Inputs((5, 50), outputs=2)),
    Case("no rows", Inputs((2, 0, 24), outputs=16)),
    Case("nothing in", Inputs((3, 0), outputs=4)),
    Case("nothing out", Inputs((3, 24), outputs=0)),
    Case("no bias", Inputs((9, 48), outputs=40, bias=False)),
    Case("float32 parameters", Inputs((6, 96), outputs=64, wide=True)),
    Case("huge", Inputs((4, 65), outputs=33, scale=1e3)),
    Case("tiny", Inputs((4, 65), outputs=33, scale=1e-3)),
    Case("many rows", Inputs((1100, 100), outputs=70), small=False),
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


def flops(arguments: Arguments, backward: bool) -> int:
    """Two per product; backward makes two products of the forward's size."""
    return (6 if backward else 2) * arguments["x"].shape[:-1].numel() * arguments["weight"].numel()


def bytes_moved(arguments: Arguments, backward: bool) -> int:
    """x and the weight read, y written, once; as much in each product of backward."""
    x, weight = arguments["x"], arguments["weight"]
    each = (x.numel() + weight.numel() + x.shape[:-1].numel() * weight.shape[0]) * x.element_size()
    return (3 if backward else 1) * each


SPEC = Spec(
    name="linear",
    function=linear,
    plain=plain,
    make=make,
    differentiable=("x", "weight", "bias"),
    cases=(
        *CASES,
        *(case for rows in (16, 1024) for case in timed(Inputs((rows, 768), 768), {Use.RACE: BOTH})),
    ),
    bad=BAD,
    terms=terms,
    rounded=ROUNDED,
    vendor=VENDOR,
    bytes_moved=bytes_moved,
    flops=flops,
)
