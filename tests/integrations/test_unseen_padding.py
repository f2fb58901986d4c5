"""NaN in the embeddings of padding: it reaches no token, and no gradient where padding is cut off."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers

import pyxlbert
from pyxlbert import models
from pyxlbert.testing import compare

RIGHT = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8])
HOLES = torch.tensor([[1] * 9, [1, 0, 1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0, 1, 1]])
SMALL = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def ours() -> torch.nn.Module:
    return models.BertModel(models.BertConfig(**SMALL))


def theirs() -> torch.nn.Module:
    pyxlbert.register_attention()
    return transformers.BertModel(transformers.BertConfig(**SMALL, attn_implementation="pyxlbert"))


def accelerated() -> torch.nn.Module:
    return pyxlbert.accelerate(transformers.BertModel(transformers.BertConfig(**SMALL)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [RIGHT, HOLES], ids=["right", "holes"])
@pytest.mark.parametrize("build", [ours, theirs, accelerated])
def test_nan_at_padding(build: Callable[[], torch.nn.Module], mask: torch.Tensor, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = build().to(dtype).eval()
    rows = torch.randn(3, 9, 24, dtype=dtype)
    real = mask.bool()
    found = []
    for padding in (0.0, float("nan")):
        given = rows.masked_fill(~real[..., None], padding).requires_grad_()
        hidden = model(inputs_embeds=given, attention_mask=mask).last_hidden_state[real]
        weight = next(p for name, p in model.named_parameters() if name.endswith("query.weight"))
        found.append((hidden, *torch.autograd.grad(hidden.float().square().sum(), (given, weight))))
    (clean, clean_rows, clean_weight), (hidden, grad_rows, grad_weight) = found
    assert hidden.isfinite().all()
    compare.same_bits("tokens", hidden, clean)
    if build is theirs:  # rows of padding are queries, too, whose gradients are NaN and go to all that they see
        return
    compare.same_bits("gradient of tokens", grad_rows[real], clean_rows[real])
    compare.same_bits("gradient of a weight", grad_weight, clean_weight)
