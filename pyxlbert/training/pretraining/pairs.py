"""BERT's examples: pairs of passages, of which the second follows the first or is from anywhere, with masks.

ALBERT's are the same, but where BERT's second passage would be from anywhere, the two passages change places, and what
is predicted is spans of whole words.

The passages are those of the published `create_pretraining_data`: a document's sentences are collected until they fill
a window, cut in two at random, and half of the time the second part is replaced by one that begins at a random sentence
of another document, while what it was goes on to the next example. What is drawn here anew in each epoch is drawn there
once for ten copies of the text.

Every row is a function of the seed, the epoch and its number: processes, worker processes and a run that goes on make
the same rows without knowing of each other. Only the places of passages are planned for all rows, a block of documents
at a time; tokens are read and masks drawn where a row is used.

Source:
    Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2019, appendix A.1; Lan et al., "ALBERT: A
    Lite BERT for Self-supervised Learning of Language Representations", 2020, sections 3.1 and 4.1; where the papers
    are silent, what their authors' codes do.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyxlbert.training.options import MOST_SEED
from pyxlbert.training.pretraining.masking import NO_LABEL, choose, mask
from pyxlbert.training.pretraining.rules import MOST_LENGTH, require_integer, require_share
from pyxlbert.training.pretraining.store import TokenStore
from pyxlbert.training.pretraining.vocabularies import Vocabulary

# Tokens of the documents that are planned, and whose examples are shuffled, together.
_BLOCK_TOKENS = 1 << 18


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """How examples are made.

    Attributes:
        max_length: tokens of a row at most, the three special ones included.
        short_share: of the documents whose windows have a random length.
        mask_share: of a row's tokens, which are predicted.
        max_predictions: of a row at most; None: as `mask_share` says.
        swapped: half of the rows have their passages in the wrong order, as ALBERT learns it; False: half of the second
            passages are from anywhere, as BERT does.
        whole_words: predict all pieces of a word or none; None: as published, which is True if `swapped`.
        max_gram: words, without whole words tokens, of the longest span that is predicted, see
            `pyxlbert.training.pretraining.masking.choose`; None: as published, which is 3 if `swapped`, else 1.
        seed: the same seed gives the same rows.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value is of another type.
    """

    max_length: int = 128
    short_share: float = 0.1
    mask_share: float = 0.15
    max_predictions: int | None = 20
    swapped: bool = False
    whole_words: bool | None = None
    max_gram: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.whole_words is None:
            object.__setattr__(self, "whole_words", self.swapped)
        if self.max_gram is None:
            object.__setattr__(self, "max_gram", 3 if self.swapped else 1)
        require_integer("max_gram", self.max_gram, 1)
        require_integer("max_length", self.max_length, 5, MOST_LENGTH)
        require_integer("seed", self.seed, 0, MOST_SEED)
        if self.max_predictions is not None:
            require_integer("max_predictions", self.max_predictions, 1)
        require_share("short_share", self.short_share)
        require_share("mask_share", self.mask_share)
        if self.mask_share == 0:
            raise ValueError("mask_share: got 0, wanted more: nothing would be predicted")
        for name in ("whole_words", "swapped"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, wanted True or False")


class Pair(NamedTuple):
    """Where an example's passages lie among the tokens of a store."""

    a_begin: int
    a_end: int
    b_begin: int
    b_end: int
    is_random: bool  # or the passages are swapped


class _Row(NamedTuple):
    pair: Pair
    seed: tuple[int, ...]  # what is drawn of the row is drawn from this


class _Epoch:
    """One epoch's documents in their order, in blocks, and how many rows the blocks had that were planned so far."""

    def __init__(self, store: TokenStore, seed: int, epoch: int) -> None:
        begins = store.document_tokens
        self.order = np.random.default_rng((seed, epoch)).permutation(len(begins) - 1)
        ends = np.cumsum((begins[1:] - begins[:-1])[self.order])  # [D]
        self.blocks = max(1, round(int(ends[-1]) / _BLOCK_TOKENS))
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, self.blocks + 1) // self.blocks) + 1
        self.cuts = np.concatenate([[0], np.minimum(cuts, len(ends))])
        self.first = [0]  # the first row of each block


class SentencePairs:
    """Batches of examples, one for each step.

    Args:
        store: the text.
        vocabulary: whose tokens they are.
        options: how examples are made.
        batch_size: rows a step, all processes together.

    Attributes:
        epoch_steps: steps of an epoch, as its first block lets expect; a step may begin in one and end in the next.

    Raises:
        ValueError: the text gives no batch.
    """

    def __init__(self, store: TokenStore, vocabulary: Vocabulary, options: PairOptions, batch_size: int) -> None:
        require_integer("batch_size", batch_size, 1)
        self.store, self.vocabulary, self.options, self.batch_size = store, vocabulary, options, batch_size
        self._epochs: dict[int, _Epoch] = {}
        self._block: tuple[tuple[int, int], list[_Row]] = ((-1, -1), [])
        self._counts: list[int] = []  # the rows of whole epochs, as far as they are known
        plan = self._plan(0)
        while plan.first[-1] < batch_size and self._extend(0):
            pass
        if plan.first[-1] < batch_size:
            raise ValueError(
                f"batch_size: got {batch_size}, but the text has {plan.first[-1]} rows of {options.max_length} tokens: "
                "wanted fewer rows a batch, or more text"
            )
        planned = len(plan.first) - 1
        self.epoch_steps = max(1, round(plan.first[-1] * plan.blocks / planned / batch_size))

    def identity(self) -> dict[str, object]:
        """What another source must have in common for its steps to be the same."""
        return {"kind": "pairs", "text": self.store.key, "batch_size": self.batch_size, **vars(self.options)}

    def pairs(self, epoch: int, block: int) -> list[Pair]:
        """The examples of a block of an epoch, in their order."""
        return [row.pair for row in self._planned(epoch, block)]

    def rows(self, step: int) -> list[_Row]:
        """The rows of a step."""
        first, epoch = step * self.batch_size, 0
        while epoch < len(self._counts) and first >= self._counts[epoch]:
            first -= self._counts[epoch]
            epoch += 1
        found: list[_Row] = []
        while len(found) < self.batch_size:
            plan = self._plan(epoch)
            while plan.first[-1] <= first and self._extend(epoch):
                pass
            if plan.first[-1] <= first:
                first -= plan.first[-1]
                epoch += 1
                continue
            block = bisect_right(plan.first, first) - 1
            begin = first - plan.first[block]
            part = self._planned(epoch, block)[begin : begin + self.batch_size - len(found)]
            found += part
            first += len(part)
        return found

    def epoch_batches(self, size: int, epoch: int = 0) -> Iterator[dict[str, Tensor]]:
        """All rows of an epoch in batches of another size, the last of which may have fewer; for an evaluation."""
        waiting: list[_Row] = []
        for block in range(self._plan(epoch).blocks):
            waiting += self._planned(epoch, block)
            while len(waiting) >= size:
                yield self.collate(waiting[:size])
                waiting = waiting[size:]
        if waiting:
            yield self.collate(waiting)

    def batch(self, step: int, rank: int = 0, processes: int = 1) -> dict[str, Tensor]:
        """What process `rank` of `processes` trains on in a step: its share of the rows, in their order.

        Returns:
            `input_ids`, `attention_mask`, `token_type_ids` and `labels`, int64 ``[B, T]`` with T the longest row's
            tokens, and `next_sentence_label`, int64 ``[B]``, 1 for a second passage from anywhere; if passages are
            swapped `sentence_order_label`, 1 where they are.
        """
        rows = self.rows(step)
        share = math.ceil(len(rows) / processes)
        return self.collate(rows[rank * share : (rank + 1) * share])

    def collate(self, rows: Sequence[_Row]) -> dict[str, Tensor]:
        """Rows side by side; see `batch`."""
        made = [self._make(row) for row in rows]
        longest = max((len(ids) for ids, _, _ in made), default=0)
        shape = (len(made), longest)
        batch = {
            "input_ids": np.full(shape, self.vocabulary.pad_id, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
            "token_type_ids": np.zeros(shape, dtype=np.int64),
            "labels": np.full(shape, NO_LABEL, dtype=np.int64),
        }
        for place, (ids, types, labels) in enumerate(made):
            size = len(ids)
            batch["input_ids"][place, :size] = ids
            batch["attention_mask"][place, :size] = 1
            batch["token_type_ids"][place, :size] = types
            batch["labels"][place, :size] = labels
        label = "sentence_order_label" if self.options.swapped else "next_sentence_label"
        batch[label] = np.array([row.pair.is_random for row in rows], dtype=np.int64)
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def _make(self, row: _Row) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids with masks, token types and labels."""
        options, words, pair = self.options, self.vocabulary, row.pair
        rng = np.random.default_rng(row.seed)
        a, b = (slice(pair.a_begin, pair.a_end), slice(pair.b_begin, pair.b_end))
        a, b = truncated(a, b, options.max_length - 3, rng)
        first, second = (self.store.tokens[one].astype(np.int64) for one in (a, b))
        cls, sep = np.array([words.cls_id]), np.array([words.sep_id])
        ids = np.concatenate([cls, first, sep, second, sep])
        types = np.repeat([0, 1], [len(first) + 2, len(second) + 1])
        count = max(1, round(len(ids) * options.mask_share))
        count = count if options.max_predictions is None else min(count, options.max_predictions)
        candidates = np.flatnonzero((ids != words.cls_id) & (ids != words.sep_id))
        starts = None
        if options.whole_words:
            starts = words.word_starts[ids[candidates]]
            starts[np.flatnonzero(np.diff(candidates) > 1) + 1] = True  # no word goes on behind a special token
        places = choose(candidates, starts, count, rng, options.max_gram)
        hidden, labels = mask(ids, places, words.mask_id, words.size, rng)
        return hidden, types, labels

    # Plans

    def _plan(self, epoch: int) -> _Epoch:
        plan = self._epochs.get(epoch)
        if plan is None:
            plan = _Epoch(self.store, self.options.seed, epoch)
            # A step may have rows of two.
            self._epochs = {old: one for old, one in self._epochs.items() if old == epoch - 1} | {epoch: plan}
        return plan

    def _extend(self, epoch: int) -> bool:
        """Plans the first block whose rows are not counted; False where there is none."""
        plan = self._plan(epoch)
        block = len(plan.first) - 1
        if block == plan.blocks:
            if len(self._counts) == epoch:
                self._counts.append(plan.first[-1])
            return False
        plan.first.append(plan.first[-1] + len(self._planned(epoch, block)))
        return True

    def _planned(self, epoch: int, block: int) -> list[_Row]:
        """The rows of a block."""
        if self._block[0] != (epoch, block):
            self._block = ((epoch, block), self._rows_of(self._plan(epoch), epoch, block))
        return self._block[1]

    def _rows_of(self, plan: _Epoch, epoch: int, block: int) -> list[_Row]:
        seed = self.options.seed
        chance = Random(f"{seed} {epoch} {block}")
        pairs: list[Pair] = []
        for document in plan.order[plan.cuts[block] : plan.cuts[block + 1]].tolist():
            pairs += self._of_document(document, chance)
        chance.shuffle(pairs)
        return [_Row(pair, (seed, epoch, block, number)) for number, pair in enumerate(pairs)]

    def _of_document(self, document: int, chance: Random) -> list[Pair]:
        most = self.options.max_length - 3
        target = chance.randint(2, most) if chance.random() < self.options.short_share else most
        bounds = self._bounds(document)
        last = len(bounds) - 2
        pairs: list[Pair] = []
        begin = at = 0  # the first sentence of the window, and the next one
        while at <= last:
            if at < last and bounds[at + 1] - bounds[begin] < target:
                at += 1
                continue
            count = at + 1 - begin
            middle = begin + (chance.randint(1, count - 1) if count > 1 else 1)
            a = (bounds[begin], bounds[middle])
            swapped = self.options.swapped and count > 1
            if swapped:
                at += 1
                b = (a[1], bounds[at])
                wrong = chance.random() < 0.5
                pairs.append(Pair(*(b + a if wrong else a + b), wrong))
            elif count == 1 or chance.random() < 0.5:
                pairs.append(Pair(*a, *self._anywhere(document, target - (a[1] - a[0]), chance), True))
                at = middle  # what was not used is not lost
            else:
                at += 1
                pairs.append(Pair(*a, a[1], bounds[at], False))
            begin = at
        return pairs

    def _bounds(self, document: int) -> list[int]:
        """Where the document's sentences begin, and where the last one ends.

        A sentence that is longer than a row is cut into sentences of half a row, at words, so that nothing is lost.
        """
        first, last = self.store.documents[document : document + 2]
        found = self.store.sentences[first : last + 1]
        bounds, most = found.tolist(), self.options.max_length - 3
        if not ((found[1:] - found[:-1]) > most).any():
            return bounds
        cut = [bounds[0]]
        for end in bounds[1:]:
            while end - cut[-1] > most:
                begin, half = cut[-1], max(1, most // 2)
                words = np.flatnonzero(self.vocabulary.word_starts[self.store.tokens[begin + 1 : begin + half + 1]])
                cut.append(begin + (int(words[-1]) + 1 if len(words) else half))
            cut.append(end)
        return cut

    def _anywhere(self, document: int, size: int, chance: Random) -> tuple[int, int]:
        """A passage of `size` tokens or the sentence that makes them more, of another document if there is one."""
        documents = len(self.store.documents) - 1
        for _ in range(10):
            other = chance.randrange(documents)
            if other != document:
                break
        first, last = self.store.documents[other : other + 2].tolist()
        start = chance.randrange(first, last)
        size = max(1, size)
        sentences = self.store.sentences[start : min(last, start + size) + 1]  # every one has a token
        begin = int(sentences[0])
        end = min(int(sentences.searchsorted(begin + size)), len(sentences) - 1)
        return begin, int(sentences[end])


def truncated(a: slice, b: slice, most: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """Two passages, cut to `most` tokens together.

    The longer one loses a token, the second of two equal ones, until they fit; each is lost at the front or at the back
    of its passage with the same probability.
    """
    sizes = [a.stop - a.start, b.stop - b.start]
    excess = max(0, sum(sizes) - most)
    longer = 0 if sizes[0] > sizes[1] else 1
    alone = min(excess, sizes[longer] - sizes[1 - longer])
    lost = [0, 0]
    lost[longer] = alone
    lost[1] += (excess - alone + 1) // 2
    lost[0] += (excess - alone) // 2
    fronts = [int(rng.binomial(count, 0.5)) for count in lost]
    a, b = (
        slice(one.start + front, one.stop - (count - front))
        for one, count, front in zip((a, b), lost, fronts, strict=True)
    )
    return a, b
