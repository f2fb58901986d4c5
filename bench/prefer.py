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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pyxlbert.bench import apart
from pyxlbert.bench.ops import Built, Drawn, Race, ours

from pyxlbert import backends, files
from pyxlbert.backends import measured
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Case, Spec, Use

# What a model spends most of its time in first; of ops of scores by head size.
ORDER = (
    ("attention", 64),
    ("relative_attention", 64),
    ("layer_norm", 0),
    ("dropout_add_layer_norm", 0),
    ("bias_gelu", 0),
    ("embedding_layer_norm", 0),
    ("two_stream_attention", 64),
    ("attention", 128),
    ("relative_attention", 128),
    ("two_stream_attention", 128),
)


@dataclass(frozen=True)
class Problem:
    """One op, forward and backward, at one size."""

    spec: Spec
    case: Case
    dtype: torch.dtype

    @cached_property
    def _deciding(self) -> torch.Tensor:
        """The tensor that decides which backend is taken: the first of a floating dtype, without memory."""
        arguments = self.spec.arguments(self.case, None, self.dtype, torch.device("meta"))
        return next(x for x in arguments.values() if isinstance(x, torch.Tensor) and x.is_floating_point())

    @property
    def elements(self) -> int:
        """Of the tensor that decides."""
        return self._deciding.numel()

    def key(self, capability: str) -> measured.Key:
        """Of `measured.json`."""
        return measured.key_of(self.spec.name, self._deciding, capability)

    def race(self) -> Race:
        """Of both backends; "torch" takes part as the plain way, to whose error they are held."""
        return Race(self.spec.name, self.case.id, self.dtype, self.build, rounds=11)

    def build(self) -> Built:
        """See `Race`."""
        drawn = Drawn(self.spec, self.case, self.dtype)
        named = {f"pyxlbert {name}": drawn.call(ours(self.spec, backend=name)) for name in measured.USUAL}
        plain = ours(self.spec, backend="torch")
        return Built(None, {"torch": drawn.call(plain)} | named, drawn.exact(plain), drawn.bytes, part=drawn.part)


def problems() -> Iterator[Problem]:
    """All that is measured, in ORDER; the sizes of a key together, rising."""
    for dtype in (torch.bfloat16, torch.float32):
        for op, head_size in ORDER:
            found = [Problem(SPECS[op], case, dtype) for case in SPECS[op].used(Use.PREFER)]
            found = [problem for problem in found if problem.key("").head_size == head_size]
            yield from sorted(found, key=lambda problem: problem.elements)


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
        print(f"{row.subject:24} {row.case:36} {row.dtype}\n{row.details()}", flush=True)
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
    if options.write is not None:
        try:
            files.check_writable("--write", str(options.write), files.real_path("--write", str(options.write)))
        except (OSError, ValueError) as error:
            parser.error(str(error))
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
