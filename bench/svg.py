"""Charts as SVG text: the same numbers give the same bytes, and nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

# Told apart by everyone (Okabe and Ito), on white; the first is ours.
COLOURS = ("#0b5cad", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b4c9a", "#7f7f7f", "#a65628", "#111111")
_GRID, _INK, _FAINT = "#dfe3e8", "#1b1f24", "#57606a"
FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"


class Axis(NamedTuple):
    """One axis.

    Attributes:
        label: with its unit.
        low, high: its ends.
        log: whether equal distances are equal ratios.
        ticks: where lines are drawn, and what stands there; none: at round numbers.
    """

    label: str
    low: float
    high: float
    log: bool = True
    ticks: tuple[tuple[float, str], ...] = ()

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def lines(self) -> Sequence[tuple[float, str]]:
        """The ticks."""
        return self.ticks or (_decades(self.low, self.high) if self.log else _steps(self.low, self.high))


def number(value: float) -> str:
    """Three digits, without an exponent where that is short."""
    text = f"{value:.3g}"
    return f"{float(text):,.0f}" if "e+" in text and value < 1e9 else text


def _decades(low: float, high: float) -> list[tuple[float, str]]:
    decades = math.log10(high / low)
    steps = (1,) if decades > 3 else (1, 2, 5) if decades > 1 else (1, 1.5, 2, 3, 4, 5, 7)
    if decades < 0.5:
        steps = (1, 1.1, 1.2, 1.3, 1.5, 1.7, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    found = [s * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for s in steps]
    return [(one, number(one)) for one in found if low * (1 - 1e-9) <= one <= high * (1 + 1e-9)]


def _steps(low: float, high: float) -> list[tuple[float, str]]:
    raw = (high - low) / 5 or 1.0
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [(i * step, number(i * step)) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def around(values: Iterable[float], label: str, margin: float = 1.25, log: bool = True) -> Axis:
    """An axis with room around its values."""
    found = list(values)
    low, high = min(found), max(found)
    if log:
        return Axis(label, low / margin, high * margin)
    return Axis(label, 0.0, high * 1.08 or 1.0, False)


class Chart:
    """A plot with two axes, marks, and a legend below its title.

    Args:
        title: of the chart.
        x, y: axes.
        width, height: in pixels, the legend not counted.
        left: room for the labels of y.
    """

    def __init__(self, title: str, x: Axis, y: Axis, width: int = 560, height: int = 340, left: int = 62) -> None:
        self._title, self._x, self._y = title, x, y
        self._width, self._height, self._left = width, height, left
        self._marks: list[str] = []
        self._legend: dict[str, tuple[str, str]] = {}

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels in the plot, from its top left corner."""
        inner, tall = self._width - self._left - 16, self._height - 44
        return self._x.place(x) * inner, (1 - self._y.place(y)) * tall

    def name(self, label: str, colour: str, kind: str = "dot") -> None:
        """A line of the legend; kind: "dot", "line" or "dash"."""
        self._legend.setdefault(label, (colour, kind))

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.5, dash: str = "") -> None:
        """A line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*p) for p in points))
        dashed = f" stroke-dasharray='{dash}'" if dash else ""
        self._marks.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='{width}'{dashed}/>")

    def dot(
        self, x: float, y: float, colour: str, tip: str, row: int | None = None, size: float = 3.5, hollow: bool = False
    ) -> None:
        """A mark with words that are shown when it is pointed at; `row`: of the page's table."""
        px, py = self.at(x, y)
        of = "" if row is None else f" data-row='{row}'"
        fill = f"fill='#fff' stroke='{colour}' stroke-width='1.6'" if hollow else f"fill='{colour}'"
        self._marks.append(
            f"<circle class='mark'{of} cx='{px:.1f}' cy='{py:.1f}' r='{size}' {fill}>"
            f"<title>{escape(tip)}</title></circle>"
        )

    def whisker(self, low: float, high: float, y: float, colour: str, row: int | None = None) -> None:
        """A horizontal line between two values."""
        (x1, py), (x2, _) = self.at(max(low, self._x.low), y), self.at(min(high, self._x.high), y)
        of = "" if row is None else f" data-row='{row}'"
        self._marks.append(
            f"<line{of} x1='{x1:.1f}' x2='{x2:.1f}' y1='{py:.1f}' y2='{py:.1f}' stroke='{colour}' stroke-width='1.5'/>"
        )

    def bar(self, low: float, high: float, y: float, colour: str, tip: str, thick: float = 14) -> None:
        """A horizontal bar between two values."""
        (x1, py), (x2, _) = self.at(low, y), self.at(high, y)
        self._marks.append(
            f"<rect class='mark' x='{x1:.1f}' y='{py - thick / 2:.1f}' width='{max(0.5, x2 - x1):.1f}' "
            f"height='{thick}' fill='{colour}'><title>{escape(tip)}</title></rect>"
        )

    def words(self, x: float, y: float, text: str, colour: str = _FAINT, anchor: str = "start", up: float = 5) -> None:
        """A text at a point, a little above it."""
        px, py = self.at(x, y)
        self._marks.append(
            f"<text x='{px:.1f}' y='{py - up:.1f}' fill='{colour}' text-anchor='{anchor}' font-size='11'>"
            f"{escape(text)}</text>"
        )

    def svg(self) -> str:
        """The chart."""
        lines = self._legend_lines()
        top = 40 + 18 * len(lines)
        inner, tall = self._width - self._left - 16, self._height - 44
        out = [
            "<svg xmlns='http://www.w3.org/2000/svg' class='chart' role='img' "
            f"viewBox='0 0 {self._width} {top + tall + 44}' "
            f"width='{self._width}' height='{top + tall + 44}' {FONT} font-size='12'>",
            f"<title>{escape(self._title)}</title>",
            "<rect width='100%' height='100%' fill='#fff'/>",
            f"<text x='8' y='20' font-size='14' font-weight='600' fill='{_INK}'>{escape(self._title)}</text>",
        ]
        for number_, line in enumerate(lines):
            out.append(f"<g transform='translate(8,{38 + 18 * number_})'>{''.join(line)}</g>")
        out.append(f"<g transform='translate({self._left},{top})'>")
        for value, text in self._x.lines():
            px = self._x.place(value) * inner
            out.append(f"<line x1='{px:.1f}' x2='{px:.1f}' y1='0' y2='{tall}' stroke='{_GRID}'/>")
            out.append(f"<text x='{px:.1f}' y='{tall + 16}' text-anchor='middle' fill='{_FAINT}'>{escape(text)}</text>")
        for value, text in self._y.lines():
            py = (1 - self._y.place(value)) * tall
            out.append(f"<line x1='0' x2='{inner}' y1='{py:.1f}' y2='{py:.1f}' stroke='{_GRID}'/>")
            out.append(f"<text x='-7' y='{py + 4:.1f}' text-anchor='end' fill='{_FAINT}'>{escape(text)}</text>")
        out += self._marks
        out.append(
            f"<text x='{inner / 2:.1f}' y='{tall + 36}' text-anchor='middle' fill='{_INK}'>"
            f"{escape(self._x.label)}</text>"
        )
        if self._y.label:
            out.append(
                f"<text transform='translate({14 - self._left},{tall / 2:.1f}) rotate(-90)' text-anchor='middle' "
                f"fill='{_INK}'>{escape(self._y.label)}</text>"
            )
        return "\n".join([*out, "</g>", "</svg>"])

    def _legend_lines(self) -> list[list[str]]:
        lines: list[list[str]] = [[]] if self._legend else []
        x = 0.0
        for label, (colour, kind) in self._legend.items():
            wide = 36 + 7 * len(label)
            if lines[-1] and x + wide > self._width - 16:
                lines.append([])
                x = 0.0
            dash = " stroke-dasharray='5 4'" if kind == "dash" else ""
            sign = (
                f"<circle cx='{x + 7:.1f}' cy='7' r='4.5' fill='{colour}'/>"
                if kind == "dot"
                else f"<line x1='{x:.1f}' x2='{x + 16:.1f}' y1='7' y2='7' stroke='{colour}' stroke-width='2'{dash}/>"
            )
            lines[-1].append(f"{sign}<text x='{x + 20:.1f}' y='11' fill='{_INK}'>{escape(label)}</text>")
            x += wide
        return lines
