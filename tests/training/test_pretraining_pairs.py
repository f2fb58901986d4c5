"""BERT's examples: against the published procedure, their masks, and the same rows whoever makes them."""

from __future__ import annotations

import itertools
from collections import Counter
from random import Random

import corpora
import numpy as np
import pytest
import torch

from pyxlbert.models import BertConfig
from pyxlbert.training.pretraining import PairOptions, PretrainingBatches, SentencePairs, check_pairs
from pyxlbert.training.pretraining import pairs as pairs_module
from pyxlbert.training.pretraining.masking import choose, mask
from pyxlbert.training.pretraining.pairs import truncated


@pytest.fixture
def made(tmp_path):
    vocabulary = corpora.bert_vocabulary(tmp_path / "v")

    def make(content: str | None = None, batch_size: int = 4, **options) -> SentencePairs:
        store = corpora.store(tmp_path, vocabulary, content)
        return SentencePairs(store, vocabulary, PairOptions(**{"max_length": 32} | options), batch_size)

    return make


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Passages


def published_pairs(
    documents: list[list[list[int]]], number: int, most: int, short: float, swapped: bool, chance: Random
) -> list:
    """The procedure of the papers' authors on lists of tokens, up to where a pair is cut to fit.

    `swapped` is ALBERT's: without `random_next_sentence` of its code.
    """
    document, found = documents[number], []
    target = chance.randint(2, most) if chance.random() < short else most
    chunk: list[list[int]] = []
    length = i = 0
    while i < len(document):
        chunk.append(document[i])
        length += len(document[i])
        if i == len(document) - 1 or length >= target:
            a_end = chance.randint(1, len(chunk) - 1) if len(chunk) >= 2 else 1
            tokens_a = [token for segment in chunk[:a_end] for token in segment]
            tokens_b: list[int] = []
            is_random = len(chunk) == 1 or (not swapped and chance.random() < 0.5)
            if is_random:
                for _ in range(10):
                    other = chance.randint(0, len(documents) - 1)
                    if other != number:
                        break
                start = chance.randint(0, len(documents[other]) - 1)
                for segment in documents[other][start:]:
                    tokens_b += segment
                    if len(tokens_b) >= target - len(tokens_a):
                        break
                i -= len(chunk) - a_end
            else:
                tokens_b = [token for segment in chunk[a_end:] for token in segment]
                if swapped and chance.random() < 0.5:
                    is_random = True
                    tokens_a, tokens_b = tokens_b, tokens_a
            found.append((tokens_a, tokens_b, is_random))
            chunk, length = [], 0
        i += 1
    return found


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("short", [0.0, 0.5])
def test_passages_are_those_of_the_published_procedure(made, short: float, swapped: bool) -> None:
    source = made(short_share=short, swapped=swapped)
    store = source.store
    bounds = [store.sentences[a : b + 1] for a, b in zip(store.documents, store.documents[1:], strict=False)]
    documents = [[store.tokens[a:b].tolist() for a, b in itertools.pairwise(one)] for one in bounds]
    assert max(len(sentence) for document in documents for sentence in document) <= 29  # none is cut here
    kinds: Counter = Counter()
    for number in range(len(documents)):
        for seed in range(20):
            ours = [
                (store.tokens[p.a_begin : p.a_end].tolist(), store.tokens[p.b_begin : p.b_end].tolist(), p.is_random)
                for p in source._of_document(number, Random(seed))
            ]
            assert ours == published_pairs(documents, number, 29, short, swapped, Random(seed))
            kinds.update(is_random for _, _, is_random in ours)
    assert min(kinds.values()) > 300


def test_half_of_the_pairs_follow(made) -> None:
    # Many short sentences, so that a window never is one sentence.
    content = "\n\n".join("\n".join(["w1 w2 w3"] * 60) for _ in range(20))
    source = made(content, short_share=0.0)
    shares = [pair.is_random for epoch in range(5) for pair in source.pairs(epoch, 0)]
    assert len(shares) > 500 and abs(np.mean(shares) - 0.5) < 0.1


def test_passages_that_are_swapped_say_so(made) -> None:
    batch = made(swapped=True).batch(0)
    assert "next_sentence_label" not in batch and batch["sentence_order_label"].shape == (4,)


def test_every_sentence_is_in_some_first_passage_or_goes_on(made) -> None:
    """What a random passage takes the place of is not lost."""
    source = made()
    covered = np.zeros(len(source.store.tokens), dtype=bool)
    for pair in source.pairs(0, 0):
        covered[pair.a_begin : pair.a_end] = True
        if not pair.is_random:
            covered[pair.b_begin : pair.b_end] = True
    assert covered.all()


def test_a_sentence_longer_than_a_row_is_cut_at_words(made) -> None:
    source = made(" ".join(f"{word}xy" for word in corpora.WORDS) + "\n\nw1 w2\n")  # 180 tokens, a word of three
    bounds = source._bounds(0)
    lengths = np.diff(bounds)
    assert lengths.sum() == 180 and lengths.max() <= 29
    starts = source.vocabulary.word_starts[source.store.tokens[bounds[:-1]]]
    assert starts.all()
    source = made("w1" + "x" * 90 + "\n\nw2\n")  # one word
    assert np.diff(source._bounds(0)).max() <= 29


def published_truncation(a: list, b: list, most: int, chance) -> tuple[list, list]:
    a, b = list(a), list(b)
    while len(a) + len(b) > most:
        longer = a if len(a) > len(b) else b
        if chance() < 0.5:
            del longer[0]
        else:
            longer.pop()
    return a, b


def test_truncation() -> None:
    rng = np.random.default_rng(0)
    fronts = []
    for _ in range(400):
        sizes = rng.integers(1, 40, 2).tolist()
        most = int(rng.integers(2, 60))
        a, b = truncated(slice(100, 100 + sizes[0]), slice(500, 500 + sizes[1]), most, rng)
        wanted = published_truncation(list(range(sizes[0])), list(range(sizes[1])), most, rng.random)
        assert (a.stop - a.start, b.stop - b.start) == tuple(len(one) for one in wanted)
        assert a.start >= 100 and a.stop <= 100 + sizes[0] and b.start >= 500 and b.stop <= 500 + sizes[1]
        lost = sizes[0] - (a.stop - a.start)
        if lost:
            fronts.append((a.start - 100) / lost)
    assert abs(np.mean(fronts) - 0.5) < 0.1


# Masks


def test_masks() -> None:
    rng = np.random.default_rng(1)
    ids = np.arange(10_000) % 50 + 10
    places = choose(np.arange(10_000), None, 4000, rng)
    assert len(set(places.tolist())) == 4000
    hidden, labels = mask(ids, places, 4, 1000, rng)
    assert ((labels == -100) == ~np.isin(np.arange(10_000), places)).all() and (labels[places] == ids[places]).all()
    assert (hidden == ids)[labels == -100].all()
    masked, kept = (hidden[places] == 4).mean(), (hidden[places] == ids[places]).mean()
    assert abs(masked - 0.8) < 0.03 and abs(kept - 0.1) < 0.02
    others = hidden[places][(hidden[places] != 4) & (hidden[places] != ids[places])]
    assert others.min() < 50 and others.max() > 950  # of the whole vocabulary


def test_whole_words_are_hidden_whole_or_not_at_all() -> None:
    rng = np.random.default_rng(2)
    seen = set()
    for _ in range(300):
        starts = rng.random(40) < 0.5
        candidates = np.arange(5, 45)
        places = choose(candidates, starts, 6, rng)
        assert len(places) <= 6 and len(set(places.tolist())) == len(places)
        chosen = np.isin(candidates, places)
        words = np.cumsum(starts)
        for word in np.unique(words):
            assert chosen[words == word].all() or not chosen[words == word].any()
        seen.add(len(places))
    assert 6 in seen
    assert len(choose(np.arange(12), np.arange(12) % 4 == 0, 6, rng)) == 4  # a second word would be too much
    assert len(choose(np.arange(9), np.zeros(9, dtype=bool), 6, rng)) == 0  # one word, too long


def published_spans(starts: np.ndarray, count: int, longest: int, rng: np.random.Generator) -> list[int]:
    """The places that ALBERT's authors' code chooses: of a list of words each with those behind it, in random order."""
    words: list[list[int]] = []
    for place, start in enumerate(starts):
        if start or not words:
            words.append([])
        words[-1].append(place)
    shares = np.array([1 / n for n in range(1, longest + 1)])
    chosen: list[int] = []
    for first in rng.permutation(len(words)):
        spans = [words[first : first + n] for n in range(1, longest + 1) if first + n <= len(words)]
        number = rng.choice(len(spans), p=shares[: len(spans)] / shares[: len(spans)].sum())
        fitting = [span for span in spans[: number + 1] if len(chosen) + sum(map(len, span)) <= count]
        if fitting and not {place for word in fitting[-1] for place in word} & set(chosen):
            chosen += [place for word in fitting[-1] for place in word]
    return chosen


def runs(places: list[int]) -> list[int]:
    """How many neighbours the places have next to each other."""
    ends = np.flatnonzero(np.diff(np.sort(places)) > 1)
    return np.diff(np.concatenate([[-1], ends, [len(places) - 1]])).tolist() if len(places) else []


@pytest.mark.parametrize("pieces", [1, 3])
def test_spans_of_words_are_the_published_ones(pieces: int) -> None:
    """The lengths of what is chosen side by side, and how often each place is, are those of the published code."""
    counts: list[Counter[int]] = [Counter(), Counter()]
    places = np.zeros((2, 60))
    starts = np.arange(60) % pieces == 0
    for seed in range(800):
        ours = choose(np.arange(60), starts, 9, np.random.default_rng(seed), 3).tolist()
        theirs = published_spans(starts, 9, 3, np.random.default_rng((1, seed)))
        assert len(ours) <= 9 and len(set(ours)) == len(ours)
        for one, found in enumerate((ours, theirs)):
            counts[one].update(runs(found))
            places[one, found] += 1
    total = [sum(one.values()) for one in counts]
    for length in set(counts[0]) | set(counts[1]):
        assert length % pieces == 0
        assert abs(counts[0][length] / total[0] - counts[1][length] / total[1]) < 0.045, length
    assert abs(places[0] - places[1]).max() / 800 < 0.09
    assert abs(places.sum(1)[0] / places.sum(1)[1] - 1) < 0.015


def test_a_span_of_n_words_has_a_share_of_one_in_n() -> None:
    """Of the first span in a long row, which nothing shortens."""
    rng, found = np.random.default_rng(4), Counter()
    for _ in range(6000):
        gaps = np.diff(choose(np.arange(400), None, 3, rng, 3)) != 1
        found[int(gaps.argmax()) + 1 if gaps.any() else 3] += 1
    for n, share in ((1, 6 / 11), (2, 3 / 11), (3, 2 / 11)):
        assert abs(found[n] / 6000 - share) < 0.025, n


def test_albert_predicts_spans_of_whole_words_unless_told_otherwise(made) -> None:
    assert (PairOptions(swapped=True).whole_words, PairOptions(swapped=True).max_gram) == (True, 3)
    assert (PairOptions().whole_words, PairOptions().max_gram) == (False, 1)
    own = made(swapped=True)
    assert same(own.batch(0), made(swapped=True, whole_words=True, max_gram=3).batch(0))
    single = made(swapped=True, whole_words=True, max_gram=1)
    lengths = [[], []]
    for one, source in enumerate((own, single)):
        for step in range(own.epoch_steps):
            batch = source.batch(step)
            lengths[one] += [n for row in batch["labels"] for n in runs((row != -100).nonzero().flatten().tolist())]
    assert np.mean(lengths[0]) > 1.15 * np.mean(lengths[1])


@pytest.mark.parametrize("whole_words", [False, True])
def test_rows(made, whole_words: bool) -> None:
    source = made(whole_words=whole_words, max_predictions=3, short_share=0.3)
    words, counts = source.vocabulary, Counter()
    for step in range(source.epoch_steps):
        batch = source.batch(step)
        assert batch["input_ids"].shape[1] <= 32
        for row, pair in enumerate(source.rows(step)):
            size = int(batch["attention_mask"][row].sum())
            hidden, labels, types = (batch[name][row] for name in ("input_ids", "labels", "token_type_ids"))
            assert (hidden[size:] == words.pad_id).all() and (labels[size:] == -100).all() and not types[size:].any()
            ids = torch.where(labels == -100, hidden, labels)[:size]
            places = (ids == words.sep_id).nonzero().flatten().tolist()
            assert ids[0] == words.cls_id and len(places) == 2 and places[1] == size - 1
            assert types[:size].tolist() == [0] * (places[0] + 1) + [1] * (size - places[0] - 1)
            assert (labels[[0, *places]] == -100).all()
            labelled = int((labels != -100).sum())
            wanted = min(3, max(1, round(size * 0.15)))
            assert labelled <= wanted if whole_words else labelled == wanted
            assert int(batch["next_sentence_label"][row]) == int(pair.pair.is_random)
            counts[labelled] += 1
            if whole_words:
                starts = words.word_starts[ids.numpy()]
                for place in (labels[:size] != -100).nonzero().flatten().tolist():
                    behind = place + 1
                    if not starts[behind] and ids[behind] not in (words.cls_id, words.sep_id):
                        assert labels[behind] != -100
    assert counts[3] and counts[1]


# The same rows whoever makes them


def test_steps_are_a_function_of_their_number(made, monkeypatch) -> None:
    monkeypatch.setattr(pairs_module, "_BLOCK_TOKENS", 200)
    source, other = made(), made()
    steps = 3 * source.epoch_steps
    forwards = [source.batch(step) for step in range(steps)]
    for step in reversed(range(steps)):
        assert same(other.batch(step), forwards[step])
    assert len(source._counts) >= 2 and source._plan(0).blocks > 3
    # All rows of an epoch, each once, and epochs that differ.
    first = [row.seed for step in range(steps) for row in source.rows(step)]
    assert len(set(first)) == len(first)
    epochs = [[seed for seed in first if seed[1] == epoch] for epoch in range(2)]
    for epoch, count in enumerate(source._counts[:2]):
        assert len(epochs[epoch]) == count
    assert not same(made(seed=1).batch(0), forwards[0])
    drawn = [sorted(source.pairs(0, block)) for block in range(source._plan(0).blocks)]
    assert drawn != [sorted(source.pairs(1, block)) for block in range(source._plan(0).blocks)]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_rows_of_one(made, processes: int) -> None:
    source = made(batch_size=7)
    whole = source.batch(2)
    parts = [source.batch(2, rank, processes) for rank in range(processes)]
    for name, value in whole.items():
        longest = value.shape[-1] if value.dim() == 2 else 0
        fill = {"labels": -100}.get(name, 0)
        padded = [
            torch.nn.functional.pad(one[name], (0, longest - one[name].shape[1]), value=fill) if longest else one[name]
            for one in parts
        ]
        assert torch.equal(torch.cat(padded), value), name


def test_resumed_at_the_exact_batch_with_other_workers(made) -> None:
    source = made(whole_words=True)
    straight = list(PretrainingBatches(source, steps=9))
    for first, second in ((0, 2), (2, 0), (2, 1)):
        batches = PretrainingBatches(made(whole_words=True), workers=first)
        taken = []
        for batch in batches:
            taken.append(batch)
            if len(taken) == 4:
                break
        state = batches.state_dict()
        assert state["step"] == 4
        resumed = PretrainingBatches(made(whole_words=True), workers=second, steps=9)
        resumed.load_state_dict(state)
        taken += list(resumed)
        assert len(taken) == 9 and all(same(a, b) for a, b in zip(taken, straight, strict=True))
        assert not list(resumed)


# What is refused


def test_a_state_of_other_batches_is_refused(made) -> None:
    state = PretrainingBatches(made()).state_dict()
    for options, words in (
        ({"seed": 3}, "seed: got 3, but the saved state is of 0"),
        ({"batch_size": 5}, "batch_size: got 5, but the saved state is of 4"),
        ({"content": corpora.text(seed=1)}, "text: got"),
    ):
        with pytest.raises(ValueError, match=words):
            PretrainingBatches(made(**options)).load_state_dict(state)
    with pytest.raises(TypeError, match="step: got None"):
        PretrainingBatches(made()).load_state_dict({**state, "step": None})


def test_a_corpus_smaller_than_a_batch_is_refused(made) -> None:
    with pytest.raises(ValueError, match=r"batch_size: got 4, but the text has 1 rows of 32 tokens"):
        made("w1 w2\n")
    batch = made("w1 w2\n", batch_size=1).batch(3)  # of one document, a random passage is of the same one
    assert batch["input_ids"].shape == (1, 7)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_length": 4}, ValueError, "max_length: got 4, wanted at least 5"),
        ({"max_length": 16.0}, TypeError, "max_length: got 16.0, wanted an integer"),
        ({"short_share": 1.5}, ValueError, "short_share: got 1.5, wanted a number from 0 to 1"),
        ({"mask_share": 0}, ValueError, "mask_share: got 0, wanted more"),
        ({"mask_share": "a"}, TypeError, "mask_share: got 'a'"),
        ({"max_predictions": 0}, ValueError, "max_predictions: got 0, wanted at least 1"),
        ({"whole_words": 1}, TypeError, "whole_words: got 1, wanted True or False"),
        ({"max_gram": 0}, ValueError, "max_gram: got 0, wanted at least 1"),
        ({"max_gram": True}, TypeError, "max_gram: got True, wanted an integer"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"seed": 2**63}, ValueError, "seed: got 9223372036854775808, wanted at most"),
        ({"max_length": 2**31 - 1}, ValueError, "max_length: got 2147483647, wanted at most 1048576"),
        ({"max_gram": 10**30}, ValueError, "max_gram: got 1000.*, wanted at most"),
        ({"short_share": 10**400}, ValueError, "short_share: got 1000.*, wanted a number from 0 to 1"),
        ({"mask_share": float("nan")}, ValueError, "mask_share: got nan, wanted a number from 0 to 1"),
    ],
)
def test_bad_options(options, error, words: str) -> None:
    with pytest.raises(error, match=words):
        PairOptions(**options)


def test_a_model_that_does_not_fit_is_refused(made) -> None:
    source = made()
    vocabulary, options = source.vocabulary, source.options
    check_pairs(BertConfig(vocab_size=vocabulary.size, max_position_embeddings=32), options, vocabulary)
    for fields, words in (
        ({"vocab_size": 66}, "config: 'vocab_size' is 66, wanted at least 67, the tokens of the tokenizer"),
        ({"max_position_embeddings": 31}, "max_length: got 32, wanted at most max_position_embeddings, 31"),
        ({"type_vocab_size": 1}, "type_vocab_size: got 1, wanted at least 2"),
    ):
        with pytest.raises(ValueError, match=words):
            check_pairs(BertConfig(**fields), options, vocabulary)
    for share in ({"rank": 2, "processes": 2}, {"processes": 0}, {"workers": -1}, {"steps": -1}):
        with pytest.raises(ValueError, match=next(iter(share))):
            PretrainingBatches(source, **share)
