"""Whether ours has become slower between two files of results, or two revisions: more than the noise of both."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyxlbert.bench import report, statistics
from pyxlbert.bench.report import Row, is_peer
from pyxlbert.bench.timer import Timing

# A change that is smaller is none, however sure it is.
LEAST = 0.05
# How likely it is, of all rows together, that an unchanged one is called slower.
FALSE_ALARM = 0.05
# What two processes of the same code differ by beside the spread within each: another layout of memory.
BETWEEN_RUNS = 0.02

# A change of this size is to be seen: a row whose noise could hide it is called unsure, not the same.
SEEN = 0.15

SLOWER, FASTER, SAME, UNSURE = "slower", "faster", "the same", "unsure"


class Change(NamedTuple):
    """One race before and after.

    Attributes:
        subject, case, dtype: of the row.
        before, after: medians of ours, in seconds.
        ratio: after over before, less what the peers have changed by in the same time.
        threshold: the ratio above which it is slower; below its inverse it is faster.
        verdict: SLOWER, FASTER, SAME or UNSURE.
    """

    subject: str
    case: str
    dtype: str
    before: float
    after: float
    ratio: float
    threshold: float
    verdict: str


def _deviation(before: Timing, after: Timing) -> float:
    """Of the logarithm of the ratio of medians, of two runs."""
    if min(len(before.samples), len(after.samples)) >= 3:
        return statistics.deviation(after.samples, before.samples)
    # A file without samples has quartiles: 1.349 deviations of a normal sample lie between them, and a median's is
    # 1.253 times that of a mean.
    parts = ((t.upper - t.lower) / t.median / 1.349 * 1.253 / math.sqrt(max(1, t.rounds)) for t in (before, after))
    return math.hypot(*parts)


def threshold(deviation: float, rows: int) -> float:
    """The logarithm of the ratio that an unchanged row, of so many, does not pass but by FALSE_ALARM."""
    return max(math.log1p(LEAST), certainty(rows) * deviation)


def certainty(rows: int) -> float:
    """Deviations that an unchanged row, of so many, does not differ by but by FALSE_ALARM."""
    return statistics.quantile_of_normal(1 - FALSE_ALARM / max(1, rows))


def _verdict(log: float, limit: float) -> str:
    if abs(log) > limit:
        return SLOWER if log > 0 else FASTER
    return SAME if limit < math.log1p(SEEN) else UNSURE


def change_of(before: Row, after: Row, rows: int, same_peers: bool) -> Change:
    """The change of ours between two runs.

    Args:
        before, after: rows of one race, with a time of ours.
        rows: that are compared in all.
        same_peers: the other libraries are the same, so that what they have changed by is the machine's.
    """
    old, new = before.timings["pyxlbert"], after.timings["pyxlbert"]
    log, variance = math.log(new.median / old.median), _deviation(old, new) ** 2
    names = [name for name in before.timings if is_peer(name) and name in after.timings] if same_peers else []
    if names:
        drifts = sorted(math.log(after.timings[name].median / before.timings[name].median) for name in names)
        # The peer in the middle: one alone may be disturbed.
        middle = len(names) // 2
        drift = drifts[middle] if len(names) % 2 else (drifts[middle - 1] + drifts[middle]) / 2
        log -= drift
        variance += sum(_deviation(before.timings[n], after.timings[n]) ** 2 for n in names) / len(names) ** 2
    limit = threshold(math.sqrt(variance + BETWEEN_RUNS**2), rows)
    where = (after.subject, after.case, after.dtype)
    return Change(*where, old.median, new.median, math.exp(log), math.exp(limit), _verdict(log, limit))


def interleaved(row: Row, before: str, rows: int) -> Change:
    """The change of ours where it took turns with `before`, a contestant of the same race."""
    old, new = row.timings[before], row.timings["pyxlbert"]
    # Of each round by itself: what the two had in common is gone.
    pairs = [b / a for a, b in zip(old.samples, new.samples, strict=True)]
    _, middle, _ = statistics.quartiles(pairs)
    log = math.log(middle)
    deviation = statistics.deviation(pairs, [1.0] * len(pairs))
    limit = threshold(math.hypot(deviation, BETWEEN_RUNS), rows)
    where = (row.subject, row.case, row.dtype)
    return Change(*where, old.median, new.median, middle, math.exp(limit), _verdict(log, limit))


def agree(sittings: Sequence[Change]) -> bool:
    """Whether all say the same of a race."""
    return len({one.verdict for one in sittings}) == 1


def together(sittings: Sequence[Change]) -> Change:
    """What several runs of one race say, each in new processes: what most of them do, or that it is not sure."""
    counts = Counter(one.verdict for one in sittings)
    verdict, most = counts.most_common(1)[0]
    if 2 * most <= len(sittings) > 1:
        verdict = UNSURE
    alike = [one for one in sittings if one.verdict == verdict] or list(sittings)
    middle = math.exp(sum(math.log(one.ratio) for one in alike) / len(alike))
    return alike[0]._replace(ratio=middle, threshold=max(one.threshold for one in alike), verdict=verdict)


class Comparison(NamedTuple):
    """Of two documents.

    Attributes:
        changes: of the races that both have.
        missing: races that one of them has no time of ours for, in words.
        warnings: what a reader must know before anything else.
    """

    changes: list[Change]
    missing: list[str]
    warnings: list[str]

    @property
    def slower(self) -> bool:
        """Whether a race is."""
        return any(change.verdict == SLOWER for change in self.changes)


def compare(before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    """Two documents of results.

    Raises:
        ValueError: they have no race in common.
    """
    rows = [{(r["subject"], r["case"], r["dtype"]): report.row_from(r) for r in one["rows"]} for one in (before, after)]
    keys = [key for key in rows[1] if key in rows[0]]
    timed = [key for key in keys if all("pyxlbert" in one[key].timings for one in rows)]
    missing = [
        f"{' '.join(key)}: only in the {'second' if i else 'first'}"
        for i in (0, 1)
        for key in rows[i].keys() - set(keys)
    ]
    missing += [f"{' '.join(key)}: ours has no time in one of them" for key in keys if key not in timed]
    if not timed:
        raise ValueError("the files have no race in common that ours has a time in")
    differ = report.same_machine(before["device"], after["device"])
    warnings = []
    if differ:
        warnings.append(
            f"RESULTS OF DIFFERENT MACHINES ({'; '.join(differ)}): a change may be the machine's, not the code's"
        )
    versions = [{k: v for k, v in one.get("versions", {}).items() if k != "pyxlbert"} for one in (before, after)]
    if versions[0] != versions[1]:
        names = [n for n in {**versions[0], **versions[1]} if versions[0].get(n) != versions[1].get(n)]
        warnings.append(f"other versions of {', '.join(names)}: what the peers have changed by is not taken off")
    same_peers = not differ and versions[0] == versions[1]
    changes = [change_of(rows[0][key], rows[1][key], len(timed), same_peers) for key in timed]
    return Comparison(changes, sorted(missing), warnings)


def lines(comparison: Comparison) -> list[str]:
    """What is printed: warnings, what has changed first, what is missing, and the sum of it."""
    order = {SLOWER: 0, UNSURE: 1, FASTER: 2, SAME: 3}
    out = [f"WARNING: {warning}" for warning in comparison.warnings]
    for one in sorted(comparison.changes, key=lambda change: (order[change.verdict], -change.ratio)):
        times = f"{report.shown(one.before):>10} {report.shown(one.after):>10}"
        sign = f"{one.ratio - 1:+7.1%}, of which {one.threshold - 1:.1%} may be noise"
        out.append(f"{one.verdict:8} {one.subject:24} {one.case:28} {one.dtype:9} {times} {sign}")
    out += [f"not compared: {reason}" for reason in comparison.missing]
    counts = {verdict: sum(change.verdict == verdict for change in comparison.changes) for verdict in order}
    unsure = counts.pop(UNSURE)
    if unsure:
        out.append(f"{unsure} unsure: the noise could hide a change of {SEEN:.0%}; race again when less is running")
    return [*out, ", ".join(f"{count} {verdict}" for verdict, count in counts.items())]


def files(paths: Sequence[Path]) -> tuple[list[str], int]:
    """What is printed of two files, and the exit status: 1 where ours has become slower.

    Raises:
        OSError, ValueError: as `report.read` and `compare`.
    """
    found = compare(*(report.read(path) for path in paths))
    return lines(found), int(found.slower)
