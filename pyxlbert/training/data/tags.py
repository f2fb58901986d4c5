"""Files of tagged words: a word and its tag a line, an empty line between sentences."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pyxlbert.files import read_lines
from pyxlbert.training.data.table import Place

#: The tag of a word that belongs to no entity.
OUTSIDE = "O"
_TAG = re.compile(r"O|[BIES]-\S+")
_DOCUMENT = "-DOCSTART-"


@dataclass(frozen=True)
class Sentence:
    """The words of one sentence.

    Attributes:
        place: the line of its first word.
        words: as they stand in the file, or in the text.
        tags: one a word; None where none are known.
        text: what the words were cut from; None for a file with a word a line.
        offsets: of each word, its first character in the text and the one behind its last.
    """

    place: Place
    words: list[str]
    tags: list[str] | None = None
    text: str | None = None
    offsets: list[tuple[int, int]] | None = None


def read_tags(path: str | Path, known: frozenset[str] | None = None) -> list[Sentence]:
    """The sentences of a file in which the first column is the word and the last one its tag.

    Columns are divided by tabs, or where a file has none by spaces. Lines that begin with -DOCSTART- are left out.

    Args:
        path: the file, UTF-8.
        known: the tags that there are; None takes all.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not UTF-8, has another number of columns than the first, or a tag that is not O nor a
            B-, I-, E- or S- with an entity's name, or is not known; the file has no sentences.
    """
    path = str(path)
    sentences: list[Sentence] = []
    words: list[str] = []
    tags: list[str] = []
    columns = begin = 0

    def finish() -> None:
        if words:
            sentences.append(Sentence(Place(path, begin), words.copy(), tags.copy()))
        words.clear()
        tags.clear()

    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            finish()
            continue
        cells = line.split("\t") if "\t" in line else line.split(" ")
        if cells[0].startswith(_DOCUMENT):
            finish()
            continue
        place = Place(path, number)
        columns = columns or len(cells)
        if len(cells) < 2 or len(cells) != columns:
            wanted = columns if columns > 1 else "a word and its tag"
            raise ValueError(f"{place} has {len(cells)} columns, wanted {wanted}: {line!r}")
        tag = cells[-1]
        if not _TAG.fullmatch(tag):
            raise ValueError(f"{place}: the tag is {tag!r}, wanted {OUTSIDE}, or B-, I-, E- or S- and an entity's name")
        if known is not None and tag not in known:
            raise ValueError(f"{place}: the tag is {tag!r}, which the model does not know: {', '.join(sorted(known))}")
        if not words:
            begin = number
        words.append(cells[0])
        tags.append(tag)
    finish()
    if not sentences:
        raise ValueError(f"{path}: holds no words with tags")
    return sentences


# A run of letters and digits, or one other mark; of scripts without spaces between words, one character.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
_WORD = re.compile(rf"[{_ALONE}]|(?:(?![{_ALONE}])\w)+|[^\w\s]")


def split_words(place: Place, text: str) -> Sentence:
    """A text as words: runs of letters and digits, other marks and Chinese characters and kana one by one."""
    found = list(_WORD.finditer(text))
    return Sentence(place, [match.group() for match in found], None, text, [match.span() for match in found])
