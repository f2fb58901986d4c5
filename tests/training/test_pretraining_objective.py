"""The losses of pretraining as sums, XLNet's memories from batch to batch, and scores on text that is held out."""

from __future__ import annotations

import copy

import corpora
import pytest
import torch

from pyxlbert.models import BertConfig, BertForPreTraining, XLNetConfig, XLNetLMHeadModel
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.tolerances import MODEL_FLOAT32
from pyxlbert.training.pretraining import PairOptions, SegmentOptions, Segments, SentencePairs
from pyxlbert.training.pretraining.objective import PretrainingModel, counts
from pyxlbert.training.pretraining.scores import HeldOut

SEGMENTS = SegmentOptions(max_length=32, reuse_len=16, num_predict=6)
PAIRS = PairOptions(max_length=32)


@pytest.fixture
def bert(tmp_path):
    vocabulary = corpora.bert_vocabulary(tmp_path / "v")
    store = corpora.store(tmp_path, vocabulary)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary.size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return PretrainingModel(BertForPreTraining(config)), store, vocabulary


@pytest.fixture
def xlnet(tmp_path):
    vocabulary = corpora.xlnet_vocabulary(tmp_path / "v")
    store = corpora.store(tmp_path, vocabulary)
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16, "dropout": 0.0}
    config = XLNetConfig(vocab_size=vocabulary.size, mem_len=24, reuse_len=16, **sizes)
    return PretrainingModel(XLNetLMHeadModel(config)), store, vocabulary


def test_sums_of_a_bert(bert) -> None:
    module, store, vocabulary = bert
    module.eval()
    batch = SentencePairs(store, vocabulary, PAIRS, 6).batch(0)
    sums, numbers = module(batch), counts(batch)
    wanted = module.model(**batch)
    labels = batch["labels"]
    plain = torch.nn.functional.cross_entropy(wanted.prediction_logits.flatten(0, 1), labels.flatten())
    assert numbers == {"tokens": int((labels != -100).sum()), "pairs": 6}
    compare.close("tokens", sums["tokens"] / numbers["tokens"], plain, MODEL_FLOAT32)
    compare.close("sum", sums["tokens"] / numbers["tokens"] + sums["pairs"] / 6, wanted.loss, MODEL_FLOAT32)
    batch["labels"] = torch.full_like(labels, -100)
    nothing = module(batch)["tokens"]
    nothing.backward()
    assert nothing == 0 and all(p.grad is None or bool(p.grad.isfinite().all()) for p in module.parameters())


def test_memories_go_from_batch_to_batch(xlnet) -> None:
    module, store, vocabulary = xlnet
    source = Segments(store, vocabulary, SEGMENTS, 4)
    mems = None
    for step in range(source.epoch_steps + 2):
        batch = source.batch(step)
        if batch["begins"]:
            mems = None
        names = [name for name in batch if name not in ("rows", "begins")]
        wanted = module.model(**{name: batch[name] for name in names}, mems=mems, use_mems=True)
        mems = wanted.mems
        sums = module(batch)
        number = counts(batch)["tokens"]
        compare.close("loss", sums["tokens"] / number, wanted.loss, MODEL_FLOAT32)
    # An evaluation has memories of its own, and without them there is another loss.
    module.eval()
    with_memory = [module(source.batch(step))["tokens"].item() for step in range(2)]
    alone = [module(source.batch(step), False)["tokens"].item() for step in range(2)]
    assert with_memory[0] == alone[0] and with_memory[1] != alone[1]
    module.forget()
    module.train()
    assert torch.equal(module._memories[True][(0, 1, 2, 3)][0], mems[0])


def test_memories_are_saved_and_shared_out_anew(xlnet) -> None:
    """A checkpoint of two processes with two passes each goes on in one process, and the other way round."""
    module, store, vocabulary = xlnet
    source = Segments(store, vocabulary, SEGMENTS, 4)
    ranks = [copy.deepcopy(module) for _ in range(2)]
    for step in range(3):
        module(source.batch(step))
        for rank, one in enumerate(ranks):
            for part in range(2):
                one(source.batch(step, rank, 2, part, 2))
    whole = module(source.batch(3))["tokens"].item()
    other = copy.deepcopy(module)
    other.load_process_state([one.process_state() for one in ranks])
    assert other(source.batch(3))["tokens"].item() == pytest.approx(whole, rel=tolerances.SUMMATION_ORDER)
    assert list(other._memories[True]) == [(0, 1, 2, 3)]
    ranks[1].load_process_state([other.process_state()])
    assert ranks[1](source.batch(4, 1, 2))["tokens"].item() == pytest.approx(
        copy.deepcopy(other)(source.batch(4, 1, 2))["tokens"].item(), rel=tolerances.SUMMATION_ORDER
    )


def test_scores_of_a_bert(bert) -> None:
    module, store, vocabulary = bert
    device = torch.device("cpu")
    scores = HeldOut(store, vocabulary, PAIRS, 7).scores(module, module, device)
    assert set(scores) == {"loss", "next_sentence_loss", "unigram_entropy"} and module.training
    again = HeldOut(store, vocabulary, PAIRS, 50).scores(module, module, device)
    for name, value in scores.items():
        assert again[name] == pytest.approx(value, rel=tolerances.SUMMATION_ORDER)
    # Each row of the epoch counts once.
    rows = sum(len(batch["labels"]) for batch in SentencePairs(store, vocabulary, PAIRS, 1).epoch_batches(7))
    assert rows == len(SentencePairs(store, vocabulary, PAIRS, 1).pairs(0, 0))


def test_scores_of_an_xlnet(xlnet) -> None:
    module, store, vocabulary = xlnet
    held_out = HeldOut(store, vocabulary, SEGMENTS, 4)
    scores = held_out.scores(module, module, torch.device("cpu"))
    assert set(scores) == {"loss", "loss_without_memories", "unigram_entropy"}
    assert scores["loss"] != scores["loss_without_memories"] and not module._memories[False]
    assert held_out.scores(module, module, torch.device("cpu")) == scores
    module.model.config.mem_len = 0
    assert set(held_out.scores(module, module, torch.device("cpu"))) == {"loss", "unigram_entropy"}
    with pytest.raises(ValueError, match="batch_size: got 1, but the text has"):
        HeldOut(store, vocabulary, SegmentOptions(max_length=3200, reuse_len=1600), 4)
