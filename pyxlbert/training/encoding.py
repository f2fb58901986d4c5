"""From texts and words to rows of ids, cut or in windows, with the special tokens around them.

A text is tokenised whole and without special tokens, and cut here: so a piece is known to be a word's first wherever a
window begins, and all families go the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyxlbert.text import TextTokenizer
from pyxlbert.text.tokenizer import load_tokenizer, well_formed

if TYPE_CHECKING:
    import tokenizers

# The library hands back one object per text: slices keep few of them alive.
_SLICE = 4096


class Pieces(NamedTuple):
    """One text's pieces, without special tokens.

    Shape: n pieces.
    """

    ids: np.ndarray  # int32 [n]
    words: np.ndarray  # int32 [n], the word that each belongs to; of plain text as the library counts them
    offsets: np.ndarray  # int32 [n, 2], characters, of words in each word


class Window(NamedTuple):
    """A row for the model.

    Shape: n places.
    """

    ids: np.ndarray  # int32 [n]
    types: np.ndarray  # int32 [n]
    first: int  # place of the first piece of the text, or of the second text of a pair
    begin: int  # which of its pieces that is
    count: int  # how many of them follow


class Cut(NamedTuple):
    """A part of a text's pieces.

    Where windows overlap, a piece belongs to that in which it has most pieces around it: `own_begin` to `own_end`.
    """

    begin: int
    end: int
    own_begin: int
    own_end: int


def windows(length: int, room: int, stride: int) -> list[Cut]:
    """The parts of `length` pieces, at most `room` each, that cover all of them.

    Args:
        length: 0 gives one empty part.
        room: at least 1.
        stride: how many pieces a part shares with the one before; less than `room`.

    Raises:
        ValueError: the stride does not fit.
    """
    if room < 1 or not 0 <= stride < room:
        raise ValueError(f"stride: got {stride}, wanted 0 to {room - 1}: less than the {room} pieces of a window")
    starts = [0]
    while starts[-1] + room < length:
        starts.append(starts[-1] + room - stride)
    # Half of what two parts share belongs to each.
    borders = [0, *(start + stride // 2 for start in starts[1:]), length]
    return [
        Cut(start, min(start + room, length), borders[number], borders[number + 1])
        for number, start in enumerate(starts)
    ]


@dataclass(frozen=True)
class _Template:
    """Special tokens before, between and behind the texts, with their types, and the texts' own types."""

    ids: tuple[np.ndarray, ...]
    types: tuple[np.ndarray, ...]
    text_types: tuple[int, ...]

    @property
    def added(self) -> int:
        return sum(len(part) for part in self.ids)

    def fill(self, texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        ids, types = [self.ids[0]], [self.types[0]]
        for number, text in enumerate(texts):
            ids += [text, self.ids[number + 1]]
            types += [np.full(len(text), self.text_types[number], dtype=np.int32), self.types[number + 1]]
        return np.concatenate(ids), np.concatenate(types)


def _template(tokenizer: tokenizers.Tokenizer, pair: bool) -> _Template:
    probe = tokenizer.encode("a", "a") if pair else tokenizer.encode("a")
    special = np.array(probe.special_tokens_mask, dtype=bool)
    ids, types = np.array(probe.ids, dtype=np.int32), np.array(probe.type_ids, dtype=np.int32)
    which = np.array([-1 if sequence is None else sequence for sequence in probe.sequence_ids])
    edges: list[int] = [0]
    text_types = []
    for number in range(2 if pair else 1):
        places = np.flatnonzero((which == number) & ~special)
        if not len(places):
            raise ValueError("tokenizer: gives no token for the letter a, so that its special tokens are not known")
        edges += [int(places[0]), int(places[-1]) + 1]
        text_types.append(int(types[places[0]]))
    edges.append(len(ids))
    parts = list(zip(edges[::2], edges[1::2], strict=True))
    return _Template(tuple(ids[a:b] for a, b in parts), tuple(types[a:b] for a, b in parts), tuple(text_types))


class TaskTokenizer:
    """A model's tokenizer as tasks need it.

    Args:
        directory: the model's.
        max_positions: rows of its position table; None where any length is taken.
        max_length: the most places of a row, special tokens included; None takes the directory's own limit, and 512
            where it has none.

    Attributes:
        max_length: the limit that holds.
        shortened: how many texts, pairs and questions were cut to it since `tell_of_cuts` was called last.

    Raises:
        OSError, ValueError: as `TextTokenizer.from_directory`; `max_length` is more than the model takes, or leaves no
            room for a text.
    """

    def __init__(self, directory: str | Path, max_positions: int | None, max_length: int | None = None) -> None:
        directory = Path(directory)
        own = TextTokenizer.from_directory(directory, max_positions)
        if max_length is None:
            max_length = min(own.max_length, 512)
        elif max_positions is not None and max_length > max_positions:
            raise ValueError(f"max_length: got {max_length}, wanted at most {max_positions}, the model's positions")
        self.max_length = max_length
        self.largest_id = own.largest_id
        self.pad_id, self.pad_left, self._cut_left = own.pad_id, own.pad_left, own.cut_left
        if self.pad_id is None:
            raise ValueError(f"{directory}: the tokenizer has no padding token")
        self._tokenizer = load_tokenizer(directory)
        self._words = _for_words(load_tokenizer(directory))
        self.shortened = 0
        self._single, self._pair = _template(self._tokenizer, False), _template(self._tokenizer, True)
        if max_length <= self._pair.added + 1:
            raise ValueError(
                f"max_length: got {max_length}, wanted more than {self._pair.added + 1}: the special tokens of a pair "
                "and a piece of each text"
            )

    @property
    def room(self) -> int:
        """How many pieces of one text fit in a row."""
        return self.max_length - self._single.added

    def texts(self, texts: Sequence[str]) -> list[Pieces]:
        """The pieces of texts, whole."""
        return _pieces(self._tokenizer, [well_formed(text) for text in texts])

    def words(self, sentences: Sequence[Sequence[str]]) -> list[Pieces]:
        """The pieces of words. A word of which the tokenizer leaves nothing has none."""
        return _pieces(self._words, [[well_formed(word) for word in words] for words in sentences], True)

    def single(self, pieces: Pieces) -> Window:
        """A text cut to the limit: its end is lost, its beginning where the directory says so."""
        begin, end = self._kept(len(pieces.ids), self.room)
        self.shortened += len(pieces.ids) > self.room
        return self.part(pieces, begin, end)

    def part(self, pieces: Pieces, begin: int, end: int) -> Window:
        """A row with the pieces from `begin` to before `end`."""
        ids, types = self._single.fill([pieces.ids[begin:end]])
        return Window(ids, types, len(self._single.ids[0]), begin, end - begin)

    def pair(self, first: Pieces, second: Pieces) -> Window:
        """Two texts in a row: of a pair that is too long, the longer text loses pieces until both fit."""
        room = self.max_length - self._pair.added
        a, b = len(first.ids), len(second.ids)
        self.shortened += a + b > room
        if a + b > room:
            # The shorter keeps all that leaves the longer at least as much.
            short = min(a, b, room // 2)
            a, b = (short, room - short) if a <= b else (room - short, short)
        (start, end), (begin, stop) = self._kept(len(first.ids), a), self._kept(len(second.ids), b)
        ids, types = self._pair.fill([first.ids[start:end], second.ids[begin:stop]])
        place = len(self._pair.ids[0]) + a + len(self._pair.ids[1])
        return Window(ids, types, place, begin, stop - begin)

    def question(self, question: Pieces, text: Pieces, stride: int, most: int) -> list[tuple[Window, Cut]]:
        """Rows with a question and a part of a text each, which cover the text.

        Args:
            question: cut to `most` pieces.
            text: any length.
            stride: how many pieces of the text two rows that follow each other share.
            most: pieces of the question.

        Raises:
            ValueError: the question leaves no room for a text, or the stride none for it to go on.
        """
        asked = question.ids[:most]
        self.shortened += len(question.ids) > most
        room = self.max_length - self._pair.added - len(asked)
        if room < 1:
            raise ValueError(
                f"max_question: got {most}, wanted at most {self.max_length - self._pair.added - 1}, so that a row of "
                f"{self.max_length} tokens has room for the text"
            )
        cuts = windows(len(text.ids), room, stride)
        place = len(self._pair.ids[0]) + len(asked) + len(self._pair.ids[1])
        rows = []
        for cut in cuts:
            ids, types = self._pair.fill([asked, text.ids[cut.begin : cut.end]])
            rows.append((Window(ids, types, place, cut.begin, cut.end - cut.begin), cut))
        return rows

    def tell_of_cuts(self, say: Callable[[str], None], what: object) -> None:
        """Says how many texts were cut, if any were.

        Args:
            say: takes a line for the person who waits.
            what: where the texts are from.
        """
        if self.shortened:
            say(f"{what}: {self.shortened} texts or pairs are longer than {self.max_length} tokens and were cut")
        self.shortened = 0

    def class_place(self, length: int) -> int:
        """Where the classification token of a row of so many ids is: first, or where none is before the text, last."""
        return 0 if len(self._pair.ids[0]) else length - 1

    def _kept(self, length: int, most: int) -> tuple[int, int]:
        kept = min(length, most)
        return (length - kept, length) if self._cut_left else (0, kept)

    def pad(self, rows: Sequence[np.ndarray], fill: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Rows side by side ``[B, T]``, the shorter ones filled up on the side on which the model has its padding."""
        longest = max((len(row) for row in rows), default=0)
        result = torch.full((len(rows), longest), fill, dtype=dtype)
        for number, row in enumerate(rows):
            place = slice(longest - len(row), None) if self.pad_left else slice(len(row))
            result[number, place] = torch.from_numpy(np.asarray(row)).to(dtype)
        return result

    def unpadded(self, values: np.ndarray, row: Window) -> np.ndarray:
        """What the model gave ``[T, ...]`` for the places of a row, without its padding."""
        length = len(row.ids)
        return values[len(values) - length :] if self.pad_left else values[:length]

    def batch(self, rows: Sequence[Window]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `token_type_ids` of rows, int64 ``[B, T]``."""
        return {
            "input_ids": self.pad([row.ids for row in rows], self.pad_id),
            "attention_mask": self.pad([np.ones(len(row.ids), dtype=np.int64) for row in rows], 0),
            "token_type_ids": self.pad([row.types for row in rows], 0),
        }


def _pieces(tokenizer: tokenizers.Tokenizer, texts: list, words: bool = False) -> list[Pieces]:
    found: list[Pieces] = []
    for start in range(0, len(texts), _SLICE):
        part = texts[start : start + _SLICE]
        for e in tokenizer.encode_batch(part, is_pretokenized=words, add_special_tokens=False):
            numbers = np.array([-1 if word is None else word for word in e.word_ids], dtype=np.int32)
            offsets = np.array(e.offsets, dtype=np.int32).reshape(-1, 2)
            found.append(Pieces(np.array(e.ids, dtype=np.int32), numbers, offsets))
    return found


def _for_words(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer of words one by one: pairs of bytes have a mark for the space before each."""
    from tokenizers import pre_tokenizers

    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def first_pieces(pieces: Pieces, count: int) -> np.ndarray:
    """int64 ``[count]``, of each word the place of its first piece; -1 for a word without any."""
    places = np.full(count, -1, dtype=np.int64)
    words, first = np.unique(pieces.words, return_index=True)
    places[words[words >= 0]] = first[words >= 0]
    return places
