"""Races of single ops: ours against plain PyTorch and others, on the cases that the specs say are timed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from pyxlbert.bench import limits, memory, relative, shapes, two_stream
from pyxlbert.bench.contest import Asked, Check, Contested, contest, lazily, reason_of
from pyxlbert.bench.extra import EXTRAS, with_extras
from pyxlbert.bench.opponents import OPPONENTS, Bind, Call, Opponents, Peer, unchanged
from pyxlbert.bench.report import Row, Work
from pyxlbert.bench.timer import Timing, copies_for, race_on

from pyxlbert.backends import OPS
from pyxlbert.backends.presence import device_type
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._attention import Scores
from pyxlbert.testing.specs._spec import BOTH, Arguments, Case, Draw, Spec, Use, as_tuple, to_float64

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
        plain: what ours is held to if no peer computes the same.
        random: peers whose answer is right on the average alone.
        work: of a call.
    """

    ours: Call | None
    peers: dict[str, Call]
    truth: Call | None
    bytes: int
    limit: Callable[[], float] | None = None
    own: dict[str, Call] = {}  # noqa: RUF012
    part: Callable[[torch.Tensor], torch.Tensor] = _itself
    plain: Call | None = None
    random: frozenset[str] = frozenset()
    work: Work = Work()

    def contestants(self) -> dict[str, Call]:
        """All of them, ours after the peers: plain PyTorch's error is what ours is held to."""
        return {name: call for name, call in self.peers.items() if not _is_ours(name)} | {
            **({} if self.ours is None else {"pyxlbert": self.ours}),
            **{name: call for name, call in self.peers.items() if _is_ours(name)},
        }


def _is_ours(name: str) -> bool:
    return name.startswith("pyxlbert")


@dataclass(frozen=True)
class Race(Contested):
    """One race before it is run.

    Attributes:
        subject, case, dtype: see `Row`.
        build: makes the contestants on inputs of their own.
        rounds: of the timer.
        note: see `Row`.
        peak: of a contestant, see `memory.measure`; None: it is not known how.
    """

    subject: str
    case: str
    dtype: torch.dtype
    build: Callable[[], Built]
    rounds: int = 11
    note: str = ""
    peak: Callable[[str], int | None] | None = None

    def __str__(self) -> str:
        return f"{self.subject} {self.case} {self.dtype}"

    def row(self, timings: dict[str, Timing], failed: dict[str, str], limit: float | None = None) -> Row:
        """What a run has found."""
        dtype = str(self.dtype).removeprefix("torch.")
        return Row(self.subject, self.case, dtype, timings, limit, self.note, failed)

    def held(self, device: str, asked: Asked) -> Row:
        """See `Contested`.

        Raises:
            Poisoned: see `contest`.
            ValueError: a race without a truth.
        """
        torch.manual_seed(0)
        tell, without, settings, cache_bytes = asked
        rest = REST if settings.rest is None else settings.rest
        if "torch._dynamo" in sys.modules:
            # Or the second shape of a function is compiled for every shape.
            torch._dynamo.reset()
        cached = limits.cache_size(device) if cache_bytes is None else cache_bytes
        with torch.device(device):
            first = self.build()
            builts = [first, *(self.build() for _ in range(copies_for(first.bytes, cached) - 1))]
            if first.truth is None:
                raise ValueError(f"{self}: got no truth, wanted one: nothing is timed that was not checked")
            check = _checker(self, first, device)
            limit = first.limit() if first.limit else None
        # The first peer is called even if nobody wants its time: ours is held to its error.
        called = {name for place, name in enumerate(first.contestants()) if place == 0 or settings.wants(name)}
        timings, failed = contest(
            [{name: call for name, call in built.contestants().items() if name in called} for built in builts],
            check,
            lambda copies: race_on(device, copies, rounds=settings.rounds or self.rounds, rest=rest, tell=tell),
            tell=tell,
            without=without,
            wants=settings.wants,
        )
        row = self.row(timings, failed, limit)
        row.work = first.work
        if settings.memory and self.peak is not None and device == "cpu":
            for name in timings:
                try:
                    peak = self.peak(name)
                except RuntimeError as error:
                    print(f"NO MEMORY MEASURED: {self}: {name}: {reason_of(error)}", file=sys.stderr)
                else:
                    row.memory |= {} if peak is None else {name: peak}
        return row


def _checker(race: Race, built: Built, device: str) -> Check:
    """Ours is held to the error of the first peer that is near the truth, all others to being near it."""
    common = _outputs(built.truth())
    # In the dtype of the race, whole, and of it what the truth has.
    plain: list[torch.Tensor] = [] if built.plain is None else [x.detach() for x in _outputs(built.plain())]
    near = tolerances.CONTESTANT[race.dtype]
    factor = tolerances.factor(race.subject, race.dtype, "cpu" if device == "cpu" else "triton")

    def check(name: str, output: Any) -> None:
        alike = name not in built.own
        wanted, got = common if alike else _outputs(built.own[name]()), _outputs(output)
        if len(got) != len(wanted):
            raise AssertionError(f"{len(got)} outputs, wanted {len(wanted)}")
        for index, (whole, t) in enumerate(zip(got, wanted, strict=True)):
            a, label = built.part(whole), f"{name} {index}"
            if name in built.random:
                compare.gain(label, a, t, tolerances.GAIN_DROPOUT)
                continue
            compare.close(label, a, t, near)
            if not (_is_ours(name) and alike):
                continue
            compare.gain(label, a, t, tolerances.GAIN[race.dtype])
            if plain:
                # A sum of n terms with signs by chance, as a gradient of a bias, is sqrt(n) below their absolute sum.
                terms = float(t.detach().abs().max()) * max(1.0, wanted[0].numel() / t.numel()) ** 0.5
                compare.within_budget(label, a, built.part(plain[index]), t, terms=terms, factor=factor)
                if whole.shape != a.shape:
                    # The rest of it beside PyTorch's, which is itself as near as that.
                    compare.close(f"{label}, whole", whole, plain[index], 2 * near)
        if not plain and not _is_ours(name) and alike:
            plain.extend(x.detach() for x in got)

    return check


def _outputs(value: Any) -> tuple[torch.Tensor, ...]:
    """Of a call; the gradient of what it has not used is None and no output."""
    return tuple(x for x in (value if isinstance(value, tuple) else (value,)) if x is not None)


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
        if self.arguments.get("dropout_p") and self.arguments.get("seed") is None:
            # Of all calls, or nobody could say which answer is right.
            self.arguments["seed"] = torch.tensor([20], dtype=torch.int64)
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
        work = self.work()
        if work.flops is not None:
            return work.flops / limits.gemm_rate(self._draw.dtype)
        return work.bytes / limits.copy_bandwidth()

    def work(self) -> Work:
        """What a call does."""
        spec, backward = self.spec, self.case.gradients
        flops = None if spec.flops is None else spec.flops(self.arguments, backward)
        return Work(flops, spec.bytes_moved(self.arguments, backward), shapes.length_of(self.case))

    @property
    def bytes(self) -> int:
        """That a call reads at least of its inputs: half of what it moves, a fifth with backward."""
        return self.spec.bytes_moved(self.arguments, self.case.gradients) // (5 if self.case.gradients else 2)


def _some_heads(inputs: Scores) -> Part:
    """Of tensors `[..., H, D]` all heads, or the first and the last where all are too much for float64.

    With dropout all: a head's mask goes by its number.
    """
    if inputs.longest <= 512 or inputs.heads <= 2 or inputs.dropout_p:
        return _itself
    return lambda x: x[..., :: inputs.heads - 1, :]


def opponents_of(spec: Spec, case: Case, extras: Sequence[str] = ()) -> Opponents:
    """What ours races against on torch's default device, and those of EXTRAS that are here."""
    others = {"relative_attention": relative.opponents, "two_stream_attention": two_stream.opponents}
    device = torch.get_default_device().type
    against = with_extras(spec.name, case, (OPPONENTS | others)[spec.name](case), device, extras)
    op = OPS[spec.name]
    outside = [name for name in op.backends if name not in op.own_backends and device_type(name) == device]
    return against._replace(peers=against.peers | {f"pyxlbert {n}": Peer(ours(spec, backend=n)) for n in outside})


def ours(spec: Spec, **options: str) -> Bind:
    """Our call."""
    return lambda arguments: partial(spec.function, **arguments, **options)


def alone(op: str, case: Case, dtype: torch.dtype, name: str) -> memory.Alone:
    """The contestant of a case by itself: all that it is given is made before.

    It is warmed by the case of sixteen places, a compiled one by its own, or its compiler's memory would be counted.
    """
    compiled = name.startswith(("torch.compile", "FlexAttention"))

    def bound(case: Case) -> Call:
        drawn = Drawn(SPECS[op], case, dtype)
        if name == "pyxlbert":
            call = drawn.call(ours(SPECS[op]))
        else:
            peer = opponents_of(SPECS[op], case, EXTRAS).peers[name]
            call = drawn.call(peer.bind, peer.change)
        if isinstance(case.inputs, Scores):
            drawn.cotangent(0, drawn.arguments["query" if "query" in drawn.arguments else "content_query"].shape)
        return call

    call = bound(case)
    return memory.Alone(call if compiled else bound(shapes.sized(case, 1, 16)), call)


def race_of(spec: Spec, case: Case, dtype: torch.dtype, rounds: int | None = None, extras: Sequence[str] = ()) -> Race:
    """The race of a case.

    Args:
        spec: of the op.
        case: of it.
        dtype: of the tensors.
        rounds: of the timer, or as many as the case's length allows.
        extras: peers that race if they are here, of EXTRAS.
    """

    def build() -> Built:
        drawn, against = Drawn(spec, case, dtype), opponents_of(spec, case, extras)
        return Built(
            drawn.call(ours(spec)),
            {
                # What is changed or imported is made when it is first called: if that fails, it is this peer's failure.
                name: drawn.call(peer.bind)
                if peer.change is unchanged and not extras
                else lazily(partial(drawn.call, peer.bind, peer.change))
                for name, peer in against.peers.items()
            },
            drawn.exact(against.truth) if against.truth is not None else None,
            drawn.bytes,
            drawn.limit,
            {name: drawn.exact(peer.own, peer.change) for name, peer in against.peers.items() if peer.own is not None},
            drawn.part,
            None if against.plain is None else drawn.call(against.plain),
            frozenset(name for name, peer in against.peers.items() if peer.random),
            drawn.work(),
        )

    usual, long = ROUNDS.get(spec.name, (11, 11))
    is_long = isinstance(case.inputs, Scores) and case.inputs.longest >= 2048
    peak = partial(memory.measure, alone, spec.name, case, dtype)
    return Race(spec.name, case.id, dtype, build, rounds or (long if is_long else usual), "", peak)


# Seconds before a contestant's turn.
REST = 0.01
# Of the timer, and for sequences of 2048 and more.
ROUNDS = {"attention": (11, 7), "relative_attention": (9, 5), "two_stream_attention": (9, 9)}
# What a suite of the command holds.
SUITES = {
    "ops": (*(name for name in SPECS if "attention" not in name), "attention"),
    "attention": ("attention",),
    "layer": ("encoder_layer",),
    "relative": ("relative_attention",),
    "two_stream": ("two_stream_attention",),
}


def races(
    ops: Iterable[str],
    dtypes: Sequence[torch.dtype] = BOTH,
    sizes: Sequence[tuple[int, int]] = (),
    extras: Sequence[str] = (),
) -> Iterator[Race]:
    """The races of some ops.

    Args:
        ops: their names.
        dtypes: of those that a case is raced in, the ones to take.
        sizes: batch and length in the place of a case's own; then of each op its first case forward, and its first
            forward and backward.
        extras: see `race_of`.
    """
    for dtype in dtypes:
        for name in ops:
            cases = [case for case in SPECS[name].used(Use.RACE) if dtype in case.uses[Use.RACE]]
            if sizes:
                firsts = [next((c for c in cases if c.gradients == both), None) for both in (False, True)]
                cases = [shapes.sized(case, *size) for size in sizes for case in firsts if case is not None]
            for case in cases:
                yield race_of(SPECS[name], case, dtype, extras=extras)
