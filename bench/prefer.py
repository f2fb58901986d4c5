"""Times backends "cuda" and "triton" on the GPU that is here, for the table of `pyxlbert.backends.measured`.

    python -m pyxlbert.bench.prefer [--write pyxlbert/backends/measured.json] [--seconds 60]

Both are checked against the readable definition in float64 before they are timed, on inputs rotated past the cache, in
a process of their own; who is wrong or fails has no time, and the size no row.  What was measured is written size by
size.  Rows of other compute capabilities stay as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyxlbert.bench import apart
from pyxlbert.bench.ops import Built, Call, Race, some_heads

import pyxlbert
from pyxlbert import backends, files
from pyxlbert.backends import measured

DTYPES = (torch.bfloat16, torch.float32)
# Rows of ops on rows, and tokens of attention, in sequences of up to 2048.
SIZES = (128, 2048, 16384)
WIDTH = 768
HEADS = 12
VOCABULARY = 30000
Forward = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """One op, forward and backward, at one size.

    Attributes:
        op: its name.
        size: rows or tokens.
        dtype: of the tensors.
        head_size: 0 for ops on rows.
    """

    op: str
    size: int
    dtype: torch.dtype
    head_size: int = 0

    @property
    def length(self) -> int:
        """Of a sequence."""
        return min(self.size, 2048)

    @property
    def elements(self) -> int:
        """Of the tensor that decides which backend is taken."""
        if self.op == "embedding_layer_norm":
            return VOCABULARY * WIDTH
        if self.head_size:
            return self.size * HEADS * self.head_size
        return self.size * WIDTH * (4 if self.op == "bias_gelu" else 1)

    def key(self, capability: str) -> measured.Key:
        """Of `measured.json`."""
        deciding = torch.empty(1, self.head_size, dtype=self.dtype, device="meta")
        return measured.key_of(self.op, deciding, capability)

    def race(self) -> Race:
        """Of both backends; "torch" takes part as the plain way, to whose error they are held."""
        case = f"{self.size} tokens, D = {self.head_size}" if self.head_size else f"{self.size} rows"
        # Of the words' table few rows are read, but its whole gradient is written.
        return Race(self.op, case, self.dtype, self.build, self.elements * self.dtype.itemsize, rounds=11)

    def build(self) -> Built:
        """See `Race`."""
        leaves, function = self._scores() if self.head_size else self._rows()
        *leaves, dy = (x.to(self.dtype) for x in leaves)
        part = some_heads(self.length, HEADS) if self.head_size else (lambda x: x)

        def on(name: str, inputs: list[torch.Tensor], cotangent: torch.Tensor) -> Call:
            inputs = [x.detach().requires_grad_() for x in inputs]

            def call() -> tuple[torch.Tensor, ...]:
                with pyxlbert.use_backend(name):
                    out = function(*inputs)
                return (out.detach(), *torch.autograd.grad(out, inputs, cotangent))

            return call

        def truth() -> tuple[torch.Tensor, ...]:
            return on("torch", [part(x).double() for x in leaves], part(dy).double())()

        named = {f"pyxlbert {name}": on(name, leaves, dy) for name in measured.USUAL}
        return Built(None, {"torch": on("torch", leaves, dy)} | named, truth, part=part)

    def _rows(self) -> tuple[list[torch.Tensor], Forward]:
        """The leaves, after them the cotangent, and a function of the leaves."""
        n = self.size
        vectors = [torch.randn(WIDTH), torch.randn(WIDTH)]
        if self.op == "layer_norm":
            return [torch.randn(n, WIDTH), *vectors, torch.randn(n, WIDTH)], pyxlbert.layer_norm
        if self.op == "dropout_add_layer_norm":
            # The same elements are dropped on every backend.
            function = partial(pyxlbert.dropout_add_layer_norm, dropout_p=0.1, seed=1)
            return [torch.randn(n, WIDTH), torch.randn(n, WIDTH), *vectors, torch.randn(n, WIDTH)], function
        if self.op == "bias_gelu":
            return [torch.randn(n, 4 * WIDTH), torch.randn(4 * WIDTH), torch.randn(n, 4 * WIDTH)], pyxlbert.bias_gelu
        ids = torch.randint(0, VOCABULARY, (max(1, n // 128), min(n, 128)))
        tables = [torch.randn(VOCABULARY, WIDTH), torch.randn(512, WIDTH)]
        return [
            *tables,
            *vectors,
            torch.randn(*ids.shape, WIDTH),
        ], lambda words, places, w, b: pyxlbert.embedding_layer_norm(ids, words, None, places, w, b)

    def _scores(self) -> tuple[list[torch.Tensor], Forward]:
        shape = (self.size // self.length, self.length, HEADS, self.head_size)
        q, k, v, g, dy, dg = (torch.randn(shape) for _ in range(6))
        if self.op == "attention":
            return [q, k, v, dy], pyxlbert.attention
        table, *biases = (torch.randn(*rows, HEADS, self.head_size) for rows in ((2 * self.length,), (), ()))
        # Scores of the size that a model's have.
        given = [0.5 * table, *(0.3 * x for x in biases)]

        def relative(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            return pyxlbert.relative_attention(q, k, v, rest[0], content_bias=rest[1], position_bias=rest[2])

        def both(q: torch.Tensor, g: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> Any:
            biases = {"content_bias": rest[1], "position_bias": rest[2]}
            return torch.cat(pyxlbert.two_stream_attention(q, g, k, v, rest[0], **biases))

        if self.op == "relative_attention":
            return [q, k, v, *given, dy], relative
        return [q, g, k, v, *given, torch.cat((dy, dg))], both


def problems() -> Iterator[Problem]:
    """All that is measured, what a model spends most of its time in first; the sizes of a key together."""
    kinds = [(op, size) for size in (64, 128) for op in ("attention", "relative_attention", "two_stream_attention")]
    rows = [(op, 0) for op in ("layer_norm", "dropout_add_layer_norm", "bias_gelu", "embedding_layer_norm")]
    for dtype in DTYPES:
        for op, head_size in (*kinds[:2], *rows, *kinds[2:]):
            for size in SIZES:
                yield Problem(op, size, dtype, head_size)


def races() -> Iterator[Race]:
    """Those of `problems`, for a worker."""
    return (problem.race() for problem in problems())


def describe() -> dict[str, object]:
    """The device's part of a key."""
    return {"capability": ".".join(str(number) for number in torch.cuda.get_device_capability())}


def collect(
    found: Iterable[apart.Found], given: Iterable[Problem], path: Path | None
) -> tuple[dict[measured.Key, list[tuple[int, float, float]]], int]:
    """Writes every size as it comes.

    Args:
        found: what the races gave.
        given: the problems they are of.
        path: the JSON file whose rows of the same keys are replaced, or None.

    Returns:
        (elements, seconds on cuda, seconds on triton) of every key, and how many races had a fault.
    """
    by_race = {(race.subject, race.case, str(race.dtype)): problem for problem in given for race in (problem.race(),)}
    times: dict[measured.Key, list[tuple[int, float, float]]] = {}
    wrong = 0
    for one in found:
        row = one.row
        print(f"{row.subject:24} {row.case:24} {row.dtype}\n{row.details()}", flush=True)
        wrong += bool(row.faults)
        seconds = [
            row.timings[f"pyxlbert {name}"].median for name in measured.USUAL if f"pyxlbert {name}" in row.timings
        ]
        if len(seconds) < 2:
            continue
        problem = by_race[row.subject, row.case, f"torch.{row.dtype}"]
        key = problem.key(str(one.device["capability"]))
        times.setdefault(key, []).append((problem.elements, *seconds))
        if path is not None:
            write(path, [{"key": key._asdict(), "times": times[key]}])
    return times, wrong


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces the rows of the same keys and leaves the others, whole or not at all."""
    before = files.read_json(path, list) if path.exists() else []
    table = {tuple(row["key"].values()): row for row in (*before, *rows)}
    with files.whole_file(path) as part:
        part.write_text(json.dumps([table[key] for key in sorted(table)], indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Measures; 1 where a backend was wrong or failed, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m pyxlbert.bench.prefer", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the JSON file whose rows are replaced")
    parser.add_argument("--seconds", type=float, default=60.0, help="begin no race after so long")
    options = parser.parse_args(arguments)
    for name in measured.USUAL:
        reason = backends.unavailable(name)
        if reason is not None or backends.cuda_is_emulated or not torch.cuda.is_available():
            print(f"prefer: nothing was timed: backend {name!r} has no GPU here ({reason})", file=sys.stderr)
            return 2
    end = time.monotonic() + options.seconds
    found = apart.run(races, "cuda", end=end, describe=describe)
    return 1 if collect(found, problems(), options.write)[1] else 0


if __name__ == "__main__":
    sys.exit(main())
