"""RoBERTa: BERT's layers, and tokens counted from the padding's id on."""

from __future__ import annotations

from pyxlbert.integrations.architecture import Architecture, EmbeddingParts
from pyxlbert.integrations.transformers.bert import LAYER

ARCHITECTURE = Architecture(
    model_type="roberta",
    tested="5.17",
    prefix="Roberta",
    layer_parts=LAYER,
    embedding_parts=EmbeddingParts(positions="token"),
)
