"""Races of single ops: ours against plain PyTorch and others, on the cases that the specs say are timed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from pyxlbert.bench import limits, relative, two_stream
from pyxlbert.bench.contest import Check, contest
from pyxlbert.bench.opponents import OPPONENTS, Bind, Call, Opponents, unchanged
from pyxlbert.bench.report import Row
from pyxlbert.bench.timer import Tell, Timing, copies_for, nobody, race_on

from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._attention import Scores
from pyxlbert.testing.specs._spec import Arguments, Case, Draw, Spec, Use, as_tuple, to_float64

Change = Callable[[Arguments], Arguments]
Part = Callable[[torch.Tensor], torch.Tensor]


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x


class Built(NamedTuple):
    """The contestants of a race on one copy of its inputs.

    Attributes:
        ours: our call, or None where those of ours are peers of each other.
        peers: the others by name; those of ours are called "pyxlbert ...".
        truth: the float64 value of their common output, or None where nothing can be compared.
        bytes: that a call reads at least; a rotation over copies of the inputs goes by it.
        limit: seconds at the machine's limit.
        own: of those that compute something else, their truth.
        part: what of an output the truths have computed: long sequences are compared for some heads alone.
    """

    ours: Call | None
    peers: dict[str, Call]
    truth: Call | None
    bytes: int
    limit: Callable[[], float] | None = None
    own: dict[str, Call] = {}  # noqa: RUF012
    part: Callable[[torch.Tensor], torch.Tensor] = _itself

    def contestants(self) -> dict[str, Call]:
        """All of them, ours after the peers: plain PyTorch's error is what ours is held to."""
        return {name: call for name, call in self.peers.items() if not _is_ours(name)} | {
            **({} if self.ours is None else {"pyxlbert": self.ours}),
            **{name: call for name, call in self.peers.items() if _is_ours(name)},
        }


def _is_ours(name: str) -> bool:
    return name.startswith("pyxlbert")


@dataclass(frozen=True)
class Race:
    """One race before it is run.

    Attributes:
        subject, case, dtype: see `Row`.
        build: makes the contestants on inputs of their own.
        rounds: of the timer.
        note: see `Row`.
    """

    subject: str
    case: str
    dtype: torch.dtype
    build: Callable[[], Built]
    rounds: int = 11
    note: str = ""

    def __str__(self) -> str:
        return f"{self.subject} {self.case} {self.dtype}"

    def row(self, timings: dict[str, Timing], failed: dict[str, str], limit: float | None = None) -> Row:
        """What a run has found."""
        dtype = str(self.dtype).removeprefix("torch.")
        return Row(self.subject, self.case, dtype, timings, limit, self.note, failed)

    def run(
        self,
        device: str = "cpu",
        *,
        cache_bytes: int | None = None,
        tell: Tell = nobody,
        without: Mapping[str, str] | None = None,
    ) -> Row:
        """Checks the answers, then times those that were right on the CPU or on the GPU that is here ("cuda").

        Args:
            device: "cpu" or "cuda".
            cache_bytes: of the cache in which no inputs may stay; by default a GPU's second level, on the CPU none.
            tell, without: see `contest`.

        Raises:
            Poisoned: see `contest`.
            ValueError: on a GPU, a race without a truth.
        """
        torch.manual_seed(0)
        if "torch._dynamo" in sys.modules:
            # Or the second shape of a function is compiled for every shape.
            torch._dynamo.reset()
        cached = limits.cache_size(device) if cache_bytes is None else cache_bytes
        with torch.device(device):
            first = self.build()
            builts = [first, *(self.build() for _ in range(copies_for(first.bytes, cached) - 1))]
            if device != "cpu" and first.truth is None:
                raise ValueError(f"{self}: got no truth, wanted one: nothing is timed that was not checked")
            check = _checker(self, first, device)
            limit = first.limit() if first.limit else None
        timings, failed = contest(
            [built.contestants() for built in builts],
            check,
            lambda copies: race_on(device, copies, rounds=self.rounds, tell=tell),
            tell=tell,
            without=without,
        )
        return self.row(timings, failed, limit)


def _checker(race: Race, built: Built, device: str) -> Check:
    """Ours is held to the error of the first peer that is near the truth, all others to being near it."""
    if built.truth is None:
        return lambda name, output: None
    common = _outputs(built.truth())
    plain: list[torch.Tensor] = []
    near = tolerances.CONTESTANT[race.dtype]
    factor = tolerances.factor(race.subject, race.dtype, "cpu" if device == "cpu" else "triton")

    def check(name: str, output: Any) -> None:
        wanted = _outputs(built.own[name]()) if name in built.own else common
        got = [built.part(x) for x in _outputs(output)]
        if len(got) != len(wanted):
            raise AssertionError(f"{len(got)} outputs, wanted {len(wanted)}")
        for index, (a, t) in enumerate(zip(got, wanted, strict=True)):
            compare.close(f"{name} {index}", a, t, near)
            if plain and _is_ours(name) and name not in built.own:
                # A sum of n terms with signs by chance, as a gradient of a bias, is sqrt(n) below their absolute sum.
                terms = float(t.detach().abs().max()) * max(1.0, wanted[0].numel() / t.numel()) ** 0.5
                compare.within_budget(f"{name} {index}", a, plain[index], t, terms=terms, factor=factor)
        if not plain and not _is_ours(name) and name not in built.own:
            plain.extend(x.detach() for x in got)

    return check


def _outputs(value: Any) -> tuple[torch.Tensor, ...]:
    """Of a call; the gradient of what it has not used is None and no output."""
    return tuple(x for x in (value if isinstance(value, tuple) else (value,)) if x is not None)


def lazily(make: Callable[[], Call]) -> Call:
    """A call that is made when it is first called: what fails in making it is its own failure and not the race's."""
    made = cache(make)
    return lambda: made()()


class Drawn:
    """One copy of a case's inputs, on torch's default device.

    Args:
        spec: of the op.
        case: forward and backward where it says so.
        dtype: of the tensors.

    Attributes:
        arguments: of the op.
        part: of what the truths compute: all heads, or the first and the last where all are too much for float64.
    """

    def __init__(self, spec: Spec, case: Case, dtype: torch.dtype) -> None:
        self.spec, self.case = spec, case
        device = torch.get_default_device()
        self._draw = Draw(torch.Generator(device), dtype, device)
        # Copies have different numbers.
        self._draw.generator.manual_seed(int(torch.randint(2**31, (), device="cpu")))
        self.arguments = spec.make(case.inputs, self._draw)
        self.part = _some_heads(case.inputs) if isinstance(case.inputs, Scores) else _itself
        self._cotangents: dict[tuple[int, torch.Size], torch.Tensor] = {}
        self._projection: torch.Tensor | None = None

    def call(self, bind: Bind, change: Change = unchanged) -> Call:
        """The call of a contestant on the arguments, or on what it changes them to."""
        return self._call(bind, change(self.arguments), _itself)

    def exact(self, bind: Bind, change: Change = unchanged) -> Call:
        """The same in float64, of the part that is compared."""

        def call() -> Any:
            wide = to_float64(change(self.arguments))
            if self.part is not _itself:
                wide = {name: self.part(x) if self._has_heads(x) else x for name, x in wide.items()}
            return self._call(bind, wide, self.part)()

        return call

    def _has_heads(self, x: Any) -> bool:
        sizes = (self.case.inputs.heads, self.case.inputs.head_size)
        return isinstance(x, torch.Tensor) and x.is_floating_point() and x.shape[-2:] == sizes

    def _call(self, bind: Bind, arguments: Arguments, part: Part) -> Call:
        if not self.case.gradients:
            return bind(arguments)
        leaves = {name: x.detach().requires_grad_() for name, x in self._leaves(arguments).items()}
        given = arguments | {name: x for name, x in leaves.items() if isinstance(name, str)}
        for names, projection in leaves.items():
            if not isinstance(names, str):
                # What is a view has no memory of its own for backward to free: the graph may begin outside of the call.
                given |= dict(zip(names, projection.unbind(-3), strict=True))
        run, inputs = bind(given), list(leaves.values())

        def call() -> tuple[torch.Tensor | None, ...]:
            outputs = as_tuple(run())
            cotangents = [self._cotangent_of(place, x, part) for place, x in enumerate(outputs)]
            return (
                *(x.detach() for x in outputs),
                *torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True),
            )

        return call

    def _leaves(self, arguments: Arguments) -> dict[str | tuple[str, ...], torch.Tensor]:
        """What gets gradients, by name; slices of one projection are one leaf, as in a model, by all of their names."""
        names = self.spec.leaves(arguments)
        slices = tuple(name for name in names if name in ("query", "content_query", "key", "value"))
        together = [arguments[name] for name in slices]
        if getattr(self.case.inputs, "layout", "") != "fused" or len({x.shape for x in together}) != 1:
            return {name: arguments[name] for name in names}
        # Contestants on the same tensors share the projection.
        shared = all(arguments[name] is self.arguments[name] for name in slices)
        if shared and self._projection is None:
            self._projection = torch.stack(together, -3)
        projection = self._projection if shared else torch.stack(together, -3)
        return {slices: projection} | {name: arguments[name] for name in names if name not in slices}

    def cotangent(self, place: int, shape: torch.Size) -> torch.Tensor:
        """Of an output by its place; the same for all whose output has this shape, drawn when it is first asked for."""
        if (place, shape) not in self._cotangents:
            self._cotangents[place, shape] = self._draw.normal(*shape)
        return self._cotangents[place, shape]

    def _cotangent_of(self, place: int, output: torch.Tensor, part: Part) -> torch.Tensor:
        shape = output.shape
        if part is not _itself:
            shape = torch.Size((*shape[:-2], self.case.inputs.heads, shape[-1]))
        return part(self.cotangent(place, shape)).to(output.dtype)

    def limit(self) -> float:
        """Seconds at the machine's limit: of its GEMM, or of its memory."""
        spec, backward = self.spec, self.case.gradients
        if spec.flops is not None:
            return spec.flops(self.arguments, backward) / limits.gemm_rate(self._draw.dtype)
        return spec.bytes_moved(self.arguments, backward) / limits.copy_bandwidth()

    @property
    def bytes(self) -> int:
        """That a call reads at least of its inputs: half of what it moves, a fifth with backward."""
        return self.spec.bytes_moved(self.arguments, self.case.gradients) // (5 if self.case.gradients else 2)


def _some_heads(inputs: Scores) -> Part:
    """Of tensors `[..., H, D]` all heads, or the first and the last where all are too much for float64."""
    if inputs.longest <= 512 or inputs.heads <= 2:
        return _itself
    return lambda x: x[..., :: inputs.heads - 1, :]


def opponents_of(spec: Spec, case: Case) -> Opponents:
    """What ours races against."""
    others = {"relative_attention": relative.opponents, "two_stream_attention": two_stream.opponents}
    return (OPPONENTS | others)[spec.name](case)


def ours(spec: Spec, **options: str) -> Bind:
    """Our call."""
    return lambda arguments: partial(spec.function, **arguments, **options)


def race_of(spec: Spec, case: Case, dtype: torch.dtype, rounds: int | None = None) -> Race:
    """The race of a case; of `rounds`, or of as many as its length allows."""

    def build() -> Built:
        drawn, against = Drawn(spec, case, dtype), opponents_of(spec, case)
        return Built(
            drawn.call(ours(spec)),
            {
                # What is changed is made when it is first called: if that fails, it is this peer's failure.
                name: drawn.call(peer.bind)
                if peer.change is unchanged
                else lazily(partial(drawn.call, peer.bind, peer.change))
                for name, peer in against.peers.items()
            },
            drawn.exact(against.truth) if against.truth is not None else None,
            drawn.bytes,
            drawn.limit,
            {name: drawn.exact(peer.own, peer.change) for name, peer in against.peers.items() if peer.own is not None},
            drawn.part,
        )

    usual, long = ROUNDS.get(spec.name, (11, 11))
    is_long = isinstance(case.inputs, Scores) and case.inputs.longest >= 2048
    return Race(spec.name, case.id, dtype, build, rounds or (long if is_long else usual))


# Of the timer, and for sequences of 2048 and more.
ROUNDS = {"attention": (11, 7), "relative_attention": (9, 5), "two_stream_attention": (9, 9)}
# What a suite of the command holds.
SUITES = {
    "ops": (*(name for name in SPECS if "attention" not in name), "attention"),
    "attention": ("attention",),
    "relative": ("relative_attention",),
    "two_stream": ("two_stream_attention",),
}


def races(suite: str) -> Iterator[Race]:
    """Every race of `python -m pyxlbert.bench SUITE`."""
    for dtype in (torch.float32, torch.bfloat16):
        for name in SUITES[suite]:
            for case in SPECS[name].used(Use.RACE):
                if dtype in case.uses[Use.RACE]:
                    yield race_of(SPECS[name], case, dtype)
