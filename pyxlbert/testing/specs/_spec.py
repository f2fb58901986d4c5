"""One description of an op's inputs, which everything that calls an op loops over: see `Use`."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

Arguments = dict[str, Any]
Dtypes = tuple[torch.dtype, ...]
HALF: Dtypes = (torch.bfloat16,)
SINGLE: Dtypes = (torch.float32,)
BOTH: Dtypes = SINGLE + HALF
# Rows, or tokens, of the races on a GPU.
ROWS = 16384


class Use(enum.Enum):
    """Who calls the op with a case."""

    SUITE = "the common suite: tests/ops, and tests/kernels/front_end.py, in dtypes of its own"
    EMULATION = "tests/emulation"
    HOPPER = "tests/emulation as Hopper's kernels"
    AHEAD = "tests/kernels/compile_ahead.py"
    AHEAD_ALL = "tests/kernels/compile_ahead.py --all"
    TILES = "bench/tiles.py, at sizes and in dtypes of its own"
    RACE = "a race on the CPU"
    LENGTHS = "bench/lengths.py"
    HOST = "a race of small calls on a GPU: what a call costs on the host"
    TARGET = "a race on a GPU, one of the first"
    DECIDE = "one of the few races of make gpu, beside the TARGETs of ops of scores"
    GPU = "a race on a GPU"
    PREFER = "bench/prefer.py"


# Each in these dtypes.
Uses = Mapping[Use, Dtypes]
NONE: Uses = {}


@dataclass(frozen=True)
class Case:
    """One call of an op before its tensors are made.

    Attributes:
        id: short, unique within the op; of a race, what the table of results says.
        inputs: a record of the op's own: sizes, which options there are, how the tensors lie in memory.
        uses: who calls the op with it, and in which dtypes.
        gradients: whether the backward pass is compared, or timed, too.
        small: in the suite: at most a second on the slowest backend (interpreter, emulation, sanitizer).
        full_only: in the suite: runs only in `make test-all`.
    """

    id: str
    inputs: Any
    uses: Uses = field(default_factory=lambda: {Use.SUITE: ()})
    gradients: bool = True
    small: bool = True
    full_only: bool = False


class Draw(NamedTuple):
    """Where the tensors of a call come from.

    Numbers are drawn where the generator is, in float32, then moved and rounded: with a generator of the CPU every
    dtype and device sees the same ones.  On the device "meta" there is no generator, and nothing is drawn.
    """

    generator: torch.Generator | None
    dtype: torch.dtype
    device: torch.device

    @property
    def single(self) -> torch.dtype:
        """float32, of parameters and streams that are wider than the rest; float64 where all is."""
        return self.dtype if self.dtype is torch.float64 else torch.float32

    @property
    def _where(self) -> dict[str, Any]:
        return {"generator": self.generator, "device": self.device if self.generator is None else self.generator.device}

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal values of the case's dtype, or of another."""
        return (torch.randn(shape, **self._where) * scale).to(device=self.device, dtype=dtype or self.dtype)

    def share(self, part: float, shape: tuple[int, ...]) -> torch.Tensor:
        """Boolean; True for this part of the elements."""
        return (torch.rand(shape, **self._where) < part).to(self.device)

    def below(self, limit: int, *shape: int) -> torch.Tensor:
        """int64 in [0, limit)."""
        return torch.randint(0, limit, shape, **self._where).to(self.device)

    def orders(self, rows: int, n: int) -> torch.Tensor:
        """int32 `[rows, n]`, each row a permutation."""
        return torch.rand((rows, n), **self._where).argsort(1).to(device=self.device, dtype=torch.int32)

    def numbers(self, values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """The values themselves."""
        return torch.tensor(values, dtype=dtype, device=self.device)


def timed(inputs: Any, forward: Uses = NONE, both: Uses = NONE, kind: str = "") -> Iterator[Case]:
    """The case of a race forward and that of one forward and backward, as far as they have uses.

    Args:
        inputs: whose text is that of the case.
        forward, both: the uses of each.
        kind: what else the case says.
    """
    if forward:
        yield Case(f"{inputs}{kind}", inputs, forward, gradients=False)
    if both:
        yield Case(f"{inputs} forward+backward{kind}", inputs, both)


@dataclass(frozen=True)
class Bad:
    """A call that must raise.

    Attributes:
        id: short, unique within the op.
        change: turns the arguments of the suite's first case into bad ones.
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
        make: the keyword arguments of the public function (tensors and plain values) for a case's `inputs`.
        differentiable: the arguments that get a gradient where a case passes them.
        cases: all of them; the suite takes `suite`, everyone else what `used` gives.
        bad: see there.
        bytes_moved, flops: of a call with these arguments, forward or forward and backward together; flops is None
            where memory is what limits a call.
        dtypes: what the fast backends take.
        terms: for an output or a gradient ("grad x"), the sum of absolute terms given the arguments in
            float64 and the cotangents; absent: the largest element.
        rounded: parameters that the op rounds first, each with the argument whose dtype they get: what is right follows
            from the rounded ones, or who is lucky with theirs would be the measure of all.
        vendor: set where backend "cpu" calls a vendor's library: what the common suite cannot ask of it, in one
            sentence.  Such an op has no instruction-set levels of its own, and the same bits are asked of it for
            the same number of threads only.
        composed: with a gradient to come it is made of other ops, and has no backward of its own.
        tiles: the cpu backend has a version for bfloat16 tiles; without one, level "amx" is "avx512_bf16" again.
    """

    name: str
    function: Callable[..., Any]
    plain: Callable[..., Any]
    make: Callable[[Any, Draw], Arguments]
    differentiable: tuple[str, ...]
    cases: tuple[Case, ...]
    bad: tuple[Bad, ...]
    bytes_moved: Callable[[Arguments, bool], int]
    flops: Callable[[Arguments, bool], float] | None = None
    dtypes: Dtypes = (torch.float32, torch.bfloat16, torch.float16)
    terms: Callable[[str, Arguments, tuple[torch.Tensor, ...]], torch.Tensor | float | None] | None = None
    rounded: Mapping[str, str] = field(default_factory=dict)
    vendor: str | None = None
    composed: bool = False
    tiles: bool = False

    @property
    def suite(self) -> tuple[Case, ...]:
        """The cases of the common suite."""
        return tuple(self.used(Use.SUITE))

    def used(self, use: Use) -> Iterator[Case]:
        """The cases of one user, in their order."""
        return (case for case in self.cases if use in case.uses)

    def arguments(
        self, case: Case, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
    ) -> Arguments:
        """What a case calls the op with: see `Draw`."""
        return self.make(case.inputs, Draw(generator, dtype, device))

    def in_float64(self, arguments: Arguments) -> Arguments:
        """The arguments from which what is right is computed: in float64, after the roundings that the op promises."""
        given = dict(arguments)
        for name, like in self.rounded.items():
            if isinstance(given.get(name), torch.Tensor):
                given[name] = given[name].to(given[like].dtype)
        return to_float64(given)

    def leaves(self, arguments: Arguments) -> list[str]:
        """The arguments that get a gradient."""
        return [name for name in self.differentiable if isinstance(arguments.get(name), torch.Tensor)]


def bytes_of(*tensors: torch.Tensor) -> int:
    """Of their elements."""
    return sum(x.numel() * x.element_size() for x in tensors)


# What a view shows of `[6, 5, 3 * 40]`; `k` tells two views apart that are to have different elements.
VIEWS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "slice of a wider buffer": lambda x, k: x[..., 40 * k : 40 * k + 40],
    "every other row": lambda x, k: x[k::2, :, :40],
    "transposed": lambda x, k: x[..., :40].transpose(0, 1),
    "last dimension strided": lambda x, k: x[..., k::3],
    "expanded": lambda x, k: x[:1, :, :40].expand(4, 5, 40),
}


def view_of(draw: Draw, name: str, k: int = 0) -> torch.Tensor:
    """A tensor `[.., .., 40]` that is no contiguous whole."""
    return VIEWS[name](draw.normal(6, 5, 3 * 40), k)


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
