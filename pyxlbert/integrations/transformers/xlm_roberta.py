"""XLM-RoBERTa: RoBERTa under another name."""

from __future__ import annotations

from dataclasses import replace

from pyxlbert.integrations.transformers import roberta

ARCHITECTURE = replace(roberta.ARCHITECTURE, model_type="xlm-roberta", prefix="XLMRoberta")
