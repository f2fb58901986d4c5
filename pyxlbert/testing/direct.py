"""One backend's implementations, called past checks and dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyxlbert.backends import OPS

# What an argument is that a call leaves out, by its type in the schema.
LEFT_OUT = {"Optional[Tensor]": None, "Optional[int]": None, "bool": False, "int": 0, "float": 0.0}


class Direct:
    """`Direct("triton").attention_fwd(query, key, value, scale=0.1)`: the schema's arguments less the backend.

    For tests that call a kernel alone; nothing is checked.  Those that are left out are None, False or 0, so that a
    call does not speak of what is no concern of it.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op, _, direction = name.rpartition("_")
        if op not in OPS or direction not in OPS[op].records:
            raise AttributeError(f"Direct: got {name!r}, wanted an op's name with _fwd or _bwd")
        record, run = OPS[op].records[direction], getattr(OPS[op].module(self.backend), name)
        schema = getattr(torch.ops.pyxlbert, name).default._schema
        usual = {one.name: LEFT_OUT[str(one.type)] for one in schema.arguments if str(one.type) in LEFT_OUT}

        def call(*arguments: Any, **named: Any) -> Any:
            given = usual | dict(zip(record._fields, arguments, strict=False)) | named
            return run(record(**given | {"backend": self.backend}))

        return call
