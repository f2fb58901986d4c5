"""Races of single ops: ours against plain PyTorch on the shapes that the models use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pyxlbert.bench import limits
from pyxlbert.bench.contest import Check, contest
from pyxlbert.bench.report import Row
from pyxlbert.bench.timer import Tell, Timing, copies_for, nobody, race_on

import pyxlbert
from pyxlbert.testing import compare, tolerances

Call = Callable[[], Any]


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x


class Built(NamedTuple):
    """The contestants of a race on one copy of its inputs.

    Attributes:
        ours: our call, or None where those of ours are peers of each other.
        peers: the others by name; those of ours are called "pyxlbert ...".
        truth: the float64 value of their common output, or None where nothing can be compared.
        own: of those that compute something else, their truth.
        part: what of an output the truths have computed: long sequences are compared for some heads alone.
    """

    ours: Call | None
    peers: dict[str, Call]
    truth: Call | None
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
        bytes: that a call reads at least; a rotation over copies of the inputs goes by it.
        limit: seconds at the machine's limit.
        rounds: of the timer.
        note: see `Row`.
    """

    subject: str
    case: str
    dtype: torch.dtype
    build: Callable[[], Built]
    bytes: int
    limit: Callable[[], float] | None = None
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
            builts = [self.build() for _ in range(copies_for(self.bytes, cached))]
            if device != "cpu" and builts[0].truth is None:
                raise ValueError(f"{self}: got no truth, wanted one: nothing is timed that was not checked")
            check = _checker(self, builts[0], device)
            limit = self.limit() if self.limit else None
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


def _bytes_limit(count: int) -> Callable[[], float]:
    return lambda: count / limits.copy_bandwidth()


def _gradients(function: Call, inputs: list[torch.Tensor], cotangent: torch.Tensor) -> Call:
    """Forward and backward together."""

    def call() -> tuple[torch.Tensor, ...]:
        output = function()
        return (output.detach(), *torch.autograd.grad(output, inputs, cotangent))

    return call


def layer_norm(rows: int, columns: int, dtype: torch.dtype, backward: bool = False) -> Race:
    """layer_norm against F.layer_norm."""

    def build() -> Built:
        x = torch.randn(rows, columns).to(dtype)
        weight, bias = torch.randn(columns).to(dtype), torch.randn(columns).to(dtype)
        inputs = [t.requires_grad_(backward) for t in (x, weight, bias)]

        def ours() -> torch.Tensor:
            return pyxlbert.layer_norm(*inputs, eps=1e-5)

        def plain() -> torch.Tensor:
            return F.layer_norm(x, (columns,), weight, bias, 1e-5)

        dy = torch.randn(rows, columns).to(dtype) if backward else None

        def truth() -> Any:
            wide = [t.detach().double().requires_grad_(backward) for t in inputs]
            forward = lambda: F.layer_norm(wide[0], (columns,), wide[1], wide[2], 1e-5)  # noqa: E731
            return forward() if dy is None else _gradients(forward, wide, dy.double())()

        if dy is None:
            return Built(ours, {"F.layer_norm": plain}, truth)
        return Built(_gradients(ours, inputs, dy), {"F.layer_norm": _gradients(plain, inputs, dy)}, truth)

    size = rows * columns * dtype.itemsize
    kind = " forward+backward" if backward else ""
    moved = _bytes_limit(size * (5 if backward else 2))
    return Race("layer_norm", f"{rows}x{columns}{kind}", dtype, build, size, moved)


def dropout_add_layer_norm(rows: int, columns: int, dtype: torch.dtype) -> Race:
    """The residual sum and LayerNorm in one pass against two."""

    def build() -> Built:
        x, residual = (torch.randn(rows, columns).to(dtype) for _ in range(2))
        weight, bias = torch.randn(columns).to(dtype), torch.randn(columns).to(dtype)

        def ours() -> torch.Tensor:
            return pyxlbert.dropout_add_layer_norm(x, residual, weight, bias, eps=1e-12)

        def plain() -> torch.Tensor:
            return F.layer_norm(x + residual, (columns,), weight, bias, 1e-12)

        def truth() -> torch.Tensor:
            total = x.double() + residual.double()
            return F.layer_norm(total, (columns,), weight.double(), bias.double(), 1e-12)

        return Built(ours, {"F.layer_norm(x + r)": plain}, truth)

    size = rows * columns * dtype.itemsize
    return Race("dropout_add_layer_norm", f"{rows}x{columns}", dtype, build, 2 * size, _bytes_limit(3 * size))


def bias_gelu(rows: int, columns: int, dtype: torch.dtype, approximate: str) -> Race:
    """bias and GELU in one pass against two."""

    def build() -> Built:
        x, bias = torch.randn(rows, columns).to(dtype), torch.randn(columns).to(dtype)
        return Built(
            lambda: pyxlbert.bias_gelu(x, bias, approximate=approximate),
            {"F.gelu(x + b)": lambda: F.gelu(x + bias, approximate=approximate)},
            lambda: F.gelu(x.double() + bias.double(), approximate=approximate),
        )

    size = rows * columns * dtype.itemsize
    return Race("bias_gelu", f"{rows}x{columns} {approximate}", dtype, build, size, _bytes_limit(2 * size))


def embedding_layer_norm(batch: int, length: int, hidden: int, dtype: torch.dtype) -> Race:
    """Three look-ups, their sum and LayerNorm in one pass."""

    def build() -> Built:
        word, position, kind = (torch.randn(n, hidden).to(dtype) for n in (30522, 512, 2))
        weight, bias = torch.randn(hidden).to(dtype), torch.randn(hidden).to(dtype)
        ids = torch.randint(0, 30522, (batch, length))
        types, places = torch.zeros_like(ids), torch.arange(length).expand(batch, length)

        def look_up(w: torch.Tensor, p: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return F.embedding(ids, w) + F.embedding(places, p) + F.embedding(types, k)

        def plain() -> torch.Tensor:
            return F.layer_norm(look_up(word, position, kind), (hidden,), weight, bias, 1e-12)

        def truth() -> torch.Tensor:
            total = look_up(word.double(), position.double(), kind.double())
            return F.layer_norm(total, (hidden,), weight.double(), bias.double(), 1e-12)

        return Built(
            lambda: pyxlbert.embedding_layer_norm(ids, word, kind, position, weight, bias),
            {
                "F.embedding, F.layer_norm": lambda: F.layer_norm(
                    look_up(word, position, kind), (hidden,), weight, bias, 1e-12
                )
            },
            truth,
        )

    # Many rows of the words' table are read more than once; as many as there are tokens are written.
    size = batch * length * hidden * dtype.itemsize
    case = f"{batch}x{length}x{hidden}"
    return Race("embedding_layer_norm", case, dtype, build, size, _bytes_limit(2 * size))


def linear(rows: int, outputs: int, inputs: int, dtype: torch.dtype, gelu: bool = False) -> Race:
    """The vendor's GEMM through our guard against F.linear (and F.gelu)."""

    def build() -> Built:
        x, weight, bias = (torch.randn(*s).to(dtype) for s in ((rows, inputs), (outputs, inputs), (outputs,)))
        weight = weight * inputs**-0.5
        wide = lambda: [t.double() for t in (x, weight, bias)]  # noqa: E731
        if gelu:
            return Built(
                lambda: pyxlbert.linear_gelu(x, weight, bias),
                {"F.gelu(F.linear)": lambda: F.gelu(F.linear(x, weight, bias))},
                lambda: F.gelu(F.linear(*wide())),
            )
        return Built(
            lambda: pyxlbert.linear(x, weight, bias),
            {"F.linear": lambda: F.linear(x, weight, bias)},
            lambda: F.linear(*wide()),
        )

    name = "linear_gelu" if gelu else "linear"
    flops = 2 * rows * outputs * inputs
    size = (rows + outputs) * inputs * dtype.itemsize
    case = f"{rows}x{inputs}->{outputs}"
    return Race(name, case, dtype, build, size, lambda: flops / limits.gemm_rate(dtype))


@dataclass(frozen=True)
class AttentionShape:
    """B sequences of T tokens, H heads of D; `fill` of the keys are real."""

    batch: int
    length: int
    heads: int
    head_size: int
    fill: float = 1.0

    def __str__(self) -> str:
        filled = "" if self.fill == 1.0 else f" {self.fill:.0%} full"
        return f"{self.batch}x{self.length}x{self.heads}x{self.head_size}{filled}"


def some_heads(length: int, heads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of tensors `[..., H, D]` all heads, or the first and the last where all are too much for float64."""
    step = 1 if length <= 512 else max(1, heads - 1)
    return lambda x: x[..., ::step, :]


def attention(
    shape: AttentionShape,
    dtype: torch.dtype,
    *,
    backward: bool = False,
    dropout_p: float = 0.0,
    bias_gradient: bool = False,
) -> Race:
    """attention against SDPA with a boolean padding mask (or the bias); q, k, v are views of one projection."""
    b, t, h, d = shape.batch, shape.length, shape.heads, shape.head_size
    gradients = backward or bias_gradient

    def build() -> Built:
        qkv = torch.randn(b, t, 3, h, d).to(dtype)
        lengths = torch.linspace(max(1, t * (2 * shape.fill - 1)), t, b).round().to(torch.int32)
        keep = torch.arange(t)[None] < lengths[:, None]  # [B, T]
        mask = keep[:, None, None]
        x_is_full = qkv.is_cuda and shape.fill == 1.0
        bias = torch.randn(1, h, t, t).to(dtype) if bias_gradient else None
        leaves = [qkv, bias] if bias_gradient else [qkv]
        dy = torch.randn(b, t, h, d).to(dtype)

        def ours_of(qkv: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            q, k, v = qkv.unbind(2)
            if bias is not None:
                return pyxlbert.attention(q, k, v, bias=bias, dropout_p=dropout_p)
            return pyxlbert.attention(q, k, v, key_lengths=lengths, dropout_p=dropout_p)

        def plain_of(qkv: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
            # SDPA's flash path takes no mask.
            given = (None if x_is_full else mask) if bias is None else bias
            return F.scaled_dot_product_attention(q, k, v, given, dropout_p).transpose(1, 2)

        def call(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], cotangent: torch.Tensor) -> Call:
            tensors = [x.detach().requires_grad_(gradients) for x in tensors]
            second = tensors[1] if bias_gradient else None
            forward = lambda: function(tensors[0], second)  # noqa: E731
            return _gradients(forward, tensors, cotangent.to(tensors[0].dtype)) if gradients else forward

        part = some_heads(t, h)

        def truth() -> Any:
            return call(plain_of, [part(x).double() if x is qkv else x.double() for x in leaves], part(dy))()

        # With dropout the two draw different masks: nothing to compare (the op suite does, bit by bit).
        wanted = truth if dropout_p == 0 else None
        return Built(call(ours_of, leaves, dy), {"SDPA": call(plain_of, leaves, dy)}, wanted, part=part)

    kind = " forward+backward" if gradients else ""
    kind += " bias gradient" if bias_gradient else ""
    kind += f" dropout {dropout_p}" if dropout_p else ""
    flops = 4 * b * h * t * t * d * (3.5 if gradients else 1)
    return Race(
        "attention",
        f"{shape}{kind}",
        dtype,
        build,
        3 * b * t * h * d * dtype.itemsize,
        lambda: flops / limits.gemm_rate(dtype),
        rounds=7 if t >= 2048 else 11,
    )


def races() -> Iterator[Race]:
    """Every race of `python -m pyxlbert.bench ops`."""
    for dtype in (torch.float32, torch.bfloat16):
        for rows, columns in ((16, 384), (1024, 768), (4096, 384)):
            yield layer_norm(rows, columns, dtype)
            yield dropout_add_layer_norm(rows, columns, dtype)
        yield layer_norm(1024, 768, dtype, backward=True)
        yield bias_gelu(1024, 3072, dtype, "none")
        yield bias_gelu(1024, 3072, dtype, "tanh")
        yield embedding_layer_norm(8, 128, 768, dtype)
        for rows in (16, 1024):
            yield linear(rows, 768, 768, dtype)
            yield linear(rows, 3072, 768, dtype, gelu=True)
    yield from attention_races()


def attention_races() -> Iterator[Race]:
    """Every race of `python -m pyxlbert.bench attention`."""
    for dtype in (torch.float32, torch.bfloat16):
        for batch, length in ((32, 16), (32, 32), (16, 64), (8, 128), (2, 512), (1, 2048), (1, 8192)):
            yield attention(AttentionShape(batch, length, 12, 64), dtype)
        yield attention(AttentionShape(8, 512, 12, 64, fill=0.56), dtype)
        yield attention(AttentionShape(8, 128, 12, 32), dtype)
        for batch, length in ((8, 128), (2, 512), (1, 2048)):
            yield attention(AttentionShape(batch, length, 12, 64), dtype, backward=True)
            yield attention(AttentionShape(batch, length, 12, 64), dtype, backward=True, dropout_p=0.1)
        yield attention(AttentionShape(2, 512, 12, 64), dtype, dropout_p=0.1)
        yield attention(AttentionShape(2, 512, 12, 64), dtype, bias_gradient=True)
