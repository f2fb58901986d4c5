"""Tokenisation, pooling, sentence vectors and scores of pairs."""

from __future__ import annotations

from .cross_encoder import CrossEncoder
from .pooling import Dense, SentenceModules, pool, read_modules
from .processes import ProcessPool
from .quantisation import quantise
from .sentence_encoder import SentenceEncoder, TokenVectors
from .settings import DTYPES, SentenceSettings
from .similarities import similarity, similarity_pairwise
from .tokenizer import TextTokenizer, TokenizedText

__all__ = [
    "DTYPES",
    "CrossEncoder",
    "Dense",
    "ProcessPool",
    "SentenceEncoder",
    "SentenceModules",
    "SentenceSettings",
    "TextTokenizer",
    "TokenVectors",
    "TokenizedText",
    "pool",
    "quantise",
    "read_modules",
    "similarity",
    "similarity_pairwise",
]
