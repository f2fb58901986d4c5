"""What is RoBERTa's own: positions that count tokens, its family's names in files, precision, layers in one call."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_bert import FLOAT32, IDS, MASK, REAL, SMALL

import pyxlbert
from pyxlbert import models
from pyxlbert.backends import native
from pyxlbert.models import BertConfig, BertModel, RobertaConfig, RobertaForMaskedLM, RobertaModel
from pyxlbert.nn.encoder_layers import PackedLayers
from pyxlbert.testing import compare

HEADS = ["RobertaModel", *sorted(name for name in models.__all__ if name.startswith("RobertaFor"))]
KINDS = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
PADDED = torch.where(REAL, IDS.clamp(min=2), 1)


def build(head: type = RobertaModel, **fields: Any) -> torch.nn.Module:
    torch.manual_seed(5)
    return head(RobertaConfig.from_dict({}, **SMALL | fields)).eval()


def test_positions_count_tokens_not_places() -> None:
    """Whatever the mask, and wherever a row's padding is."""
    model = build()
    wanted = model(PADDED, MASK)[0]
    for row, real in enumerate(REAL[:4]):
        alone = PADDED[row][real][None]
        compare.close("alone", model(alone)[0][0], wanted[row][real], FLOAT32)
        counted = torch.arange(2, 2 + alone.shape[1])[None]
        compare.same_bits("named", model(alone, position_ids=counted)[0], model(alone)[0])
    # A masked token that is not padding's is counted.
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[1, 0, 1, 1]])
    counted = torch.tensor([[2, 3, 4, 5]])
    compare.same_bits("masked", model(ids, mask)[0], model(ids, mask, position_ids=counted)[0])
    vectors = model.get_input_embeddings()(ids)
    compare.same_bits("vectors", model(inputs_embeds=vectors, attention_mask=mask)[0], model(ids, mask)[0])


def test_packed_rows_count_from_their_beginning() -> None:
    model = build()
    rows = [PADDED[row][real] for row, real in enumerate(REAL)]  # the last one empty
    rows[1] = torch.tensor([5, 1, 6])  # padding's id among tokens
    cu_seqlens = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0)], dtype=torch.int32)
    packed = model(torch.cat(rows), cu_seqlens=cu_seqlens)
    for row, got in zip(rows[:4], packed[0].split([len(row) for row in rows])[:4], strict=True):
        compare.close("rows", got, model(row[None])[0][0], FLOAT32)
    vectors = model.get_input_embeddings()(torch.cat(rows))
    named = torch.cat([torch.arange(len(row)) for row in rows]) + 2
    a = model(inputs_embeds=vectors, cu_seqlens=cu_seqlens)[0]
    compare.same_bits("vectors", a, model(inputs_embeds=vectors, cu_seqlens=cu_seqlens, position_ids=named)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_files_go_both_ways(kind: str, head: str, tmp_path: Path, recwarn) -> None:
    prefix, fields = KINDS[kind], SMALL | {"pad_token_id": 1}
    ours = getattr(models, head)(RobertaConfig.from_dict({"model_type": kind}, **fields))
    ours.save_pretrained(tmp_path / "ours")
    oracle = getattr(transformers, head.replace("Roberta", prefix))
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["model_type"] == kind and written["architectures"] == [oracle.__name__]
    theirs, info = oracle.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.save_pretrained(tmp_path / "theirs")
    again, info = getattr(models, head).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": [], "removed_prefixes": []} and type(again.config) is type(
        ours.config
    )
    assert not [w for w in recwarn if "pyxlbert" in str(w.filename)]
    for name, value in ours.state_dict().items():
        compare.same_bits(name, again.state_dict()[name], value)


def test_an_encoder_goes_into_a_head_and_out(tmp_path: Path) -> None:
    build(RobertaForMaskedLM).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"lm_head"):
        encoder = RobertaModel.from_pretrained(tmp_path, add_pooling_layer=False)
    encoder.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"classifier.dense.weight"):
        head = models.RobertaForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    compare.same_bits("embeddings", head.get_input_embeddings().weight, encoder.get_input_embeddings().weight)


@pytest.mark.skipif(native._C is None or native._C.level() == "portable", reason="nothing is packed without AVX2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_run_in_one_call(dtype: torch.dtype, monkeypatch) -> None:
    ran = []
    right = PackedLayers.run
    monkeypatch.setattr(PackedLayers, "run", lambda *given: (ran.append(right(*given)), ran[-1])[1])
    fields = {"hidden_size": 48, "num_hidden_layers": 3, "intermediate_size": 96}
    model = build(**fields, initializer_range=0.1)
    truth = copy.deepcopy(model).double()
    model = pyxlbert.pack(model.to(dtype))
    with torch.no_grad():
        packed = model(PADDED, MASK)[0][REAL]
        assert ran and ran[-1] is not None
        exact = truth(PADDED, MASK)[0][REAL]
        pyxlbert.unpack(model)
        plain = model(PADDED, MASK)[0][REAL]
    compare.within_budget("states", packed, plain, exact)


@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
def test_low_precision_errs_no_more_than_transformers(how: str) -> None:
    torch.manual_seed(0)
    fields = SMALL | {"num_hidden_layers": 4, "hidden_size": 48}
    theirs = transformers.RobertaModel(transformers.RobertaConfig(**fields, attn_implementation="eager")).eval()
    ours = RobertaModel(RobertaConfig(**fields)).eval()
    ours.load_state_dict(theirs.state_dict())
    truth, direction = copy.deepcopy(theirs).double(), torch.randn(5, 7, 48)
    ids, mask, results = PADDED[:4], MASK[:4], []
    if how != "autocast":
        ours, theirs = ours.to(getattr(torch, how)), theirs.to(getattr(torch, how))
    for model in (ours, theirs, truth):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast" and model is not truth):
            state = model(ids, mask).last_hidden_state
        (state * direction[:4].to(state.dtype))[REAL[:4]].sum().backward()
        named = sorted((name, p.grad.flatten()) for name, p in model.named_parameters() if p.grad is not None)
        results.append((state.detach()[REAL[:4]], torch.cat([gradient for _, gradient in named])))
    (mine, dmine), (plain, dplain), (exact, dexact) = results
    assert mine.dtype == plain.dtype
    compare.within_budget("states", mine, plain, exact)
    compare.within_budget("gradients", dmine, dplain, dexact)


def test_traces_into_one_graph_and_exports() -> None:
    """What a compiler makes of the layers is tested with BERT's."""
    model = build(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=14)
    dynamic = {name: {0: batch, 1: length} for name in ("input_ids", "attention_mask")}
    whole = {"input_ids": PADDED, "attention_mask": MASK}
    exported = torch.export.export(model, (), whole, dynamic_shapes=dynamic).module()
    for rows, columns in ((5, 7), (3, 5)):
        given = {name: value[:rows, :columns] for name, value in whole.items()}
        wanted = model(**given)[0]
        for one in (compiled, exported):
            compare.close("states", one(**given)[0], wanted, FLOAT32)


@pytest.mark.parametrize("batch, length", [(0, 5), (3, 0)])
@pytest.mark.parametrize("head", HEADS)
def test_empty_batches(head: str, batch: int, length: int) -> None:
    shape = (batch, 2, length) if "Choice" in head else (batch, length)
    for mask in (None, torch.ones(shape)):
        output = build(getattr(models, head))(torch.zeros(shape, dtype=torch.long), attention_mask=mask)
        assert all(value.isfinite().all() for value in output.values() if isinstance(value, torch.Tensor))


TOO_LONG = "got 15 tokens a row, wanted at most 14, which is max_position_embeddings 16 less pad_token_id"
BAD = [
    ({}, "input_ids: wanted exactly one"),
    ({"input_ids": torch.full((1, 15), 5)}, f"input_ids: {TOO_LONG}"),
    ({"inputs_embeds": torch.zeros(1, 15, 24)}, f"inputs_embeds: {TOO_LONG}"),
    ({"input_ids": torch.full((15,), 5), "cu_seqlens": torch.tensor([0, 15]).int()}, f"input_ids: {TOO_LONG}"),
    ({"input_ids": torch.full((1, 3), 40)}, "input_ids"),
    ({"input_ids": PADDED, "attention_mask": MASK * 2}, "attention_mask"),
    ({"input_ids": PADDED, "position_ids": PADDED * 0 + 16}, "position_ids"),
    ({"input_ids": PADDED, "position_ids": [[0]]}, "position_ids: got list"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build()(**arguments)


def test_padding_beyond_the_table_takes_no_position() -> None:
    """As in transformers, where a row is wider than the table but has no more tokens than it."""
    model = build()
    wide = torch.nn.functional.pad(PADDED[:1], (0, 10), value=1)
    compare.close("states", model(wide, wide.ne(1))[0][:, :7], model(PADDED[:1])[0], FLOAT32)


def test_configurations() -> None:
    with pytest.raises(ValueError, match=r"pad_token_id: got None, wanted the padding's id"):
        RobertaConfig(pad_token_id=None)
    with pytest.raises(ValueError, match=r"max_position_embeddings: got 2, wanted at least 3"):
        RobertaConfig(max_position_embeddings=2)
    with pytest.raises(ValueError, match=r"model_type: got 'bert', wanted 'roberta' or 'xlm-roberta' or 'camembert'"):
        RobertaConfig.from_dict({"model_type": "bert"})
    with pytest.raises(ValueError, match=r"model_type: got 'roberta', wanted 'bert'"):
        BertConfig.from_dict({"model_type": "roberta"})
    with pytest.raises(TypeError, match=r"config: got RobertaConfig, wanted BertConfig"):
        BertModel(RobertaConfig(**SMALL))
    with pytest.raises(TypeError, match=r"config: got BertConfig, wanted RobertaConfig"):
        RobertaModel(BertConfig(**SMALL))
    assert RobertaModel(models.XLMRobertaConfig(**SMALL)).config.model_type == "xlm-roberta"
