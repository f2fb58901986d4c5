"""Comparison helpers: each raises AssertionError with the numbers, and a test shows each one failing."""

from __future__ import annotations

import torch

from pyxlbert.testing import tolerances


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

    Two measures must hold: the largest error and the relative L2 error.  Where plain is not finite,
    ours must be finite or equal to it.

    Args:
        name: what is compared, for the message.
        ours, plain: results in the tested dtype.
        truth: the same in float64.
        terms: the sum of absolute terms behind each element (a tensor of truth's shape, or one number);
            None takes the largest element of truth.
        factor: see `tolerances.FACTOR`.

    Raises:
        AssertionError: a shape or dtype differs, a value is not finite, or the error is over budget.
    """
    _require(ours.shape == truth.shape, f"{name}: shape {list(ours.shape)}, wanted {list(truth.shape)}")
    _require(ours.dtype == plain.dtype, f"{name}: dtype {ours.dtype}, wanted {plain.dtype}")
    if truth.numel() == 0:
        return
    a, b, t = ours.double(), plain.double(), truth.double()
    finite = b.isfinite() & t.isfinite()
    odd = ~(finite | a.isfinite() | (a == b))
    _require(not odd.any(), f"{name}: {int(odd.sum())} elements not finite where plain PyTorch is not, and not equal")
    _require(bool(a[finite].isfinite().all()), f"{name}: not finite where plain PyTorch is")
    if not finite.any():
        return
    a, b, t = a[finite], b[finite], t[finite]
    accumulation = torch.finfo(torch.promote_types(ours.dtype, torch.float32)).eps
    output = torch.finfo(ours.dtype).eps / 2 * tolerances.OUTPUT_ROUNDINGS
    scale = _terms(terms, truth)[finite]
    slack = output * t.abs() + tolerances.TERMS * accumulation * scale + torch.finfo(ours.dtype).tiny

    ours_max, plain_max = (a - t).abs(), (b - t).abs().max()
    excess = (ours_max - slack).max()
    _require(
        bool(excess <= factor * plain_max),
        f"{name}: largest error {ours_max.max():.3e}, plain PyTorch's {plain_max:.3e}, "
        f"{excess - factor * plain_max:.3e} over {factor} times that plus rounding",
    )
    ours_l2, plain_l2, slack_l2 = (a - t).norm(), (b - t).norm(), slack.norm()
    _require(
        bool(ours_l2 <= factor * plain_l2 + slack_l2),
        f"{name}: L2 error {ours_l2:.3e}, plain PyTorch's {plain_l2:.3e}, budget {factor * plain_l2 + slack_l2:.3e}",
    )


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


def same_bits(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Both tensors hold the same bits (NaN equals itself).

    Raises:
        AssertionError: they differ.
    """
    _require(a.dtype == b.dtype and a.shape == b.shape, f"{name}: {a.dtype} {list(a.shape)}, {b.dtype} {list(b.shape)}")
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    different = a.contiguous().view(integer) != b.contiguous().view(integer)
    _require(not different.any(), f"{name}: {int(different.sum())} of {a.numel()} elements differ in their bits")


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
