"""`output_logits=False`: the loss without the logits of all places, in every model with a vocabulary."""

from __future__ import annotations

import math

import pytest
import small_bert
import small_xlnet
import torch

from pyxlbert import models
from pyxlbert.nn import Linear, fixed_sizes
from pyxlbert.testing import compare

VOCABULARY = 40
LABELS = torch.where(small_bert.IDS % 3 == 0, small_bert.IDS, -100)


def bert(name: str, **fields) -> tuple[torch.nn.Module, dict]:
    head = getattr(models, name)
    if name.startswith("Roberta"):
        torch.manual_seed(5)
        config = models.RobertaConfig(**small_bert.SMALL | {"max_position_embeddings": 20} | fields)
        model = head(config).eval()
    else:
        model = small_bert.build(head, **fields)
    arguments = {"input_ids": small_bert.IDS, "attention_mask": small_bert.MASK, "labels": LABELS}
    if name == "BertForPreTraining":
        arguments["next_sentence_label"] = torch.tensor([0, 1, 0, 1, 1])
    return model, arguments


def xlnet(targets: bool) -> tuple[torch.nn.Module, dict]:
    model = small_xlnet.build(models.XLNetLMHeadModel)
    arguments = {"input_ids": small_xlnet.IDS, "attention_mask": small_xlnet.MASK, "use_mems": False}
    if targets:
        labels = torch.tensor([[1, 2], [3, -100], [5, -100], [7, 8]])
        return model, arguments | {"target_positions": small_xlnet.POSITIONS, "labels": labels}
    return model, arguments | {"labels": torch.where(small_xlnet.IDS % 2 == 0, small_xlnet.IDS, -100)}


CASES = {
    "bert": lambda: bert("BertForMaskedLM"),
    "bert, another label for none": lambda: bert(
        "BertForMaskedLM", sparse_prediction=True, sparse_pred_ignore_index=0, tie_word_embeddings=False
    ),
    "pretraining": lambda: bert("BertForPreTraining"),
    "roberta": lambda: bert("RobertaForMaskedLM"),
    "xlnet": lambda: xlnet(False),
    "xlnet, targets": lambda: xlnet(True),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_same(case: str, monkeypatch) -> None:
    model, arguments = CASES[case]()
    if case.endswith("none"):
        arguments["labels"] = LABELS.clamp(min=0)
    whole = model(**arguments)
    whole.loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rows: list[int] = []
    product = Linear.forward

    def counted(self, x):
        if self.out_features == VOCABULARY:
            rows.append(x.numel() // x.shape[-1])
        return product(self, x)

    monkeypatch.setattr(Linear, "forward", counted)
    output = model(**arguments, output_logits=False)
    assert not rows  # the decoder was not asked for its logits
    assert "logits" not in output and "prediction_logits" not in output and len(output) == len(whole) - 1
    output.loss.backward()
    compare.close("loss", output.loss, whole.loss, small_bert.FLOAT32)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(wanted)
    least = max(float(one.abs().max()) for one in wanted.values()) * compare.tolerances.MODEL_SMALL_GRADIENT
    for name, p in model.named_parameters():
        if name in wanted:
            compare.close(name, p.grad, wanted[name], small_bert.GRADIENT, least=least)
    with torch.no_grad():
        compare.close("loss", model(**arguments, output_logits=False).loss, whole.loss, small_bert.FLOAT32)
    # Only what is labelled, also without gradients.
    assert rows and sum(rows) < arguments["labels"].numel()


def test_no_label_at_all_is_no_number() -> None:
    model, arguments = CASES["bert"]()
    arguments["labels"] = torch.full_like(LABELS, -100)
    assert math.isnan(model(**arguments).loss.item())
    assert math.isnan(model(**arguments, output_logits=False).loss.item())


def test_a_graph_whose_sizes_are_fixed_has_the_same_loss() -> None:
    model, arguments = CASES["bert"]()
    wanted = model(**arguments).loss
    with fixed_sizes():
        output = model(**arguments, output_logits=False)
    assert output.logits is None
    compare.close("loss", output.loss, wanted, small_bert.FLOAT32)


@pytest.mark.parametrize("case", ["bert", "pretraining", "roberta", "xlnet"])
def test_what_is_refused(case: str) -> None:
    model, arguments = CASES[case]()
    with pytest.raises(TypeError, match="output_logits: got 0, wanted True or False"):
        model(**arguments, output_logits=0)
    with pytest.raises(ValueError, match=r"labels: got 40, wanted 0 to 39"):
        model(**arguments | {"labels": torch.full_like(arguments["labels"], 40)}, output_logits=False)
    with pytest.raises(ValueError, match=r"labels: got shape \[2, 3\]"):
        model(**arguments | {"labels": torch.zeros(2, 3, dtype=torch.int64)}, output_logits=False)
    del arguments["labels"]
    with pytest.raises(ValueError, match="output_logits: got False without labels"):
        model(**arguments, output_logits=False)
