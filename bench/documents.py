"""`python -m pyxlbert.bench.documents [--write]`: the numbers of README and docs, from `bench/results`.

A block stands between two comments of Markdown, of which the first says what is in it:

    <!-- results FILE: SUBJECT[, SUBJECT ...] -->     the table of one subject, or of several with one ratio each
    <!-- ratios -->                                   the lines of `RATIOS`
    <!-- end -->
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pyxlbert.bench.report import is_peer
from pyxlbert.bench.tables import several, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
_BLOCK = re.compile(
    r"(?P<head><!-- (?:results (?P<file>\S+): (?P<subjects>[^>]+?)|ratios) -->\n)(?P<body>.*?)(?P<end><!-- end -->)",
    re.S,
)


class Ratio(NamedTuple):
    """A line of the README: one row of one file, and what it is in words."""

    file: str
    subject: str
    case: str
    dtype: str
    words: str


_ZEN = "epyc-zen4-2-cores.json"
RATIOS = (
    Ratio(_ZEN, "relative_attention", "1x2048x12x64", "float32", "attention with Transformer-XL's term, 2048 places"),
    Ratio(_ZEN, "accelerated sentences", "bert 6x384 short", "int8", "all-MiniLM-L6-v2 in sentence-transformers, int8"),
    Ratio(
        _ZEN,
        "accelerated classification",
        "XLM-R base",
        "float32",
        "XLM-R base classifies paragraphs, half of it padding",
    ),
    Ratio(
        _ZEN, "accelerated training step", "BERT-base", "float32", "a training step of BERT-base, half of it padding"
    ),
    Ratio(_ZEN, "XLNet-base", "8x128", "bfloat16", "XLNet-base, 8 texts of 128 tokens"),
)


def documents() -> list[Path]:
    """The pages that may hold results."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@cache
def _rows(file: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]


def _of(file: str, subject: str) -> list[dict[str, Any]]:
    rows = [row for row in _rows(file) if row["subject"] == subject]
    if not rows:
        raise ValueError(f"bench/results/{file}: got no rows of {subject!r}")
    return rows


def _ratios() -> str:
    lines = ["| what | dtype | ours | best peer | ratio | command |", "|---|---|---|---|---|---|"]
    for one in RATIOS:
        rows = [row for row in _of(one.file, one.subject) if (row["case"], row["dtype"]) == (one.case, one.dtype)]
        if not rows:
            raise ValueError(f"bench/results/{one.file}: got no row {one.case} {one.dtype} of {one.subject!r}")
        times = {name: timing["median"] for name, timing in rows[0]["timings"].items()}
        ours, best = times["pyxlbert"], min((name for name in times if is_peer(name)), key=times.__getitem__)
        shown = [
            f"{times[name] * 1e3:.3g} ms" if times[name] < 1 else f"{times[name]:.3g} s" for name in ("pyxlbert", best)
        ]
        cells = [
            one.words,
            one.dtype,
            shown[0],
            f"{best} {shown[1]}",
            f"{times[best] / ours:.2f}",
            f"`{_command(rows[0])}`",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _command(row: dict[str, Any]) -> str:
    return row["command"].split(" --only")[0]


def filled(text: str) -> str:
    """A page's text with every block made anew.

    Raises:
        ValueError: a block names a file or a subject of which there are no results.
    """

    def fill(block: re.Match[str]) -> str:
        if block["file"] is None:
            body = _ratios()
        else:
            subjects = [name.strip() for name in block["subjects"].split(",")]
            rows = [_of(block["file"], subject) for subject in subjects]
            body = table(rows[0]) if len(rows) == 1 else several([row for one in rows for row in one])
        return f"{block['head']}{body}\n{block['end']}"

    return _BLOCK.sub(fill, text)


def main(arguments: list[str] | None = None) -> int:
    """Says which pages differ from the results, 1 if one does; with --write makes them anew."""
    parser = argparse.ArgumentParser(prog="python -m pyxlbert.bench.documents", description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="write the pages that differ")
    options = parser.parse_args(arguments)
    differ = 0
    for page in documents():
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new == text:
            continue
        differ += 1
        print(f"{page.relative_to(ROOT)}: {'written' if options.write else 'differs from bench/results'}")
        if options.write:
            page.write_text(new, encoding="utf-8")
    return 1 if differ and not options.write else 0


if __name__ == "__main__":
    sys.exit(main())
