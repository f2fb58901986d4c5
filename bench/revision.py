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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pyxlbert.bench import ops, shapes
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
ROUNDS, REST, LEAST = 25, 0.01, 0.02


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
    sides: dict[str, Side], one: tuple[str, Case, torch.dtype, Any], rounds: int | None, rest: float | None
) -> Row:
    """Both sides on one case: outputs are compared first, then they take turns.

    Args:
        sides: the process of each contestant, "pyxlbert" among them.
        one: of `cases`.
        rounds, rest: of the timer.
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
    seconds = {who: side.ask(do="sample", repeats=1)["seconds"] for who, side in sides.items()}
    repeats = max(1, round(LEAST / max(min(seconds.values()), 1e-7)))
    samples: dict[str, list[float]] = {who: [] for who in sides}
    order, shuffle = list(sides), random.Random(0)
    for _ in range(rounds or ROUNDS):
        shuffle.shuffle(order)
        for who in order:
            time.sleep(REST if rest is None else rest)
            samples[who].append(sides[who].ask(do="sample", repeats=repeats)["seconds"])
    for who, values in samples.items():
        lower, median, upper = quartiles(values)
        row.timings[who] = Timing(median, lower, upper, len(values), tuple(values))
    return row


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
