"""`python -m pyxlbert.bench [suite ...]`: races, a table, and on request bench/results/<device>.json."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pyxlbert.bench import apart, lengths, models, on_gpu, ops, report
from pyxlbert.bench.report import Row

# By the device that they run on.
SUITES = {"cpu": (*ops.SUITES, "lengths", "models", "text", "drop-in"), "cuda": ("gpu",)}
# glibc gives a large block back to the system when it is freed, and its pages are made anew at the next call.
KEEP_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(32 << 30), "MALLOC_TRIM_THRESHOLD_": str(32 << 30)}


def _races(suite: str, options: argparse.Namespace) -> Iterator[Any]:
    if suite in ops.SUITES:
        return ops.races(suite)
    if suite == "lengths":
        return lengths.races()
    if suite == "models":
        return models.races()
    from pyxlbert.bench import drop_in, text

    return (text if suite == "text" else drop_in).races(options.data, options.model)


def _rows(suite: str, options: argparse.Namespace) -> Iterator[tuple[Row | None, dict[str, object] | None]]:
    """Every race's row, or None where an answer was wrong, and the device of it where another process ran it."""
    if options.device == "cuda":
        for found in apart.run(on_gpu.races, "cuda", only=options.only, end=options.end):
            yield found.row, found.device
        return
    for race in _races(suite, options):
        if options.only and options.only not in str(race):
            continue
        if time.monotonic() > options.end:
            print(f"NOT TIMED, no time left: {race}", file=sys.stderr)
            continue
        try:
            row = race.run()
        except AssertionError as error:
            print(f"NOT TIMED, wrong answer: {error}", file=sys.stderr)
            yield None, None
        else:
            yield row, None


def main(arguments: list[str] | None = None) -> int:
    """Runs the suites; 1 where one of ours was wrong or did not run."""
    parser = argparse.ArgumentParser(prog="python -m pyxlbert.bench", description=__doc__)
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES['cpu'])}; by default ops and models")
    parser.add_argument("--device", default="cpu", choices=SUITES, help="cuda: the GPU that is here, suite gpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no race after this time")
    parser.add_argument("--only", default="", help="races whose line holds this text")
    parser.add_argument("--keep-pages", action="store_true", help="freed memory stays with the process")
    parser.add_argument("--picture", type=Path, help="of the suite lengths, drawn from the file of --out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON to write or to update")
    parser.add_argument("--data", type=Path, help="folder with stsb/ and wikitext2/, for the suites text and drop-in")
    parser.add_argument("--model", type=Path, help="model directory, for the same two")
    options = parser.parse_args(arguments)
    suites = options.suites or (["ops", "models"] if options.device == "cpu" else ["gpu"])
    for suite in suites:
        if suite not in SUITES[options.device]:
            parser.error(f"suite: got {suite!r}, on {options.device} wanted one of {', '.join(SUITES[options.device])}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, and no CUDA device is here")
    for suite in {"text", "drop-in"} & set(suites):
        if options.data is None or options.model is None:
            parser.error(f"the suite {suite} needs --data and --model")
    if options.picture is not None and options.out is None:
        parser.error("--picture needs --out")
    if options.keep_pages and not KEEP_PAGES.items() <= os.environ.items():
        # The allocator reads its settings when the process starts.
        given = sys.argv[1:] if arguments is None else arguments
        os.execve(sys.executable, [sys.executable, "-m", "pyxlbert.bench", *given], {**os.environ, **KEEP_PAGES})
    torch.set_num_threads(options.threads)
    shown = [*suites, *(["--only", f"'{options.only}'"] if options.only else [])]
    shown += ["--keep-pages"] if options.keep_pages else []
    shown += ["--device", options.device] if options.device != "cpu" else []
    wrong = 0
    options.end = time.monotonic() + options.seconds
    for suite in suites:
        for row, device in _rows(suite, options):
            if row is None:
                wrong += 1
                continue
            wrong += bool(row.faults)
            if options.keep_pages:
                row.case += ", pages kept"
            print(row.line(), flush=True)
            if len(row.timings) > 2 or row.failed:
                print(row.details(), flush=True)
            if options.out is not None:
                # One by one: a suite may last an hour.
                report.write(options.out, [row], "python -m pyxlbert.bench " + " ".join(shown), device)
    if options.picture is not None:
        lengths.draw(options.out, options.picture)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
