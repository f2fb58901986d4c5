"""BERT under torch.compile and torch.export."""

from __future__ import annotations

import torch
from small_bert import FLOAT32, GRADIENT, IDS, MASK, REAL, build, gradients

from pyxlbert.models import (
    BertForMaskedLM,
)
from pyxlbert.testing import compare


def test_compiles_into_one_graph(monkeypatch) -> None:
    model = build(BertForMaskedLM, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, columns in ((5, 7), (3, 5)):
        ids, mask, labels = IDS[:rows, :columns], MASK[:rows, :columns], IDS[:rows, :columns].clone()
        a, b = compiled(ids, mask, labels=labels), model(ids, mask, labels=labels)
        compare.close("logits", a.logits, b.logits, FLOAT32)
        compare.close("loss", a.loss, b.loss, FLOAT32)
        a.loss.backward()
        da = gradients(model)
        model.zero_grad()
        b.loss.backward()
        compare.close("gradients", da, gradients(model), GRADIENT)
        model.zero_grad()


def test_a_compiled_model_computes_the_whole_vocabulary() -> None:
    """Sparse prediction's sizes depend on the labels, which a graph cannot: the loss is the same, logits are whole."""
    model = build(BertForMaskedLM, num_hidden_layers=1, sparse_prediction=True)
    labels = IDS.masked_fill(IDS % 3 > 0, -100)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    a, b = compiled(IDS, MASK, labels=labels), model(IDS, MASK, labels=labels)
    compare.close("loss", a.loss, b.loss, FLOAT32)
    assert a.logits.shape == (5, 7, 40)
    compare.close("logits", a.logits[REAL & (labels != -100)], b.logits, FLOAT32)


def test_exports() -> None:
    model = build(num_hidden_layers=1)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=16)
    dynamic = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}}
    program = torch.export.export(model, (), {"input_ids": IDS, "attention_mask": MASK}, dynamic_shapes=dynamic)
    for rows, columns in ((5, 7), (3, 6)):
        given = {"input_ids": IDS[:rows, :columns], "attention_mask": MASK[:rows, :columns]}
        a, b = program.module()(**given), model(**given)
        compare.close("states", a.last_hidden_state, b.last_hidden_state, FLOAT32)
        compare.close("pooler", a.pooler_output, b.pooler_output, FLOAT32)
