"""`pyxlbert convert` of RoBERTa's own checkpoints: fairseq's names for the weights that transformers has."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pyxlbert import cli, models
from pyxlbert.original import convert
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.models import randomize

SIZES = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
ARGS = argparse.Namespace(encoder_attention_heads=3, activation_fn="gelu", dropout=0.1, attention_dropout=0.1)
ENCODER = "encoder.sentence_encoder."
NAMES = {
    "roberta.embeddings.word_embeddings.weight": "sentence_encoder.embed_tokens.weight",
    "roberta.embeddings.position_embeddings.weight": "sentence_encoder.embed_positions.weight",
    "lm_head.bias": "lm_head.bias",
}
PARTS = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "final_layer_norm",
}


def plain(head: str) -> Any:
    torch.manual_seed(0)
    fields = SIZES | {"max_position_embeddings": 20, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "num_labels": 3}
    model = getattr(transformers, head)(transformers.RobertaConfig(**fields)).eval()
    randomize(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.roberta.embeddings.token_type_embeddings.weight.zero_()  # which fairseq has not
    return model


def save(path: Path, model: Any, owner: str, whole: bool, norm: str) -> None:
    """As fairseq does; `whole`: query, key and value as one matrix."""
    weights: dict[str, torch.Tensor] = {f"{owner}.sentence_encoder.version": torch.tensor([3.0])}
    state = model.state_dict()
    for name, tensor in state.items():
        theirs = NAMES.get(name)
        base, _, kind = name.rpartition(".")
        if base.startswith("roberta.encoder.layer."):
            number, _, part = base.removeprefix("roberta.encoder.layer.").partition(".")
            theirs = f"sentence_encoder.layers.{number}.{PARTS[part]}.{kind}"
            if whole and ".q_proj" in theirs:
                several = [state[name.replace("query", one)] for one in ("query", "key", "value")]
                theirs, tensor = theirs.replace("q_proj.", "in_proj_"), torch.cat(several)
            elif whole and (".k_proj" in theirs or ".v_proj" in theirs):
                continue
        elif base == "roberta.embeddings.LayerNorm":
            theirs = f"sentence_encoder.{norm}.{kind}"
        elif base.startswith("lm_head.") and base != "lm_head.decoder":
            theirs = name
        elif base.startswith("classifier."):
            theirs = f"classification_heads.mnli.{name.removeprefix('classifier.')}"
        if theirs is not None:
            weights[theirs if theirs.startswith("classification") else f"{owner}.{theirs}"] = tensor.clone()
    if "lm_head.bias" in state:
        weights[f"{owner}.lm_head.weight"] = state["roberta.embeddings.word_embeddings.weight"]
    torch.save({"args": ARGS, "model": weights}, path)


@pytest.mark.parametrize("head", ["RobertaForMaskedLM", "RobertaForSequenceClassification"])
@pytest.mark.parametrize(
    ("owner", "whole", "norm"), [("decoder", True, "emb_layer_norm"), ("encoder", False, "layernorm_embedding")]
)
def test_what_it_computes(head: str, owner: str, whole: bool, norm: str, tmp_path: Path, capsys) -> None:
    model = plain(head)
    save(tmp_path / "model.pt", model, owner, whole, norm)
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "out"), "--no-tokenizer"]) == 0
    said = capsys.readouterr()
    assert said.err == f"{head}: {tmp_path / 'out'}\n"
    assert f"{owner}.sentence_encoder.version" in said.out and "1 left new" in said.out
    ids = torch.tensor([[0, 7, 8, 2], [0, 9, 2, 1]])
    given = {"input_ids": ids, "attention_mask": ids.ne(1).long()}
    with torch.no_grad():
        wanted = model(**given).logits
        for library in (transformers, models):
            found, info = getattr(library, head).from_pretrained(tmp_path / "out", output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
            got = found.eval()(**given).logits
            rows = ids.ne(1) if got.dim() == 3 else slice(None)
            compare.close(library.__name__, got[rows], wanted[rows], tolerances.MODEL_FLOAT32)


def test_another_task(tmp_path: Path) -> None:
    """The encoder alone, and a head that is left new."""
    model = plain("RobertaForMaskedLM")
    save(tmp_path / "model.pt", model, "encoder", True, "emb_layer_norm")
    done = convert(tmp_path / "model.pt", tmp_path / "encoder", task="feature-extraction", tokenizer=False)
    assert done.class_name == "RobertaModel"
    assert {row.parameters for row in done.rows if row.state == "left new"} == {
        ("pooler.dense.weight",),
        ("pooler.dense.bias",),
    }
    done = convert(tmp_path, tmp_path / "tokens", task="token-classification", tokenizer=False)
    assert {row.parameters[0] for row in done.rows if row.state == "left new"} == {
        "classifier.weight",
        "classifier.bias",
    }
    ids = torch.tensor([[0, 7, 8, 2]])
    with torch.no_grad(), pytest.warns(match=r"classifier"):
        found = models.RobertaForTokenClassification.from_pretrained(tmp_path / "tokens")
    with torch.no_grad():
        got = found.eval().roberta(ids).last_hidden_state
        compare.close("rows", got, model.roberta(ids).last_hidden_state, tolerances.MODEL_FLOAT32)


def _edit(change: Any) -> Any:
    def edit(path: Path) -> None:
        state = torch.load(path, weights_only=False)
        change(state)
        torch.save(state, path)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "is not a whole file of numbers and arguments alone"),
        (_edit(lambda s: s.pop("model")), "has no dictionary of tensors under 'model'"),
        (_edit(lambda s: s["model"].pop(f"{ENCODER}embed_tokens.weight")), "it is no RoBERTa of fairseq"),
        (_edit(lambda s: s["model"].pop(f"{ENCODER}layers.1.fc2.bias")), "lacks roberta.encoder.layer.1"),
        (_edit(lambda s: s.pop("args")), "args.encoder_attention_heads: got None"),
        (_edit(lambda s: setattr(s["args"], "activation_fn", "tanh")), "args.activation_fn: got 'tanh'"),
        (
            _edit(lambda s: s["model"].update({"encoder.sentence_encoder.layer_norm.weight": torch.ones(24)})),
            "normalises before its layers",
        ),
        (
            _edit(lambda s: s["model"].update({"encoder.lm_head.weight": torch.ones(40, 24)})),
            "to which RoBERTa's head is tied",
        ),
        (
            _edit(lambda s: s["model"].update({"encoder.sentence_encoder.layers.0.fc1.bias": torch.ones(3)})),
            "got [3], wanted [20]",
        ),
        (
            _edit(lambda s: s["model"].update({f"classification_heads.{n}.dense.bias": torch.ones(2) for n in "ab"})),
            "has the heads a, b, of which a model has one",
        ),
    ],
)
def test_bad_input(edit: Any, message: str, tmp_path: Path) -> None:
    save(tmp_path / "model.pt", plain("RobertaForMaskedLM"), "encoder", False, "emb_layer_norm")
    edit(tmp_path / "model.pt")
    with pytest.raises(ValueError) as raised:
        convert(tmp_path, tmp_path / "out", tokenizer=False)
    assert message in str(raised.value) and "model.pt" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_its_dictionary_is_not_read(tmp_path: Path) -> None:
    save(tmp_path / "model.pt", plain("RobertaForMaskedLM"), "encoder", False, "emb_layer_norm")
    with pytest.raises(ValueError, match="whose dictionary is not read: wanted --no-tokenizer"):
        convert(tmp_path, tmp_path / "out")
