"""One backend's implementations, called past checks and dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyxlbert.backends import OPS


class Direct:
    """`Direct("triton").attention_fwd(query, key, ...)`: the schema's arguments less the backend, in their order.

    For tests that call a kernel alone; nothing is checked.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op, _, direction = name.rpartition("_")
        if op not in OPS or direction not in OPS[op].records:
            raise AttributeError(f"Direct: got {name!r}, wanted an op's name with _fwd or _bwd")
        record, run = OPS[op].records[direction], getattr(OPS[op].module(self.backend), name)
        return lambda *arguments: run(record(*arguments, self.backend))
