"""One description of an op's inputs, read by the common test suite and by the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        id: short, unique within the op.
        make: builds the keyword arguments of the public function (tensors and plain values) from a seeded
            generator, the tested dtype and the device.
        small: at most a second on the slowest backend (interpreter, emulation, sanitizer).
        gradients: whether the backward pass is compared too.
        full_only: runs only in `make test-all`.
    """

    id: str
    make: Callable[[torch.Generator, torch.dtype, torch.device], Arguments]
    small: bool = True
    gradients: bool = True
    full_only: bool = False


@dataclass(frozen=True)
class Bad:
    """A call that must raise.

    Attributes:
        id: short, unique within the op.
        change: turns the arguments of the op's first case into bad ones.
        error: the exception's type.
        words: pieces of text that the message must hold (the argument, what came, what was wanted).
    """

    id: str
    change: Callable[[Arguments], Arguments]
    error: type[Exception]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Spec:
    """An op as tests and benchmarks see it.

    Attributes:
        name: the op.
        function: the public function; called as function(**arguments, backend=...).
        plain: the same by eager torch.nn.functional calls, in the dtype it is given, float64 included;
            takes the same arguments less `backend` and returns the same.  For dropout it may use the
            public dropout bits of `pyxlbert.reference.philox`.
        differentiable: the arguments that get a gradient where a case passes them.
        cases, bad: see there.
        dtypes: what the fast backends take.
        terms: for an output or a gradient ("grad x"), the sum of absolute terms given the arguments in
            float64 and the cotangents; absent: the largest element.
        vendor: set where backend "cpu" calls a vendor's library: what the common suite cannot ask of it, in one
            sentence.  Such an op has no instruction-set levels of its own, and the same bits are asked of it for
            the same number of threads only.
        tiles: the cpu backend has a version for bfloat16 tiles; without one, level "amx" is "avx512_bf16" again.
        bytes_moved, flops: of a forward call with these arguments, for the benchmark's limits.
    """

    name: str
    function: Callable[..., Any]
    plain: Callable[..., Any]
    differentiable: tuple[str, ...]
    cases: tuple[Case, ...]
    bad: tuple[Bad, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    terms: Callable[[str, Arguments, tuple[torch.Tensor, ...]], torch.Tensor | float | None] | None = None
    vendor: str | None = None
    tiles: bool = False
    bytes_moved: Callable[[Arguments], int] | None = None
    flops: Callable[[Arguments], int] | None = None


def randn(
    generator: torch.Generator, *shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0
) -> torch.Tensor:
    """Normal values drawn in float32 on the CPU, so that every dtype and device sees the same ones, then rounded."""
    return (torch.randn(*shape, generator=generator) * scale).to(device=device, dtype=dtype)


def replace(**changes: Callable[[Arguments], Any]) -> Callable[[Arguments], Arguments]:
    """A `Bad.change` that sets each named argument to what its function makes of the good ones."""

    def change(arguments: Arguments) -> Arguments:
        return arguments | {name: value(arguments) for name, value in changes.items()}

    return change


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    """The outputs of a call as a tuple."""
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def to_float64(arguments: Arguments) -> Arguments:
    """The same arguments with every floating tensor, and every floating dtype that is asked for, in float64."""

    def widen(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return torch.float64 if value.is_floating_point else value
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return {name: widen(value) for name, value in arguments.items()}
