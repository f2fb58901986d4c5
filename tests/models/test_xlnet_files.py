"""XLNet's directories, both ways, and its configuration's other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_xlnet import FLOAT32, HEADS, IDS, build

from pyxlbert import models
from pyxlbert.models import (
    XLNetConfig,
    XLNetForSequenceClassification,
    XLNetModel,
)
from pyxlbert.testing import compare


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}, {"untie_r": False}])
def test_directories_both_ways(head: str, fields: dict[str, Any], tmp_path: Path) -> None:
    ours = build(getattr(models, head), **fields)
    ours.save_pretrained(tmp_path / "a")
    theirs, info = getattr(transformers, head).from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"] and not info["missing_keys"]
    theirs.eval().save_pretrained(tmp_path / "b")
    again, info = getattr(models, head).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": [], "removed_prefixes": []}
    assert again.config.untie_r == fields.get("untie_r", True)
    ids = IDS[:, None] if head == "XLNetForMultipleChoice" else IDS
    a, b, c = ours(ids), theirs(ids), again(ids)
    for name in a:
        if isinstance(a[name], torch.Tensor) and a[name].is_floating_point():
            compare.close(name, a[name], b[name], FLOAT32)
            compare.same_bits(name, a[name], c[name])
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in again.named_parameters()}


def test_biases_that_differ_are_left_untied(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"untie_r": False}))
    with pytest.warns(UserWarning, match="left untied"):
        again = XLNetModel.from_pretrained(tmp_path)
    assert again.config.untie_r
    compare.same_bits("states", again(IDS)[0], model(IDS)[0])


def test_an_encoder_loads_into_a_head_and_back(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "encoder")
    with pytest.warns(UserWarning, match="fresh values"):
        head = XLNetForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3)
    compare.same_bits("states", head.transformer(IDS)[0], build()(IDS)[0])
    head.save_pretrained(tmp_path / "head")
    with pytest.warns(UserWarning, match="without a place"):
        compare.same_bits("states", XLNetModel.from_pretrained(tmp_path / "head")(IDS)[0], build()(IDS)[0])


def test_configuration_has_the_other_names_too(tmp_path: Path) -> None:
    theirs = transformers.XLNetConfig(vocab_size=40, d_model=24, n_layer=2, n_head=3, d_inner=20)
    theirs.save_pretrained(tmp_path)
    ours = XLNetConfig.from_pretrained(tmp_path, num_hidden_layers=5)
    assert (ours.n_layer, ours.num_hidden_layers, ours.hidden_size, ours.num_attention_heads) == (5, 5, 24, 3)
    for name in ("d_head", "mem_len", "clamp_len", "summary_activation", "pad_token_id", "start_n_top", "dropout"):
        assert getattr(ours, name) == getattr(theirs, name)
