"""Permutation language modelling: which tokens are predicted, in which order, and who may see whom.

A sequence is a block of `reuse_len` tokens, which the next sequence finds in its memory, and a block of two passages,
``A [SEP] B [SEP] [CLS]``. In each block spans of tokens are chosen to be predicted, and an order of its places is
drawn. A target sees the tokens that are not predicted, and the targets before it in that order; the second block sees
all of the first.

Source:
    Yang et al., "XLNet: Generalized Autoregressive Pretraining for Language Understanding", 2019, sections 2.2 to 2.5
    and appendix A; where the paper is silent, what its authors' code does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

NO_TARGET, NO_LABEL = -1, -100


def sample_spans(
    word_starts: np.ndarray,
    num_predict: int,
    rng: np.random.Generator,
    *,
    max_gram: int = 5,
    context: int = 6,
    whole_words: bool = False,
    backwards: bool = False,
) -> np.ndarray:
    """Chooses the tokens to predict: spans of 1 to `max_gram`, each within a context of `context` times its length.

    A span of n tokens is drawn with a probability of 1/n, n's shares adding to one, and begins at the start of a word.
    What is left of `num_predict` at the end falls on single tokens.

    Args:
        word_starts: bool ``[T]``, True where a word begins.
        num_predict: how many tokens to choose.
        rng: the source of chance.
        max_gram: the longest span.
        context: tokens around a span that are left to be seen, as a multiple of its length, the span's included.
        whole_words: a span is n words instead of n tokens, and may then end with the block.
        backwards: the text runs backwards, so a word's start is its last token here.

    Returns:
        bool ``[T]``, `num_predict` of them True.

    Raises:
        ValueError: num_predict is negative or more than there are tokens, or a size is less than one.
    """
    length = len(word_starts)
    if not 0 <= num_predict <= length:
        raise ValueError(f"num_predict: got {num_predict}, wanted 0 to {length}, the tokens of the block")
    for name, value in (("max_gram", max_gram), ("context", context)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, wanted at least 1")
    starts = np.flip(word_starts) if backwards else word_starts
    masked = np.zeros(length, dtype=bool)
    shares = 1.0 / np.arange(1, max_gram + 1)
    shares /= shares.sum()
    left, place = num_predict, 0
    while left and place < length:
        count = min(int(rng.choice(max_gram, p=shares)) + 1, left)
        before = int(rng.integers(count * context))
        after = count * context - before
        begin = place + before
        while begin < length and not starts[begin]:
            begin += 1
        end = _span_end(starts, begin, count, left, whole_words)
        if end is None:
            break
        masked[begin:end] = True
        left -= end - begin
        place = end + after
    if left:
        masked[rng.choice(np.flatnonzero(~masked), size=left, replace=False)] = True
    return np.flip(masked).copy() if backwards else masked


def _span_end(starts: np.ndarray, begin: int, count: int, left: int, whole_words: bool) -> int | None:
    """One past the last token of a span, or None where the block ends before it does."""
    length = len(starts)
    if not whole_words:
        # A token has to follow, as in the authors' code.
        return begin + count if begin + count < length else None
    # The last word ends with the block.
    ends = [*(np.flatnonzero(starts[begin + 1 :]) + begin + 1), length]
    # Words are never cut, unless they are more than all that may be predicted.
    end = min(int(ends[count - 1]) if len(ends) >= count else length + 1, begin + left)
    return end if begin < length and end <= length else None


def sample_order(length: int, perm_size: int, rng: np.random.Generator) -> np.ndarray:
    """When each place's turn is: groups of `perm_size` places one after the other, in one order drawn for all of them.

    Returns:
        int64 ``[length]``, a permutation of 0 .. length - 1.

    Raises:
        ValueError: perm_size does not divide the length.
    """
    if perm_size < 1 or length % perm_size:
        raise ValueError(f"perm_size: got {perm_size}, wanted a divisor of the block's length {length}")
    groups = np.arange(length).reshape(-1, perm_size)
    return groups[:, rng.permutation(perm_size)].reshape(-1)


def order_ranks(
    orders: Sequence[np.ndarray], masked: np.ndarray, functional: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The order of a sequence's blocks as ranks: i may see j where query_rank[i] > key_rank[j].

    Args:
        orders: of each block, see `sample_order`.
        masked: bool ``[T]``, tokens to predict.
        functional: bool ``[T]``, [SEP] and [CLS]: never predicted, and not seen before their turn.

    Returns:
        query_rank and key_rank, int32 ``[T]``. A target does not see itself in the query stream; the content stream
        sees itself whatever these say.
    """
    order = np.concatenate(orders).astype(np.int32) if len(orders) else np.zeros(0, dtype=np.int32)
    target, visible = masked & ~functional, ~masked & ~functional
    key = np.where(visible, np.int32(-1), order)
    query = np.where(target, key, key + 1)
    offset = start = 0
    for block in orders:
        # Above every rank of the blocks before, so that these are seen and see nothing of this one.
        query[start : start + len(block)] += offset
        key[start : start + len(block)] += offset
        start += len(block)
        offset += len(block) + 1
    return query.astype(np.int32), key.astype(np.int32)


def order_perm_mask(orders: Sequence[np.ndarray], masked: np.ndarray, functional: np.ndarray) -> np.ndarray:
    """The same as a dense mask: bool ``[T, T]``, True where i (row) may not see j."""
    length = len(masked)
    blocked = np.zeros((length, length), dtype=bool)
    start = 0
    for order in orders:
        end = start + len(order)
        target = (masked & ~functional)[start:end]
        hidden = (masked | functional)[start:end]
        turn = np.where(hidden, order, -1)
        first = np.where(target, turn, turn + 1)
        blocked[start:end, start:end] = (first[:, None] <= turn[None, :]) & hidden[None, :]
        blocked[start:end, end:] = True
        start = end
    return blocked


@dataclass(frozen=True, eq=False)
class PermutationBatch:
    """Sequences with their targets.

    Attributes:
        input_ids: int64 ``[B, T]``; nothing is hidden in them, the order decides who sees what.
        token_type_ids: int64 ``[B, T]``: 0 for the reused block, passage A and its [SEP], 1 for B and its, 2 for [CLS].
        target_positions: int32 ``[B, M]``, the places to predict, -1 for none.
        labels: int64 ``[B, M]``, the tokens there, -100 for none.
        query_rank, key_rank: int32 ``[B, T]``: i may see j where query_rank[i] > key_rank[j].
        follows: bool ``[B]``, whether passage B is the continuation of A.
        perm_mask: bool ``[B, T, T]``, True where i may not see j; where it was asked for.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    target_positions: Tensor
    labels: Tensor
    query_rank: Tensor
    key_rank: Tensor
    follows: Tensor
    perm_mask: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[dict[str, np.ndarray]]) -> PermutationBatch:
        """The batch of sequences that `PermutationLanguageModeling.example` has made."""
        return cls(**{name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]})

    def model_inputs(self) -> dict[str, Tensor]:
        """Arguments of `XLNetLMHeadModel`."""
        names = ("input_ids", "token_type_ids", "target_positions", "labels", "query_rank", "key_rank")
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device | str) -> PermutationBatch:
        """The same on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return PermutationBatch(**{name: None if x is None else x.to(device) for name, x in moved.items()})


class Tokens(Protocol):
    """A text that may lie anywhere."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: slice) -> np.ndarray: ...


class SentenceBorders(Protocol):
    """The places of a text where a sentence begins, without 0."""

    def between(self, low: int, high: int) -> np.ndarray:
        """Those above `low` and below `high`, ascending."""
        ...

    def up_to(self, place: int) -> int | None:
        """The last one that is no further than `place`."""
        ...

    def from_on(self, place: int) -> int | None:
        """The first one at `place` or behind it."""
        ...


class Borders:
    """`SentenceBorders` in memory.

    Args:
        places: ascending integers.
    """

    def __init__(self, places: np.ndarray) -> None:
        self._places = places

    def between(self, low: int, high: int) -> np.ndarray:
        """See `SentenceBorders`."""
        first, last = np.searchsorted(self._places, low, side="right"), np.searchsorted(self._places, high)
        return self._places[first:last]

    def up_to(self, place: int) -> int | None:
        """See `SentenceBorders`."""
        found = np.searchsorted(self._places, place, side="right")
        return int(self._places[found - 1]) if found else None

    def from_on(self, place: int) -> int | None:
        """See `SentenceBorders`."""
        found = np.searchsorted(self._places, place)
        return int(self._places[found]) if found < len(self._places) else None


class PermutationLanguageModeling:
    """Cuts a text into batches for permutation language modelling.

    The text is cut into as many streams as there are sequences in a batch. Sequence b of a batch continues sequence b
    of the batch before, `reuse_len` tokens further on, so that the memories of one are the past of the next. With
    `bi_data` the second half of the streams are those of the first half, backwards.

    Args:
        batch_size: B; even with `bi_data`.
        sep_id, cls_id: ids of [SEP] and [CLS].
        seq_len: T.
        reuse_len: tokens of a sequence that the next one remembers; 0 for none.
        num_predict: M, how many places to predict, half of them in each block and an odd one in the first; [SEP] and
            [CLS] that are drawn among them count, but are no targets.
        perm_size: places that share an order; divides both blocks. None: the largest size that does.
        bi_data: whether half of the streams run backwards.
        word_starts: bool ``[V]``, True for tokens that begin a word, as `TextTokenizer.word_starts` gives them; None:
            all do.
        max_gram, context, whole_words: see `sample_spans`.
        dense: whether to make `perm_mask`.
        seed: the same seed gives the same batches.

    Raises:
        ValueError: a size is out of range or does not fit another.
        TypeError: a size or an id is not an integer.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        sep_id: int,
        cls_id: int,
        seq_len: int = 512,
        reuse_len: int = 256,
        num_predict: int = 85,
        perm_size: int | None = 256,
        bi_data: bool = False,
        word_starts: np.ndarray | Tensor | None = None,
        max_gram: int = 5,
        context: int = 6,
        whole_words: bool = False,
        dense: bool = False,
        seed: int = 0,
    ) -> None:
        sizes = {"batch_size": batch_size, "sep_id": sep_id, "cls_id": cls_id, "seq_len": seq_len}
        sizes |= {"reuse_len": reuse_len, "num_predict": num_predict, "max_gram": max_gram, "context": context}
        for name, value in (sizes if perm_size is None else sizes | {"perm_size": perm_size}).items():
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name}: got {value!r}, wanted an integer")
        rest = seq_len - reuse_len
        if reuse_len < 0 or rest < 5:
            raise ValueError(
                f"reuse_len: got {reuse_len}, wanted 0 to seq_len - 5, {seq_len - 5}: two passages and three special "
                "tokens follow"
            )
        if batch_size < 1 or (bi_data and batch_size % 2):
            wanted = "an even number: half of the streams run backwards" if bi_data else "at least 1"
            raise ValueError(f"batch_size: got {batch_size}, wanted {wanted}")
        perm_size = int(np.gcd(reuse_len, rest)) if perm_size is None else perm_size
        if perm_size < 1 or reuse_len % perm_size or rest % perm_size:
            raise ValueError(f"perm_size: got {perm_size}, wanted a divisor of both blocks, {reuse_len} and {rest}")
        self.first_predict = num_predict - num_predict // 2 if reuse_len else 0
        most = min(2 * reuse_len, 2 * rest + 1) if reuse_len else seq_len
        if not 1 <= num_predict <= most:
            raise ValueError(f"num_predict: got {num_predict}, wanted 1 to {most}: half of them in each block")
        self.batch_size, self.seq_len, self.reuse_len, self.perm_size = batch_size, seq_len, reuse_len, perm_size
        self.num_predict, self.bi_data, self.dense, self.seed = num_predict, bi_data, dense, seed
        self.sep_id, self.cls_id = sep_id, cls_id
        self.word_starts = None if word_starts is None else np.asarray(word_starts, dtype=bool)
        self.spans = {"max_gram": max_gram, "context": context, "whole_words": whole_words}

    def batches(self, ids: Any, sentences: Any | None = None) -> Iterator[PermutationBatch]:
        """All batches of a text.

        Args:
            ids: integers ``[N]``, the text's tokens without special ones.
            sentences: integers ``[N]``, the number of the sentence of each token: passages are cut between them.
                None: anywhere.

        Raises:
            ValueError: the text is too short for one batch, the two differ in length, or an id has no word start.
        """
        ids = np.asarray(ids, dtype=np.int64)
        sentences = np.arange(len(ids)) if sentences is None else np.asarray(sentences)
        if ids.ndim != 1 or sentences.shape != ids.shape:
            raise ValueError(f"sentences: got shape {list(sentences.shape)}, wanted ids' {list(ids.shape)}")
        if self.word_starts is not None and len(ids) and not 0 <= ids.min() <= ids.max() < len(self.word_starts):
            raise ValueError(f"word_starts: got {len(self.word_starts)} tokens, wanted more than id {ids.max()}")
        streams = self.batch_size // 2 if self.bi_data else self.batch_size
        length = len(ids) // streams
        # What the last sequence has to find behind its own beginning.
        if length < self.seq_len:
            raise ValueError(f"ids: got {len(ids)} tokens, wanted at least {streams * self.seq_len} for one batch")
        ids, sentences = (x[: streams * length].reshape(streams, length) for x in (ids, sentences))
        if self.bi_data:
            ids, sentences = (np.concatenate([x, np.flip(x, 1)]) for x in (ids, sentences))
        borders = [Borders(np.flatnonzero(np.diff(row)) + 1) for row in sentences]
        rng = np.random.default_rng(self.seed)
        for begin in range(0, length - self.seq_len + 1, self.step):
            yield PermutationBatch.of(
                [
                    self.example(ids[b], borders[b], begin, self.bi_data and b >= streams, rng)
                    for b in range(self.batch_size)
                ]
            )

    @property
    def step(self) -> int:
        """How many tokens further on a sequence begins than the one before it."""
        return self.reuse_len or self.seq_len - 3

    def example(
        self, ids: Tokens, borders: SentenceBorders, begin: int, backwards: bool, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """One sequence of a stream, as the fields of `PermutationBatch` without B.

        Args:
            ids: int64 ``[N]``, the stream's tokens; only slices are taken of them.
            borders: where sentences begin in it.
            begin: where the sequence begins; at least `seq_len` tokens are there.
            backwards: the stream runs backwards.
            rng: the source of chance.
        """
        cut = begin + self.reuse_len
        a, b, follows = two_passages(borders, len(ids), cut, self.seq_len - self.reuse_len - 3, rng)
        sep, cls = np.array([self.sep_id]), np.array([self.cls_id])
        blocks = [ids[begin:cut]] if self.reuse_len else []
        blocks.append(np.concatenate([ids[a], sep, ids[b], sep, cls]))
        tokens = np.concatenate(blocks)
        len_a, len_b = a.stop - a.start, b.stop - b.start
        types = np.repeat([0, 1, 2], [self.reuse_len + len_a + 1, len_b + 1, 1])
        functional = (tokens == self.sep_id) | (tokens == self.cls_id)
        counts = [self.first_predict] * (self.reuse_len > 0) + [self.num_predict - self.first_predict]
        masked = np.concatenate(
            [
                sample_spans(self._starts(block), count, rng, backwards=backwards, **self.spans)
                for block, count in zip(blocks, counts, strict=True)
            ]
        )
        orders = [sample_order(len(block), self.perm_size, rng) for block in blocks]
        query_rank, key_rank = order_ranks(orders, masked, functional)
        places = np.flatnonzero(masked & ~functional)
        positions = np.full(self.num_predict, NO_TARGET, dtype=np.int32)
        labels = np.full(self.num_predict, NO_LABEL, dtype=np.int64)
        positions[: len(places)], labels[: len(places)] = places, tokens[places]
        example = {
            "input_ids": tokens,
            "token_type_ids": types,
            "target_positions": positions,
            "labels": labels,
            "query_rank": query_rank,
            "key_rank": key_rank,
            "follows": np.array(follows),
        }
        if self.dense:
            example["perm_mask"] = order_perm_mask(orders, masked, functional)
        return example

    def _starts(self, tokens: np.ndarray) -> np.ndarray:
        if self.word_starts is None:
            return np.ones(len(tokens), dtype=bool)
        special = (tokens == self.sep_id) | (tokens == self.cls_id)
        return self.word_starts[np.where(special, 0, tokens)] | special


def two_passages(
    borders: SentenceBorders, length: int, begin: int, total: int, rng: np.random.Generator
) -> tuple[slice, slice, bool]:
    """Passages A and B of `total` tokens together, A from `begin` on.

    A ends with a sentence. Half of the time B is what comes next, else it begins at a sentence anywhere in the stream;
    where no sentence ends within `total` tokens there is nothing to come next. Both are whole sentences at first; then
    the longer one loses tokens at its end until they fit.

    Args:
        borders: the places where a sentence begins, without 0.
        length: tokens in the stream.
        begin: where A begins.
        total: at least 2; ``begin + total`` is at most the length.
        rng: the source of chance.

    Returns:
        The places of A, those of B, and whether B follows A.
    """
    cuts = borders.between(begin, begin + total)
    end = borders.from_on(begin + total)
    end = length if end is None else end
    follows = bool(len(cuts)) and bool(rng.random() < 0.5)
    cut = int(rng.choice(cuts)) if len(cuts) else end
    if follows:
        start, stop = cut, end
    else:
        size = max(1, total - (cut - begin))
        place = int(rng.integers(0, length - size + 1))
        start, stop = borders.up_to(place) or 0, borders.from_on(place + size)
        stop = length if stop is None else stop
    # What is left of B when always the longer one loses a token, B of two equal ones.
    size = min(stop - start, max(total // 2, total - (cut - begin)))
    return slice(begin, begin + total - size), slice(start, start + size), follows
