"""Configurations: defaults, round trips and refusals."""

from __future__ import annotations

import json
import time

import pytest
import torch
import transformers

from pyxlbert.models import BertConfig, BertForQuestionAnswering, BertModel, XLNetConfig
from pyxlbert.testing.directories import tiny_bert

pytestmark = pytest.mark.quick


def test_defaults_are_those_of_transformers() -> None:
    ours, theirs = BertConfig().to_dict(), transformers.BertConfig().to_dict()
    shared = set(ours) & set(theirs) - {"id2label", "label2id"}
    assert {"hidden_size", "layer_norm_eps", "tie_word_embeddings", "pad_token_id", "model_type"} <= shared
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


def test_round_trip_keeps_unknown_keys(tmp_path) -> None:
    written = {
        "model_type": "bert",
        "hidden_size": 24,
        "num_attention_heads": 2,
        "colour": {"a": [1]},
        "use_cache": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = BertConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "again")
    read = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {name: read[name] for name in written} == written
    assert BertConfig.from_pretrained(tmp_path / "again") == config


def test_old_and_new_names_of_the_dtype() -> None:
    assert BertConfig.from_dict({"torch_dtype": "float16"}).dtype == "float16"
    assert BertConfig.from_dict({"torch_dtype": "float16", "dtype": "bfloat16"}).dtype == "bfloat16"


def test_labels() -> None:
    assert BertConfig().num_labels == 2
    config = BertConfig.from_dict({"id2label": {"0": "no", "1": "yes", "2": "maybe"}, "label2id": {"no": 0}})
    assert config.num_labels == 3
    assert config.id2label[2] == "maybe"
    assert BertConfig.from_dict(config.to_dict(), num_labels=4).num_labels == 4
    assert BertConfig.from_dict(BertConfig(num_labels=7).to_dict()).num_labels == 7


def test_transformers_reads_what_we_write(tmp_path) -> None:
    config = BertConfig(hidden_size=24, num_attention_heads=2, num_labels=5, hidden_act="relu", pad_token_id=None)
    config.save_pretrained(tmp_path)
    theirs = transformers.BertConfig.from_pretrained(tmp_path)
    assert (theirs.hidden_size, theirs.num_labels, theirs.hidden_act, theirs.pad_token_id) == (24, 5, "relu", None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("position_embedding_type", "relative_key"),
        ("is_encoder_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"bits": 4}),
        ("model_type", "roberta"),
        ("hidden_act", "softmax"),
        ("hidden_act", None),
        ("num_attention_heads", 7),
        ("num_attention_heads", 0),
        ("hidden_size", 12.0),
        ("vocab_size", True),
        ("num_hidden_layers", -1),
        ("hidden_dropout_prob", 1.5),
        ("hidden_dropout_prob", -0.1),
        ("attention_probs_dropout_prob", float("nan")),
        ("attention_probs_dropout_prob", None),
        ("classifier_dropout", 2),
        ("layer_norm_eps", -1e-5),
        ("layer_norm_eps", "tiny"),
        ("pad_token_id", 30522),
        ("pad_token_id", -1),
        ("type_vocab_size", 0),
        ("problem_type", "clustering"),
        ("num_labels", 0),
        ("id2label", ["a"]),
        ("id2label", {"first": "a"}),
        ("tie_word_embeddings", "yes"),
        ("residual_in_fp32", None),
        ("sparse_prediction", 1),
        ("layer_norm_eps", float("inf")),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        BertConfig.from_dict({name: value})


def test_an_override_that_is_no_field_is_named() -> None:
    with pytest.raises(TypeError, match="num_label: no field of BertConfig; near: num_labels"):
        BertConfig.from_dict({}, num_label=3)
    with pytest.raises(ValueError, match="is_decoder"):
        BertConfig.from_dict({}, is_decoder=True)
    assert BertConfig.from_dict({"colour": 3}, torch_dtype="float16").dtype == "float16"


def test_a_changed_field_is_checked_when_a_model_is_made() -> None:
    config = BertConfig(hidden_size=24, num_attention_heads=2)
    config.num_attention_heads = 5
    with pytest.raises(ValueError, match="num_attention_heads"):
        BertModel(config)


def test_question_answering_has_two_labels() -> None:
    with pytest.raises(ValueError, match="num_labels"):
        BertForQuestionAnswering(BertConfig(num_labels=3))


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_a_broken_file_is_named(tmp_path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json"):
        BertConfig.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        BertConfig.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="bert-base-uncased"):
        BertConfig.from_pretrained("bert-base-uncased")


HOSTILE = [
    ("num_hidden_layers", 10**9),
    ("num_labels", 10**10),
    ("hidden_size", 10**12),
    ("hidden_size", 2**63),
    ("num_attention_heads", 2**63),
    ("intermediate_size", 10**12),
    ("vocab_size", 2**63),
    ("max_position_embeddings", 10**400),
    ("type_vocab_size", 10**12),
    ("pad_token_id", 10**20),
    ("sparse_pred_ignore_index", 10**20),
    ("sparse_pred_ignore_index", float("nan")),
    ("layer_norm_eps", 10**400),
    ("layer_norm_eps", float("nan")),
    ("hidden_dropout_prob", -(10**400)),
    ("initializer_range", float("inf")),
    ("architectures", 3),
    ("architectures", [{}]),
    ("label2id", [1]),
    ("id2label", {"a": "b"}),
    ("problem_type", ["regression"]),
    ("model_type", []),
    ("hidden_act", {}),
    ("hidden_act", 3),
    ("dtype", 3),
]


@pytest.mark.parametrize(("name", "value"), HOSTILE, ids=lambda one: str(one)[:20])
def test_hostile_values_are_refused_before_anything_is_built(name: str, value, tmp_path) -> None:
    """In a moment, with the file and the field in the message: of the configuration, and of a model with weights."""
    tiny_bert(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        BertModel.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and name in str(caught.value)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("kind", [BertConfig, XLNetConfig])
@pytest.mark.parametrize(
    "value", [3, "", "float33", "int64", "nn", "Tensor", "bfloat16 ", [], {}, ["float32"], True, torch.int64], ids=str
)
def test_a_dtype_is_one_that_weights_may_have(kind: type, value: object) -> None:
    for name in ("dtype", "torch_dtype"):
        with pytest.raises(ValueError, match=r"^dtype: got .*, wanted the name of a floating-point dtype of torch"):
            kind.from_dict({name: value})
    assert kind.from_dict({"dtype": torch.bfloat16}).dtype == kind(dtype="torch.bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize("kind", [BertConfig, XLNetConfig])
def test_fields_come_as_a_dict(kind: type) -> None:
    for values in ([], "{}", None, 3):
        with pytest.raises(TypeError, match=r"^values: got .*, wanted a dict of fields"):
            kind.from_dict(values)
    with pytest.raises(TypeError, match=r"^values: got the key 3, wanted a field's name"):
        kind.from_dict({3: "vocab_size"})
    with pytest.raises(ValueError, match=r"^extra: got 3, wanted an object"):
        kind(extra=3)


@pytest.mark.parametrize("name", ["n_layer", "num_hidden_layers", "d_model", "d_inner", "vocab_size", "mem_len"])
def test_hostile_values_of_xlnet(name: str) -> None:
    with pytest.raises(ValueError, match="got 1000000000000, wanted an integer of at most"):
        XLNetConfig.from_dict({name: 10**12})


@pytest.mark.parametrize("value", [10**12, -2, float("nan"), "5", {}, [2, 0.5]], ids=str)
@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id", "eos_token_id"])
def test_tokens_of_xlnet_are_integers(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got .*, wanted an integer"):
        XLNetConfig.from_dict({name: value})


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 1024}, {"hidden_size": 2**24, "vocab_size": 2**31 - 1}], ids=str
)
def test_the_largest_values_meet_the_weights(changes: dict, tmp_path) -> None:
    tiny_bert(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=r"lacks weights of the encoder|does not fit its configuration"):
        BertModel.from_pretrained(tmp_path)
