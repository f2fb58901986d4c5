"""Tokenisation, pooling and sentence vectors."""

from __future__ import annotations

from .pooling import Dense, SentenceModules, pool, read_modules
from .sentence_encoder import SentenceEncoder, TokenVectors
from .tokenizer import TextTokenizer, TokenizedText

__all__ = [
    "Dense",
    "SentenceEncoder",
    "SentenceModules",
    "TextTokenizer",
    "TokenVectors",
    "TokenizedText",
    "pool",
    "read_modules",
]
