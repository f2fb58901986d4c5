"""Models that are made before their weights are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Undrawn(TorchFunctionMode):
    """Fresh values are not drawn for tensors that have no memory for them."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.normal_ or getattr(func, "__module__", None) == "torch.nn.init":
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextmanager
def without_memory() -> Iterator[None]:
    """Inside of it modules have shapes and no memory: their tensors are on the device "meta".

    Nothing is drawn for them. It would cost no time, but torch imports its compiler to draw normal numbers there, and
    every command that reads a model would start a second later.
    """
    with torch.device("meta"), _Undrawn():
        yield
