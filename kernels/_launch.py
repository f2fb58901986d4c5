"""What the launchers share: which tensors they take, rows as an address and a stride, the call itself."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Set before triton is imported, kernels run as NumPy programs on CPU tensors: slow, and right enough to be tested.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# A row is held in registers as a whole, over the threads of one block.
MAX_COLUMNS = 1 << 16


def refusal(*tensors: Tensor | None) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None: the `supports` of most ops."""
    device = "cpu" if INTERPRETED else "cuda"
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != device:
            interpreter = " in Triton's interpreter" if INTERPRETED else ""
            return f"it takes {device.upper()} tensors{interpreter}, not {tensor.device.type}"
        if tensor.dtype is torch.float64:
            return "it computes in float32; float64 runs on backend 'torch'"
        if INTERPRETED and tensor.dtype is torch.bfloat16 and not _interprets_bfloat16():
            return "this Triton's interpreter multiplies the bits of bfloat16 numbers"
    return None


def refusal_of_rows(*tensors: Tensor | None) -> str | None:
    """The `supports` of the ops on rows: the first tensor's last dimension is bounded too."""
    columns = tensors[0].shape[-1] if tensors and tensors[0] is not None and tensors[0].dim() else 0
    if columns > MAX_COLUMNS:
        return f"it takes rows of at most {MAX_COLUMNS} elements, not {columns}"
    return refusal(*tensors)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> Any:
    """`kernel[grid](*arguments, **options)` on the device of its tensors; the compiled kernel."""
    if INTERPRETED or device.index == torch.cuda.current_device():
        return kernel[grid](*arguments, **options)
    with torch.cuda.device(device):
        return kernel[grid](*arguments, **options)


@triton.jit
def _dot(x, y):
    place = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(y + place, tl.dot(tl.load(x + place), tl.load(x + place)))


@functools.cache
def _interprets_bfloat16() -> bool:
    x, y = torch.ones(16, 16, dtype=torch.bfloat16), torch.zeros(16, 16)
    _dot[(1,)](x, y)
    return bool((y == 16).all())
