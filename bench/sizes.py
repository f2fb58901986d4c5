"""Sizes of the models that are raced: suites, the GPU's run and profiles read them here."""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    """Of an encoder."""

    layers: int
    hidden: int
    inner: int


# Heads of 64 and, of the small one, 32.
SIZES = {"BERT-base": Size(12, 768, 3072), "MiniLM": Size(6, 384, 1536), "BERT 2 layers": Size(2, 768, 3072)}
XLNET = Size(12, 768, 3072)


def xlnet_fields(layers: int = XLNET.layers) -> dict[str, int]:
    """Of a configuration of XLNet-base, ours or of transformers, with so many layers."""
    return {"d_model": XLNET.hidden, "n_layer": layers, "n_head": XLNET.hidden // 64, "d_inner": XLNET.inner}
