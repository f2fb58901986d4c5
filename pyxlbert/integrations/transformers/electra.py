"""Electra: BERT's layers; its embeddings may be narrower than they."""

from __future__ import annotations

from pyxlbert.integrations.architecture import Architecture
from pyxlbert.integrations.transformers.bert import LAYER

ARCHITECTURE = Architecture(
    model_type="electra",
    tested="5.17",
    prefix="Electra",
    layer_parts=LAYER,
    summaries=("{}ForMultipleChoice",),
)
