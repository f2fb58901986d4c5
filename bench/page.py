"""Results as one page of HTML that loads nothing: charts, a table, and the samples of a row that is opened."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from pyxlbert.bench import pictures
from pyxlbert.bench.counted import counted
from pyxlbert.bench.report import Row, is_peer, rate_of, row_from
from pyxlbert.bench.statistics import interval
from pyxlbert.bench.svg import number

_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; margin: 0 auto;
  max-width: 78rem; padding: 1.5rem 1.25rem 4rem; color: #1b1f24; background: #fff }
h1 { font-size: 1.5rem; margin: 0 0 .25rem } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem }
p { margin: .35rem 0; max-width: 60rem } .faint { color: #57606a }
.charts { display: flex; flex-wrap: wrap; gap: 1rem }
svg.chart { border: 1px solid #dfe3e8; border-radius: 6px; max-width: 100%; height: auto }
svg .mark:hover { stroke: #1b1f24; stroke-width: 2 }
.bar { position: sticky; top: 0; background: #fff; padding: .6rem 0; border-bottom: 1px solid #dfe3e8;
  margin-top: 1rem; z-index: 1 }
input { font: inherit; padding: .35rem .6rem; width: 22rem; max-width: 100%; border: 1px solid #8c959f;
  border-radius: 6px }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600; border-bottom: 2px solid #8c959f }
th, td { padding: .28rem .7rem .28rem 0; vertical-align: top } td { border-bottom: 1px solid #dfe3e8 }
td.n, th.n { text-align: right; white-space: nowrap }
button { font: inherit; border: 0; background: none; color: #0b5cad; cursor: pointer; padding: 0; text-align: left }
button:hover { text-decoration: underline } button::before { content: "▸ " }
button[aria-expanded=true]::before { content: "▾ " }
tr.more > td { padding: .3rem 0 1rem 1.2rem; background: #f6f8fa } tr.more table { width: auto }
pre { background: #f6f8fa; padding: 1rem; font-size: 13px; line-height: 1.45 }
.behind { color: #a40e26 } .why { color: #a40e26; max-width: 60rem }
"""

# Only this script runs, and it asks for nothing.
_SCRIPT = """
"use strict";
const rows = JSON.parse(document.getElementById("data").textContent);
const bodies = [...document.querySelectorAll("tbody[data-row]")];
const SVG = "http://www.w3.org/2000/svg";
function show(seconds) {
  for (const [unit, scale] of [["s", 1], ["ms", 1e-3], ["µs", 1e-6]]) {
    if (seconds >= scale) return (seconds / scale).toPrecision(3) + " " + unit;
  }
  return (seconds * 1e9).toFixed(0) + " ns";
}
function make(name, attributes, parent, text) {
  const node = document.createElementNS(SVG, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}
// Every sample of every contestant, a line for each.
function strips(row) {
  const names = Object.keys(row.samples).filter(name => row.samples[name].length);
  if (!names.length) return null;
  const all = names.flatMap(name => row.samples[name]);
  const low = Math.log(Math.min(...all) / 1.05), high = Math.log(Math.max(...all) * 1.05);
  const left = 190, width = 720, line = 22, height = names.length * line + 34;
  const svg = document.createElementNS(SVG, "svg");
  for (const [key, value] of [["width", width], ["height", height], ["class", "samples"]]) svg.setAttribute(key, value);
  const place = seconds => left + (Math.log(seconds) - low) / (high - low) * (width - left - 50);
  for (let tick = 0; tick <= 4; tick++) {
    const seconds = Math.exp(low + (high - low) * tick / 4), x = place(seconds);
    make("line", {x1: x, x2: x, y1: 0, y2: height - 26, stroke: "#dfe3e8"}, svg);
    make("text", {x: x, y: height - 10, "font-size": 11, fill: "#57606a", "text-anchor": "middle"}, svg, show(seconds));
  }
  names.forEach((name, index) => {
    const y = index * line + 13;
    make("text", {x: left - 10, y: y + 4, "font-size": 12, "text-anchor": "end", fill: "#1b1f24"}, svg, name);
    row.samples[name].forEach((seconds, round) => {
      const dot = make("circle", {cx: place(seconds), cy: y, r: 4, fill: name === "pyxlbert" ? "#0b5cad" : "#d55e00",
        "fill-opacity": 0.45}, svg);
      make("title", {}, dot, "round " + (round + 1) + ": " + show(seconds));
    });
    make("line", {x1: place(row.medians[name]), x2: place(row.medians[name]), y1: y - 8, y2: y + 8, stroke: "#1b1f24",
      "stroke-width": 1.5}, svg);
  });
  return svg;
}
for (const body of bodies) {
  const button = body.querySelector("button"), more = body.querySelector("tr.more");
  button.addEventListener("click", () => {
    more.hidden = !more.hidden;
    button.setAttribute("aria-expanded", String(!more.hidden));
    const room = more.querySelector(".strips");
    if (room && !room.firstChild) {
      const drawn = strips(rows[Number(body.dataset.row)]);
      room.append(drawn || "This file has no samples of this row.");
    }
  });
}
const filter = document.getElementById("filter"), count = document.getElementById("count");
function apply() {
  const words = filter.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  const visible = new Set();
  for (const body of bodies) {
    const text = body.firstElementChild.textContent.toLowerCase();
    body.hidden = !words.every(word => text.includes(word));
    if (!body.hidden) { shown++; visible.add(body.dataset.row); }
  }
  for (const mark of document.querySelectorAll("svg [data-row]")) {
    mark.style.display = visible.has(mark.dataset.row) ? "" : "none";
  }
  count.textContent = shown + " of " + bodies.length + " races";
}
filter.addEventListener("input", apply);
apply();
"""

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)
_COLUMNS = (
    ("race", ""),
    ("dtype", ""),
    ("ours", "n"),
    ("a second", "n"),
    ("of limit", "n"),
    ("best peer", ""),
    ("its time", "n"),
    ("ratio", "n"),
    ("95 % interval", "n"),
    ("peak memory", "n"),
    ("its peak", "n"),
)


def head(title: str) -> str:
    """What stands before a page's own words: its policy and its style."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
    )


def described(device: dict[str, Any]) -> str:
    """The machine in words, with units."""
    return ", ".join(f"{name.replace('_', ' ')} {_with_unit(name, value)}" for name, value in device.items())


def page(document: dict[str, Any]) -> str:
    """The page of a document of results; every name in it is text, whatever it holds."""
    rows = counted(row_from(entry) for entry in document["rows"])
    device = document["device"]
    packages = ", ".join(f"{name} {value}" for name, value in document.get("versions", {}).items())
    commands = dict.fromkeys(str(entry.get("command", "")) for entry in document["rows"])
    parts = [
        head("pyxlbert bench"),
        f"<h1>pyxlbert bench</h1><p>{escape(described(device))}</p><p class='faint'>{escape(packages)}</p>",
        "<p class='faint'>Every answer was checked before it was timed. All contestants had the same threads and took "
        "turns in a new order every round. A ratio is a contestant's median over ours: above 1 ours is faster.</p>",
        _commands(commands),
        _peers(document.get("peers", {})),
        "<div class='bar'><input id='filter' type='search' placeholder='filter races: words in any order' "
        "aria-label='filter races'> <span id='count' class='faint'></span></div>",
        *_charts(rows, device),
        "<h2>Every race</h2><p class='faint'>A race opens every contestant and its samples.</p>",
        f"<div class='wide'>{_table(rows)}</div>",
        f"<script type='application/json' id='data'>{_data(rows)}</script><script>{_SCRIPT}</script></body></html>\n",
    ]
    return "\n".join(parts)


def _commands(commands: Iterable[str]) -> str:
    lines = [f"<p class='faint'><code>{escape(command)}</code></p>" for command in commands]
    if len(lines) < 4:
        return "".join(lines)
    return f"<details><summary class='faint'>of {len(lines)} commands</summary>{''.join(lines)}</details>"


def _peers(peers: dict[str, Any]) -> str:
    if not peers:
        return ""
    lines = "".join(f"<li>{escape(str(name))}: {escape(str(what))}</li>" for name, what in peers.items())
    return f"<details><summary class='faint'>peers, and who did not race</summary><ul>{lines}</ul></details>"


def _with_unit(name: str, value: Any) -> str:
    unit = " GB/s" if name == "copy_bandwidth" else " GFLOP/s" if name.startswith("gemm_") else ""
    return f"{value}{unit}"


def _data(rows: Sequence[Row]) -> str:
    """JSON that no name can end early: a script's text has no escapes but JSON's own."""
    listed = []
    for row in rows:
        timings = sorted(row.timings.items(), key=lambda item: item[1].median)
        samples = {name: list(timing.samples) for name, timing in timings}
        listed.append({"samples": samples, "medians": {name: timing.median for name, timing in timings}})
    text = json.dumps(listed, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _charts(rows: Sequence[Row], device: dict[str, Any]) -> list[str]:
    groups = pictures.by_length(rows)
    times = [pictures.over_length(rows, name, places) for name, places in groups.items()]
    peaks = [pictures.over_length(rows, name, places, memory=True) for name, places in groups.items()]
    subjects = {row.subject: [i for i, one in enumerate(rows) if one.subject == row.subject] for row in rows}
    kinds = [
        ("Overview", [pictures.overview(rows)], "no race here has a peer"),
        ("Roofline", [pictures.roofline(rows, device)], "no race here has a number of FLOPs"),
        ("Time over length", times, "no race here came at two lengths; give --shape twice"),
        ("Peak memory over length", peaks, "no race here has its memory at two lengths"),
        (
            "Ratio to every peer",
            [pictures.ratios(rows, places, subject) for subject, places in subjects.items()],
            "no race here has a peer",
        ),
    ]
    parts = []
    for title, drawn, reason in kinds:
        found = [one for one in drawn if one is not None]
        inner = "\n".join(found) if found else f"<p class='faint'>Nothing to draw: {escape(reason)}.</p>"
        parts.append(f"<h2>{title}</h2><div class='charts'>{inner}</div>")
    return parts


def _table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th class='{kind}'>{escape(name)}</th>" for name, kind in _COLUMNS)
    bodies = []
    for place, row in enumerate(rows):
        cells = "".join(
            f"<td class='{kind}'>{cell}</td>" for cell, (_, kind) in zip(_cells(row), _COLUMNS, strict=True)
        )
        bodies.append(
            f"<tbody data-row='{place}'><tr>{cells}</tr>"
            f"<tr class='more' hidden><td colspan='{len(_COLUMNS)}'>{_more(row)}</td></tr></tbody>"
        )
    return f"<table><thead><tr>{head}</tr></thead>\n{chr(10).join(bodies)}\n</table>"


def _cells(row: Row) -> list[str]:
    """Of the table, as HTML."""
    ours, peer, limit = row.ours, row.best_peer, pictures.of_limit(row)
    ratio = peer[1].median / ours.median if peer is not None and ours is not None else None
    sure = interval(peer[1].samples, ours.samples) if ratio is not None else None
    peaks = [_peak(row, name) for name in ("pyxlbert", None if peer is None else peer[0])]
    behind = ratio is not None and (ratio if sure is None else sure[1]) < 1
    return [
        f"<button aria-expanded='false'>{escape(f'{row.subject} {row.case}')}</button>",
        escape(row.dtype),
        "<span class='behind'>no time</span>" if ours is None else escape(pictures.seconds(ours.median)),
        "" if ours is None else escape(rate_of(row.work, ours.median)),
        "" if limit is None else f"{limit:.0%}",
        "" if peer is None else escape(peer[0]),
        "" if peer is None else escape(pictures.seconds(peer[1].median)),
        "" if ratio is None else f"<span class='{'behind' if behind else ''}'>{ratio:.2f}</span>",
        "" if sure is None else f"{sure[0]:.2f} – {sure[1]:.2f}",
        *peaks,
    ]


def _peak(row: Row, name: str | None) -> str:
    return f"{number(row.memory[name] / 1e6)} MB" if name is not None and name in row.memory else ""


def _more(row: Row) -> str:
    head = "".join(
        f"<th class='{kind}'>{name}</th>"
        for name, kind in (
            *(("contestant", ""), ("median", "n"), ("quartiles", "n"), ("over ours", "n")),
            *(("95 % interval", "n"), ("peak memory", "n")),
        )
    )
    lines = []
    for name, timing in sorted(row.timings.items(), key=lambda item: item[1].median):
        ratio = "" if row.ours is None else f"{timing.median / row.ours.median:.2f}"
        sure = None if row.ours is None or name == "pyxlbert" else interval(timing.samples, row.ours.samples)
        given = "" if is_peer(name) or name.startswith("pyxlbert") else " (no peer: a part is given to it)"
        cells = [
            pictures.seconds(timing.median),
            f"{pictures.seconds(timing.lower)} – {pictures.seconds(timing.upper)}",
            ratio,
            "" if sure is None else f"{sure[0]:.2f} – {sure[1]:.2f}",
            _peak(row, name),
        ]
        shown = "".join(f"<td class='n'>{escape(cell)}</td>" for cell in cells)
        lines.append(f"<tr><td>{escape(name + given)}</td>{shown}</tr>")
    why = "".join(
        f"<p class='why'>{escape(name)} has no time: {escape(reason)}</p>" for name, reason in row.failed.items()
    )
    note = f"<p class='faint'>{escape(row.note)}</p>" if row.note else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>" if lines else ""
    return f"{note}{table}{why}<div class='strips'></div>"
