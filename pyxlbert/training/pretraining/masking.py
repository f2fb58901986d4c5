"""BERT's masks: which tokens are to be predicted, and what stands in their places.

ALBERT predicts spans of words.

Source:
    Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2019, section 3.1; Lan et al., "ALBERT: A
    Lite BERT for Self-supervised Learning of Language Representations", 2020, section 4.1; where the papers are silent,
    what their authors' codes do.
"""

from __future__ import annotations

import numpy as np

NO_LABEL = -100


def choose(
    candidates: np.ndarray, starts: np.ndarray | None, count: int, rng: np.random.Generator, max_gram: int = 1
) -> np.ndarray:
    """The places to predict.

    Args:
        candidates: integers, ascending: the places that may be chosen.
        starts: for whole words: bool, of each candidate whether a word begins there. A word that would make more than
            `count` is left out, and another is tried. None: every candidate is a word.
        count: how many places at most; single tokens are as many, if there are so many.
        rng: the source of chance.
        max_gram: words of the longest span. A span of n words is drawn with a probability that is proportional to 1/n,
            among those that end within the candidates. One that would make more than `count` loses its last words, and
            one that meets another is left out.

    Returns:
        The places, in no order.
    """
    if starts is None:
        if max_gram == 1:
            return rng.permutation(candidates)[:count]
        starts = np.ones(len(candidates), dtype=bool)
    begins = np.flatnonzero(starts)
    if not len(begins) or begins[0] != 0:
        begins = np.concatenate([[0], begins])  # what is left of a word whose beginning was cut off
    bounds = np.append(begins, len(candidates))
    shares = np.cumsum(1 / np.arange(1, max_gram + 1))
    taken = np.zeros(len(begins), dtype=bool)
    chosen: list[np.ndarray] = []
    left = count
    for word in rng.permutation(len(begins)):
        if not left:
            break
        most = min(max_gram, len(begins) - int(word))
        words = 1 if most == 1 else 1 + int(shares.searchsorted(rng.random() * shares[most - 1], side="right"))
        while words and bounds[word + words] - bounds[word] > left:
            words -= 1
        if words and not taken[word : word + words].any():
            taken[word : word + words] = True
            chosen.append(candidates[bounds[word] : bounds[word + words]])
            left -= len(chosen[-1])
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
