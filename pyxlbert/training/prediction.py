"""A trained model over a file: row i of the output is row i of the input."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from pyxlbert.files import check_apart, check_writable, read_lines, real_path, whole_file
from pyxlbert.text.batches import check_count
from pyxlbert.training.data.squad import read_squad
from pyxlbert.training.data.table import Place, read_table
from pyxlbert.training.data.tags import Sentence
from pyxlbert.training.finetune import predictions
from pyxlbert.training.packages import require
from pyxlbert.training.saved import Trained, open_trained
from pyxlbert.training.tasks import Answers, Tagging, Task

# What an input is made of, and so no prediction: left out where a row is a line of cells.
_INPUT = ("text", "pair", "words", "question", "choices")
_CHUNK = 4096


def predict_file(
    model: str | Path,
    source: str | Path,
    output: str | Path,
    *,
    columns: Mapping[str, Any] | None = None,
    words: bool = False,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
    progress: bool | None = False,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Writes a prediction for each row of a file.

    Args:
        model: a directory that `finetune` has written.
        source: ``.txt`` with a text a line (also "-", standard input), ``.jsonl`` with an object a line, a table whose
            columns are divided by tabs, or for questions ``.json`` as SQuAD has it.
        output: ``.jsonl`` with all that is known of a row; ``.tsv`` with what was predicted, below a header; ``.txt``
            with the label, or the entities, alone. It appears whole or not at all.
        columns: settings of the task that say where the texts are, in place of those of the training.
        words: the file has a word a line, its first column, and an empty line between sentences: for taggers.
        batch_size: rows a pass.
        dtype: of the model.
        progress: whether there is a bar; None: on a terminal.
        say: takes a line for the person who waits.

    Returns:
        How many rows.

    Raises:
        OSError: a file is missing, or the output cannot be written.
        ValueError: a line is not what it should be; the message has the file and the line.
        ImportError: a package that the task's rows need is missing.
    """
    path = output_path(output)
    check_count("batch_size", batch_size)
    if columns is not None and not isinstance(columns, Mapping):
        raise TypeError(f"columns: got {type(columns).__name__}, wanted a dict of settings")
    check_apart("output", str(output), path, str(source))
    saved = open_trained(model)
    require("predict", *saved.task.row_packages)
    examples = _examples(saved.task, source, dict(columns or {}), words)
    trained = saved.trained(dtype)
    with whole_file(path) as temporary, temporary.open("x", encoding="utf-8", newline="\n") as file:
        write = _WRITERS[Path(output).suffix](file, trained)
        for start in range(0, len(examples), _CHUNK):
            part = examples[start : start + _CHUNK]
            write(trained.task.rows(part, predictions(trained, part, batch_size, progress)))
    trained.tokenizer.tell_of_cuts(say, source)
    return len(examples)


def output_path(name: str | Path) -> Path:
    """Where predictions may be written.

    Raises:
        ValueError: the name's ending is none that is written, or no file can have the name.
        OSError: its folder is missing or not writable, or it is a folder.
    """
    path = real_path("output", str(name))  # a link keeps pointing where it did
    if Path(name).suffix not in _WRITERS:
        raise ValueError(f"output: got {str(name)!r}, wanted a name that ends in {', '.join(_WRITERS)}")
    check_writable("output", str(name), path)
    return path


def _examples(task: Task, source: str | Path, columns: dict[str, Any], words: bool) -> list[Any]:
    unknown = columns.keys() - task.settings.keys()
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]}: {task.name} has no such column")
    task.settings.update(columns)
    task.check_settings()
    task.check_columns([f"{name}_column" for name in task.columns if f"{name}_column" in task.settings])
    if words:
        if not isinstance(task, Tagging):
            raise ValueError(f"words: the model is trained for {task.name}, wanted a tagger")
        return _read_words(source)
    if Path(source).suffix == ".json":
        if not isinstance(task, Answers):
            raise ValueError(f"{source}: questions about texts, but the model is trained for {task.name}")
        return read_squad(source, nulls=True, labelled=False)
    if str(source) == "-":
        wanted = [name for name in task.columns if name != "text"]
        if wanted:
            raise ValueError(f"standard input has one text a line; wanted a table for the {wanted[0]}")
        lines = read_lines("-")
        places = [Place("standard input", number) for number in range(1, len(lines) + 1)]
        return task.inputs([{"text": line} for line in lines], places)
    rows = read_table(source, task.columns, task.settings["header"])
    return task.inputs([row.values for row in rows], [row.place for row in rows])


def _read_words(source: str | Path) -> list[Sentence]:
    sentences: list[Sentence] = []
    words: list[str] = []
    begin = 1
    for number, line in enumerate([*read_lines(str(source)), ""], start=1):
        if line.strip():
            begin = begin if words else number
            words.append(line.split("\t" if "\t" in line else " ")[0])
        elif words:
            sentences.append(Sentence(Place(str(source), begin), words))
            words = []
    if not sentences:
        raise ValueError(f"{source}: holds no words")
    return sentences


Writer = Callable[[Iterable[Mapping[str, Any]]], None]


def _json_lines(file: TextIO, trained: Trained) -> Writer:
    def write(rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    return write


def _table(file: TextIO, trained: Trained) -> Writer:
    names: list[str] = []

    def write(rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            if not names:
                names.extend(name for name in row if name not in _INPUT)
                file.write("\t".join(names) + "\n")
            file.write("\t".join(_cell(row[name]) for name in names) + "\n")

    return write


def _cell(value: Any) -> str:
    """A value without tabs and line ends."""
    if isinstance(value, list) and all(isinstance(one, str) for one in value) and value:
        return " ".join(value)
    plain = isinstance(value, str) and not set(value) & set("\t\r\n")
    return value if plain else json.dumps(value, ensure_ascii=False, allow_nan=False)


def _plain(file: TextIO, trained: Trained) -> Writer:
    def write(rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            file.write(trained.task.line(row).replace("\n", " ") + "\n")

    return write


_WRITERS: dict[str, Callable[[TextIO, Trained], Writer]] = {".jsonl": _json_lines, ".tsv": _table, ".txt": _plain}
