"""Races of single ops: ours against plain PyTorch on the shapes that the models use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pyxlbert.bench import limits
from pyxlbert.bench.report import Row
from pyxlbert.bench.timer import race_on

import pyxlbert
from pyxlbert.testing import compare, tolerances

Call = Callable[[], Any]


class WrongAnswer(RuntimeError):
    """A contestant's output is outside the error budget: it is not timed."""


@dataclass(frozen=True)
class Race:
    """One race before it is run.

    Attributes:
        subject, case, dtype: see `Row`.
        build: makes our call, the plain calls by name and the float64 truth of their common output.
        limit: seconds at the machine's limit.
        rounds: of the timer.
        note: see `Row`.
    """

    subject: str
    case: str
    dtype: torch.dtype
    build: Callable[[], tuple[Call, dict[str, Call], Call | None]]
    limit: Callable[[], float] | None = None
    rounds: int = 11
    note: str = ""

    def __str__(self) -> str:
        return f"{self.subject} {self.case} {self.dtype}"

    def run(self, device: str = "cpu") -> Row:
        """Checks the answers, then times them on the CPU or on the GPU that is here ("cuda").

        Raises:
            WrongAnswer: our output is outside the error budget.
        """
        torch.manual_seed(0)
        with torch.device(device):
            ours, peers, truth = self.build()
            limit = self.limit() if self.limit else None
        failed: dict[str, str] = {}
        if device != "cpu":
            peers, failed = _those_that_run(peers)
        if truth is not None:
            first = next(iter(peers.values()))
            for index, (a, b, t) in enumerate(zip(_outputs(ours()), _outputs(first()), _outputs(truth()), strict=True)):
                try:
                    factor = tolerances.factor(self.subject, self.dtype, "cpu" if device == "cpu" else "triton")
                    compare.within_budget(f"{self.subject} {self.case} {index}", a, b, t, factor=factor)
                except AssertionError as error:
                    raise WrongAnswer(str(error)) from None
        timings = race_on(device, {"pyxlbert": ours, **peers}, rounds=self.rounds)
        dtype = str(self.dtype).removeprefix("torch.")
        return Row(self.subject, self.case, dtype, timings, limit, self.note, failed)


def _those_that_run(peers: dict[str, Call]) -> tuple[dict[str, Call], dict[str, str]]:
    """Peers that do, and of the others why not: on a GPU some want more memory, or a compiler."""
    failed = {}
    for name, call in peers.items():
        try:
            call()
        except Exception as error:  # a peer that fails is a line of the report
            failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160]
    return {name: call for name, call in peers.items() if name not in failed}, failed


def _outputs(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


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

    def build() -> tuple[Call, dict[str, Call], Call]:
        x = torch.randn(rows, columns).to(dtype)
        weight, bias = torch.randn(columns).to(dtype), torch.randn(columns).to(dtype)
        inputs = [t.requires_grad_(backward) for t in (x, weight, bias)]
        wide = [t.detach().double().requires_grad_(backward) for t in inputs]

        def ours() -> torch.Tensor:
            return pyxlbert.layer_norm(*inputs, eps=1e-5)

        def plain() -> torch.Tensor:
            return F.layer_norm(x, (columns,), weight, bias, 1e-5)

        def truth() -> torch.Tensor:
            return F.layer_norm(wide[0], (columns,), wide[1], wide[2], 1e-5)

        if not backward:
            return ours, {"F.layer_norm": plain}, truth
        dy = torch.randn(rows, columns).to(dtype)
        calls = _gradients(ours, inputs, dy), _gradients(plain, inputs, dy), _gradients(truth, wide, dy.double())
        return calls[0], {"F.layer_norm": calls[1]}, calls[2]

    size = rows * columns * dtype.itemsize
    kind = " forward+backward" if backward else ""
    return Race("layer_norm", f"{rows}x{columns}{kind}", dtype, build, _bytes_limit(size * (5 if backward else 2)))


def dropout_add_layer_norm(rows: int, columns: int, dtype: torch.dtype) -> Race:
    """The residual sum and LayerNorm in one pass against two."""

    def build() -> tuple[Call, dict[str, Call], Call]:
        x, residual = (torch.randn(rows, columns).to(dtype) for _ in range(2))
        weight, bias = torch.randn(columns).to(dtype), torch.randn(columns).to(dtype)

        def ours() -> torch.Tensor:
            return pyxlbert.dropout_add_layer_norm(x, residual, weight, bias, eps=1e-12)

        def plain() -> torch.Tensor:
            return F.layer_norm(x + residual, (columns,), weight, bias, 1e-12)

        def truth() -> torch.Tensor:
            total = x.double() + residual.double()
            return F.layer_norm(total, (columns,), weight.double(), bias.double(), 1e-12)

        return ours, {"F.layer_norm(x + r)": plain}, truth

    size = 3 * rows * columns * dtype.itemsize
    return Race("dropout_add_layer_norm", f"{rows}x{columns}", dtype, build, _bytes_limit(size))


def bias_gelu(rows: int, columns: int, dtype: torch.dtype, approximate: str) -> Race:
    """bias and GELU in one pass against two."""

    def build() -> tuple[Call, dict[str, Call], Call]:
        x, bias = torch.randn(rows, columns).to(dtype), torch.randn(columns).to(dtype)
        return (
            lambda: pyxlbert.bias_gelu(x, bias, approximate=approximate),
            {"F.gelu(x + b)": lambda: F.gelu(x + bias, approximate=approximate)},
            lambda: F.gelu(x.double() + bias.double(), approximate=approximate),
        )

    size = 2 * rows * columns * dtype.itemsize
    return Race("bias_gelu", f"{rows}x{columns} {approximate}", dtype, build, _bytes_limit(size))


def embedding_layer_norm(batch: int, length: int, hidden: int, dtype: torch.dtype) -> Race:
    """Three look-ups, their sum and LayerNorm in one pass."""

    def build() -> tuple[Call, dict[str, Call], Call]:
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

        return (
            lambda: pyxlbert.embedding_layer_norm(ids, word, kind, position, weight, bias),
            {
                "F.embedding, F.layer_norm": lambda: F.layer_norm(
                    look_up(word, position, kind), (hidden,), weight, bias, 1e-12
                )
            },
            truth,
        )

    size = 2 * batch * length * hidden * dtype.itemsize
    return Race("embedding_layer_norm", f"{batch}x{length}x{hidden}", dtype, build, _bytes_limit(size))


def linear(rows: int, outputs: int, inputs: int, dtype: torch.dtype, gelu: bool = False) -> Race:
    """The vendor's GEMM through our guard against F.linear (and F.gelu)."""

    def build() -> tuple[Call, dict[str, Call], Call]:
        x, weight, bias = (torch.randn(*s).to(dtype) for s in ((rows, inputs), (outputs, inputs), (outputs,)))
        weight = weight * inputs**-0.5
        wide = [t.double() for t in (x, weight, bias)]
        if gelu:
            return (
                lambda: pyxlbert.linear_gelu(x, weight, bias),
                {"F.gelu(F.linear)": lambda: F.gelu(F.linear(x, weight, bias))},
                lambda: F.gelu(F.linear(*wide)),
            )
        return (
            lambda: pyxlbert.linear(x, weight, bias),
            {"F.linear": lambda: F.linear(x, weight, bias)},
            lambda: F.linear(*wide),
        )

    name = "linear_gelu" if gelu else "linear"
    flops = 2 * rows * outputs * inputs
    return Race(name, f"{rows}x{inputs}->{outputs}", dtype, build, lambda: flops / limits.gemm_rate(dtype))


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

    def build() -> tuple[Call, dict[str, Call], Call | None]:
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

        def call(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> Call:
            tensors = [x.detach().requires_grad_(gradients) for x in tensors]
            second = tensors[1] if bias_gradient else None
            forward = lambda: function(tensors[0], second)  # noqa: E731
            return _gradients(forward, tensors, dy.to(tensors[0].dtype)) if gradients else forward

        # With dropout the two draw different masks: nothing to compare (the op suite does, bit by bit).
        truth = call(plain_of, [x.double() for x in leaves]) if dropout_p == 0 and t <= 2048 else None
        return call(ours_of, leaves), {"SDPA": call(plain_of, leaves)}, truth

    kind = " forward+backward" if gradients else ""
    kind += " bias gradient" if bias_gradient else ""
    kind += f" dropout {dropout_p}" if dropout_p else ""
    flops = 4 * b * h * t * t * d * (3.5 if gradients else 1)
    return Race(
        "attention",
        f"{shape}{kind}",
        dtype,
        build,
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
