"""Data2Vec of text: RoBERTa under another name."""

from __future__ import annotations

from dataclasses import replace

from pyxlbert.integrations.transformers import roberta

ARCHITECTURE = replace(roberta.ARCHITECTURE, model_type="data2vec-text", prefix="Data2VecText")
