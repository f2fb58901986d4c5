"""XLNet's sequences: each row of a batch goes on where it was in the batch before, so that its memories are its past.

In each epoch the documents are put in another order and become one text, which is cut into as many streams as there are
rows. Row b of step k is a function of the seed, the epoch, k and b; only what it covers is read.

Source:
    Yang et al., "XLNet: Generalized Autoregressive Pretraining for Language Understanding", 2019; where the paper is
    silent, what its authors' code does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from pyxlbert.training.options import MOST_SEED
from pyxlbert.training.permutation import PermutationBatch, PermutationLanguageModeling
from pyxlbert.training.pretraining.rules import MOST_LENGTH, require_integer
from pyxlbert.training.pretraining.store import TokenStore
from pyxlbert.training.pretraining.vocabularies import Vocabulary


@dataclass(frozen=True, kw_only=True)
class SegmentOptions:
    """How sequences are made; see `pyxlbert.training.PermutationLanguageModeling`, which also says what fits.

    Attributes:
        max_length: T, tokens of a row, the three special ones included.
        reuse_len: the first tokens of a row, which the next one remembers; 0: rows remember nothing.
        num_predict: targets of a row; None: a sixth of its tokens.
        perm_size: tokens that share an order; None: the largest size that fits.
        bi_data: half of the streams run backwards.
        max_gram, context, whole_words: of the spans that are predicted.
        seed: the same seed gives the same rows.
    """

    max_length: int = 128
    reuse_len: int = 64
    num_predict: int | None = None
    perm_size: int | None = None
    bi_data: bool = False
    max_gram: int = 5
    context: int = 6
    whole_words: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise TypeError(f"{field.name}: got {value!r}, wanted True or False")
            if field.type != "bool" and not (value is None and "None" in field.type):
                require_integer(field.name, value, 0, MOST_SEED if field.name == "seed" else MOST_LENGTH)

    def sampler(
        self, *, sep_id: int, cls_id: int, word_starts: np.ndarray | None, batch_size: int
    ) -> PermutationLanguageModeling:
        """What makes the rows; see `PermutationLanguageModeling`.

        Raises:
            ValueError: the sizes do not fit each other; the message names one.
        """
        return PermutationLanguageModeling(
            batch_size,
            sep_id=sep_id,
            cls_id=cls_id,
            seq_len=self.max_length,
            reuse_len=self.reuse_len,
            num_predict=max(1, self.max_length // 6) if self.num_predict is None else self.num_predict,
            perm_size=self.perm_size,
            bi_data=self.bi_data,
            word_starts=word_starts,
            max_gram=self.max_gram,
            context=self.context,
            whole_words=self.whole_words,
        )


class _Text:
    """All documents in an order, as one text: `Tokens` and `SentenceBorders` of any part of it."""

    def __init__(self, store: TokenStore, order: np.ndarray) -> None:
        self._store, self._order = store, order
        begins = store.document_tokens
        self._sources = begins[:-1][order]  # where each document lies in the store
        self._places = np.concatenate([[0], np.cumsum((begins[1:] - begins[:-1])[order])])  # and here

    def __len__(self) -> int:
        return int(self._places[-1])

    def read(self, begin: int, end: int) -> np.ndarray:
        """int64 ``[end - begin]``, the tokens there."""
        parts = []
        at = int(np.searchsorted(self._places, begin, side="right")) - 1
        while begin < end:
            stop = min(end, int(self._places[at + 1]))
            shift = int(self._sources[at]) - int(self._places[at])
            parts.append(self._store.tokens[begin + shift : stop + shift])
            begin, at = stop, at + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)

    def borders(self, begin: int, end: int) -> np.ndarray:
        """Places from `begin` to before `end` where a sentence begins, ascending."""
        found = []
        at = max(0, int(np.searchsorted(self._places, begin, side="right")) - 1)
        while at < len(self._order) and self._places[at] < end:
            first, last = self._store.documents[self._order[at] : self._order[at] + 2]
            shift = int(self._places[at]) - int(self._sources[at])
            sentences = self._store.sentences[first:last]
            low, high = np.searchsorted(sentences, (begin - shift, end - shift))
            found.append(sentences[low:high] + shift)
            at += 1
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


class _Stream:
    """A part of a text, forwards or backwards."""

    def __init__(self, text: _Text, begin: int, length: int, backwards: bool) -> None:
        self._text, self._begin, self._length, self._backwards = text, begin, length, backwards

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, places: slice) -> np.ndarray:
        start, stop, _ = places.indices(self._length)
        if self._backwards:
            start, stop = self._length - stop, self._length - start
        ids = self._text.read(self._begin + start, self._begin + stop)
        return ids[::-1] if self._backwards else ids

    def between(self, low: int, high: int) -> np.ndarray:
        """See `SentenceBorders`."""
        low, high = max(0, low), min(self._length, high)
        if self._backwards:
            low, high = self._length - high, self._length - low
        found = self._text.borders(self._begin + low + 1, self._begin + high) - self._begin
        return self._length - found[::-1] if self._backwards else found

    def up_to(self, place: int) -> int | None:
        """See `SentenceBorders`."""
        reach = 64
        while place > 0:
            found = self.between(max(0, place - reach), min(place + 1, self._length))
            if len(found):
                return int(found[-1])
            if reach >= place:
                break
            reach *= 4
        return None

    def from_on(self, place: int) -> int | None:
        """See `SentenceBorders`."""
        reach = 64
        while place < self._length:
            found = self.between(max(0, place - 1), place + reach)
            if len(found):
                return int(found[0])
            if place + reach >= self._length:
                break
            reach *= 4
        return None


def own_rows(
    batch_size: int, bi_data: bool, rank: int = 0, processes: int = 1, part: int = 0, parts: int = 1
) -> list[int]:
    """`Segments.rows`, of which nothing is known but its sizes."""
    streams = batch_size // 2 if bi_data else batch_size
    shares = processes * parts
    if streams % shares:
        rows = "pairs of rows" if bi_data else "rows"
        raise ValueError(
            f"batch_size: got {batch_size}, wanted a number of {rows} that {shares} divides: processes {processes}, "
            f"passes {parts}, and each keeps its rows, for memories belong to them"
        )
    share = streams // shares
    first = (rank * parts + part) * share
    own = list(range(first, first + share))
    return own + [streams + row for row in own] if bi_data else own


class Segments:
    """Batches of sequences, one for each step.

    Args:
        store: the text.
        vocabulary: whose tokens they are.
        options: how sequences are made.
        batch_size: rows a step, all processes together; even with `bi_data`.

    Attributes:
        epoch_steps: steps of an epoch.

    Raises:
        ValueError: sizes do not fit each other, or the text gives no batch.
    """

    def __init__(self, store: TokenStore, vocabulary: Vocabulary, options: SegmentOptions, batch_size: int) -> None:
        require_integer("batch_size", batch_size, 1)
        self.store, self.options, self.batch_size = store, options, batch_size
        self._sampler = options.sampler(
            sep_id=vocabulary.sep_id,
            cls_id=vocabulary.cls_id,
            word_starts=vocabulary.word_starts,
            batch_size=batch_size,
        )
        self._streams = batch_size // 2 if options.bi_data else batch_size
        self._length = len(store.tokens) // self._streams
        if self._length < options.max_length:
            raise ValueError(
                f"batch_size: got {batch_size}, but the text has {len(store.tokens)} tokens: wanted at least "
                f"{self._streams * options.max_length} for rows of {options.max_length}, so fewer rows, or more text"
            )
        self.epoch_steps = (self._length - options.max_length) // self._sampler.step + 1
        self._text: tuple[int, _Text | None] = (-1, None)

    def identity(self) -> dict[str, object]:
        """What another source must have in common for its steps to be the same."""
        return {"kind": "segments", "text": self.store.key, "batch_size": self.batch_size, **vars(self.options)}

    def rows(self, rank: int = 0, processes: int = 1, part: int = 0, parts: int = 1) -> list[int]:
        """The rows that a process has in each step, or in one of several equal parts of it.

        With `bi_data` the first half of them runs forwards, the second are the same streams backwards, as a model wants
        its batch.

        Raises:
            ValueError: the rows cannot be shared out equally: memories belong to rows, which stay where they are.
        """
        return own_rows(self.batch_size, self.options.bi_data, rank, processes, part, parts)

    def batch(self, step: int, rank: int = 0, processes: int = 1, part: int = 0, parts: int = 1) -> dict[str, Tensor]:
        """What a process trains on in a step.

        Returns:
            The tensors of `PermutationBatch.model_inputs`, `rows`, int64 ``[B]``, and `begins`, bool ``[1]``: whether
            the streams are new, so that memories are of another text.
        """
        return self.collate(step, self.rows(rank, processes, part, parts))

    def collate(self, step: int, rows: Sequence[int]) -> dict[str, Tensor]:
        """Some rows of a step; see `batch`."""
        epoch, number = divmod(step, self.epoch_steps)
        text, begin = self._epoch_text(epoch), number * self._sampler.step
        made = []
        for row in rows:
            backwards = row >= self._streams
            stream = _Stream(text, row % self._streams * self._length, self._length, backwards)
            rng = np.random.default_rng((self.options.seed, epoch, number, row))
            made.append(self._sampler.example(stream, stream, begin, backwards, rng))
        batch = PermutationBatch.of(made).model_inputs()
        return batch | {"rows": torch.tensor(rows), "begins": torch.tensor([number == 0])}

    def _epoch_text(self, epoch: int) -> _Text:
        if self._text[0] != epoch:
            documents = len(self.store.documents) - 1
            order = np.random.default_rng((self.options.seed, epoch)).permutation(documents)
            self._text = (epoch, _Text(self.store, order))
        return self._text[1]  # type: ignore[return-value]
