"""Heads hold an encoder whatever its name and class, so that a model of the same family costs one file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyxlbert import models
from pyxlbert.models import BertConfig, BertModel, RobertaConfig, RobertaModel, XLNetConfig, XLNetModel
from pyxlbert.models.pretrained import PretrainedModel
from pyxlbert.testing import compare

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 9,
}
SMALL = {
    "Bert": BertConfig(**SIZES),
    "Roberta": RobertaConfig(**SIZES),
    "XLNet": XLNetConfig(vocab_size=40, d_model=24, n_layer=2, n_head=3, d_inner=20, start_n_top=2, end_n_top=2),
}
ENCODERS = {"Bert": BertModel, "Roberta": RobertaModel, "XLNet": XLNetModel}
HEADS = [name for name in models.__all__ if name.startswith(("BertFor", "RobertaFor", "XLNetFor", "XLNetLM"))]
IDS = torch.randint(1, 40, (4, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(4, 7).tril(3)


def family(head: str) -> str:
    return next(name for name in ENCODERS if head.startswith(name))


def another(head: str) -> tuple[PretrainedModel, PretrainedModel]:
    """A head as it is, and the same on an encoder of another class and name, with the same weights."""
    usual = getattr(models, head)
    encoder = type("Another", (ENCODERS[family(head)],), {"base_model_prefix": "another"})
    other = type(f"Another{head}", (usual,), {"base_model_prefix": "another", "encoder_class": encoder})
    torch.manual_seed(5)
    first = usual(SMALL[family(head)]).eval()
    torch.manual_seed(5)
    return first, other(SMALL[family(head)]).eval()


@pytest.mark.parametrize("head", HEADS)
def test_a_head_takes_an_encoder_of_another_class_and_name(head: str, tmp_path: Path) -> None:
    first, second = another(head)
    prefix = f"{first.base_model_prefix}."
    renamed = {name.replace(prefix, "another.", 1) if name.startswith(prefix) else name for name in first.state_dict()}
    assert set(second.state_dict()) == renamed
    assert type(second.base_model).__name__ == "Another" and not hasattr(second, first.base_model_prefix)
    tied = {
        name.replace(prefix, "another.", 1): same.replace(prefix, "another.", 1)
        for name, same in first.tied_names().items()
    }
    assert second.tied_names() == tied
    shape = (2, 2, 7) if "Choice" in head else (4, 7)
    given = {"input_ids": IDS.view(shape), "attention_mask": MASK.view(shape)}
    ours, wanted = second(**given, output_hidden_states=True), first(**given, output_hidden_states=True)
    assert list(ours) == list(wanted)
    for name, value in wanted.items():
        pairs = zip(ours[name], value, strict=True) if isinstance(value, tuple) else [(ours[name], value)]
        for one, same in pairs:
            compare.same_bits(f"{head} {name}", one, same)
    second.gradient_checkpointing_enable()
    assert second.base_model.checkpointing is not None
    second.set_input_embeddings(torch.nn.Embedding(40, 24))
    second.save_pretrained(tmp_path)
    again = type(second).from_pretrained(tmp_path)
    assert again.loading_info == {"missing_keys": [], "unexpected_keys": [], "removed_prefixes": []}
    compare.same_bits(f"{head} embeddings", again.get_input_embeddings().weight, second.get_input_embeddings().weight)


@pytest.mark.parametrize("options", [{"use_mems": False}, {"use_mems": True}, {"left_to_right": True}], ids=str)
def test_generation_asks_for_no_name_of_the_encoder(options: dict[str, bool]) -> None:
    first, second = another("XLNetLMHeadModel")
    assert torch.equal(
        second.generate(IDS, max_new_tokens=3, **options), first.generate(IDS, max_new_tokens=3, **options)
    )
