"""The measurement behind `measured.json`, without a GPU: answers, the table as it grows, faults that cost one size."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from pyxlbert.bench import ops, prefer
from pyxlbert.bench.apart import Found
from pyxlbert.bench.timer import Timing
from small_cases import small

from pyxlbert import backends
from pyxlbert.backends import measured
from pyxlbert.testing.specs._spec import as_tuple

TIME = Timing(1e-3, 9e-4, 2e-3, 5)
# One of every op.
PROBLEMS = {p.spec.name: p for p in prefer.problems() if p.dtype is torch.float32 and p.key("").head_size != 128}


@pytest.mark.parametrize("op", sorted(PROBLEMS))
def test_every_problem_is_checked(op: str, monkeypatch) -> None:
    """Kernels run here in Triton's interpreter and in the emulation, or refuse; what is changed is not timed."""
    monkeypatch.setattr(ops, "race_on", lambda device, copies, **options: {name: TIME for name in copies[0]})
    problem = replace(PROBLEMS[op], case=small(PROBLEMS[op].case))
    row = problem.race().run()
    assert "torch" in row.timings and not row.faults
    assert {*row.timings, *row.failed} == {"torch", "pyxlbert cuda", "pyxlbert triton"}
    # In place of both, the CPU's: right, and then wrong.
    monkeypatch.setattr(measured, "USUAL", ("cpu", "torch"))
    assert set(problem.race().run().timings) == {"torch", "pyxlbert cpu", "pyxlbert torch"}

    def wrong(**arguments):
        outputs = as_tuple(problem.spec.function(**arguments))
        return tuple(out if out.dtype is torch.float64 else 1.5 * out for out in outputs)

    changed = replace(problem, spec=replace(problem.spec, function=wrong))
    assert not changed.race().run().timings


def test_sizes_are_written_as_they_come(tmp_path) -> None:
    path = tmp_path / "measured.json"
    old = {"key": measured.Key("attention", "bfloat16", 64, "8.0")._asdict(), "times": [[1, 2.0, 3.0]]}
    path.write_text(json.dumps([old]))
    given = [p for p in prefer.problems() if p.key("9.0") == measured.Key("attention", "bfloat16", 64, "9.0")]
    names = ("pyxlbert cuda", "pyxlbert triton")
    lines = []

    def found():
        for place, problem in enumerate(given):
            timings = {name: TIME for name in names[: 1 if place == 1 else 2]}
            failed = {} if place != 1 else {"pyxlbert triton": "wrong answer: 1"}
            yield Found(problem.race().row(timings, failed), {"capability": "9.0"})
            lines.append(json.loads(path.read_text()))

    times, wrong = prefer.collect(found(), given, path)
    key = measured.Key("attention", "bfloat16", 64, "9.0")
    assert wrong == 1 and times == {key: [(128 * 768, 1e-3, 1e-3), (16384 * 768, 1e-3, 1e-3)]}
    assert [len(line[1]["times"]) for line in lines] == [1, 1, 2]
    assert all(line[0] == old and line[1]["key"] == key._asdict() for line in lines)


def test_the_keys_are_those_that_a_call_asks_for() -> None:
    for problem in prefer.problems():
        head_size = getattr(problem.case.inputs, "head_size", 0)
        tensor = torch.empty(3, head_size or 768, dtype=problem.dtype, device="meta")
        assert problem.key("9.0") == measured.key_of(problem.spec.name, tensor, "9.0")


def test_every_key_is_measured_at_three_sizes() -> None:
    found = list(prefer.problems())
    keys = Counter(problem.key("9.0") for problem in found)
    assert set(keys.values()) == {3} and len(found) == len({str(problem.race()) for problem in found})
    assert {key.op for key in keys} == {name for name, op in backends.OPS.items() if "cuda" in op.backends}
