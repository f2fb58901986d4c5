"""Tables of texts: TSV, JSON lines, or plain text with one text a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyxlbert.files import parsed_json, read_lines

# Characters of a list of columns in an error.
_MOST = 300
#: Endings of the files that are read, in the words of an error.
FORMATS = (".tsv", ".csv", ".txt", ".jsonl")


@dataclass(frozen=True)
class Place:
    """Where something was read.

    Attributes:
        path: of the file.
        at: the number of its line, from 1, or the name of what `kind` says.
        kind: what the file is made of.
    """

    path: str
    at: int | str
    kind: str = "line"

    def __str__(self) -> str:
        return f"{self.path}: {self.kind} {self.at}"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        place: the line.
        values: what it holds, by the names that the caller has for the columns.
    """

    place: Place
    values: dict[str, Any]


def read_table(path: str | Path, columns: Mapping[str, str | int], header: bool = True) -> list[Row]:
    """The rows of a table.

    A ``.jsonl`` file has an object a line, ``.txt`` one text a line, which is its only column; every other name is a
    table whose columns are divided by tabs, in which quotation marks mean nothing. Empty lines at the end of a file
    count for nothing; in a ``.txt`` file every line is a row, an empty one too.

    Args:
        path: the file, UTF-8.
        columns: of each name that the caller has for a column, the column: its name in the header or the object, or
            its number from 1.
        header: whether the first line of a table names its columns.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not UTF-8, lacks a column, has more or fewer columns than the header, or is no JSON
            object; a column has a name that the file does not have; two names stand for one column; the file has no
            rows.
    """
    path = str(path)
    lines = read_lines(path)
    suffix = Path(path).suffix
    if suffix == ".txt":
        wanted = [name for name in columns if name != "text"]
        if wanted:
            raise ValueError(f"{path}: plain text has one column, the text; wanted a table for the {wanted[0]}")
        rows = [Row(Place(path, number), dict.fromkeys(columns, line)) for number, line in enumerate(lines, start=1)]
    elif suffix == ".jsonl":
        rows = _json_rows(path, lines, columns)
    else:
        rows = _table_rows(path, lines, columns, header)
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    return rows


def _json_rows(path: str, lines: list[str], columns: Mapping[str, str | int]) -> list[Row]:
    rows = []
    keys = {name: name if isinstance(one, int) or one.isdecimal() else one for name, one in columns.items()}
    _check_apart(path, columns, keys)
    for number, line in enumerate(_without_end(lines), start=1):
        place = Place(path, number)
        found = parsed_json(str(place), line)
        if not isinstance(found, dict):
            raise ValueError(f"{place} is a JSON {type(found).__name__}, wanted an object")
        values = {}
        for name, key in keys.items():
            if found.get(key) is None:
                raise ValueError(f"{place} has no {key!r}; it has {_listed(found) or 'nothing'}")
            values[name] = found[key]
        rows.append(Row(place, values))
    return rows


def _table_rows(path: str, lines: list[str], columns: Mapping[str, str | int], header: bool) -> list[Row]:
    lines = _without_end(lines)
    names = lines[0].split("\t") if header and lines else None
    places = {name: _column(path, column, names) for name, column in columns.items()}
    _check_apart(path, columns, places)
    least = len(names) if names else max(places.values()) + 1
    rows = []
    for number, line in enumerate(lines[1:] if names else lines, start=2 if names else 1):
        cells = line.split("\t")
        # Without a header nobody says how many there should be: further columns are allowed.
        if len(cells) < least or (names and len(cells) > least):
            wanted = f"{least}, as the header has" if names else f"at least {least}"
            raise ValueError(f"{path}: line {number} has {len(cells)} columns, wanted {wanted}")
        rows.append(Row(Place(path, number), {name: cells[index] for name, index in places.items()}))
    return rows


def _check_apart(path: str, columns: Mapping[str, str | int], places: Mapping[str, str | int]) -> None:
    """That no two names stand for one column.

    Raises:
        ValueError: two do, as a column's name and its number may.
    """
    taken: dict[str | int, str] = {}
    for name, place in places.items():
        other = taken.setdefault(place, name)
        if other != name:
            raise ValueError(
                f"{path}: {name}_column {columns[name]!r} and {other}_column {columns[other]!r} are the same column; "
                "wanted two"
            )


def _column(path: str, column: str | int, names: list[str] | None) -> int:
    """The column's index from 0."""
    if names and column in names:
        if names.count(str(column)) > 1:
            count = names.count(str(column))
            raise ValueError(f"{path}: its header names {count} columns {column!r}; wanted one, or the column's number")
        return names.index(str(column))
    if str(column).isdecimal() and len(str(column)) < 10 and int(column) >= 1:
        if names and int(column) > len(names):
            raise ValueError(f"{path}: has {len(names)} columns, wanted a column {column}")
        return int(column) - 1
    there = f"its header has {_listed(names)}" if names else "without a header columns go by number"
    raise ValueError(f"{path}: has no column {column!r}; {there}")


def _listed(names: Iterable[str]) -> str:
    """Names of columns, cut: a file that is no table may have megabytes in its first line."""
    listed = ", ".join(map(repr, names))
    return listed if len(listed) <= _MOST else f"{listed[:_MOST]}…"


def _without_end(lines: list[str]) -> list[str]:
    end = len(lines)
    while end and not lines[end - 1].strip():
        end -= 1
    return lines[:end]
