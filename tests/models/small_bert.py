"""A small BERT and a batch with padding, which the tests of the model share."""

from __future__ import annotations

from typing import Any

import torch

from pyxlbert.models import (
    BertConfig,
    BertModel,
)
from pyxlbert.testing import compare

FLOAT32 = compare.tolerances.MODEL_FLOAT32
GRADIENT = compare.tolerances.MODEL_GRADIENT_FLOAT32
SMALL = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IDS = torch.randint(1, 40, (5, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor(
    [[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]]
)
REAL = MASK.bool()


def build(head: type = BertModel, **fields: Any) -> torch.nn.Module:
    torch.manual_seed(5)
    return head(BertConfig(**SMALL | fields)).eval()


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
