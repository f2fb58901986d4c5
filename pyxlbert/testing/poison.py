"""Memory that a kernel must write before it reads: full of NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from pyxlbert.backends import native


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside the block every floating tensor of torch.empty and friends, and native scratch memory, holds NaN."""

    def poison(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = function(*args, **kwargs)
            if tensor.is_floating_point() and tensor.device.type != "meta":
                tensor.fill_(float("nan"))
            return tensor

        return make

    owners = (
        *((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")),
        (torch.Tensor, "new_empty"),
    )
    patches = [mock.patch.object(owner, name, poison(getattr(owner, name))) for owner, name in owners]
    module = native._C
    for patch in patches:
        patch.start()
    if module is not None:
        module.poison_workspaces(True)
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
        if module is not None:
            module.poison_workspaces(False)
