"""What the CUDA glue shares: dtypes as numbers, which tensors it takes, sums over rows, the call itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyxlbert import backends
from pyxlbert.launch import rows
from pyxlbert.launch.rows import DTYPE

_MOST_PARTS = 512  # partial sums over rows, each of them a row to write and to read again


def refusal(*tensors: Tensor | None) -> str | None:
    """Why the CUDA kernels cannot take these tensors, or None: the `supports` of most ops."""
    emulated = backends.cuda_is_emulated
    return rows.refusal("cpu" if emulated else "cuda", " in the emulation" if emulated else "", tensors)


def refusal_of_rows(*tensors: Tensor | None) -> str | None:
    """The `supports` of the ops that hold rows whole: the first tensor's last dimension is bounded too."""
    columns = tensors[0].shape[-1] if tensors and tensors[0] is not None and tensors[0].dim() else 0
    if columns > backends.cuda_kernels.MAX_COLUMNS:
        return f"it takes rows of at most {backends.cuda_kernels.MAX_COLUMNS} elements, not {columns}"
    return refusal(*tensors)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on a device, which the sizes of tiles follow."""
    return backends.cuda_kernels.shared_memory(device.index or 0)


def launch(name: str, device: torch.device, *arguments: Any) -> None:
    """Calls a launcher of the native module on `device`, on its current stream."""
    function = getattr(backends.cuda_kernels, name)
    if backends.cuda_is_emulated:
        function(*arguments, 0)
    elif device.index == torch.cuda.current_device():
        function(*arguments, torch.cuda.current_stream(device).cuda_stream)
    else:
        with torch.cuda.device(device):
            function(*arguments, torch.cuda.current_stream(device).cuda_stream)


def dtype_of(x: Tensor | None) -> int:
    """The number of x's dtype; any for None."""
    return 0 if x is None else DTYPE[x.dtype]


def parts_of(count: int) -> tuple[int, int]:
    """How many blocks sum over rows, and how many rows each of them takes, a multiple of 4.

    Both follow from the number of rows alone, so that a sum has the same order on every device.
    """
    each = -(-count // (_MOST_PARTS * 4)) * 4
    return -(-count // each), each


def partial_sums(sums: int, parts: int, columns: int, device: torch.device) -> Tensor:
    """float32 `[sums, parts, N]`, not initialised."""
    return torch.empty(sums, parts, columns, dtype=torch.float32, device=device)
