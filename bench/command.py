"""`pyxlbert bench`: which races, in which order, and what is written of them as they come."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pyxlbert.bench import (
    apart,
    compare,
    families,
    lengths,
    models,
    on_gpu,
    ops,
    page,
    profile,
    report,
    revision,
    shapes,
    tables,
)
from pyxlbert.bench.contest import Settings
from pyxlbert.bench.extra import EXTRAS
from pyxlbert.bench.report import Row

from pyxlbert.files import check_distinct, check_parents, check_writable, whole_file
from pyxlbert.testing.specs import SPECS

# By the device that they run on.
SUITES = {"cpu": (*ops.SUITES, "lengths", "models", "text", "drop-in", "training"), "cuda": ("gpu", "decide")}
# What they read of --data; they read --model too.
NEED_DATA = dict.fromkeys(("text", "drop-in"), ("stsb/sts-dev.csv", "wikitext2/valid.txt"))
NEED_DATA |= {"training": ("wikitext2/valid.txt",)}
# glibc gives a large block back to the system when it is freed, and its pages are made anew at the next call.
KEEP_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(32 << 30), "MALLOC_TRIM_THRESHOLD_": str(32 << 30)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The suites that hold each op once.
EVERY_OP = ("ops", "relative", "two_stream")
# Of `--quick`: the sizes of every op, and samples of each contestant.
QUICK_SIZE, QUICK_ROUNDS = (2, 64), 7
# What a quick run leaves out unless it is asked for: a compiler takes longer than all races.
SLOW_PEERS = ("compile", "flex")
# Seconds after which tables and page are written again; the file of results is after every race.
SHOWN = 30.0

Fail = Callable[[str], Any]


def run(options: argparse.Namespace, fail: Fail) -> int:
    """The races that the options ask for.

    Args:
        options: of the command.
        fail: is told of a wrong option, and does not return.

    Returns:
        0, or 1 where one of ours was wrong or did not run.
    """
    if options.read is not None:
        return show(options, fail)
    if options.compare is not None:
        text, status = compare.files(options.compare)
        print("\n".join(text))
        return status
    if options.profile is not None:
        return profiled(options, fail)
    suites = check(options, fail)
    if options.keep_pages and not KEEP_PAGES.items() <= os.environ.items():
        # The allocator reads its settings when the process starts.
        given = sys.argv[2:] if sys.argv[1:2] == ["bench"] else sys.argv[1:]
        os.execve(sys.executable, [sys.executable, "-m", "pyxlbert.bench", *given], {**os.environ, **KEEP_PAGES})
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.end = time.monotonic() + options.seconds
    if options.against is not None:
        return against(options, fail)
    sheet = Sheet(options, _shown(suites, options))
    sheet.begin()
    try:
        for suite in suites:
            for row, device in _rows(suite, options, sheet.settings):
                if row is not None and options.keep_pages:
                    row.case += ", pages kept"
                sheet.add(row, device)
    finally:
        sheet.show()
    if sheet.empty:
        fail("no race is of what was asked for: nothing was timed")
    if options.picture is not None:
        lengths.draw(options.json, options.picture)
    return 1 if sheet.wrong else 0


def against(options: argparse.Namespace, fail: Fail) -> int:
    """Ours beside a revision of itself; 1 where it has become slower, or gives another answer."""
    names = revision.ops_of(options.suites or EVERY_OP, options.op)
    name = revision.commit(options.against)
    library = revision.build(name)
    sizes = [shapes.parse(text) for text in options.shape or ()]
    if options.quick and not sizes:
        sizes = [QUICK_SIZE]
    chosen = [DTYPES[one] for one in dict.fromkeys(options.dtype or DTYPES)]
    races = [one for one in revision.cases(names, chosen, sizes) if options.only in f"{one[0]} {one[1].id} {one[2]}"]
    if not races:
        fail("no race is of what was asked for: nothing was timed")
    command = f"{_shown(options.suites, options)} --against {name[:12]}"
    print(f"{command}: both with {torch.get_num_threads()} threads, in a new order every round", flush=True)
    device = report.device() if options.json is not None else {}

    def record(row: Row) -> None:
        if options.json is not None:
            report.write(options.json, [row], command, device)

    changes, failed = revision.verdicts(library, races, options.rounds, options.rest, record)
    found = compare.Comparison(changes, failed, [])
    print("\n".join(compare.lines(found)))
    answers = any("other answers" in reason for reason in failed)
    return int(found.slower or answers or not changes)


def profiled(options: argparse.Namespace, fail: Fail) -> int:
    """Where the time of a model goes."""
    name, text = options.profile
    try:
        size = shapes.parse(text)
    except ValueError as error:
        fail(f"--profile: {error}")
    check_numbers(options, fail)
    for option in ("json", "html", "picture"):
        check_output(f"--{option}", getattr(options, option), fail)
    if options.json is not None and options.json.exists():
        fail(f"--json: {str(options.json)!r} is there already; a profile is not added to other results")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    profile.require(name)
    dtypes = [DTYPES[one] for one in dict.fromkeys(options.dtype or ["float32"])]
    device, found = report.device(), []
    print(f"pyxlbert bench --profile: {torch.get_num_threads()} threads; {page.described(device)}", flush=True)
    for dtype in dtypes:
        for one in profile.profiles(name, size, dtype, options.rounds or profile.ROUNDS):
            print(profile.text(one), flush=True)
            found.append(one)
            if options.json is not None:
                _write(options.json, profile.document(found, device))
            if options.html is not None:
                _write(options.html, profile.html(found, device))
            if options.picture is not None:
                _write(options.picture, profile.picture(found[0]))
    return 0


def show(options: argparse.Namespace, fail: Fail) -> int:
    """Recorded results as tables or a page: nothing is timed."""
    if options.html is None and options.markdown is None:
        fail("--read needs --html or --markdown")
    check_outputs(options, ("markdown", "html"), fail)
    document = report.read(options.read)
    for path, make in ((options.markdown, tables.document), (options.html, page.page)):
        if path is not None:
            _write(path, make(document))
    return 0


def check(options: argparse.Namespace, fail: Fail) -> list[str]:
    """The suites to run, after everything that can be wrong before a race."""
    device = options.device
    usual = ["ops"] if options.op else [*EVERY_OP] if options.quick or options.against else [*EVERY_OP, "models"]
    suites = options.suites or (usual if device == "cpu" else ["gpu"])
    for suite in suites:
        if suite not in SUITES[device]:
            fail(f"suite: got {suite!r}, on {device} wanted one of {', '.join(SUITES[device])}")
    if options.op and options.suites:
        fail("--op and a suite: got both, wanted one of them")
    for name in options.op or ():
        if name not in SPECS:
            fail(f"--op: got {name!r}, wanted one of {', '.join(sorted(SPECS))}")
    for name in options.peer or ():
        if name not in families.FAMILIES:
            fail(f"--peer: got {name!r}, wanted one of {', '.join(families.FAMILIES)}")
        reason = families.why_not(name, device)
        if reason is not None:
            fail(f"--peer: {name} cannot race: {reason}")
    for text in options.shape or ():
        try:
            shapes.parse(text)
        except ValueError as error:
            fail(f"--shape: {error}")
    check_numbers(options, fail)
    for name in ("op", "dtype", "shape", "quick", "memory", "rest", "threads") if device == "cuda" else ():
        if getattr(options, name):
            fail(f"--{name}: the races of a GPU are chosen by --only, --peer and --rounds")
    if importlib.util.find_spec("transformers") is None and {"models", *NEED_DATA} & set(suites):
        if options.suites:
            fail("the suites models, text, drop-in and training need transformers, which is not installed")
        print("models do not race: transformers is not installed")
        suites = ["ops"]
    if "drop-in" in suites and importlib.util.find_spec("sentence_transformers") is None:
        fail("the suite drop-in needs sentence-transformers, which is not installed")
    if "training" in suites and importlib.util.find_spec("accelerate") is None:
        fail("the suite training needs accelerate, which is not installed")
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device: got cuda, and no CUDA device is here")
    for suite in NEED_DATA.keys() & set(suites):
        if options.data is None or options.model is None:
            fail(f"the suite {suite} needs --data and --model")
        for wanted in NEED_DATA[suite]:
            if not (options.data / wanted).is_file():
                fail(f"--data: {wanted} is missing in {str(options.data)!r}")
        if not options.model.is_dir():
            fail(f"--model: got {str(options.model)!r}, which is no directory")
    if options.picture is not None and options.json is None:
        fail("--picture needs --json")
    check_outputs(options, ("json", "markdown", "html", "picture"), fail)
    if options.json is not None and options.json.exists():
        try:
            report.read(options.json)
        except (OSError, ValueError) as error:
            fail(f"--json: {error}; it is left as it is")
    return suites


def check_numbers(options: argparse.Namespace, fail: Fail) -> None:
    """Whether threads, rounds and times are in bounds."""
    for name, least, most in (("threads", 1, 4096), ("rounds", 3, 10**6)):
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            fail(f"--{name}: got {value}, wanted at {f'least {least}' if value < least else f'most {most}'}")
    if not options.seconds >= 0:  # NaN is not
        fail(f"--seconds: got {options.seconds}, wanted at least 0")
    if options.rest is not None and not 0 <= options.rest <= 60:
        fail(f"--rest: got {options.rest}, wanted seconds from 0 to 60")


def check_outputs(options: argparse.Namespace, names: Sequence[str], fail: Fail) -> None:
    """Whether files can be written there, each another one."""
    for name in names:
        check_output(f"--{name}", getattr(options, name), fail)
    try:
        check_distinct({f"--{name}": getattr(options, name) for name in names})
    except ValueError as error:
        fail(str(error))


def check_output(option: str, path: Path | None, fail: Fail) -> None:
    """Whether a file can be written there; folders that are missing are made."""
    if path is None:
        return
    path = Path(os.path.realpath(path))
    try:
        check_parents(option, path)
        if path.parent.is_dir():
            check_writable(option, str(path), path)
    except OSError as error:
        fail(str(error))


def _shown(suites: list[str], options: argparse.Namespace) -> str:
    """The command, less what only says where results go."""
    words = ["pyxlbert bench", *(suites if not options.op else [])]
    for name in ("op", "dtype", "shape", "peer"):
        words += [f"--{name} {value}" for value in getattr(options, name) or ()]
    words += [f"--only '{options.only}'"] if options.only else []
    words += [f"--{name} {getattr(options, name)}" for name in ("rounds", "rest") if getattr(options, name) is not None]
    words += ["--quick"] if options.quick else []
    words += ["--keep-pages"] if options.keep_pages else []
    return " ".join(words + (["--device cuda"] if options.device == "cuda" else []))


def settings_of(options: argparse.Namespace) -> Settings:
    """What every race is told."""
    peers = frozenset(options.peer) if options.peer else None
    if peers is None and options.quick:
        peers = frozenset(families.FAMILIES) - set(SLOW_PEERS)
    rounds = QUICK_ROUNDS if options.quick and options.rounds is None else options.rounds
    memory = not options.quick if options.memory is None else options.memory
    return Settings(rounds, options.rest, peers, memory)


def _races(suite: str, options: argparse.Namespace) -> Iterator[Any]:
    sizes = [shapes.parse(text) for text in options.shape or ()]
    dtypes = [DTYPES[name] for name in dict.fromkeys(options.dtype or DTYPES)]
    if suite in ops.SUITES:
        names = options.op or ops.SUITES[suite]
        if options.quick and not sizes:
            sizes = [QUICK_SIZE]
        return ops.races(names, dtypes, sizes, extras=EXTRAS)
    if suite == "lengths":
        return lengths.races()
    if suite == "models":
        return models.races(sizes)
    from pyxlbert.bench import drop_in, text, training

    return {"text": text, "drop-in": drop_in, "training": training}[suite].races(options.data, options.model)


def _rows(
    suite: str, options: argparse.Namespace, settings: Settings
) -> Iterator[tuple[Row | None, dict[str, object] | None]]:
    """Every race's row, or None where an answer was wrong, and the device of it where another process ran it."""
    # A model's peak takes a minute for each contestant: if it is asked for.
    settings = replace(settings, memory=bool(options.memory)) if suite == "models" else settings
    if options.device == "cuda":
        told, source = {"settings": settings}, on_gpu.deciding if suite == "decide" else on_gpu.races
        for found in apart.run(source, "cuda", only=options.only, end=options.end, options=told):
            yield found.row, found.device
        return
    for race in _races(suite, options):
        if options.only and options.only not in str(race):
            continue
        if options.dtype and str(getattr(race, "dtype", "")).removeprefix("torch.") not in ("", *options.dtype):
            continue
        if time.monotonic() > options.end:
            print(f"NOT TIMED, no time left: {race}", file=sys.stderr)
            continue
        try:
            row = race.run(settings=settings)
        except AssertionError as error:
            print(f"NOT TIMED, wrong answer: {error}", file=sys.stderr)
            yield None, None
        else:
            yield row, None


@dataclass
class Sheet:
    """What a run has found, printed and written race by race: a run that is killed keeps what it had.

    Attributes:
        options: of the command.
        command: that results are said to come from.
        wrong: how many of ours were wrong or did not run.
        rows: found so far.
    """

    options: argparse.Namespace
    command: str
    wrong: int = 0

    def __post_init__(self) -> None:
        self.rows: list[Row] = []
        self.settings = settings_of(self.options)
        self._device: dict[str, Any] = {}
        self._peers: dict[str, str] = {}
        self._shown = time.monotonic()

    @property
    def empty(self) -> bool:
        """Whether there is nothing at all."""
        return not self.rows and not self.wrong

    def begin(self) -> None:
        """Says where, with how many threads and against whom."""
        cuda, options = self.options.device == "cuda", self.options
        print(f"{self.command}: every contestant with {torch.get_num_threads()} threads, in a new order every round")
        raced = families.here(options.device)
        for name, what in raced.items():
            reason = families.why_not(name, options.device)
            if reason is None and self.settings.peers is not None and name not in self.settings.peers:
                reason = "not asked for"
            self._peers[name] = what if reason is None else f"does not race: {reason}"
            print(f"  peer {name:22} {self._peers[name]}")
        if not cuda:
            self._device = report.device()
            known = ", ".join(f"{name} {value}" for name, value in self._device.items())
            print(f"  measured first: {known} (GB/s and GFLOP/s)", flush=True)
            if options.json is not None and options.json.exists():
                report.refuse_other_machine(options.json, self._device)

    def add(self, row: Row | None, device: dict[str, Any] | None) -> None:
        """A race that has run; None: its answer was wrong."""
        if row is None:
            self.wrong += 1
            return
        self.wrong += bool(row.faults)
        self.rows.append(row)
        print(row.line(), flush=True)
        if len(row.timings) > 2 or row.failed:
            print(row.details(), flush=True)
        self._device = device or self._device
        options = self.options
        if options.json is not None:
            # One by one: a suite may last an hour.
            report.write(options.json, [row], self.command, self._device, self._peers)
        if time.monotonic() - self._shown > SHOWN:
            self.show()

    def show(self) -> None:
        """Writes tables and page: of what the file holds, rows of earlier runs too, or of this run."""
        options = self.options
        self._shown = time.monotonic()
        if not self.rows or (options.markdown is None and options.html is None):
            return
        if options.json is not None:
            document = report.read(options.json)
        else:
            document = report.document_of(self.rows, self.command, self._device, peers=self._peers)
        if options.markdown is not None:
            _write(options.markdown, tables.document(document))
        if options.html is not None:
            _write(options.html, page.page(document))


def _write(path: Path, text: str) -> None:
    with whole_file(Path(os.path.realpath(path))) as part:
        part.write_text(text, encoding="utf-8")
