"""`python -m pyxlbert.bench [suite ...]`: races, a table, and on request bench/results/<device>.json."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pyxlbert.bench import models, ops, relative, report

SUITES = ("ops", "attention", "relative", "models", "text")


def _races(suite: str, options: argparse.Namespace) -> Iterator[Any]:
    if suite == "ops":
        return ops.races()
    if suite == "attention":
        return ops.attention_races()
    if suite == "relative":
        return relative.races()
    if suite == "models":
        return models.races()
    from pyxlbert.bench import text

    return text.races(options.data, options.model)


def main(arguments: list[str] | None = None) -> int:
    """Runs the suites; 1 when a race's answers were wrong."""
    parser = argparse.ArgumentParser(prog="python -m pyxlbert.bench", description=__doc__)
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; all but text by default")
    parser.add_argument("--only", default="", help="races whose line holds this text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON to write or to update")
    parser.add_argument("--data", type=Path, help="folder with stsb/ and wikitext2/, for the suite text")
    parser.add_argument("--model", type=Path, help="model directory, for the suite text")
    options = parser.parse_args(arguments)
    suites = options.suites or ["ops", "models"]
    for suite in suites:
        if suite not in SUITES:
            parser.error(f"suite: got {suite!r}, wanted one of {', '.join(SUITES)}")
    if "text" in suites and (options.data is None or options.model is None):
        parser.error("the suite text needs --data and --model")
    torch.set_num_threads(options.threads)
    rows, wrong = [], 0
    for suite in suites:
        for race in _races(suite, options):
            if options.only and options.only not in str(race):
                continue
            try:
                row = race.run()
            except (ops.WrongAnswer, AssertionError) as error:
                print(f"NOT TIMED, wrong answer: {error}", file=sys.stderr)
                wrong += 1
                continue
            rows.append(row)
            print(row.line(), flush=True)
            if len(row.timings) > 2 or row.failed:
                print(row.details(), flush=True)
    if options.out is not None:
        shown = [*suites, *(["--only", options.only] if options.only else [])]
        report.write(options.out, rows, "python -m pyxlbert.bench " + " ".join(shown))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
