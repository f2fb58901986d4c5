"""BERT in training: checkpointing, dropout, losses, ties, initial values."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import transformers
from small_bert import FLOAT32, GRADIENT, IDS, MASK, REAL, SMALL, build, gradients

from pyxlbert import models
from pyxlbert.models import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from pyxlbert.testing import compare


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_a_training_step_are_those_that_it_used(dtype: torch.dtype) -> None:
    """With dropout too: the same seed drops the same weights, shown or not."""
    found = []
    for weights in (False, True):
        model = build(attention_probs_dropout_prob=0.4, hidden_dropout_prob=0.2).to(dtype).train()
        torch.manual_seed(3)
        output = model(IDS, MASK, output_attentions=weights)
        output[0].float().square().sum().backward()
        found.append((output[0].detach(), gradients(model)))
    dropped = output.attentions[0][0] == 0  # of a row without padding
    assert 0.2 < dropped.double().mean() < 0.6
    # Both in the same dtype, each with its own roundings.
    scale = float(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)
    compare.close("states", found[1][0], found[0][0], FLOAT32 * scale)
    compare.close("gradients", found[1][1], found[0][1], GRADIENT * scale)


def test_checkpointing_changes_nothing_but_what_is_kept() -> None:
    model = build(num_hidden_layers=3, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3).train()

    def once() -> tuple[torch.Tensor, torch.Tensor, int]:
        model.zero_grad()
        torch.manual_seed(1)
        kept: list[int] = []

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            y = model(IDS, MASK).last_hidden_state
        y.square().sum().backward()
        return y, gradients(model), sum(kept)

    y, dy, kept = once()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    z, dz, less = once()
    compare.same_bits("states", y, z)
    compare.same_bits("gradients", dy, dz)
    assert less < kept / 2
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_dropout_follows_the_seed_and_stops_in_evaluation() -> None:
    model = build(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model(IDS, MASK)[0])
    compare.same_bits("same seed", draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    model.eval()
    compare.same_bits("evaluation", model(IDS, MASK)[0], model(IDS, MASK)[0])


def test_labels_on_padding_count_for_nothing() -> None:
    model = build(BertForTokenClassification, num_labels=4)
    labels = IDS % 4
    a = model(IDS, MASK, labels=labels)
    b = model(IDS, MASK, labels=labels.masked_fill(~REAL, -100))
    compare.same_bits("loss", a.loss, b.loss)
    assert not a.logits[~REAL].any()


def test_spans_never_end_on_padding() -> None:
    model = build(BertForQuestionAnswering)
    output = model(IDS, MASK, start_positions=torch.zeros(5).long(), end_positions=torch.full((5,), 99))
    assert not output.start_logits.softmax(-1)[:4][~REAL[:4]].any()
    assert output.loss.isnan()  # no end position counts, as in transformers
    output = model(
        IDS, MASK, start_positions=torch.tensor([0, 0, 3, 1, 2]), end_positions=torch.tensor([6, 1, 2, 4, 0])
    )
    assert output.loss.isfinite() and output.loss < 100


def test_dropout_of_the_classifier() -> None:
    for head in ("BertForSequenceClassification", "BertForTokenClassification", "BertForMultipleChoice"):
        for given in (None, 0.0, 0.4):
            fields = SMALL | {"hidden_dropout_prob": 0.3, "classifier_dropout": given}
            theirs = getattr(transformers, head)(transformers.BertConfig(**fields))
            ours = getattr(models, head)(BertConfig(**fields))
            assert ours.dropout.p == theirs.dropout.p == (0.3 if given is None else given)


def test_problem_types() -> None:
    one = build(BertForSequenceClassification, num_labels=1)
    compare.same_bits("shape", one(IDS, labels=torch.ones(5)).loss, one(IDS, labels=torch.ones(5, 1).long()).loss)
    many = build(BertForSequenceClassification, num_labels=3)
    logits = many(IDS).logits
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.ones(5, 3))
    compare.close("multi-label", many(IDS, labels=torch.ones(5, 3)).loss, wanted, FLOAT32)
    wanted = torch.nn.functional.cross_entropy(logits, torch.ones(5).long())
    compare.close("classes", many(IDS, labels=torch.ones(5, dtype=torch.int32)).loss, wanted, FLOAT32)
    assert many.config.problem_type is None


def test_ties_survive_copies_conversions_and_new_embeddings() -> None:
    model = build(BertForMaskedLM)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(model).to(torch.bfloat16),
    ):
        assert other.cls.predictions.decoder.weight is other.bert.embeddings.word_embeddings.weight
        assert other.cls.predictions.decoder.bias is other.cls.predictions.bias
    table = torch.nn.Embedding(40, 24, padding_idx=0)
    model.set_input_embeddings(table)
    assert model.get_output_embeddings().weight is table.weight is model.get_input_embeddings().weight


def test_initial_values() -> None:
    model = build(BertForMaskedLM, initializer_range=0.02, hidden_size=192, intermediate_size=200)
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            assert 0.015 < parameter.std() < 0.025, name
    assert not model.bert.embeddings.word_embeddings.weight[0].any()
