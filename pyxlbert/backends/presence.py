"""One record per backend: its name, the room of its modules, and why it cannot run here or on a device."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from pyxlbert.backends import native, outside

# The first Triton that compiles the kernels: older ones lack `tl.gather` or chained conditions.
_OLDEST_TRITON = (3, 4)


class Backend(NamedTuple):
    """One backend.

    Attributes:
        name: as `backend=` names it.
        room: the package of its modules; op `x` is implemented in `<room>.x`.
        missing: why it cannot run on this machine at all, or None.
        refusal: why it cannot run on the CUDA device of this index, or None; asked only if nothing is missing.
        outside: another package's, where it is none of ours.
    """

    name: str
    room: str
    missing: Callable[[], str | None]
    refusal: Callable[[int], str | None]
    outside: outside.Room | None = None


def _nothing(*_: int) -> None:
    return None


def _no_native_module() -> str | None:
    return None if native._C is not None else f"the native module is not built ({native.build_error})"


def version_of(package: str) -> tuple[int, ...]:
    """The numbers that an installed package's version begins with."""
    return tuple(int(number) for number in re.findall(r"\d+", importlib.metadata.version(package))[:2])


def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        found = version_of("triton")
    except importlib.metadata.PackageNotFoundError:
        found = _OLDEST_TRITON  # a Triton built in place has no metadata: it is taken at its word
    if found < _OLDEST_TRITON:
        installed, oldest = (".".join(map(str, version)) for version in (found, _OLDEST_TRITON))
        return f"triton {installed} is installed, and the kernels need {oldest} or later"
    # In the interpreter kernels take CPU tensors: see kernels/_launch.py.
    if _interpreted() or torch.cuda.is_available():
        return None
    return "no CUDA device is here"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_refusal(device: int) -> str | None:
    return _too_old(device) if torch.version.hip is None and not _interpreted() else None


def _no_cuda() -> str | None:
    if native.cuda_is_emulated:
        return None
    if native._C is None:
        return _no_native_module()
    if native.cuda_kernels is None:
        return "the native module was built without its CUDA kernels: see docs/gpu.md"
    if not torch.cuda.is_available():
        return "no CUDA device is here"
    return None if torch.version.hip is None else "it runs on NVIDIA devices only"


def _cuda_refusal(device: int) -> str | None:
    if native.cuda_is_emulated:
        return None
    # The static runtime, the driver and what was compiled: only the native module can say whether they fit.
    return _too_old(device) or native.cuda_kernels.probe(device) or None


def _too_old(device: int) -> str | None:
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return None
    return f"CUDA device {device} has a compute capability below 8.0"


BACKENDS = {
    one.name: one
    for one in (
        Backend("torch", "pyxlbert.reference", _nothing, _nothing),
        Backend("cpu", "pyxlbert.cpu", _no_native_module, _nothing),
        Backend("triton", "pyxlbert.kernels", _no_triton, _triton_refusal),
        Backend("cuda", "pyxlbert.cuda", _no_cuda, _cuda_refusal),
    )
}
# Ours; those of other packages follow, and are taken only where they are named.
OWN = tuple(BACKENDS)
_rooms, REFUSED = outside.read(OWN)
BACKENDS |= {name: Backend(name, room.room, room.missing, room.refusal, room) for name, room in _rooms.items()}
NAMES = tuple(BACKENDS)
outside.warn(REFUSED)


def has(name: str, op: str) -> bool:
    """Whether a backend of another package holds a module for an op; False where it cannot be imported."""
    room = BACKENDS[name].outside
    return room is not None and room.has(op)


_refusals: dict[tuple[str, int], str | None] = {}


def refusal_on(name: str, device: int) -> str | None:
    """Why a backend that is here cannot run on the CUDA device of this index, or None; found out once per device."""
    if (name, device) not in _refusals:
        _refusals[name, device] = BACKENDS[name].refusal(device)
    return _refusals[name, device]


# What `torch.compiler.assume_constant_result` sets: a compiler calls this and does not trace it.  The function itself
# would import the whole compiler.
refusal_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unavailable(name: str, device: torch.device | int | None = None) -> str | None:
    """Why backend `name` cannot run on this machine, or None if it can.

    Args:
        name: one of `NAMES`.
        device: a CUDA device or its index, for what depends on it (its age, the driver, the machine code that was
            built); None asks the current one.

    Raises:
        ValueError: `name` is not one of them.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, wanted one of {', '.join(NAMES)}")
    reason = BACKENDS[name].missing()
    if reason is not None or name in ("torch", "cpu") or not torch.cuda.is_available():
        return reason
    if device is None and device_type(name) == "cpu":
        return None
    index = device.index if isinstance(device, torch.device) else device
    return refusal_on(name, torch.cuda.current_device() if index is None else index)


def device_type(name: str) -> str:
    """ "cuda" where a backend's tensors are on a GPU, else "cpu", where "torch" can run too."""
    room = BACKENDS[name].outside
    if room is not None:
        return room.device()
    return "cuda" if name in ("triton", "cuda") else "cpu"


def available() -> tuple[str, ...]:
    """The backends that can run here."""
    return tuple(name for name in NAMES if unavailable(name) is None)
