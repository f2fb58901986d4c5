"""What results look like: roofline, time and memory over length, ratio to every peer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pyxlbert.bench.report import Row, is_peer
from pyxlbert.bench.statistics import interval
from pyxlbert.bench.svg import COLOURS, Axis, Chart, around, number

_DTYPES = {"float32": COLOURS[0], "bfloat16": COLOURS[1], "int8": COLOURS[2]}
_RATIO = "times as long as ours (right of 1: ours is faster)"
# Of a chart of ratios: pixels of a row.
_TALL = 17


def seconds(value: float) -> str:
    """With its unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.0f} ns"


def _at_seconds(axis: Axis) -> Axis:
    return axis._replace(ticks=tuple((value, seconds(value)) for value, _ in axis.lines()))


def label(row: Row) -> str:
    """A row in words."""
    return f"{row.subject} {row.case} {row.dtype}"


def colours(names: Sequence[str]) -> dict[str, str]:
    """Of contestants: ours is always the first."""
    others = [name for name in dict.fromkeys(names) if name != "pyxlbert"]
    return {"pyxlbert": COLOURS[0]} | {name: COLOURS[1 + i % (len(COLOURS) - 1)] for i, name in enumerate(others)}


def roofline(rows: Sequence[Row], device: dict[str, Any]) -> str | None:
    """FLOP/s of ours over FLOPs a byte, below what memory and products allow; None where nothing was counted."""
    copy = device.get("copy_bandwidth")
    points = [
        (row.work.flops / row.work.bytes, row.work.flops / row.ours.median / 1e9, number_)
        for number_, row in enumerate(rows)
        if row.work.flops and row.work.bytes and row.ours is not None
    ]
    if not points or not copy:
        return None
    rates = {name: device[f"gemm_{name}"] for name in _DTYPES if device.get(f"gemm_{name}")}
    x = around([*(p[0] for p in points), *(rate / copy for rate in rates.values())], "FLOPs a byte", 2.0)
    y = around([*(p[1] for p in points), *rates.values()], "GFLOP/s", 1.8)
    chart = Chart("Roofline: ours below what this machine allows", x, y, 760, 420)
    for name, rate in rates.items():
        start, knee = max(x.low, y.low / copy), min(max(rate / copy, x.low), x.high)
        chart.line([(start, start * copy), (knee, rate), (x.high, rate)], _DTYPES[name], 1.4, "5 4")
        chart.words(x.high, rate, f"product in {name}: {number(rate)} GFLOP/s", _DTYPES[name], "end")
    low = max(x.low, y.low / copy)
    chart.words(low, low * copy, f"copy: {number(copy)} GB/s", up=-14)
    for x_value, y_value, number_ in points:
        row = rows[number_]
        tip = f"{label(row)}: {number(y_value)} GFLOP/s, {number(x_value)} FLOPs a byte"
        chart.name(row.dtype, _DTYPES.get(row.dtype, COLOURS[-1]))
        chart.dot(x_value, y_value, _DTYPES.get(row.dtype, COLOURS[-1]), tip, number_, 4.5)
    return chart.svg()


def by_length(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Rows that differ in their length alone, shortest first, by what they have in common."""
    found: dict[str, dict[int, int]] = {}
    for place, row in enumerate(rows):
        length = row.work.length or _length(row.case)
        if length is None:
            continue
        common = row.case.replace(f"x{length}", "×T", 1).replace("x", "×")
        found.setdefault(f"{row.subject.removesuffix(' by length')} {common}, {row.dtype}", {})[length] = place
    return {name: [place for _, place in sorted(places.items())] for name, places in found.items() if len(places) > 1}


def _length(case: str) -> int | None:
    """Of "8x128 ..." or "1x128x12x64 ...", for results of before rows said it."""
    sizes = case.partition(" ")[0].split("x")
    return int(sizes[1]) if len(sizes) in (2, 4) and all(one.isdecimal() for one in sizes) else None


def over_length(rows: Sequence[Row], name: str, places: Sequence[int], memory: bool = False) -> str | None:
    """Time, or peak memory, of every contestant over the length; None where there is nothing to draw."""
    lengths = [rows[place].work.length or _length(rows[place].case) or 1 for place in places]
    lines: dict[str, list[tuple[float, float, int]]] = {}
    for place, length in zip(places, lengths, strict=True):
        row = rows[place]
        values = (
            # What is a thousandth of a megabyte is nothing: an axis of ratios has no zero.
            {who: max(peak, 1e5) / 1e6 for who, peak in row.memory.items() if is_peer(who) or who == "pyxlbert"}
            if memory
            else {who: timing.median for who, timing in row.timings.items()}
        )
        for who, value in values.items():
            lines.setdefault(who, []).append((length, value, place))
    lines = {who: line for who, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    unit = "peak MB above inputs and results" if memory else "time of a call"
    x = around(lengths, "T, places", 1.12)._replace(ticks=tuple((one, f"{one}") for one in lengths))
    y = around((v for line in lines.values() for _, v, _ in line), unit, 1.4)
    chart = Chart(name, x, y if memory else _at_seconds(y), left=76)
    # The same in every chart of a subject.
    shades = colours([who for row in rows if row.subject == rows[places[0]].subject for who in row.timings])
    for who, line in lines.items():
        chart.name(who, shades[who], "line")
        chart.line([(t, v) for t, v, _ in line], shades[who], 2.5 if who == "pyxlbert" else 1.5)
        for t, value, place in line:
            shown = f"{number(value)} MB" if memory else seconds(value)
            chart.dot(t, value, shades[who], f"{who}, {label(rows[place])}: {shown}", place)
    return chart.svg()


def ratios(rows: Sequence[Row], places: Sequence[int], title: str) -> str | None:
    """A line for each row with a dot for every other contestant: its time over ours, and the interval of that."""
    shown = [place for place in places if rows[place].ours is not None and len(rows[place].timings) > 1]
    if not shown:
        return None
    names = [who for place in shown for who in rows[place].timings if who != "pyxlbert"]
    values = [t.median / rows[p].ours.median for p in shown for who, t in rows[p].timings.items() if who != "pyxlbert"]
    x = around([0.8, 1.25, *values], _RATIO, 1.12)
    texts = [f"{rows[place].case} {rows[place].dtype}" for place in shown]
    count = len(shown)
    ticks = tuple((count - i - 0.5, text) for i, text in enumerate(texts))
    left = 24 + round(7 * max(map(len, texts)))
    chart = Chart(title, x, Axis("", 0, count, False, ticks), left + 520, 60 + _TALL * count, left)
    chart.line([(1, 0), (1, count)], "#57606a", 1.5)
    shades = colours(names)
    for i, place in enumerate(shown):
        row, y = rows[place], count - i - 0.5
        for who, timing in row.timings.items():
            if who == "pyxlbert":
                continue
            ratio, sure = timing.median / row.ours.median, interval(timing.samples, row.ours.samples)
            given = not is_peer(who)
            chart.name(f"{who} (no peer)" if given else who, shades[who])
            words = f"{who}, {label(row)}: {ratio:.2f}"
            if sure is not None:
                chart.whisker(*sure, y, shades[who], place)
                words += f", 95 % of {sure[0]:.2f} to {sure[1]:.2f}"
            chart.dot(ratio, y, shades[who], words, place, 4, hollow=given)
    return chart.svg()


def overview(rows: Sequence[Row]) -> str | None:
    """A line for each subject with a dot for every row: the best peer's time over ours."""
    found: dict[str, list[tuple[float, int]]] = {}
    for place, row in enumerate(rows):
        if row.ours is not None and row.best_peer is not None:
            found.setdefault(row.subject, []).append((row.best_peer[1].median / row.ours.median, place))
    if not found:
        return None
    count = len(found)
    x = around([0.8, 1.25, *(ratio for line in found.values() for ratio, _ in line)], _RATIO, 1.12)
    ticks = tuple((count - i - 0.5, subject) for i, subject in enumerate(found))
    left = 24 + round(7 * max(map(len, found)))
    title = "The best peer's time over ours, a dot for each race"
    chart = Chart(title, x, Axis("", 0, count, False, ticks), left + 560, 60 + 22 * count, left)
    chart.line([(1, 0), (1, count)], "#57606a", 1.5)
    for i, line in enumerate(found.values()):
        for ratio, place in line:
            row = rows[place]
            shade = _DTYPES.get(row.dtype, COLOURS[-1])
            chart.name(row.dtype, shade)
            # Beside each other, not on each other.
            y = count - i - 0.5 + {"float32": 0.16, "bfloat16": -0.16}.get(row.dtype, 0.0)
            chart.dot(ratio, y, shade, f"{label(row)}: {ratio:.2f} times, {row.best_peer[0]}", place, 4)
    return chart.svg()


def of_limit(row: Row) -> float | None:
    """The share of the machine's limit that ours reaches."""
    found = row.limit / row.ours.median if row.limit and row.ours is not None else None
    return found if found is None or math.isfinite(found) else None
