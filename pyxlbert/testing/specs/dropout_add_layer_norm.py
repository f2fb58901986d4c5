"""Inputs of dropout_add_layer_norm."""

from __future__ import annotations

import torch

from pyxlbert.ops.dropout_add_layer_norm import dropout_add_layer_norm
from pyxlbert.reference.philox import Tag, keep_rows
from pyxlbert.testing.specs._spec import Arguments, Bad, Case, Spec, randn, replace

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


def _case(
    id: str,
    *shape: int,
    x_bias: bool = False,
    dropout_p: float = 0.0,
    stream: bool = False,
    wide: bool = False,
    copy: torch.dtype | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    eps: float = 1e-12,
    small: bool = True,
) -> Case:
    """`stream`: the residual in float32; `wide`: the parameters in float32."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Arguments:
        n = shape[-1]
        single = torch.float32 if dtype is not torch.float64 else dtype
        parameter = single if wide else dtype
        arguments: Arguments = {
            "x": randn(generator, *shape, dtype=dtype, device=device, scale=scale),
            "residual": randn(generator, *shape, dtype=single if stream else dtype, device=device, scale=scale) + shift,
            "weight": randn(generator, n, dtype=parameter, device=device) * 0.5 + 1,
            "bias": randn(generator, n, dtype=parameter, device=device),
            "eps": eps,
        }
        if x_bias:
            arguments["x_bias"] = randn(generator, n, dtype=parameter, device=device)
        if dropout_p:
            arguments |= {"dropout_p": dropout_p, "seed": torch.tensor([SEED], device=device)}
        if copy is not None:
            arguments["copy_dtype"] = copy
        return arguments

    return Case(id, make, small=small)


def _view(id: str, change: str) -> Case:
    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Arguments:
        x, residual = (randn(generator, 6, 5, 3 * 40, dtype=dtype, device=device) for _ in range(2))
        view = {
            "slice": lambda t, k: t[..., 40 * k : 40 * k + 40],
            "rows": lambda t, k: t[k::2, :, :40],
            "transposed": lambda t, k: t[..., :40].transpose(0, 1),
            "last dimension strided": lambda t, k: t[..., k::3],
            "expanded": lambda t, k: t[:1, :, :40].expand(4, 5, 40),
        }[change]
        return {
            "x": view(x, 0),
            "residual": view(residual, 1),
            "weight": randn(generator, 40, dtype=dtype, device=device),
            "bias": randn(generator, 80, dtype=dtype, device=device)[::2],
            "x_bias": randn(generator, 80, dtype=dtype, device=device)[1::2],
            "dropout_p": 0.1,
            "seed": SEED,
        }

    return Case(id, make)


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


SPEC = Spec(
    name="dropout_add_layer_norm",
    function=dropout_add_layer_norm,
    plain=plain,
    differentiable=("x", "residual", "weight", "bias", "x_bias"),
    cases=(
        _case("odd", 4, 7, 35, x_bias=True, dropout_p=0.1, copy=torch.bfloat16),
        _case("sum only", 4, 7, 35),
        _case("hidden 384", 2, 9, 384),
        _case("hidden 768 float32 stream", 33, 768, stream=True, copy=torch.bfloat16),
        _case("dropout", 6, 200, dropout_p=0.3),
        _case("dropout of all", 6, 40, x_bias=True, dropout_p=1.0),
        _case("bias", 6, 65, x_bias=True),
        _case("float32 parameters", 6, 96, x_bias=True, wide=True),
        _case("all mixed", 5, 130, x_bias=True, dropout_p=0.5, stream=True, wide=True, copy=torch.float16),
        _case("copy in float32", 5, 48, copy=torch.float32),
        _case("one row", 1, 64, dropout_p=0.1),
        _case("one dimension", 50, x_bias=True),
        _case("no rows", 0, 48, x_bias=True, dropout_p=0.1, copy=torch.bfloat16),
        _case("one column", 5, 1),
        _case("two columns", 300, 2, dropout_p=0.25, eps=1e-5),
        _case("large mean", 8, 100, shift=200.0),
        _case("huge", 3, 65, scale=1e4),
        _case("many rows", 1500, 129, dropout_p=0.1, small=False),
        _view("slice of a wider buffer", "slice"),
        _view("every other row", "rows"),
        _view("transposed", "transposed"),
        _view("last dimension strided", "last dimension strided"),
        _view("expanded", "expanded"),
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
    bytes_moved=lambda a: (
        a["x"].numel()
        * (a["x"].element_size() + 2 * a["residual"].element_size() + getattr(a.get("copy_dtype"), "itemsize", 0))
    ),
)
