"""Wav2Vec2-Conformer, where its positions are relative."""

from __future__ import annotations

from pyxlbert.integrations.architecture import ConformerArchitecture

ARCHITECTURE = ConformerArchitecture(model_type="wav2vec2-conformer", tested="5.17", prefix="Wav2Vec2Conformer")
