"""Wav2Vec2-BERT, where its positions are relative; by default they are not."""

from __future__ import annotations

from pyxlbert.integrations.architecture import ConformerArchitecture

ARCHITECTURE = ConformerArchitecture(model_type="wav2vec2-bert", tested="5.17", prefix="Wav2Vec2Bert")
