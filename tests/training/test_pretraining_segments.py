"""XLNet's sequences: rows that go on where they were, on any part of a text, and sizes that do not fit."""

from __future__ import annotations

from itertools import pairwise

import corpora
import numpy as np
import pytest
import torch

from pyxlbert.models import XLNetConfig, XLNetLMHeadModel
from pyxlbert.training import PermutationBatch
from pyxlbert.training.permutation import Borders
from pyxlbert.training.pretraining import PretrainingBatches, SegmentOptions, Segments, check_segments
from pyxlbert.training.pretraining.segments import _Stream

SIZES = {"max_length": 32, "reuse_len": 16, "num_predict": 6}


@pytest.fixture
def made(tmp_path):
    vocabulary = corpora.xlnet_vocabulary(tmp_path / "v")

    def make(content: str | None = None, batch_size: int = 4, **options) -> Segments:
        store = corpora.store(tmp_path, vocabulary, corpora.text(60) if content is None else content)
        source = Segments(store, vocabulary, SegmentOptions(**SIZES | options), batch_size)
        source.vocabulary = vocabulary
        return source

    return make


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("bi_data", [False, True])
def test_each_row_goes_on_where_it_was(made, bi_data: bool) -> None:
    source = made(bi_data=bi_data)
    assert source.epoch_steps > 10
    batches = [source.batch(step) for step in range(2 * source.epoch_steps)]
    assert [bool(batch["begins"]) for batch in batches] == ([True] + [False] * (source.epoch_steps - 1)) * 2
    for epoch in range(2):
        own = batches[epoch * source.epoch_steps : (epoch + 1) * source.epoch_steps]
        text = source._epoch_text(epoch)
        tokens = text.read(0, len(text))
        assert sorted(tokens) == sorted(source.store.tokens)
        for row in range(4):
            reused = np.concatenate([batch["input_ids"][row, :16].numpy() for batch in own])
            stream = row % source._streams
            wanted = tokens[stream * source._length : (stream + 1) * source._length]
            wanted = wanted[::-1] if row >= source._streams else wanted
            np.testing.assert_array_equal(reused, wanted[: len(reused)])
            # What follows the reused block, up to the end of a sentence, is what the next row begins with.
            for now, then in pairwise(own):
                first = int((now["token_type_ids"][row, 16:] == 0).sum()) - 1
                assert first >= 1
                count = min(first, 16)
                assert torch.equal(now["input_ids"][row, 16 : 16 + count], then["input_ids"][row, :count])
    assert not same(batches[0], batches[source.epoch_steps])


@pytest.mark.parametrize("backwards", [False, True])
def test_a_stream_is_its_part_of_the_text(made, backwards: bool) -> None:
    """Borders and tokens of a part, read in pieces, against the whole in memory."""
    source = made()
    text = source._epoch_text(0)
    tokens, borders = text.read(0, len(text)), text.borders(0, len(text))
    assert len(borders) == len(source.store.sentences) - 1
    begin, length = 317, 600
    stream = _Stream(text, begin, length, backwards)
    wanted = tokens[begin : begin + length]
    places = borders[(borders > begin) & (borders < begin + length)] - begin
    if backwards:
        wanted, places = wanted[::-1], (length - places)[::-1]
    memory, rng = Borders(places), np.random.default_rng(0)
    assert len(stream) == length
    for low, high in np.sort(rng.integers(0, length + 1, (400, 2)), axis=1).tolist():
        np.testing.assert_array_equal(stream[low:high], wanted[low:high])
        np.testing.assert_array_equal(stream.between(low, high), memory.between(low, high))
        assert stream.up_to(low) == memory.up_to(low) and stream.from_on(low) == memory.from_on(low)


def test_a_sentence_longer_than_any_row_is_no_end(made) -> None:
    """Nothing in reach ends a sentence: passages end where the row does, and looking further finds what is there."""
    source = made(" ".join(corpora.WORDS * 20) + "\nw1 w2\n", batch_size=2)
    batches = [source.batch(step) for step in range(source.epoch_steps)]
    assert all(batch["input_ids"].shape == (2, 32) for batch in batches)
    stream = _Stream(source._epoch_text(0), 0, len(source.store.tokens), False)
    assert stream.from_on(1) == 1200 and stream.up_to(1199) is None and stream.from_on(1203) is None


def test_steps_are_a_function_of_their_number(made) -> None:
    source, other = made(), made()
    forwards = [source.batch(step) for step in range(2 * source.epoch_steps)]
    for step in reversed(range(len(forwards))):
        assert same(other.batch(step), forwards[step])
    assert not same(made(seed=1).batch(0), forwards[0])


@pytest.mark.parametrize("bi_data", [False, True])
def test_processes_and_passes_share_the_rows_of_one(made, bi_data: bool) -> None:
    source = made(batch_size=8, bi_data=bi_data)
    whole = source.batch(3)
    parts = [source.batch(3, rank, 2, part, 2) for rank in range(2) for part in range(2)]
    for name, value in whole.items():
        if name == "begins":
            continue
        # Each pass has rows that run forwards, and then the same streams backwards, as a model of bi_data wants.
        order = torch.cat([one["rows"] for one in parts])
        assert sorted(order.tolist()) == list(range(8))
        assert torch.equal(torch.cat([one[name] for one in parts]), value[order]), name
    if bi_data:
        assert [one["rows"].tolist() for one in parts] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    with pytest.raises(ValueError, match=r"batch_size: got 8, wanted a number of (pairs of )?rows that 3 divides"):
        source.batch(0, 0, 3)


def test_resumed_at_the_exact_batch_with_other_workers(made) -> None:
    straight = list(PretrainingBatches(made(), steps=9))
    for first, second in ((0, 1), (1, 0)):
        taken, batches = [], PretrainingBatches(made(), workers=first)
        for batch in batches:
            taken.append(batch)
            if len(taken) == 4:
                break
        resumed = PretrainingBatches(made(), workers=second, steps=9)
        resumed.load_state_dict(batches.state_dict())
        taken += list(resumed)
        assert len(taken) == 9 and all(same(a, b) for a, b in zip(taken, straight, strict=True))
    for options in ({"reuse_len": 8, "num_predict": 6}, {"batch_size": 2}):
        with pytest.raises(ValueError, match=next(iter(options))):
            PretrainingBatches(made(**options)).load_state_dict(batches.state_dict())


def test_a_model_takes_the_batches_and_remembers_the_reused_tokens(made) -> None:
    source = made()
    config = XLNetConfig(
        vocab_size=source.vocabulary.size, d_model=16, n_layer=2, n_head=2, d_inner=16, mem_len=24, reuse_len=16
    )
    check_segments(config, source.options, source.vocabulary, 4)
    torch.manual_seed(0)
    model = XLNetLMHeadModel(config).eval()
    names = PermutationBatch.__dataclass_fields__
    mems = None
    for step in range(3):
        batch = {name: value for name, value in source.batch(step).items() if name in names}
        output = model(**batch, mems=mems, use_mems=True, output_logits=False)
        assert output.loss.isfinite()
        # The first memory holds the embeddings of the tokens just before those that the next row begins with.
        words = model.base_model.word_embedding(batch["input_ids"][:, :16])
        assert torch.equal(output.mems[0][-16:], words.transpose(0, 1))
        mems = output.mems


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"reuse_len": 28}, ValueError, "reuse_len: got 28, wanted 0 to seq_len - 5, 27"),
        ({"perm_size": 5}, ValueError, "perm_size: got 5, wanted a divisor of both blocks, 16 and 16"),
        ({"num_predict": 33}, ValueError, "num_predict: got 33, wanted 1 to 32"),
        ({"num_predict": 0}, ValueError, "num_predict: got 0"),
        ({"bi_data": True, "batch_size": 3}, ValueError, "batch_size: got 3, wanted an even number"),
        ({"bi_data": 1}, TypeError, "bi_data: got 1, wanted True or False"),
        ({"max_length": "a"}, TypeError, "max_length: got 'a', wanted an integer"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0, wanted at least 1"),
        ({"batch_size": 400}, ValueError, r"batch_size: got 400, but the text has \d+ tokens: wanted at least 12800"),
    ],
)
def test_sizes_that_do_not_fit(made, options, error, words: str) -> None:
    with pytest.raises(error, match=words):
        made(**options)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reuse_len": 8}, "reuse_len: got 16, wanted the configuration's, 8"),
        ({"reuse_len": None}, "reuse_len: got 16, wanted the configuration's, None"),
        ({"mem_len": 15}, "config: 'mem_len' is 15, wanted at least reuse_len, 16"),
        ({"bi_data": True}, "bi_data: got False, wanted the configuration's, True"),
        ({"attn_type": "uni"}, "attn_type: got 'uni', wanted 'bi'"),
        ({"vocab_size": 70}, "config: 'vocab_size' is 70, wanted at least 71, the tokens of the tokenizer"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(made, fields, words: str) -> None:
    source = made()
    good = {"vocab_size": 100, "d_model": 16, "n_head": 2, "mem_len": 16, "reuse_len": 16}
    check_segments(XLNetConfig(**good), source.options, source.vocabulary, 4)
    check_segments(XLNetConfig(**good | {"mem_len": 0, "reuse_len": None}), source.options, source.vocabulary, 4)
    with pytest.raises(ValueError, match=words):
        check_segments(XLNetConfig(**good | fields), source.options, source.vocabulary, 4)
    nothing = SegmentOptions(**SIZES | {"reuse_len": 0})
    with pytest.raises(ValueError, match="reuse_len: got 0 with a mem_len of 16"):
        check_segments(XLNetConfig(**good), nothing, source.vocabulary, 4)
