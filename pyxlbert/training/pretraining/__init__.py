"""Pretraining data: from text files to batches for BERT, ALBERT and XLNet."""

from __future__ import annotations

from pyxlbert.training.pretraining.batches import PretrainingBatches
from pyxlbert.training.pretraining.fits import check_pairs, check_segments
from pyxlbert.training.pretraining.pairs import PairOptions, SentencePairs
from pyxlbert.training.pretraining.segments import SegmentOptions, Segments
from pyxlbert.training.pretraining.store import TokenStore, open_or_build
from pyxlbert.training.pretraining.vocabularies import Vocabulary, train_albert, train_unigram, train_wordpiece

__all__ = [
    "PairOptions",
    "PretrainingBatches",
    "SegmentOptions",
    "Segments",
    "SentencePairs",
    "TokenStore",
    "Vocabulary",
    "check_pairs",
    "check_segments",
    "open_or_build",
    "train_albert",
    "train_unigram",
    "train_wordpiece",
]
