"""Text files as sentences and the ends of documents, read a line at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyxlbert.files import named_path, refuse_encoded, shown

#: How sentences and documents lie in a file: a sentence a line with a blank line between documents; raw text whose
#: documents stand between blank lines; raw text whose files are documents, a blank line being the end of a sentence.
LAYOUTS = ("sentences", "paragraphs", "files")

# So much raw text is looked at for ends of sentences at a time.
_MOST_CHARACTERS = 1 << 16

# A full stop and what closes the sentence, with white space and the beginning of another behind it, or a Chinese one.
_END = re.compile(r"""([.!?…]["'”’)\]]*)\s+(?=["'“‘(\[]*(?:[^\W_a-z]))|([。！？]["”’」』）]*)(?=\S)""")


def check_files(paths: Sequence[str | Path], argument: str = "files") -> list[Path]:
    """The files as paths; messages begin with the argument's name.

    Raises:
        TypeError: it is one name, or one of them is no name.
        ValueError: there is none, or one is named twice, can be read once alone, or has a name that no file can have.
        FileNotFoundError, IsADirectoryError: one is no file.
    """
    if isinstance(paths, (str, Path)):
        raise TypeError(f"{argument}: got {type(paths).__name__}, wanted a list of files")
    files = [named_path(argument, path) for path in paths]
    if not files:
        raise ValueError(f"{argument}: got none, wanted at least one text file")
    taken: set[tuple[int, int]] = set()  # a corpus may be some hundred thousand files
    for path in files:
        if path.is_dir():
            raise IsADirectoryError(f"{argument}: {str(path)!r} is a directory, wanted a text file")
        if not path.exists():
            raise FileNotFoundError(f"{argument}: {shown(path)} does not exist")
        if not path.is_file():
            raise ValueError(f"{argument}: {str(path)!r} is a device or a pipe, wanted a file, which can be read twice")
        if on_disk(path) in taken:
            raise ValueError(f"{argument}: got {str(path)!r} twice, wanted each file once")
        taken.add(on_disk(path))
    return files


def on_disk(path: Path) -> tuple[int, int]:
    """What two names of one file have in common."""
    found = path.stat()
    return found.st_dev, found.st_ino


def named(paths: Sequence[str | Path]) -> str:
    """Files in a few words: the first, and how many follow."""
    more = len(paths) - 1
    return f"{paths[0]} and {more} more" if more else str(paths[0])


def check_layout(layout: str) -> None:
    """Raises ValueError for what is none of `LAYOUTS`."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, wanted one of {', '.join(LAYOUTS)}")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without white space around them.

    Raises:
        ValueError: a line is not UTF-8; the message has the file and the line.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                refuse_encoded(path, line[:4])
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                place = f"{error.reason} at byte {error.start}"
                raise ValueError(f"{path}: line {number} is not UTF-8: {place}") from None


def read_sentences(path: Path, layout: str) -> Iterator[str | None]:
    """The sentences of a file, and None behind each document; documents without a sentence are left out.

    Args:
        path: the file, in UTF-8.
        layout: one of `LAYOUTS`.

    Raises:
        ValueError: the layout is none, or a line is not UTF-8; the message has the file and the line.
        OSError: the file cannot be read.
    """
    check_layout(layout)
    inside = False
    for one in _marked(path, layout):
        if one is not None or inside:
            yield one
        inside = one is not None
    if inside:
        yield None


def _marked(path: Path, layout: str) -> Iterator[str | None]:
    """Sentences and ends of documents, of which several may follow each other."""
    if layout == "sentences":
        for line in read_lines(path):
            yield line or None
        return
    text = ""
    for line in read_lines(path):
        if line:
            text = f"{text} {line}" if text else line
            if len(text) > _MOST_CHARACTERS:
                *whole, rest = split_sentences(text)
                # What has no end for so long is a sentence all the same.
                text = "" if len(rest) > _MOST_CHARACTERS // 2 else rest
                yield from whole if text else [*whole, rest]
            continue
        if text:
            yield from split_sentences(text)
            text = ""
        if layout == "paragraphs":
            yield None
    if text:
        yield from split_sentences(text)


def split_sentences(text: str) -> list[str]:
    """Sentences of raw text: each ends with a full stop, a question or an exclamation mark, and what closes it.

    A capital, a digit or a letter of a script without capitals has to follow, so "e.g. this" is not cut; "Dr. Smith"
    is, which hurts no objective here.
    """
    marked = _END.sub(lambda found: f"{found[0].rstrip()}\n", text)
    return [part for part in (piece.strip() for piece in marked.split("\n")) if part]
