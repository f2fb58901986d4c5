"""BERT's masks: which tokens are to be predicted, and what stands in their places."""

from __future__ import annotations

import numpy as np

NO_LABEL = -100


def choose(candidates: np.ndarray, starts: np.ndarray | None, count: int, rng: np.random.Generator) -> np.ndarray:
    """The places to predict.

    Args:
        candidates: integers, ascending: the places that may be chosen.
        starts: for whole words: bool, of each candidate whether a word begins there. A word that would make more than
            `count` is left out, and another is tried.
        count: how many places at most; without whole words as many, if there are so many.
        rng: the source of chance.

    Returns:
        The places, in no order.
    """
    if starts is None:
        return rng.permutation(candidates)[:count]
    begins = np.flatnonzero(starts)
    if not len(begins) or begins[0] != 0:
        begins = np.concatenate([[0], begins])  # what is left of a word whose beginning was cut off
    ends = np.append(begins[1:], len(candidates))
    chosen: list[np.ndarray] = []
    left = count
    for word in rng.permutation(len(begins)):
        if not left:
            break
        size = int(ends[word] - begins[word])
        if size <= left:
            chosen.append(candidates[begins[word] : ends[word]])
            left -= size
    return np.concatenate(chosen) if chosen else candidates[:0]


def mask(
    ids: np.ndarray, places: np.ndarray, mask_id: int, vocab_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Hides tokens: of ten places eight become the mask, one a token of the vocabulary, and one stays.

    Args:
        ids: int64 ``[T]``.
        places: of the tokens to predict.
        mask_id: of [MASK].
        vocab_size: V; a token is drawn from all of them.
        rng: the source of chance.

    Returns:
        The ids that the model is given, and the labels: -100 but at these places.
    """
    hidden, labels = ids.copy(), np.full(len(ids), NO_LABEL, dtype=np.int64)
    labels[places] = ids[places]
    fate = rng.random(len(places))
    other = rng.integers(vocab_size, size=len(places))
    hidden[places] = np.where(fate < 0.8, mask_id, np.where(fate < 0.9, ids[places], other))
    return hidden, labels
