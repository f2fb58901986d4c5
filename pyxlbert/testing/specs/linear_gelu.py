"""Inputs of linear_gelu: those of linear, with both forms of the activation."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as changed

import torch

from pyxlbert.ops.linear_gelu import linear_gelu
from pyxlbert.testing import tolerances
from pyxlbert.testing.specs import linear
from pyxlbert.testing.specs._spec import (
    BOTH,
    Arguments,
    Bad,
    Case,
    Draw,
    Spec,
    Use,
    timed,
)


def plain(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, approximate: str = "none"
) -> torch.Tensor:
    """The affine map and its activation by torch.nn.functional, parameters in x's dtype as it demands."""
    return torch.nn.functional.gelu(linear.plain(x, weight, bias), approximate=approximate)


@dataclass(frozen=True)
class Inputs(linear.Inputs):
    """linear's, and the form of the activation."""

    approximate: str = "none"


def make(inputs: Inputs, draw: Draw) -> Arguments:
    """See `Spec`."""
    return linear.make(inputs, draw) | {"approximate": inputs.approximate}


def _with(case: Case, approximate: str) -> Case:
    return changed(case, id=f"{case.id} {approximate}", inputs=Inputs(**vars(case.inputs), approximate=approximate))


def _inference(case: Case) -> Case:
    # Without a gradient gelu is the product's epilogue, which is other code.
    return changed(case, id=f"{case.id} inference", gradients=False)


def _terms(name: str, a: Arguments, cotangents: tuple[torch.Tensor, ...]) -> torch.Tensor | float | None:
    """gelu'(z) is at most 1.13 and changes by at most 0.8 per unit of z, which carries the rounding of its own sum.

    In backward it carries that of its dtype too, in which it is saved.
    """
    reach = linear.terms("out 0", a, cotangents)
    if name == "out 0":
        return reach
    saved = torch.finfo(cotangents[0].dtype).eps / 2 / (tolerances.TERMS * torch.finfo(torch.float32).eps)
    reach = reach + saved * linear.plain(a["x"], a["weight"], a.get("bias")).abs()
    return linear.terms(name, a, (cotangents[0].double().abs() * (1.13 + 0.8 * reach),))


_ERF = tuple(_with(case, "none") for case in linear.CASES)
_TANH = tuple(_with(case, "tanh") for case in linear.CASES if case.id in ("odd", "hidden 384", "huge", "no rows"))

SPEC = Spec(
    name="linear_gelu",
    function=linear_gelu,
    plain=plain,
    make=make,
    differentiable=("x", "weight", "bias"),
    cases=(
        *_ERF,
        *_TANH,
        *(_inference(case) for case in (*_ERF, *_TANH)),
        *(case for rows in (16, 1024) for case in timed(Inputs((rows, 768), 3072), {Use.RACE: BOTH})),
    ),
    bad=(
        *linear.BAD,
        Bad(
            "approximate unknown",
            linear.replace(approximate=lambda a: "fast"),
            ValueError,
            ("approximate", "fast", "'none' or 'tanh'"),
        ),
    ),
    terms=_terms,
    rounded=linear.ROUNDED,
    vendor=linear.VENDOR,
    bytes_moved=linear.bytes_moved,
    flops=linear.flops,
)
