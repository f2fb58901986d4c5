"""Whether ours has become slower: what is called so of synthetic samples, of files, and of two revisions."""

from __future__ import annotations

import json
import random
import subprocess
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from pyxlbert.bench import compare, report, revision
from pyxlbert.bench.compare import FASTER, SAME, SLOWER, UNSURE
from pyxlbert.bench.report import Row
from pyxlbert.bench.statistics import quartiles
from pyxlbert.bench.timer import Timing

from pyxlbert.cli import main

DEVICE = {"processor": "an abacus", "level": "beads", "threads": 2}


def timing(generator: random.Random, seconds: float, noise: float = 0.03, rounds: int = 11) -> Timing:
    """Samples with outliers to one side, as a busy machine has them."""
    samples = [
        seconds * (1 + abs(generator.gauss(0, noise)) + (0.3 if generator.random() < 0.05 else 0))
        for _ in range(rounds)
    ]
    lower, median, upper = quartiles(samples)
    return Timing(median, lower, upper, rounds, tuple(samples))


def run(seed: int, factor: float = 1.0, machine: float = 1.0, rows: int = 1) -> list[Row]:
    """Rows of a run whose ours takes `factor` times as long, on a machine that takes `machine` times as long."""
    generator = random.Random(seed)
    # A run is as a whole a little faster or slower than the next.
    machine *= 1 + generator.gauss(0, 0.01)
    return [
        Row(
            *("x", str(number), "float32"),
            {"pyxlbert": timing(generator, factor * machine), "peer": timing(generator, 2 * machine)},
        )
        for number in range(rows)
    ]


def verdicts(before: list[Row], after: list[Row], same_peers: bool = True) -> list[str]:
    return [compare.change_of(a, b, len(before), same_peers).verdict for a, b in zip(before, after, strict=True)]


def test_a_kernel_slower_by_15_percent_is_caught_and_an_unchanged_one_is_not() -> None:
    before = [run(seed) for seed in range(20)]
    unchanged = [verdicts(one, run(100 + seed))[0] for seed, one in enumerate(before)]
    slowed = [verdicts(one, run(200 + seed, 1.15))[0] for seed, one in enumerate(before)]
    faster = [verdicts(one, run(300 + seed, 1 / 1.15))[0] for seed, one in enumerate(before)]
    assert unchanged.count(SAME) >= 19 and slowed.count(SLOWER) >= 18 and faster.count(FASTER) >= 18


def test_a_hundred_unchanged_rows_are_unchanged_together() -> None:
    found = [verdicts(run(seed, rows=100), run(50 + seed, rows=100)) for seed in range(3)]
    assert sum(SLOWER in one for one in found) == 0
    assert compare.threshold(0.05, 100) > compare.threshold(0.05, 1) > 0.05


def test_a_slow_machine_is_no_slow_kernel() -> None:
    assert verdicts(run(1), run(2, machine=1.3)) == [SAME]
    assert verdicts(run(1), run(2, machine=1.3), same_peers=False) == [SLOWER]
    assert verdicts(run(1), run(2, 1.2, machine=0.8)) == [SLOWER]


def test_noise_raises_the_threshold() -> None:
    generator = random.Random(0)
    quiet, loud = (Row("x", "y", "float32", {"pyxlbert": timing(generator, 1.0, noise)}) for noise in (0.01, 0.5))
    assert compare.change_of(quiet, loud, 1, True).threshold > 1.15 > compare.change_of(quiet, quiet, 1, True).threshold


def test_samples_that_took_turns_are_compared_by_rounds() -> None:
    slow = [1.0, 3.0, 1.1, 5.0, 1.0, 2.0, 1.3, 4.0, 1.0]

    def row(factor: float) -> Row:
        times = {"pyxlbert": [factor * one for one in slow], "pyxlbert before": slow}
        return Row(
            "x", "y", "z", {who: Timing(*(quartiles(v)[i] for i in (1, 0, 2)), 9, tuple(v)) for who, v in times.items()}
        )

    assert compare.interleaved(row(1.0), "pyxlbert before", 1).verdict == SAME
    assert compare.interleaved(row(1.1), "pyxlbert before", 1).verdict == SLOWER
    assert compare.interleaved(row(0.9), "pyxlbert before", 1).verdict == FASTER


def test_most_of_several_runs_decide() -> None:
    def change(verdict: str, ratio: float) -> compare.Change:
        return compare.Change("x", "y", "z", 1.0, ratio, ratio, 1.06, verdict)

    slow, same, unsure = change(SLOWER, 1.2), change(SAME, 1.0), change(UNSURE, 1.1)
    assert compare.agree([slow, slow]) and not compare.agree([slow, same])
    found = compare.together([slow, same, slow._replace(ratio=1.1)])
    assert found.verdict == SLOWER and 1.1 < found.ratio < 1.2
    assert compare.together([slow, same, same]) == same and compare.together([same]) == same
    assert compare.together([slow, same, unsure]).verdict == UNSURE == compare.together([slow, same]).verdict


def written(path: Path, rows: list[Row], **changes: object) -> str:
    path.write_text(json.dumps(report.document_of(rows, "command", DEVICE) | changes))
    return str(path)


def test_files_and_their_exit_status(tmp_path, capsys) -> None:
    a = written(tmp_path / "a.json", run(1, rows=2))
    b = written(tmp_path / "b.json", [*run(2, rows=1), *run(3, 1.3, rows=2)[1:], *run(4, rows=3)[2:]])
    assert main(["bench", "--compare", a, a]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 slower, 0 faster, 2 the same"
    assert main(["bench", "--compare", a, b]) == 1
    first, second, third, last = capsys.readouterr().out.splitlines()
    assert first.startswith("slower   x ") and "may be noise" in first and second.startswith("the same x ")
    assert third == "not compared: x 2 float32: only in the second" and last == "1 slower, 0 faster, 1 the same"
    assert main(["bench", "--compare", b, a]) == 0


def test_another_machine_is_said_loudly(tmp_path, capsys) -> None:
    a = written(tmp_path / "a.json", run(1))
    b = written(tmp_path / "b.json", run(2), device=DEVICE | {"processor": "a slide rule"})
    assert main(["bench", "--compare", a, b]) == 0
    assert capsys.readouterr().out.startswith(
        "WARNING: RESULTS OF DIFFERENT MACHINES (processor an abacus and a slide rule)"
    )
    c = written(tmp_path / "c.json", run(2), versions={"torch": "1"})
    assert main(["bench", "--compare", a, c]) == 0
    assert "WARNING: other versions of " in capsys.readouterr().out


def test_files_of_before_samples_are_compared_by_quartiles(tmp_path) -> None:
    old = report.document_of(run(1), "command", DEVICE)
    del old["version"]
    for row in old["rows"]:
        del row["work"]
        for one in row["timings"].values():
            del one["samples"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    new = written(tmp_path / "new.json", run(2, 1.3))
    assert main(["bench", "--compare", str(path), str(path)]) == 0 and main(["bench", "--compare", str(path), new]) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "b.json: there is no such file"),
        ("[]", "holds a JSON list"),
        ('{"version": 3, "device": {}, "rows": []}', "got results of version 3, wanted 1 or 2"),
        ('{"device": {}, "rows": []}', "no race in common"),
    ],
)
def test_files_that_cannot_be_compared(content: str | None, words: str, tmp_path, capsys) -> None:
    a, b = written(tmp_path / "a.json", run(1)), tmp_path / "b.json"
    if content is not None:
        b.write_text(content)
    assert main(["bench", "--compare", a, str(b)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pyxlbert bench: error: ") and words in line and "Errno" not in line


ONE = ["--op", "layer_norm", "--shape", "1x8", "--rounds", "5", "--rest", "0", "--dtype", "float32"]


def test_against_itself(tmp_path, capsys, monkeypatch) -> None:
    """Two processes take turns, the same ones each time; the package of this one stands in for a build."""
    monkeypatch.setattr(report, "device", lambda: DEVICE)
    library = Path(revision.pyxlbert.__file__).parent.parent
    monkeypatch.setattr(revision, "build", lambda name: library)
    out = tmp_path / "a.json"
    with revision.against(library) as sides:
        monkeypatch.setattr(revision, "against", lambda library: nullcontext(sides))
        assert main(["bench", *ONE, "--against", "HEAD", "--json", str(out)]) in (0, 1)
    text = capsys.readouterr().out
    assert "8x384" in text and "8x768 forward+backward" in text and text.splitlines()[-1].endswith("the same")
    for row in report.read(out)["rows"]:
        assert set(row["timings"]) == {"pyxlbert", "pyxlbert before"}
        assert len({len(one["samples"]) for one in row["timings"].values()}) == 1 <= len(row["timings"]["pyxlbert"])


class Busy:
    """A side on a machine that somebody else needs too: most of its samples are several times too long."""

    def __init__(self, factor: float, generator: random.Random, disturbed: float = 0.7) -> None:
        self.factor, self.generator, self.disturbed = factor, generator, disturbed

    def ask(self, **request):
        seconds, taken = self.factor * 1e-3 * (1 + abs(self.generator.gauss(0, 0.03))), 0
        # Who takes longer is caught more often, and then waits as long as the other.
        while self.generator.random() < self.disturbed * self.factor / (1 + self.disturbed * self.factor):
            seconds, taken = seconds + 4e-3, taken + 1
        return {"seconds": seconds, "taken": taken}


def raced(factor: float, seed: int, disturbed: float = 0.7) -> compare.Change:
    generator = random.Random(seed)
    sides = {name: Busy(one, generator, disturbed) for name, one in (("pyxlbert", factor), ("pyxlbert before", 1.0))}
    clean, every = revision._pairs(sides, None, 0, 8)
    pairs = clean if len(clean) >= revision.FEWEST else every
    timings = {}
    for place, who in enumerate(sides):
        lower, median, upper = quartiles([pair[place] for pair in pairs])
        timings[who] = Timing(median, lower, upper, len(pairs), tuple(pair[place] for pair in pairs))
    return compare.interleaved(Row("x", "y", "z", timings), "pyxlbert before", 8)


def test_a_busy_machine_hides_no_slow_kernel_and_invents_none() -> None:
    assert [raced(1.15, seed).verdict for seed in range(20)].count(SLOWER) >= 18
    assert [raced(1.0, 100 + seed).verdict for seed in range(20)].count(SAME) >= 19


def test_noise_that_could_hide_a_slow_kernel_is_said() -> None:
    """Of samples that are all disturbed no verdict is made, and none that nothing has changed."""
    found = [raced(1.15, seed, disturbed=60.0) for seed in range(3)]
    assert {one.verdict for one in found} == {UNSURE}
    *_, words, last = compare.lines(compare.Comparison(found, [], []))
    assert words.startswith("3 unsure: the noise could hide a change of 15%") and last.startswith("0 slower")


def test_a_race_is_run_again_in_new_processes(monkeypatch) -> None:
    # After over before, process by process; None: nothing but noise.
    told = {"slow": [1.15, 1.16], "once": [1.2, 1.0, 1.0], "same": [1.0, 1.0], "hidden": [1.0, 1.2, 1.2]}
    told |= {"unsure": [None, None], "never": []}
    started = []

    @contextmanager
    def against(library):
        started.append(library)
        yield {}

    def race(sides, one, rounds, rest, rows):
        if one == "never":
            return Row("x", one, "z", {}, failed={"pyxlbert": "KeyError: no"})
        ratio = told[one].pop(0)
        pairs = [1.0, 3.0] * 8 if ratio is None else [ratio] * 16
        timings = {"pyxlbert": pairs, "pyxlbert before": [1.0] * 16}
        return Row("x", one, "z", {who: Timing(v[0], v[0], v[0], 16, tuple(v)) for who, v in timings.items()})

    monkeypatch.setattr(revision, "against", against)
    monkeypatch.setattr(revision, "race", race)
    rows = []
    found = revision.verdicts(Path("lib"), list(told), None, None, rows.append)
    verdict = {change.case: change.verdict for change in found.changes}
    assert verdict == {"slow": SLOWER, "once": SAME, "same": SAME, "hidden": SLOWER, "unsure": UNSURE}
    assert found.failed == ["x never z: pyxlbert: KeyError: no"]
    assert len(started) == 3 and len(rows) == 6 and not any(told.values())


def test_a_side_that_fails_or_answers_otherwise_is_a_reason(monkeypatch) -> None:
    class Fake:
        def __init__(self, answer) -> None:
            self.answer = answer

        def ask(self, **request):
            if isinstance(self.answer, str):
                raise RuntimeError(self.answer)
            revision.torch.save([self.answer], request["file"])
            return {}

    one = next(iter(revision.cases(["layer_norm"], [revision.torch.float32], [(1, 8)])))
    ones = revision.torch.ones(3)
    row = revision.race({"pyxlbert": Fake(ones), "pyxlbert before": Fake("KeyError: no")}, one, 3, 0, 1)
    assert row.failed == {"pyxlbert before": "KeyError: no"} and not row.timings
    row = revision.race({"pyxlbert": Fake(ones), "pyxlbert before": Fake(2 * ones)}, one, 3, 0, 1)
    assert not row.timings and "other answers: output 0" in row.failed["pyxlbert"]


def test_a_revision_that_is_none(capsys) -> None:
    assert main(["bench", *ONE, "--against", "no-such-revision"]) == 2
    assert "--against: got 'no-such-revision', which is no revision" in capsys.readouterr().err
    assert main(["bench", "models", "--against", "HEAD"]) == 2
    assert "--against: got the suite 'models', wanted some of ops, " in capsys.readouterr().err
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=revision.ROOT, capture_output=True, text=True, check=True)
    assert revision.commit("HEAD") == head.stdout.strip()


def test_a_revision_that_does_not_build_names_its_log(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(revision, "BUILT", revision.ROOT / "build" / "test-revisions")
    usual = subprocess.run

    def fails(command, **options):
        if command[1:2] == ["setup.py"]:
            command = [command[0], "-c", "print('no compiler'); raise SystemExit(1)"]
        return usual(command, **options)

    monkeypatch.setattr(subprocess, "run", fails)
    try:
        with pytest.raises(ValueError, match=r"does not build: no compiler \(see build/test-revisions/"):
            revision.build(revision.commit("HEAD"))
        assert not list(revision.BUILT.glob("*/lib"))
    finally:
        revision.shutil.rmtree(revision.BUILT)
