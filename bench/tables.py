"""`python -m pyxlbert.bench.tables FILE [subject ...]`: results as Markdown, the way `docs/benchmarks/` shows them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pyxlbert.bench.report import is_peer


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of every contestant of one subject's rows, ours first; the ratio is the best peer's over ours."""
    names = list(dict.fromkeys(name for row in rows for name in row["timings"]))
    names.sort(key=lambda name: (name != "pyxlbert", name.startswith("pyxlbert")))
    memory = any(row.get("memory") for row in rows)
    head = ["case", "dtype", *("ours" if name == "pyxlbert" else name for name in names), "ratio", "of limit"]
    head += ["ours MB", "best peer MB"] if memory else []
    lines = [" | ".join(head), "|".join("---" for _ in head)]
    for row in rows:
        # None: it has no time, and `failed` says why.
        ours = row["timings"].get("pyxlbert", {}).get("median")
        peers = {name: t["median"] for name, t in row["timings"].items() if is_peer(name)}
        best = min(peers, key=peers.__getitem__) if peers else None
        cells = [row["case"], row["dtype"]]
        cells += [_ms(row["timings"][name]["median"]) if name in row["timings"] else "" for name in names]
        cells += [f"{peers[best] / ours:.2f}" if best and ours else ""]
        cells += [f"{row['limit'] / ours:.0%}" if row["limit"] and ours else ""]
        if memory:
            cells += [_mb(row["memory"].get(name)) for name in ("pyxlbert", best)]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" if " | " in line else f"|{line}|" for line in lines)


def several(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of ours and of the best peer for rows of several subjects."""
    lines = ["| op | case | dtype | ours | best peer | ratio | of limit |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        ours = row["timings"].get("pyxlbert", {}).get("median")
        best = min((t["median"] for name, t in row["timings"].items() if is_peer(name)), default=None)
        cells = [row["subject"], row["case"], row["dtype"], *("" if one is None else _ms(one) for one in (ours, best))]
        cells += [
            f"{best / ours:.2f}" if best and ours else "",
            f"{row['limit'] / ours:.0%}" if row["limit"] and ours else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def document(results: dict[str, Any]) -> str:
    """A page of Markdown: the machine, the commands, a table a subject, and what has no time."""
    lines = ["# pyxlbert bench", "", ", ".join(f"{name} {value}" for name, value in results["device"].items()), ""]
    lines += [f"- `{command}`" for command in dict.fromkeys(row["command"] for row in results["rows"])]
    for subject in dict.fromkeys(row["subject"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["subject"] == subject]
        lines += ["", f"## {subject}", "", "Milliseconds.", "", table(rows)]
        for row in rows:
            lines += [f"- {row['case']} {row['dtype']}: {name}: no time: {why}" for name, why in row["failed"].items()]
    return "\n".join(lines) + "\n"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _mb(count: int | None) -> str:
    return "" if count is None else f"{max(count, 0) / 1e6:.0f}"


def main() -> None:
    """Prints a table a subject."""
    path, *wanted = sys.argv[1:]
    rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
    for subject in dict.fromkeys(row["subject"] for row in rows):
        if not wanted or subject in wanted:
            print(f"\n{subject}\n\n{table([row for row in rows if row['subject'] == subject])}")


if __name__ == "__main__":
    main()
