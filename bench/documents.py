"""`python -m pyxlbert.bench.documents [--write]`: the numbers of README and docs, from `bench/results` and
`docs/training`.

A block stands between two comments of Markdown, of which the first says what is in it:

    <!-- results FILE: SUBJECT[, SUBJECT ...] -->     the table of one subject, or of several with one ratio each
    <!-- ratios -->                                   the lines of `RATIOS`
    <!-- machine FILE -->                             the device, what it reaches, and the versions
    <!-- pictures FILE -->                            the device's charts, which are files beside its page
    <!-- runs FILE: NAME[, NAME ...] -->              trained models of `docs/training/FILE`: commands, scores, seconds
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

from pyxlbert.bench import page, pictures, report
from pyxlbert.bench.counted import counted
from pyxlbert.bench.report import is_peer
from pyxlbert.bench.tables import several, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
TRAINED = ROOT / "docs" / "training"
_BLOCK = re.compile(
    r"(?P<head><!-- (?:(?P<what>results|runs) (?P<file>\S+): (?P<subjects>[^>]+?)|ratios"
    r"|(?P<kind>machine|pictures) (?P<device>\S+))"
    r" -->\n)"
    r"(?P<body>.*?)(?P<end><!-- end -->)",
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
def _results(file: str) -> dict[str, Any]:
    return report.read(RESULTS / file)


def _rows(file: str) -> list[dict[str, Any]]:
    return _results(file)["rows"]


def _machine(file: str) -> str:
    document = _results(file)
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return f"{page.described(document['device'])}; {versions}. `bench/results/{file}` has the command of every row."


@cache
def _pictures(file: str) -> dict[str, tuple[str, str]]:
    """Of a device, by the names of their files: what each shows, and the SVG."""
    rows, name = counted(report.row_from(entry) for entry in _rows(file)), file.removesuffix(".json")
    found = {"ratios": ("The best peer's time over ours, every row", pictures.overview(rows))}
    found["roofline"] = ("Ours below what this machine allows", pictures.roofline(rows, _results(file)["device"]))
    for subject in ("BERT-base", "XLNet-base"):
        places = [place for place, row in enumerate(rows) if row.subject == subject]
        found[subject.lower()] = (f"{subject} and every peer", pictures.ratios(rows, places, subject))
    for title, places in pictures.by_length(rows).items():
        if len(places) < 4:
            continue
        plain = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        for memory, words in ((False, "time"), (True, "memory")):
            drawn = pictures.over_length(rows, title, places, memory)
            found[f"{words}-{plain}"] = (f"{words.capitalize()} over length: {title}", drawn)
    return {f"{name}-{one}.svg": (words, svg) for one, (words, svg) in found.items() if svg is not None}


def drawings() -> dict[Path, str]:
    """The pictures of all devices: where each belongs, and what it holds."""
    found = {}
    for results in sorted(RESULTS.glob("*.json")):
        found |= {ROOT / "docs" / "benchmarks" / name: svg for name, (_, svg) in _pictures(results.name).items()}
    return found


def begun(results: Path) -> str:
    """A page of a device that has none: blocks, to be filled, of all that its file holds."""
    subjects = list(dict.fromkeys(row["subject"] for row in _rows(results.name)))
    blocks = [f"<!-- {kind} {results.name} -->\n<!-- end -->\n" for kind in ("machine", "pictures")]
    blocks += [f"## {name}\n\n<!-- results {results.name}: {name} -->\n<!-- end -->\n" for name in subjects]
    return "\n".join([f"# Benchmarks: {results.stem}\n", *blocks])


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


def _trained(file: str, names: list[str]) -> str:
    """Commands of some runs, and a table of what they have come to."""
    document = json.loads((TRAINED / file).read_text(encoding="utf-8"))
    runs = {run["name"]: run for run in document["runs"]}
    missing = [name for name in names if name not in runs]
    if missing:
        raise ValueError(f"docs/training/{file}: got no run {missing[0]!r}")
    commands = "\n".join(runs[name]["command"] for name in names)
    lines = ["| run | scores | steps | seconds |", "|---|---|---|---|"]
    for name in names:
        run = runs[name]
        scores = ", ".join(f"{score} {value:.4f}" for score, value in run["scores"].items())
        lines.append(f"| {name} | {scores} | {run['steps']:,} | {run['seconds']:,.0f} |")
    return f"```\n{commands}\n```\n\n" + "\n".join(lines) + f"\n\n{document['machine']}"


def filled(text: str) -> str:
    """A page's text with every block made anew.

    Raises:
        ValueError: a block names a file or a subject of which there are no results.
    """

    def fill(block: re.Match[str]) -> str:
        if block["kind"] == "machine":
            body = _machine(block["device"])
        elif block["kind"] == "pictures":
            body = "\n\n".join(f"![{words}]({name})" for name, (words, _) in _pictures(block["device"]).items())
        elif block["file"] is None:
            body = _ratios()
        elif block["what"] == "runs":
            body = _trained(block["file"], [name.strip() for name in block["subjects"].split(",")])
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
    wanted = {one: filled(one.read_text(encoding="utf-8")) for one in documents()} | drawings()
    for results in sorted(RESULTS.glob("*.json")):
        one = ROOT / "docs" / "benchmarks" / f"{results.stem}.md"
        if one not in wanted:
            wanted[one] = filled(begun(results))
    differ = 0
    for path, new in wanted.items():
        if path.exists() and path.read_text(encoding="utf-8") == new:
            continue
        differ += 1
        print(f"{path.relative_to(ROOT)}: {'written' if options.write else 'differs from bench/results'}")
        if options.write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(new, encoding="utf-8")
    return 1 if differ and not options.write else 0


if __name__ == "__main__":
    sys.exit(main())
