"""Which of backends "cuda" and "triton" an op takes on a GPU: the one that was faster there, by a measured table.

`measured.json` beside this file is written by `python -m pyxlbert.bench.prefer` on a GPU: of each op, dtype, head
size and compute capability the times of both at a few sizes, forward and backward together.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

# Where nothing was measured.
USUAL = ("cuda", "triton")


class Key(NamedTuple):
    """What is measured as one.

    Attributes:
        op: its name.
        dtype: of the tensor that decides, as "bfloat16".
        head_size: 64 or 128, whichever holds the tensor's; 0 for ops on rows.
        capability: of the device, as "9.0".
    """

    op: str
    dtype: str
    head_size: int
    capability: str


class Choice(NamedTuple):
    """`small` for tensors of fewer than `threshold` elements, `large` from there on."""

    threshold: int
    small: str
    large: str


def key_of(op: str, tensor: torch.Tensor, capability: str) -> Key:
    """The key of a call whose deciding tensor this is."""
    head_size = 0
    if op.endswith("attention"):
        head_size = 64 if tensor.shape[-1] <= 64 else 128
    return Key(op, str(tensor.dtype).removeprefix("torch."), head_size, capability)


def choose(times: list[tuple[int, float, float]]) -> Choice:
    """The one threshold that loses least, of (elements, seconds on cuda, seconds on triton) by rising elements.

    What is lost is the sum over sizes of how much slower, as a share, the other would have been.
    """
    # One backend for all sizes first: a threshold has to be worth something.
    choices = [Choice(0, name, name) for name in USUAL]
    choices += [Choice(elements, *names) for elements, _, _ in times[1:] for names in (USUAL, USUAL[::-1])]

    def lost(choice: Choice) -> float:
        total = 0.0
        for elements, *seconds in times:
            taken = choice.small if elements < choice.threshold else choice.large
            total += seconds[USUAL.index(taken)] / min(seconds) - 1.0
        return total

    return min(choices, key=lost)


@functools.cache
def table() -> dict[Key, Choice]:
    """The measured table of this installation."""
    path = Path(__file__).with_name("measured.json")
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {Key(**row["key"]): choose([tuple(one) for one in row["times"]]) for row in rows}


@functools.cache
def _capability(device: int) -> str:
    return ".".join(str(number) for number in torch.cuda.get_device_capability(device))


def order(op: str, tensor: torch.Tensor) -> tuple[str, str]:
    """Both backends, the faster one first.

    Args:
        op: the op's name.
        tensor: the CUDA tensor that decides.
    """
    choice = table().get(key_of(op, tensor, _capability(tensor.device.index)))
    if choice is None:
        return USUAL
    first = choice.small if tensor.numel() < choice.threshold else choice.large
    return (first, "triton" if first == "cuda" else "cuda")


def reason(op: str, tensor: torch.Tensor) -> str:
    """Why `order` says what it says."""
    capability = _capability(tensor.device.index)
    choice = table().get(key_of(op, tensor, capability))
    if choice is None:
        return f"not measured against {USUAL[1]} on compute capability {capability}"
    if choice.threshold == 0:
        return f"measured faster on compute capability {capability}"
    side = "below" if tensor.numel() < choice.threshold else "from"
    return f"measured faster {side} {choice.threshold} elements on compute capability {capability}"
