"""Weights as eight-bit integers with a scale for each output: what `pyxlbert.pack(model, "int8")` multiplies by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MOST = 127
# Rows are integers up to 255, and their products with a weight's are summed in 32 bits.
MOST_INPUTS = (2**31 - 1) // (255 * MOST)


class Integers(NamedTuple):
    """A weight `[N, K]`, of which row n is about `scales[n] * weight[n]`.

    Attributes:
        weight: int8 `[N, K]`, contiguous, from -127 to 127.
        scales: float32 `[N]`.
    """

    weight: Tensor
    scales: Tensor


def quantise(weight: Tensor) -> Integers:
    """The nearest integers, halves away from zero; the largest element of a row is 127 or -127.

    A row of zeros has the scale 0, one with an infinity or a NaN the scale NaN.

    Args:
        weight: floating `[N, K]`; any strides.

    Raises:
        ValueError: K is over MOST_INPUTS.
    """
    check_inputs("int8: weight", weight)
    x = weight.detach().float()
    most = x.abs().amax(1)
    finite = most.isfinite()
    # Of the smallest numbers of all the quotient would be infinite.
    inverse = (MOST / most).clamp(max=torch.finfo(torch.float32).max).where(finite & (most > 0), 0.0)
    scaled = x.where(finite[:, None], 0.0) * inverse[:, None]
    integers = (scaled + scaled.sign() * 0.5).trunc().clamp(-MOST, MOST).to(torch.int8)
    return Integers(integers.contiguous(), (most * (1 / MOST)).where(finite, torch.nan))


def check_inputs(name: str, weight: Tensor) -> None:
    """That sums of products with the weight `[N, K]` fit the integers that they are summed in.

    Raises:
        ValueError: they may not; `name` says whose.
    """
    if weight.shape[1] > MOST_INPUTS:
        raise ValueError(
            f"{name}: got {list(weight.shape)}, wanted at most {MOST_INPUTS} columns: "
            "products of integers are summed in 32 bits"
        )
