"""Questions about texts, as SQuAD 1.1 and 2.0 have them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyxlbert.files import read_json
from pyxlbert.training.data.table import Place


@dataclass(frozen=True)
class Answer:
    """A part of a text: its first character's place and what it says."""

    start: int
    text: str

    @property
    def end(self) -> int:
        """The place behind its last character."""
        return self.start + len(self.text)


@dataclass(frozen=True)
class Question:
    """A question about a text.

    Attributes:
        place: where it stands.
        question, context: the two texts.
        answers: those that people gave; none where the text does not answer it; None where they are not known.
        name: its id in the file.
    """

    place: Place
    question: str
    context: str
    answers: tuple[Answer, ...] | None = None
    name: str | None = None


def read_squad(path: str | Path, nulls: bool, labelled: bool = True) -> list[Question]:
    """The questions of a JSON file: ``data``, ``paragraphs``, ``qas``.

    Args:
        path: the file.
        nulls: whether a question may have no answer: with ``is_impossible``, or an empty list.
        labelled: whether answers are read.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON, a field is missing or of another type, an answer does not stand in its text where it
            is said to, or a question has none and `nulls` is False; the message has the question's id.
    """
    path = Path(path)
    questions = []
    for article, entry in enumerate(_field(read_json(path), "data", list, f"{path}")):
        for number, paragraph in enumerate(_field(entry, "paragraphs", list, f"{path}: data[{article}]")):
            where = f"{path}: data[{article}].paragraphs[{number}]"
            context = _field(paragraph, "context", str, where)
            for at, asked in enumerate(_field(paragraph, "qas", list, where)):
                question = _field(asked, "question", str, f"{where}.qas[{at}]")
                name = str(asked.get("id", f"{article}.{number}.{at}"))
                place = Place(str(path), name, "question")
                answers = _answers(asked, context, place, nulls) if labelled else None
                questions.append(Question(place, question, context, answers, name))
    if not questions:
        raise ValueError(f"{path}: holds no questions")
    return questions


def _field(value: Any, name: str, kind: type, where: str) -> Any:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise ValueError(f"{where}: {name} is {found!r}, wanted a {'string' if kind is str else kind.__name__}")
    return found


def _answers(asked: dict[str, Any], context: str, place: Place, nulls: bool) -> tuple[Answer, ...]:
    impossible = asked.get("is_impossible", False)
    if not isinstance(impossible, bool):
        raise ValueError(f"{place}: is_impossible is {impossible!r}, wanted true or false")
    listed = [] if impossible else _field(asked, "answers", list, str(place))
    answers = []
    for one in listed:
        text = _field(one, "text", str, f"{place}: answers")
        start = _field(one, "answer_start", int, f"{place}: answers")
        if start < 0 or not text or context[start : start + len(text)] != text:
            raise ValueError(
                f"{place}: the answer {text!r} does not stand at character {start} of the text, which has "
                f"{context[max(0, start) : max(0, start) + len(text)]!r} there"
            )
        answers.append(Answer(start, text))
    if not answers and not nulls:
        raise ValueError(f"{place} has no answer; with the setting nulls a question may have none")
    return tuple(answers)
