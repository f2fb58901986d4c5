"""A parity run as text, JSON and one page of HTML that loads nothing."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pyxlbert.testing.parity.rows import NOT_RUN, OK, OVER, WRONG, Row

#: Of the JSON document.
VERSION = 1


def good(rows: Sequence[Row]) -> bool:
    """Whether something ran, and nothing was wrong or over its budget."""
    return any(row.verdict == OK for row in rows) and not any(row.verdict in (OVER, WRONG) for row in rows)


def summary(rows: Sequence[Row]) -> str:
    """What a person can read in ten seconds: one line, one for each subject, and what is wrong."""
    ran = [row for row in rows if row.verdict != NOT_RUN]
    bad = [row for row in ran if row.verdict != OK]
    tensors = sum(row.compared for row in ran)
    head = f"{len(bad)} of {len(ran)} rows wrong" if bad else f"all {len(ran)} rows within budget"
    lines = [f"{head if ran else 'nothing ran'} ({tensors} tensors against float64)", ""]
    width = max((len(row.subject) for row in rows), default=0)
    for subject in dict.fromkeys(row.subject for row in rows):
        own = [row for row in ran if row.subject == subject]
        on = ", ".join(dict.fromkeys(row.runner for row in own)) or "nothing"
        shares = [row.share for row in own if row.share is not None]
        used = f"{max(shares):6.0%} of budget" if shares else " " * 16
        state = "WRONG" if any(row in bad for row in own) else "ok" if own else "not run"
        lines.append(f"{subject:{width}}  {state:7}  {used}  on {on}")
    if bad:
        lines.append("")
        lines += [f"{row.subject} {row.runner} {row.dtype} {row.direction}: {row.reason}" for row in bad]
    return "\n".join(lines)


_COLUMNS = ("subject", "runner", "dtype", "direction", "tensors", "error", "PyTorch's", "ratio", "of budget", "verdict")


def _cells(row: Row) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        *(row.subject, row.runner, row.dtype, row.direction, str(row.compared or "")),
        *(number(row.error, ".1e"), number(row.plain, ".1e"), number(row.ratio, ".2f"), number(row.share, ".0%")),
        row.verdict if row.verdict == OK else f"{row.verdict}: {row.reason}",
    ]


def table(rows: Sequence[Row]) -> str:
    """A line for each row, in columns."""
    cells = [list(_COLUMNS), *(_cells(row) for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(_COLUMNS) - 1)]
    lines = []
    for line in cells:
        shown = [text.ljust(width) for text, width in zip(line[:4], widths[:4], strict=True)]
        shown += [text.rjust(width) for text, width in zip(line[4:-1], widths[4:], strict=True)]
        lines.append("  ".join([*shown, line[-1]]).rstrip())
    return "\n".join(lines)


def document(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """JSON: `version`, `machine`, `good`, `rows` with every field of `Row` and its ratio."""
    listed = [asdict(row) | {"ratio": row.ratio} for row in rows]
    return json.dumps({"version": VERSION, "machine": machine, "good": good(rows), "rows": listed}, indent=1) + "\n"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1b1f24 }
h1 { font-size: 1.4rem } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #d8dee4 }
td:not(:last-child) { white-space: nowrap }
tr.bad { background: #ffebe9 } tr.none { color: #6e7781 } input { font: inherit; padding: .3rem .5rem; width: 20rem }
.bar { background: #d8dee4; height: .5rem; width: 8rem } .bar i { display: block; height: 100%; background: #2da44e }
tr.bad .bar i { background: #cf222e } pre { background: #f6f8fa; padding: 1rem; overflow: auto }
@media (prefers-color-scheme: dark) { body { background: #0d1117; color: #e6edf3 } th, td { border-color: #30363d }
tr.bad { background: #490202 } pre { background: #161b22 } .bar { background: #30363d } }
"""

_FILTER = """
document.getElementById("filter").addEventListener("input", function (event) {
  const words = event.target.value.toLowerCase().split(/\\s+/);
  for (const row of document.querySelectorAll("tbody tr")) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
  }
});
"""


def page(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """One self-contained page: the summary, and every row with a bar for its share of the budget."""
    lines = []
    for row in rows:
        kind = {OK: "ok", NOT_RUN: "none"}.get(row.verdict, "bad")
        cells = [f"<td>{html.escape(text)}</td>" for text in _cells(row)]
        share = 0.0 if row.share is None else min(row.share, 1.0)
        bar = "" if row.share is None else f'<div class="bar"><i style="width: {share:.0%}"></i></div>'
        cells[8] = f"<td>{html.escape(_cells(row)[8])}{bar}</td>"
        lines.append(f'<tr class="{kind}" title="{html.escape(row.where)}">{"".join(cells)}</tr>')
    head = "".join(f"<th>{html.escape(name)}</th>" for name in _COLUMNS)
    about = html.escape(", ".join(f"{name}: {value}" for name, value in machine.items()))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>pyxlbert parity</title>'
        f"<style>{_STYLE}</style></head><body><h1>Parity with float64</h1><p>{about}</p>"
        f"<pre>{html.escape(summary(rows))}</pre>"
        '<p><input id="filter" placeholder="filter: words in any order" aria-label="filter"></p>'
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{chr(10).join(lines)}\n</tbody></table>"
        f"<script>{_FILTER}</script></body></html>\n"
    )
