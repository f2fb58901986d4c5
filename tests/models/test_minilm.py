"""Real weights: all-MiniLM-L6-v2 on sentences, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from pyxlbert.demo import minilm_directory
from pyxlbert.models import BertModel
from pyxlbert.testing import compare

SENTENCES = [
    "The ferry leaves at nine, unless the fog is too thick.",
    "Unless it is foggy, the boat departs at 9 o'clock.",
    "She tuned the old piano by ear.",
    "Why does bread rise?",
    "Yeast eats sugar and breathes out gas, and the gas is caught in the dough.",
    "",
    "Ok.",
    "The committee postponed its decision until the auditors had looked at every invoice of the past three years.",
    "Über den Wolken muss die Freiheit wohl grenzenlos sein.",
    "今天天气很好，我们去公园散步吧。",
    "def add(a, b): return a + b",
    "A glacier is a river that has forgotten how to hurry; it carries stones the size of houses, "
    "scratches its name into the bedrock, and when it finally melts it leaves lakes behind in the "
    "places where it rested longest, cold and green and very deep. " * 4,
]


@pytest.fixture(scope="module")
def directory() -> Path:
    return minilm_directory()  # a part of the development environment: without it these tests fail


@pytest.fixture(scope="module")
def batch(directory: Path) -> dict[str, torch.Tensor]:
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(SENTENCES)
    return {
        "input_ids": torch.tensor([e.ids for e in encoded]),
        "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
    }


def sentence_vectors(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask[..., None].to(torch.float32)
    return (states.float() * weights).sum(1) / weights.sum(1)


@pytest.fixture(scope="module")
def wanted(directory: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model = transformers.BertModel.from_pretrained(directory).eval()
    with torch.no_grad():
        return sentence_vectors(model(**batch).last_hidden_state, batch["attention_mask"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sentence_vectors(dtype: torch.dtype, directory: Path, batch: dict[str, torch.Tensor], wanted) -> None:
    model, info = BertModel.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": [], "removed_prefixes": []}
    with torch.no_grad():
        vectors = sentence_vectors(model(**batch).last_hidden_state, batch["attention_mask"])
    compare.cosine_distance(f"{dtype}", vectors, wanted, compare.tolerances.COSINE[dtype])
