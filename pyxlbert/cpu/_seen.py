"""What tells whether tensors of which there are copies still are what they were, through the native module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, UntypedStorage

from pyxlbert import _C

held, layouts = _C.cpu.held, _C.cpu.layouts

# Of a matrix so many lines of 64 bytes are looked at, one in each of so many equal parts of it.
_LINES = 16
# Of a matrix that shares its memory with others, so many elements.
_ELEMENTS = 256


class Contents:
    """What tensors held when this was made: a digest of vectors, and of a sample of each matrix.

    A write that leaves no line of a matrix as it was is seen, whoever makes it; so is any to a vector, and memory that
    has become smaller in its place.

    Args:
        tensors: in the CPU's memory; kept alive, so that it is theirs at every look.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Aliases: what else becomes of the tensors is somebody else's to see, and is to be asked first.
        self.aliases = [one.detach() for one in tensors]
        self._storages = [one.untyped_storage() for one in self.aliases]
        self._bytes = list(map(UntypedStorage.nbytes, self._storages))
        self._seen = _C.cpu.Seen([run for one in self.aliases for run in _runs(one)])

    def unchanged(self) -> bool:
        """Whether they hold it still; where they lie must have been looked at before, for memory can be given back."""
        return list(map(UntypedStorage.nbytes, self._storages)) == self._bytes and self._seen.unchanged()


def digest(values: Tensor) -> int:
    """A number of all that a contiguous tensor holds."""
    return _C.cpu.Seen([(values.data_ptr(), values.numel() * values.element_size(), 0)]).digest


def _runs(tensor: Tensor) -> list[tuple[int, int, int]]:
    """Address, bytes and number of lines, 0 for all, of stretches of memory that are a tensor's own."""
    count, size, address = tensor.numel(), tensor.element_size(), tensor.data_ptr()
    if count == 0 or address == 0:
        return []
    span = 1 + sum((one - 1) * step for one, step in zip(tensor.shape, tensor.stride(), strict=True))
    if span == count:
        return [(address, count * size, 0 if tensor.dim() < 2 else _LINES)]
    # Not at regular places, where rows may begin.
    step = 1 if tensor.dim() < 2 else max(1, count // _ELEMENTS)
    chosen = (min(first + 7919 * first // step % step, count - 1) for first in range(0, count, step))
    return [(address + size * _place(tensor, number), size, 0) for number in chosen]


def _place(tensor: Tensor, number: int) -> int:
    """How many elements behind the first the element of a number lies."""
    place = 0
    for one, step in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        number, index = divmod(number, one)
        place += index * step
    return place
