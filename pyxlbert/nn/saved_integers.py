"""Eight-bit integers that were saved with a model's weights, for as long as those are what they were."""

from __future__ import annotations

from torch import Tensor

from pyxlbert.ops import _seen
from pyxlbert.ops._integers import Integers


class SavedIntegers:
    """By parameter.  A copied or unpickled model has none: it quantises its own weights."""

    def __init__(self) -> None:
        # By address; the alias keeps the memory, so that no other tensor can come to lie there.
        self._kept: dict[int, tuple[Tensor, tuple[int, int], Integers]] = {}

    def add(self, parameter: Tensor, integers: Integers) -> None:
        """Keeps what the parameter is multiplied as from here on, until it is written to."""
        self._kept[parameter.data_ptr()] = (parameter.detach(), _state(parameter), integers)

    def get(self, parameter: Tensor) -> Integers | None:
        """What was kept for the parameter, unless it is another or was written to."""
        alias, state, integers = self._kept.get(parameter.data_ptr(), (None, None, None))
        if alias is None:
            return None
        same = (alias.dtype, alias.shape, alias.stride()) == (parameter.dtype, parameter.shape, parameter.stride())
        return integers if same and _state(parameter) == state else None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _state(parameter: Tensor) -> tuple[int, int]:
    """What a write changes, through autograd or past it."""
    return parameter._version, _seen.digest(parameter)
