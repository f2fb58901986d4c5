"""Ours beside an earlier revision of itself, each in a process of its own, taking turns."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyxlbert.bench import compare as changes
from pyxlbert.bench import ops, shapes, statistics
from pyxlbert.bench.compare import Change
from pyxlbert.bench.report import Row
from pyxlbert.bench.statistics import quartiles
from pyxlbert.bench.timer import Timing

import pyxlbert
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Case, Use

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "revisions"
WORKER = Path(__file__).with_name("revision_worker.py")
# Seconds of a sample and before it: so short that it mostly ends before the system takes the processor away.
# Threads of a team spin for some milliseconds after their work, and one thread does not.
LEAST, REST, REST_OF_TEAMS = 0.002, 0.002, 0.01
# A sample is taken again, so often, if the system did take it away: then it is not of our code.
TRIES = 5
# Rounds go on until the noise of the ratio is below NOISE, or for so many, or for so many seconds.
FEWEST, MOST, NOISE, PATIENCE = 15, 200, 0.015, 30.0


def commit(revision: str) -> str:
    """The full name of a git revision of the checkout that this package runs from.

    Raises:
        ValueError: there is no such revision, or no checkout.
    """
    if not (ROOT / "setup.py").is_file() or shutil.which("git") is None:
        raise ValueError("--against needs git and a checkout of pyxlbert's sources, and this package runs from none")
    done = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ValueError(f"--against: got {revision!r}, which is no revision of this checkout")
    return done.stdout.strip()


def build(name: str) -> Path:
    """The folder that holds the package of a commit, built if it was not before.

    The tree is git's archive of the commit in `build/revisions`, so that neither the checkout nor git's list of
    worktrees changes; a build that is interrupted goes on where it was.

    Raises:
        ValueError: it does not build; the log's place is named.
    """
    folder = BUILT / name
    library, part, tree = folder / "lib", folder / "lib.part", folder / "tree"
    if library.is_dir():
        return library
    print(f"building {name[:12]} (some minutes, once) ...", file=sys.stderr, flush=True)
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", name], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
    log = folder / "build.log"
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(part), "--build-temp", "../objects"]
    environment = os.environ | {"PYXLBERT_CUDA": os.environ.get("PYXLBERT_CUDA", "0")}
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=tree, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"--against: {name[:12]} does not build: {last} (see {log.relative_to(ROOT)})")
    os.replace(part, library)
    shutil.rmtree(tree, ignore_errors=True)
    return library


class Side:
    """A process with one revision's package.

    Args:
        package: the folder in which it finds `pyxlbert`.

    Raises:
        RuntimeError: it cannot be imported, or is not the one from there.
    """

    def __init__(self, package: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        found = Path(self.ask(do="begin", threads=torch.get_num_threads())["package"])
        if found.parent.resolve() != package.resolve():
            self.close()
            raise RuntimeError(f"a process for {package} has imported {found}")

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            RuntimeError: it failed, or the process has ended.
        """
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"its process ended with {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def cases(
    names: Sequence[str], dtypes: Sequence[torch.dtype], sizes: Sequence[tuple[int, int]]
) -> Iterator[tuple[str, Case, torch.dtype, tuple[int, int] | None]]:
    """Op, case as the spec has it, dtype, and batch and length if they are not the case's own."""
    for dtype in dtypes:
        for name in names:
            found = [case for case in SPECS[name].used(Use.RACE) if dtype in case.uses[Use.RACE]]
            if sizes:
                firsts = (next((c for c in found if c.gradients == both), None) for both in (False, True))
                found = [case for case in firsts if case is not None]
            for case in found:
                yield from ((name, case, dtype, size) for size in (sizes or [None]))


def race(
    sides: dict[str, Side], one: tuple[str, Case, torch.dtype, Any], rounds: int | None, rest: float | None, rows: int
) -> Row:
    """Both sides on one case: outputs are compared first, then they take turns.

    Args:
        sides: the process of each contestant, "pyxlbert" among them.
        one: of `cases`.
        rounds: of the timer; None: until the noise is small.
        rest: seconds before a sample.
        rows: that are raced in all: the more, the surer each must be.

    Returns:
        The row; of samples those rounds in which neither side was disturbed, if they are enough.
    """
    name, case, dtype, size = one
    shown = case if size is None else shapes.sized(case, *size)
    label = str(dtype).removeprefix("torch.")
    row = Row(name, shown.id, label, {})
    request = {"op": name, "case": case.id, "gradients": case.gradients, "dtype": label, "size": size}
    with tempfile.TemporaryDirectory() as folder:
        outputs = {}
        for who, side in sides.items():
            try:
                side.ask(do="make", file=str(Path(folder, "out.pt")), **request)
                outputs[who] = torch.load(Path(folder, "out.pt"), weights_only=True)
            except RuntimeError as error:
                row.failed[who] = str(error)
        if row.failed:
            return row
    first, second = outputs.values()
    try:
        for place, (a, b) in enumerate(zip(first, second, strict=True)):
            compare.close(f"output {place}", a, b, 2 * tolerances.CONTESTANT[dtype])
    except (AssertionError, ValueError) as error:
        row.failed = dict.fromkeys(sides, f"the two give other answers: {error}")
        return row
    usual = REST if torch.get_num_threads() == 1 else REST_OF_TEAMS
    clean, every = _pairs(sides, rounds, usual if rest is None else rest, rows)
    # Rounds that were nearly all disturbed say little, and that little with an interval as wide as their noise.
    kept = clean if len(clean) >= min(FEWEST, len(every)) else every
    if len(clean) < len(every):
        row.note = f"{len(every) - len(clean)} of {len(every)} rounds were disturbed by other processes"
    for place, who in enumerate(sides):
        values = [pair[place] for pair in kept]
        lower, median, upper = quartiles(values)
        row.timings[who] = Timing(median, lower, upper, len(values), tuple(values))
    return row


def _pairs(
    sides: dict[str, Side], rounds: int | None, rest: float, rows: int
) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    """Seconds of a call of each side, round by round: of rounds in which neither was disturbed, and of all."""
    seconds = [min(side.ask(do="sample", repeats=1)["seconds"] for _ in range(3)) for side in sides.values()]
    repeats = max(1, round(LEAST / max(min(seconds), 1e-7)))
    order, shuffle, end = list(sides), random.Random(0), time.monotonic() + PATIENCE
    clean, every = [], []
    while len(every) < (rounds or MOST) and (rounds or len(every) < FEWEST or time.monotonic() < end):
        shuffle.shuffle(order)
        found = {who: _sample(sides[who], repeats, rest) for who in order}
        every.append(tuple(found[who][0] for who in sides))
        if all(undisturbed for _, undisturbed in found.values()):
            clean.append(every[-1])
            if rounds is None and len(clean) >= FEWEST and len(clean) % 5 == 0 and noise(clean, rows) < NOISE:
                break
    return clean, every


def _sample(side: Side, repeats: int, rest: float) -> tuple[float, bool]:
    """Seconds of a call, and whether the processor was this process's for all of it."""
    shortest = float("inf")
    for _ in range(TRIES):
        time.sleep(rest)
        found = side.ask(do="sample", repeats=repeats)
        if not found["taken"]:
            return found["seconds"], True
        shortest = min(shortest, found["seconds"])
    return shortest, False


def noise(pairs: Sequence[tuple[float, ...]], rows: int) -> float:
    """What the median of the logarithm of the ratio may be off by, at the certainty that one of so many rows needs."""
    ratios = [ours / before for ours, before in pairs]
    return changes.certainty(rows) * statistics.deviation(ratios, [1.0] * len(ratios))


class Verdicts(NamedTuple):
    """What two revisions differ by.

    Attributes:
        changes: of every race that both have run.
        failed: what has no time, and why.
    """

    changes: list[Change]
    failed: list[str]


def verdicts(
    library: Path, races: Sequence[Any], rounds: int | None, rest: float | None, record: Callable[[Row], None]
) -> Verdicts:
    """Every race twice, each time in new processes, and a third time where the two disagree.

    Another layout of memory may make a small op slower or faster by more than a change of its code: a process has the
    same one for as long as it lives.

    Args:
        library: the folder with the package of before.
        races: of `cases`.
        rounds, rest: see `race`.
        record: is given every row of the first time, as it comes.
    """
    found: list[list[Change]] = [[] for _ in races]
    failed: list[str] = []
    places = list(range(len(races)))
    for sitting in range(3):
        if not places:
            break
        pair = ("first", "second", "third")[sitting]
        print(f"{pair} pair of processes: {len(places)} races", file=sys.stderr, flush=True)
        with against(library) as sides:
            for place in places:
                row = race(sides, races[place], rounds, rest, len(races))
                if sitting == 0:
                    failed += [f"{row.subject} {row.case} {row.dtype}: {who}: {why}" for who, why in row.failed.items()]
                    record(row)
                if row.timings:
                    found[place].append(changes.interleaved(row, "pyxlbert before", len(races)))
        places = [n for n, told in enumerate(found) if told and (sitting == 0 or not changes.agree(told))]
    return Verdicts([changes.together(told) for told in found if told], failed)


def ops_of(suites: Sequence[str], chosen: Sequence[str] | None) -> list[str]:
    """The ops of some suites, or those that were named.

    Raises:
        ValueError: a suite is not one of ops.
    """
    if chosen:
        return list(chosen)
    for suite in suites:
        if suite not in ops.SUITES:
            raise ValueError(f"--against: got the suite {suite!r}, wanted some of {', '.join(ops.SUITES)}")
    return list(dict.fromkeys(name for suite in suites for name in ops.SUITES[suite]))


@contextmanager
def against(library: Path) -> Iterator[dict[str, Side]]:
    """The two processes: ours as it runs here, and "pyxlbert before" from a folder; ended with the block."""
    sides: dict[str, Side] = {}
    try:
        sides["pyxlbert"] = Side(Path(pyxlbert.__file__).parent.parent)
        sides["pyxlbert before"] = Side(library)
        yield sides
    finally:
        for side in sides.values():
            side.close()
