"""Tokenisation and pooling."""

from __future__ import annotations

from .pooling import Dense, SentenceModules, pool, read_modules
from .tokenizer import TextTokenizer, TokenizedText

__all__ = ["Dense", "SentenceModules", "TextTokenizer", "TokenizedText", "pool", "read_modules"]
