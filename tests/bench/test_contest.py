"""What the races of `make gpu` are made of: inputs in turn, answers checked, rows that say why there is no time."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from pyxlbert.bench import limits, on_gpu, ops, report, tables
from pyxlbert.bench.contest import poisons
from pyxlbert.bench.report import Row
from pyxlbert.bench.timer import Failed, Timing, copies_for, race
from small_cases import small

from pyxlbert.testing import tolerances
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Use

TIME = Timing(1e-3, 9e-4, 2e-3, 5)


@pytest.mark.parametrize(
    ("size", "cache", "copies"), [(25, 50, 5), (100, 50, 2), (101, 50, 1), (1, 50, 101), (9, 0, 1)]
)
def test_all_copies_are_more_than_twice_the_cache(size: int, cache: int, copies: int) -> None:
    assert copies_for(size, cache) == copies
    assert cache == 0 or copies * size > 2 * cache >= (copies - 1) * size


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_every_call_takes_the_next_copy_whoever_it_is(copies: int) -> None:
    """Between two calls that read the same copy lie calls on all the others."""
    read: list[int] = []
    contestants = [{name: lambda i=i: read.append(i) for name in ("a", "b")} for i in range(copies)]
    # Each round calls both at least once, however slow a call was.
    assert set(race(contestants, rounds=copies + 3, least=1e-6)) == {"a", "b"}
    assert len(read) > 2 * copies and read == [i % copies for i in range(len(read))]


def test_a_race_builds_as_many_inputs_as_the_cache_asks_for(monkeypatch) -> None:
    built = []
    taken = []

    def build() -> ops.Built:
        x = torch.randn(8)
        built.append(x)
        return ops.Built(lambda: taken.append(x) or 2 * x, {"peer": lambda: x + x}, lambda: 2 * x.double(), 32)

    found = ops.Race("double", "8", torch.float32, build, rounds=2).run(cache_bytes=100)
    assert len(built) == 7 and not found.failed
    assert {id(x) for x in taken} == {id(x) for x in built}
    assert len({float(x[0]) for x in built}) == 7


def test_the_timer_names_who_raised() -> None:
    def fails() -> None:
        raise KeyError("x")

    with pytest.raises(Failed) as caught:
        race({"a": lambda: None, "b": fails}, rounds=1)
    assert caught.value.name == "b" and isinstance(caught.value.__cause__, KeyError)


def test_what_poisons_a_process() -> None:
    assert poisons(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not poisons(torch.cuda.OutOfMemoryError("CUDA out of memory.")) and not poisons(ValueError("x"))
    assert not poisons(None)
    outer = ValueError("at the end of the block")
    outer.__cause__ = RuntimeError("CUDA error: unspecified launch failure")
    assert poisons(outer)


def test_nothing_is_timed_without_a_truth() -> None:
    race = ops.Race("x", "y", torch.float32, lambda: ops.Built(lambda: None, {}, None, 4))
    with pytest.raises(ValueError, match=r"x y torch\.float32: got no truth, wanted one"):
        race.run()


# One of every kind, the last in the list, on few tokens: those of a GPU, then those of the CPU alone.
TINY = {
    (race.subject, race.case.partition(" ")[2]): race
    for race in on_gpu.races(small)
    if isinstance(race, ops.Race) and race.dtype is torch.bfloat16
}
TINY |= {
    (name, case.id.partition(" ")[2]): ops.race_of(spec, small(case), torch.bfloat16)
    for name, spec in SPECS.items()
    for case in spec.used(Use.RACE)
    # With dropout SDPA's mask is another one, and nothing is checked.
    if (name, case.id.partition(" ")[2]) not in TINY and not getattr(case.inputs, "dropout_p", None)
}


@pytest.mark.parametrize("race", TINY.values(), ids=str)
def test_every_answer_of_a_race_is_right_and_checked(race: ops.Race, monkeypatch) -> None:
    """The same races on few tokens, on the CPU; then none is timed whose last output is changed."""
    monkeypatch.setattr(limits, "gemm_rate", lambda dtype: 1e12)
    monkeypatch.setattr(limits, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(ops, "race_on", lambda device, copies, **options: {name: TIME for name in copies[0]})
    monkeypatch.setattr(torch, "compile", lambda call: call)
    row = race.run()
    assert "pyxlbert" in row.timings and not row.faults
    assert row.best_peer is not None or race.subject == "two_stream_attention"
    assert all(name in ("pyxlbert cuda", "pyxlbert triton") for name in row.failed)
    usual = ops._outputs

    def changed(value):
        *first, last = usual(value)
        return (*first, last * 1.5 if last.dtype is race.dtype else last)

    monkeypatch.setattr(ops, "_outputs", changed)
    assert not race.run().timings


@pytest.mark.parametrize("name", ["BERT-base", "XLNet-base"])
def test_a_models_answer_is_checked(name: str, monkeypatch) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    monkeypatch.setattr(on_gpu, "race_on", lambda device, copies, **options: {name: TIME for name in copies[0]})
    monkeypatch.setattr(torch, "compile", lambda call: call)
    race = on_gpu.ModelRace(name, 2, 16, fill=0.5, layers=1)
    row = race.run("cpu")
    assert not row.failed and set(row.timings) == {"transformers", "torch.compile", "pyxlbert"}
    monkeypatch.setitem(tolerances.CONTESTANT, torch.bfloat16, 1e-4)
    row = race.run("cpu")
    assert not row.timings and all(why.startswith("wrong answer") for why in row.failed.values())


def test_a_backend_that_refuses_is_no_fault() -> None:
    refusal = "RuntimeError: attention: backend 'cuda' is unavailable: head sizes up to 128"
    row = Row("a", "b", "float32", {"SDPA": TIME}, failed={"pyxlbert cuda": refusal, "SDPA 2": "x", "pyxlbert": "y"})
    assert row.faults == {"pyxlbert": "y"}


def test_rows_without_our_time_are_shown_and_written(tmp_path) -> None:
    rows = [Row("a", str(n), "float32", {"SDPA": TIME} | ours, 1e-4) for n, ours in ((1, {}), (2, {"pyxlbert": TIME}))]
    rows[0].failed["pyxlbert"] = "wrong answer"
    path = tmp_path / "new" / "file.json"
    report.write(path, rows[:1], "command", {"gpu": "g", "user": "nobody"})
    report.write(path, rows[1:], "command", {"gpu": "g"})
    document = report.files.read_json(path)
    assert document["device"] == {"gpu": "g"} and [row["case"] for row in document["rows"]] == ["1", "2"]
    assert document["rows"][0]["failed"] == {"pyxlbert": "wrong answer"}
    lines = tables.table(document["rows"]).splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["", "1"]
