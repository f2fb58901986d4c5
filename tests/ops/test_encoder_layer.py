"""encoder_layer: what is special to it."""

from __future__ import annotations

import pytest
import torch
from runners import arguments_of

import pyxlbert
from pyxlbert.backends.native import _C
from pyxlbert.ops._integers import quantise
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.specs import SPECS

SPEC = SPECS["encoder_layer"]
CASES = {case.id: case for case in SPEC.suite}
pytestmark = pytest.mark.skipif(_C is None, reason="backend cpu is not here")


def test_the_fused_layer_and_the_composed_one_agree() -> None:
    """With a gradient to come it is made of other ops; the value is the same but for rounding."""
    for name in ("odd", "packed", "mask", "bias", "relu"):
        arguments = arguments_of(SPEC, CASES[name], torch.float32)
        with torch.no_grad():
            fused = pyxlbert.encoder_layer(**arguments, backend="cpu")
        arguments["x"].requires_grad_()
        composed = pyxlbert.encoder_layer(**arguments, backend="cpu")
        assert composed.requires_grad and not fused.requires_grad
        compare.close(name, fused, composed.detach(), tolerances.MODEL_FLOAT32)


def test_weights_are_packed_once_and_followed(monkeypatch) -> None:
    """The copies follow writes and replacements, and go with the first weight."""
    from pyxlbert.cpu import encoder_layer as launcher

    packs: list[int] = []
    right = launcher._packed_layer
    monkeypatch.setattr(launcher, "_packed_layer", lambda *a: packs.append(1) or right(*a))
    kept = len(launcher._kept)
    arguments = arguments_of(SPEC, CASES["odd"], torch.float32)
    first, again = (pyxlbert.encoder_layer(**arguments, backend="cpu") for _ in "ab")
    compare.same_bits("again", again, first)
    assert len(packs) == 1
    changes = (
        lambda a: a | {"up_weight": a["up_weight"].mul_(2)},
        lambda a: a | {"down_bias": a["down_bias"] + 1},
        lambda a: a | {"activation": "relu"},
        lambda a: a | {"norm_weight": a["norm_weight"].add_(1)},
        lambda a: a | {"qkv_weight": a["qkv_weight"].clone() * 2},
    )
    for change in changes:
        arguments = change(arguments)
        found = pyxlbert.encoder_layer(**arguments, backend="cpu")
        compare.close("changed", found, pyxlbert.encoder_layer(**arguments, backend="torch"), tolerances.MODEL_FLOAT32)
        assert not torch.equal(found, first)
        first = found
    assert len(packs) >= 5
    del arguments
    assert len(launcher._kept) == kept


@pytest.mark.parametrize("rows", [*range(1, 14), 31, 47, 48, 49, 95, 97, 191, 193, 300])
@pytest.mark.parametrize(("columns", "inner"), [(1, 1), (63, 3), (65, 33), (130, 769), (192, 384)])
def test_packed_products_of_any_size(rows: int, columns: int, inner: int) -> None:
    """Every level, dtype, number of rows and tail, and the same bits for a row alone."""
    from pyxlbert.cpu import _packed

    before, generator = _C.level(), torch.Generator().manual_seed(rows)
    try:
        for number, level in enumerate(_C.levels()):
            _C.set_level(level)
            dtype = SPEC.dtypes[(number + rows) % 3]
            x, weight = (torch.randn(n, inner, generator=generator).to(dtype) for n in (rows, columns))
            bias = torch.randn(columns, generator=generator).to(dtype)
            activation = tuple(_packed.ACTIVATIONS)[(number + rows) % 5]
            packed = _packed.pack([weight], [bias])
            found = _packed.product(x, packed, activation)
            exact = _activated(x.double() @ weight.double().t() + bias.double(), activation)
            plain = _activated(torch.nn.functional.linear(x, weight, bias), activation)
            compare.within_budget(f"{level} {activation}", found, plain, exact, terms=float(exact.abs().max()))
            alone = torch.cat([_packed.product(x[i : i + 1], packed, activation) for i in range(rows)])
            compare.same_bits(level, found, alone)
    finally:
        _C.set_level(before)


def _activated(x: torch.Tensor, name: str) -> torch.Tensor:
    from pyxlbert.reference.encoder_layer import ACTIVATIONS

    return x if name == "none" else ACTIVATIONS[name](x)


@pytest.mark.parametrize("level", _C.levels() if _C else [])
@pytest.mark.parametrize("inner", [1, 5, 64, 385, 3072])
def test_sums_of_integers_are_exact(level: str, inner: int) -> None:
    """Against the same quantisation in exact arithmetic; one weight and one row are all the same, one is zero."""
    from pyxlbert.cpu import _packed

    before = _C.level()
    _C.set_level(level)
    try:
        generator = torch.Generator().manual_seed(inner)
        x, weight = (torch.randn(n, inner, generator=generator) for n in (9, 70))
        x[3], x[4], weight[5], weight[6] = 0.7, 0.0, -0.3, 0.0
        x[5] *= 1e4
        packed = _packed.pack([weight], None, [quantise(weight)])
        found = _packed.product(x, packed, "none").double()
    finally:
        _C.set_level(before)
    scale = weight.abs().amax(1, keepdim=True) / 127
    whole = (weight / scale.clamp(min=1e-30)).round().double()
    low = x.amin(1, keepdim=True)
    step = (x.amax(1, keepdim=True) - low) / 255
    q = ((x - low) / step.clamp(min=1e-30)).round().double()
    exact = (step.double() * q) @ (scale.double() * whole).t() + low.double() * (scale.double() * whole).sum(1)
    # A number half between two integers may be rounded either way: one step of one element.
    slack = (step.double() * (scale * 127).double().t()) * 1.01
    error = (found - exact).abs()
    rounding = tolerances.TERMS * torch.finfo(torch.float32).eps * (x.abs().double() @ weight.abs().double().t())
    assert (error <= slack + rounding).all()
    # A tie in x is seen in every column, one in the weight in every row.
    assert (error > rounding).sum() <= 2 * weight.shape[0], "more than ties"


def test_infinities_stay_in_their_rows() -> None:
    from pyxlbert.cpu import _packed

    x, weight = torch.randn(7, 40), torch.randn(9, 40)
    packed = _packed.pack([weight], None, [quantise(weight)])
    wanted = _packed.product(x, packed, "none")
    for odd in (float("inf"), float("nan"), float("-inf")):
        other = x.clone()
        other[2, 5] = odd
        found = _packed.product(other, packed, "none")
        assert not found[2].isfinite().any()
        keep = [i for i in range(7) if i != 2]
        compare.same_bits("other rows", found[keep], wanted[keep])


def test_another_level_cannot_read_a_packed_weight() -> None:
    from pyxlbert.cpu import _packed

    levels, before = _C.levels(), _C.level()
    if len(levels) < 2:
        pytest.skip("this machine has one level")
    packed = _packed.pack([torch.randn(4, 4)], None)
    try:
        _C.set_level(levels[0])
        with pytest.raises(ValueError, match=f"packed for level {before}"):
            _packed.product(torch.randn(2, 4), packed, "none")
    finally:
        _C.set_level(before)
