"""Objectives and the data for them."""

from __future__ import annotations

from pyxlbert.training.permutation import (
    PermutationBatch,
    PermutationLanguageModeling,
    order_perm_mask,
    order_ranks,
    sample_order,
    sample_spans,
)

__all__ = [
    "PermutationBatch",
    "PermutationLanguageModeling",
    "order_perm_mask",
    "order_ranks",
    "sample_order",
    "sample_spans",
]
