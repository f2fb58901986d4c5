"""Permutation language modelling: what is drawn, ranks against the dense mask, and that nothing leaks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pyxlbert.models import XLNetConfig, XLNetLMHeadModel
from pyxlbert.testing import compare
from pyxlbert.training import (
    PermutationBatch,
    PermutationLanguageModeling,
    order_perm_mask,
    order_ranks,
    sample_order,
    sample_spans,
)
from pyxlbert.training.permutation import Borders, two_passages

SEP, CLS, VOCAB = 4, 3, 60
SIZES = {"sep_id": SEP, "cls_id": CLS, "seq_len": 32, "reuse_len": 16, "num_predict": 9, "perm_size": 8}


def text(tokens: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and the number of each one's sentence."""
    rng = np.random.default_rng(seed)
    return rng.integers(5, VOCAB, tokens), np.cumsum(rng.random(tokens) < 0.15)


def batches(batch_size: int = 2, tokens: int = 400, **options: Any) -> list[PermutationBatch]:
    return list(PermutationLanguageModeling(batch_size, **SIZES | options).batches(*text(tokens)))


# Ranks


def test_ranks_are_the_dense_mask() -> None:
    rng = np.random.default_rng(0)
    reached = 0
    for _ in range(5000):
        perm_size = int(rng.integers(1, 7))
        blocks = [perm_size * int(rng.integers(1, 4)) for _ in range(rng.integers(1, 4))]
        orders = [sample_order(length, perm_size, rng) for length in blocks]
        masked = rng.random(sum(blocks)) < rng.choice([0.0, 0.2, 0.7, 1.0])
        functional = rng.random(sum(blocks)) < rng.choice([0.0, 0.2])
        query_rank, key_rank = order_ranks(orders, masked, functional)
        dense = order_perm_mask(orders, masked, functional)
        np.testing.assert_array_equal(query_rank[:, None] <= key_rank[None, :], dense)
        # Memories have rank -1 or less: every row sees them.
        assert query_rank.min() > -1
        reached += dense.all(1).any()
    assert reached  # rows that see nothing were among them


def test_what_the_dense_mask_says() -> None:
    orders = [np.array([2, 0, 1, 3]), np.array([1, 0])]
    masked = np.array([True, True, False, False, True, False])
    functional = np.array([False, False, False, False, False, True])
    blocked = order_perm_mask(orders, masked, functional).astype(int)
    assert blocked.tolist() == [
        [1, 0, 0, 0, 1, 1],  # a target sees what is not predicted and the target before it
        [1, 1, 0, 0, 1, 1],
        [1, 1, 0, 0, 1, 1],  # what is not predicted sees only its like
        [1, 1, 0, 0, 1, 1],
        [0, 0, 0, 0, 1, 0],  # the second block sees all of the first, and a special token when its turn has been
        [0, 0, 0, 0, 1, 0],
    ]


def test_places_share_an_order_group_by_group() -> None:
    order = sample_order(12, 4, np.random.default_rng(1))
    assert sorted(order) == list(range(12))
    assert (order[4:] == order[:8] + 4).all()


# Spans


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_spans(whole_words: bool, backwards: bool) -> None:
    rng = np.random.default_rng(2)
    lengths = np.zeros(6)
    for _ in range(300):
        starts = rng.random(200) < 0.6
        masked = sample_spans(starts, 30, rng, whole_words=whole_words, backwards=backwards)
        assert masked.sum() == 30
        runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], masked.astype(int), [0]]))))[::2]
        for run in runs:
            lengths[min(run, 6) - 1] += 1
    if not whole_words:
        # Shares of 1/n, with the few spans that touch or were cut at the end on top.
        shares = lengths[:5] / lengths[:5].sum()
        assert (np.diff(shares) < 0).all() and shares[0] > 0.4


def test_a_span_begins_with_a_word() -> None:
    starts = np.zeros(400, dtype=bool)
    starts[::10] = True
    masked = sample_spans(starts, 12, np.random.default_rng(3), context=1)
    begins = np.flatnonzero(masked & ~np.concatenate([[False], masked[:-1]]))
    assert starts[begins].all()
    flipped = sample_spans(starts[::-1], 12, np.random.default_rng(3), context=1, backwards=True)
    assert (flipped[::-1] == masked).all()


def test_all_may_be_predicted() -> None:
    rng = np.random.default_rng(4)
    assert sample_spans(np.ones(7, dtype=bool), 7, rng).all()
    assert not sample_spans(np.ones(7, dtype=bool), 0, rng).any()
    assert not sample_spans(np.ones(0, dtype=bool), 0, rng).any()


def published_spans(
    starts: np.ndarray, num_predict: int, rng: np.random.Generator, max_gram: int, context: int, whole_words: bool
) -> list[bool]:
    """The procedure of the paper's authors, token by token."""
    masked, place, left = [False] * len(starts), 0, num_predict
    shares = np.array([1 / n for n in range(1, max_gram + 1)])
    while place < len(starts) and left > 0:
        n = min(1 + rng.choice(max_gram, p=shares / shares.sum()), left)
        before = rng.integers(n * context)
        begin = place + before
        while begin < len(starts) and not starts[begin]:
            begin += 1
        end, words = begin, 0
        while end < len(starts):
            words += starts[end] if whole_words else 1
            if words > n or (whole_words and end - begin == left):
                break
            end += 1
        # A span of tokens has one behind it; the last word may be whole.
        complete = words > n or end - begin == left or words == n if whole_words else end < len(starts)
        if begin == len(starts) or not complete:
            break
        for one in range(begin, end):
            masked[one] = True
        left -= end - begin
        place = end + n * context - before
    for one in rng.choice([i for i, m in enumerate(masked) if not m], size=left, replace=False) if left else []:
        masked[one] = True
    return masked


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_spans_are_the_published_ones(whole_words: bool, backwards: bool) -> None:
    cases = np.random.default_rng(5)
    for seed in range(300):
        length, max_gram, context = (int(cases.integers(*bounds)) for bounds in ((1, 120), (1, 7), (1, 8)))
        starts = cases.random(length) < cases.choice([0.2, 0.6, 1.0])
        given = {"max_gram": max_gram, "context": context, "whole_words": whole_words}
        count = int(cases.integers(0, length + 1))
        ours = sample_spans(starts, count, np.random.default_rng(seed), backwards=backwards, **given)
        ordered = starts[::-1] if backwards else starts
        wanted = published_spans(ordered, count, np.random.default_rng(seed), **given)
        assert ours.tolist() == (wanted[::-1] if backwards else wanted)


def test_the_last_word_of_a_block_may_be_predicted() -> None:
    starts = np.array([True, False, False])
    given = {"max_gram": 1, "context": 1, "whole_words": True}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert sample_spans(starts, 2, rng, **given).tolist() == [True, True, False]
        assert sample_spans(starts, 3, rng, **given).all()


# Passages


def published_passages(
    sentences: np.ndarray, begin: int, total: int, rng: np.random.Generator
) -> tuple[list[int], list[int], bool]:
    """The procedure of the paper's authors, token by token."""
    length, end, cuts = len(sentences), begin + 1, []
    while end < length:
        if sentences[end] != sentences[end - 1]:
            if end - begin >= total:
                break
            cuts.append(end)
        end += 1
    follows = bool(cuts) and rng.random() < 0.5
    a = list(range(begin, rng.choice(cuts) if cuts else end))
    if follows:
        b = list(range(a[-1] + 1, end))
    else:
        size = max(1, total - len(a))
        start = rng.integers(0, length - size + 1)
        b = list(range(start, start + size))
        while b[0] > 0 and sentences[b[0] - 1] == sentences[b[0]]:
            b.insert(0, b[0] - 1)
        while b[-1] + 1 < length and sentences[b[-1] + 1] == sentences[b[-1]]:
            b.append(b[-1] + 1)
    while len(a) + len(b) > total:
        (a if len(a) > len(b) else b).pop()
    return a, b, follows


def test_passages_are_the_published_ones() -> None:
    cases, seen = np.random.default_rng(6), set()
    for seed in range(1500):
        length = int(cases.integers(6, 60))
        total = int(cases.integers(2, length - 2))
        begin = int(cases.integers(0, length - total + 1))
        sentences = np.cumsum(cases.random(length) < cases.choice([0.0, 0.05, 0.3, 1.0]))
        borders = np.flatnonzero(np.diff(sentences)) + 1
        a, b, follows = two_passages(Borders(borders), length, begin, total, np.random.default_rng(seed))
        wanted = published_passages(sentences, begin, total, np.random.default_rng(seed))
        assert (list(range(length))[a], list(range(length))[b], follows) == wanted
        seen.add((follows, len(borders) > 0))
    assert len(seen) == 3  # without a border nothing follows


def test_passages_are_sentences() -> None:
    _, sentences = text(20000)
    begins = np.diff(sentences, prepend=-1) != 0
    begins[::5000] = True  # a stream does too
    ids = np.arange(20000) + 10  # a token tells its place
    rows = followed = 0
    whole = [0, 0]
    for batch in PermutationLanguageModeling(4, **SIZES | {"seq_len": 48}).batches(ids, sentences):
        for tokens, follows in zip(batch.input_ids[:, 16:].numpy() - 10, batch.follows.tolist(), strict=True):
            first, second = np.flatnonzero(tokens == SEP - 10)
            a, b = tokens[:first], tokens[first + 1 : second]
            assert begins[b[0]] and (np.diff(a) == 1).all() and (np.diff(b) == 1).all()
            rows, followed = rows + 1, followed + follows
            if len(a) < len(b):  # only the longer one is cut short
                assert begins[a[-1] + 1]
                assert b[0] == a[-1] + 1 or not follows
                whole[follows] += 1
    assert rows > 1000 and 0.44 < followed / rows < 0.56
    assert min(whole) > rows / 10


def test_nothing_follows_a_sentence_without_end() -> None:
    ids, sentences = text()
    for batch in PermutationLanguageModeling(2, **SIZES).batches(ids, sentences * 0):
        assert not batch.follows.any()


# Batches


def test_a_batch_is_what_it_says() -> None:
    made = batches(dense=True)
    ids, _ = text()
    streams = ids.reshape(2, 200)
    assert len(made) == (200 - 32) // 16 + 1
    followed = 0
    for number, batch in enumerate(made):
        assert batch.input_ids.shape == (2, 32) and batch.labels.shape == (2, 9)
        for row in range(2):
            tokens, types = batch.input_ids[row].numpy(), batch.token_type_ids[row].numpy()
            begin = 16 * number
            (first, second) = np.flatnonzero(tokens == SEP)
            assert tokens[-1] == CLS and second == 30
            # The reused block and passage A are the stream; the next batch begins where this one's reuse ends.
            np.testing.assert_array_equal(tokens[:first], streams[row, begin : begin + first])
            assert types.tolist() == [0] * (first + 1) + [1] * (second - first) + [2]
            followed += bool(batch.follows[row])
            places = batch.target_positions[row]
            real = places >= 0
            assert (batch.labels[row][real] == batch.input_ids[row][places[real].long()]).all()
            assert (batch.labels[row][~real] == -100).all()
            assert not np.isin(batch.labels[row], (SEP, CLS)).any()
            assert (places[real] < 16).sum() == 5  # half of them in each block, an odd one in the first
        dense = batch.query_rank[:, :, None] <= batch.key_rank[:, None, :]
        assert torch.equal(batch.perm_mask, dense)
        assert batch.perm_mask[:, :16, 16:].all() and not batch.perm_mask[:, 16:, :16].any()
    assert 0 < followed < 2 * len(made)


def test_half_of_the_streams_run_backwards() -> None:
    ids, _ = text()
    batch = batches(4, bi_data=True)[0]
    for row, stream in enumerate((ids[:200], ids[200:], ids[:200][::-1], ids[200:][::-1])):
        np.testing.assert_array_equal(batch.input_ids[row, :16].numpy(), stream[:16])


def test_without_reuse_there_is_one_block() -> None:
    batch = batches(reuse_len=0, dense=True)[0]
    assert batch.token_type_ids[0, 0] == 0 and batch.input_ids.shape == (2, 32)
    assert torch.equal(batch.perm_mask, batch.query_rank[:, :, None] <= batch.key_rank[:, None, :])


def test_the_seed_decides() -> None:
    for other, same in ((0, True), (1, False)):
        a, b = batches(seed=0), batches(seed=other)
        assert all(torch.equal(x.target_positions, y.target_positions) for x, y in zip(a, b, strict=True)) == same


def test_only_word_starts_begin_spans() -> None:
    starts = np.zeros(VOCAB, dtype=bool)
    starts[::2] = True
    batch = batches(1, 4000, word_starts=starts, seq_len=512, reuse_len=256, perm_size=256, num_predict=40)[0]
    places = batch.target_positions[0]
    places = places[places >= 0].long()
    begins = places[~torch.isin(places - 1, places)]
    assert starts[batch.input_ids[0, begins].numpy()].mean() > 0.9  # the rest fell on single tokens


# Nothing leaks


def small_model(**fields: Any) -> XLNetLMHeadModel:
    torch.manual_seed(0)
    config = XLNetConfig(
        vocab_size=VOCAB, d_model=32, n_layer=3, n_head=2, d_inner=48, initializer_range=0.3, mem_len=16, reuse_len=16
    )
    for name, value in fields.items():
        setattr(config, name, value)
    return XLNetLMHeadModel(config).eval()


@pytest.mark.parametrize("bi_data", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_no_target_sees_what_it_must_not(bi_data: bool, dense: bool) -> None:
    model = small_model(bi_data=bi_data)
    g = torch.Generator().manual_seed(1)
    mems = None
    with torch.no_grad():
        for batch in batches(2, bi_data=bi_data, dense=True)[:3]:
            inputs = batch.model_inputs()
            if dense:
                del inputs["query_rank"], inputs["key_rank"]
                inputs["perm_mask"] = batch.perm_mask
            ids = inputs.pop("input_ids")
            output = model(ids, mems=mems, **inputs, use_mems=True)
            seen_change = 0
            for target in range(batch.labels.shape[1]):
                places = batch.target_positions[:, target].long()
                blocked = batch.perm_mask[torch.arange(2), places.clamp(min=0)]
                own = blocked[torch.arange(2), places.clamp(min=0)]
                assert (own | (places < 0)).all()  # its own token is among them
                noise = torch.randint(5, VOCAB, ids.shape, generator=g)
                changed = model(torch.where(blocked, noise, ids), mems=mems, **inputs)
                compare.same_bits("hidden tokens", changed.logits[:, target], output.logits[:, target])
                changed = model(torch.where(blocked, ids, noise), mems=mems, **inputs)
                seen_change += int((changed.logits[:, target] != output.logits[:, target]).any(-1).sum())
            assert seen_change > batch.labels.numel() // 2  # the test can fail
            # What the next batch remembers knows nothing of the second block.
            noise = torch.randint(5, VOCAB, ids.shape, generator=g)
            noise[:, :16] = ids[:, :16]
            changed = model(noise, mems=mems, **inputs, use_mems=True)
            for a, b in zip(changed.mems, output.mems, strict=True):
                compare.same_bits("memory", a, b)
            mems = output.mems


def test_content_rows_see_themselves_and_their_order_only() -> None:
    model = small_model()
    batch = batches(1, dense=True)[0]
    inputs = {"query_rank": batch.query_rank, "key_rank": batch.key_rank}
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        wanted = model.transformer(batch.input_ids, **inputs)[0]
        for place in range(32):
            blocked = batch.perm_mask[:, place].clone()
            blocked[:, place] = False
            noise = torch.randint(5, VOCAB, (1, 32), generator=g)
            changed = model.transformer(torch.where(blocked, noise, batch.input_ids), **inputs)[0]
            compare.same_bits("content", changed[:, place], wanted[:, place])


def test_it_learns() -> None:
    model = small_model().train()
    batch = batches()[0]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        torch.manual_seed(0)
        loss = model(**batch.model_inputs()).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


# Bad input


@pytest.mark.parametrize(
    "options, name",
    [
        ({"reuse_len": 28}, r"reuse_len.*28"),
        ({"reuse_len": -1}, "reuse_len"),
        ({"perm_size": 5}, r"perm_size.*5"),
        ({"perm_size": 0}, "perm_size"),
        ({"num_predict": 34}, r"num_predict.*34"),
        ({"num_predict": 0}, "num_predict"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 3, "bi_data": True}, r"batch_size.*3.*even"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        PermutationLanguageModeling(**{"batch_size": 2} | SIZES | options)


@pytest.mark.parametrize("name", ["batch_size", "sep_id", "cls_id", "seq_len", "reuse_len", "num_predict", "max_gram"])
@pytest.mark.parametrize("value", [None, 4.0, "4", True])
def test_sizes_of_another_type(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"{name}: got {value!r}"):
        PermutationLanguageModeling(**{"batch_size": 2} | SIZES | {name: value})


def test_a_text_too_short_or_without_its_sentences() -> None:
    sampler = PermutationLanguageModeling(2, **SIZES)
    ids, sentences = text()
    with pytest.raises(ValueError, match=r"ids.*63.*64"):
        next(sampler.batches(ids[:63]))
    with pytest.raises(ValueError, match="sentences"):
        next(sampler.batches(ids, sentences[:-1]))
    with pytest.raises(ValueError, match="word_starts"):
        next(PermutationLanguageModeling(2, word_starts=np.ones(7), **SIZES).batches(ids))
    with pytest.raises(ValueError, match="num_predict"):
        sample_spans(np.ones(4, dtype=bool), 5, np.random.default_rng(0))
    with pytest.raises(ValueError, match="max_gram"):
        sample_spans(np.ones(4, dtype=bool), 2, np.random.default_rng(0), max_gram=0)
