"""What kernels are tested with; `check_op` is for kernels of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyxlbert.testing.check import check_op

__all__ = ["check_op"]


def __getattr__(name: str) -> Any:
    # The specs of all ops: not for whoever wants one comparison.
    if name == "check_op":
        from pyxlbert.testing.check import check_op

        return check_op
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
