"""Comparison helpers: each raises AssertionError with the numbers, and a test shows each one failing."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from pyxlbert.testing import tolerances


class Errors(NamedTuple):
    """How wrong a result is, beside plain PyTorch and what the budget allows; zeros if there is nothing to compare.

    Attributes:
        largest, plain_largest: the largest absolute error of ours, and of plain PyTorch.
        l2, plain_l2: the error's L2 norm over that of the truth.
        largest_share, l2_share: of the budget that either measure uses; over 1 is over budget.
        largest_over, l2_budget: what the largest error is over budget by; what the L2 norm of the error may be.
        factor: how many times as wrong as plain PyTorch a result may be.
    """

    largest: float = 0.0
    plain_largest: float = 0.0
    l2: float = 0.0
    plain_l2: float = 0.0
    largest_share: float = 0.0
    l2_share: float = 0.0
    largest_over: float = 0.0
    l2_budget: float = 0.0
    factor: float = tolerances.FACTOR

    @property
    def share(self) -> float:
        """Of the budget, by the worse measure."""
        return max(self.largest_share, self.l2_share)

    def require(self, name: str) -> None:
        """Raises AssertionError, with the numbers, if the budget is not kept.

        Args:
            name: what is compared, for the message.
        """
        _require(
            self.largest_share <= 1.0,
            f"{name}: largest error {self.largest:.3e}, plain PyTorch's {self.plain_largest:.3e}, "
            f"{self.largest_over:.3e} over {self.factor} times that plus rounding",
        )
        _require(
            self.l2_share <= 1.0,
            f"{name}: relative L2 error {self.l2:.3e}, plain PyTorch's {self.plain_l2:.3e}, "
            f"budget {self.l2_budget:.3e}",
        )


def within_budget(
    name: str,
    ours: torch.Tensor,
    plain: torch.Tensor,
    truth: torch.Tensor,
    *,
    terms: torch.Tensor | float | None = None,
    factor: float = tolerances.FACTOR,
) -> None:
    """`ours` is at most `factor` times as wrong as `plain`, both measured against the float64 `truth`.

    Two measures must hold: the largest error and the relative L2 error.  The arguments are those of `errors`.

    Raises:
        AssertionError: a shape or dtype differs, a value is not finite, or the error is over budget.
    """
    errors(name, ours, plain, truth, terms=terms, factor=factor).require(name)


def errors(
    name: str,
    ours: torch.Tensor,
    plain: torch.Tensor,
    truth: torch.Tensor,
    *,
    terms: torch.Tensor | float | None = None,
    factor: float = tolerances.FACTOR,
) -> Errors:
    """How wrong `ours` and `plain` are against the float64 `truth`.

    Where plain is not finite, ours must be finite or equal to it.

    Args:
        name: what is compared, for the message.
        ours, plain: results in the tested dtype.
        truth: the same in float64.
        terms: the sum of absolute terms behind each element (a tensor of truth's shape, or one number);
            None takes the largest element of truth.
        factor: see `tolerances.FACTOR`.

    Raises:
        AssertionError: a shape or dtype differs, or a value is not finite.
    """
    _require(ours.shape == truth.shape, f"{name}: shape {list(ours.shape)}, wanted {list(truth.shape)}")
    _require(ours.dtype == plain.dtype, f"{name}: dtype {ours.dtype}, wanted {plain.dtype}")
    if truth.numel() == 0:
        return Errors(factor=factor)
    a, b, t, scale = ours.double(), plain.double(), truth.double(), _terms(terms, truth)
    finite = b.isfinite() & t.isfinite()
    if not (finite.all() and a.isfinite().all()):
        odd = ~(finite | a.isfinite() | (a == b))
        words = "elements not finite where plain PyTorch is not, and not equal"
        _require(not odd.any(), f"{name}: {int(odd.sum())} {words}")
        _require(bool(a[finite].isfinite().all()), f"{name}: not finite where plain PyTorch is")
        if not finite.any():
            return Errors(factor=factor)
        a, b, t, scale = a[finite], b[finite], t[finite], scale[finite]
    accumulation = torch.finfo(torch.promote_types(ours.dtype, torch.float32)).eps
    output = torch.finfo(ours.dtype).eps / 2 * tolerances.OUTPUT_ROUNDINGS
    slack = output * t.abs() + tolerances.TERMS * accumulation * scale + torch.finfo(ours.dtype).tiny

    far, plain_far = (a - t).abs(), (b - t).abs()
    plain_largest = plain_far.max()
    norm = t.norm().clamp(min=torch.finfo(torch.float64).tiny)
    l2, plain_l2 = far.norm(), plain_far.norm()
    budget = factor * plain_l2 + slack.norm()
    return Errors(
        *(float(far.max()), float(plain_largest)),
        *(float(l2 / norm), float(plain_l2 / norm)),
        *(float((far / (slack + factor * plain_largest)).max()), float(l2 / budget)),
        *(float((far - slack).max() - factor * plain_largest), float(budget / norm)),
        factor,
    )


class Peer(NamedTuple):
    """How wrong plain PyTorch's result is, for many results of ours.

    Attributes:
        plain, truth: see `errors`; truth in float64.
        largest, l2: the largest absolute error and the error's L2 norm; not finite if an element is not.
    """

    plain: torch.Tensor
    truth: torch.Tensor
    largest: float
    l2: float

    @classmethod
    def of(cls, plain: torch.Tensor, truth: torch.Tensor) -> Peer:
        """Both tensors have one shape."""
        if truth.numel() == 0:
            return cls(plain, truth, 0.0, 0.0)
        far = truth.double() - plain
        return cls(plain, truth, float(far.abs().max()), float(far.norm()))

    def clearly(self, ours: torch.Tensor, factor: float) -> bool:
        """Whether ours keeps its budget even if nothing is granted for rounding, which is quickly asked.

        If so, `within_budget` passes, whatever the terms are; if not, it has to be asked.
        """
        if ours.shape != self.truth.shape or ours.dtype != self.plain.dtype or not math.isfinite(self.l2):
            return False
        if ours.numel() == 0:
            return True
        far = self.truth - ours
        # No number is at most a limit if an element is NaN.
        return float(far.abs().max()) <= factor * self.largest and float(far.norm()) <= factor * self.l2


def close(name: str, ours: torch.Tensor, wanted: torch.Tensor, relative: float, *, least: float = 0.0) -> None:
    """The largest difference is at most `relative` times the largest element of `wanted`; a number of `tolerances`.

    Args:
        name: what is compared, for the message.
        ours, wanted: tensors of one shape.
        relative: the ratio.
        least: taken for the largest element where that is smaller: what is zero in exact arithmetic has no scale.

    Raises:
        AssertionError: a shape differs, a value is not finite, or the difference is larger.
    """
    _require(ours.shape == wanted.shape, f"{name}: shape {list(ours.shape)}, wanted {list(wanted.shape)}")
    if wanted.numel() == 0:
        return
    a, b = ours.double(), wanted.double()
    _require(bool(a.isfinite().all()), f"{name}: {int((~a.isfinite()).sum())} elements not finite")
    difference, largest = (a - b).abs().max(), b.abs().max().clamp(min=least)
    _require(
        bool(difference <= relative * largest),
        f"{name}: largest difference {difference:.3e}, largest element {largest:.3e}, wanted a ratio of {relative:.1e}",
    )


def gain(name: str, ours: torch.Tensor, truth: torch.Tensor, limit: float) -> None:
    """A result is the truth and rounding, not a multiple of the truth: an error of every element's size that no one
    element shows.

    Args:
        name: what is compared, for the message.
        ours, truth: tensors of one shape.
        limit: what the multiple may differ from 1 by, beyond what rounding to both sides leaves; of `tolerances`.

    Raises:
        AssertionError: a shape or the multiple differs.
    """
    _require(ours.shape == truth.shape, f"{name}: shape {list(ours.shape)}, wanted {list(truth.shape)}")
    a, t = ours.double().flatten(), truth.double().flatten()
    square = t.dot(t)
    if not square > 0:
        return
    found = a.dot(t) / square
    # Four deviations of a mean over rows: errors of one row have their sums in common.
    rows = truth.numel() / truth.shape[-1] if truth.dim() else 1
    noise = 4 * (a - found * t).norm() / (square.sqrt() * rows**0.5)
    _require(
        bool((found - 1).abs() <= limit + noise),
        f"{name}: {float(found):.6f} times the truth, wanted 1 within {float(limit + noise):.1e}",
    )


def same_bits(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Both tensors hold the same bits (NaN equals itself).

    Raises:
        AssertionError: they differ.
    """
    _require(a.dtype == b.dtype and a.shape == b.shape, f"{name}: {a.dtype} {list(a.shape)}, {b.dtype} {list(b.shape)}")
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    x, y = a.contiguous().view(integer), b.contiguous().view(integer)
    if not torch.equal(x, y):
        raise AssertionError(f"{name}: {int((x != y).sum())} of {a.numel()} elements differ in their bits")


def cosine_distance(name: str, ours: torch.Tensor, wanted: torch.Tensor, limit: float) -> float:
    """The worst 1 - cosine over rows `[N, E]`, at most `limit`.

    Raises:
        AssertionError: it is larger, or a value is not finite.
    """
    a, b = ours.double(), wanted.double()
    _require(bool(a.isfinite().all()), f"{name}: not finite")
    worst = float((1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).max()) if a.numel() else 0.0
    _require(worst <= limit, f"{name}: worst 1 - cosine {worst:.3e}, wanted at most {limit:.1e}")
    return worst


def _terms(terms: torch.Tensor | float | None, truth: torch.Tensor) -> torch.Tensor:
    if terms is None:
        finite = truth[truth.isfinite()]
        terms = float(finite.detach().abs().max()) if finite.numel() else 0.0
    if isinstance(terms, torch.Tensor):
        return terms.double().expand(truth.shape)
    return torch.full(truth.shape, float(terms), dtype=torch.float64, device=truth.device)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
