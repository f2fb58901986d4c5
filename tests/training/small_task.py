"""Small encoders, files with labels and options, which the tests of training share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from pyxlbert.testing.directories import tiny_bert, tiny_xlnet, train_pieces
from pyxlbert.training.options import TrainingOptions

WORDS = ("the", "hello", "world", "unbelievable", "trains", "naive", "a", "b", "c")
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def sentences(count: int, seed: int = 0) -> list[list[str]]:
    source = random.Random(seed)
    return [[source.choice(WORDS) for _ in range(source.randint(1, 9))] for _ in range(count)]


def table(path: Path, count: int = 40) -> Path:
    """Texts that have the label yes where they say hello."""
    lines = [f"{' '.join(words)}\t{'yes' if 'hello' in words else 'no'}" for words in sentences(count)]
    path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n", encoding="utf-8")
    return path


def tagged(path: Path, count: int = 40) -> Path:
    """Sentences in which hello begins a person, which world goes on with."""
    blocks = []
    for words in sentences(count):
        tags = [{"hello": "B-PER", "world": "I-PER"}.get(word, "O") for word in words]
        blocks.append("\n".join(f"{word} {tag}" for word, tag in zip(words, tags, strict=True)))
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return path


def bert(folder: Path, **fields: Any) -> Path:
    return tiny_bert(folder, **{"num_hidden_layers": 2, **fields})


def xlnet(folder: Path) -> Path:
    lines = [" ".join(words) for words in sentences(300)]
    pieces = train_pieces(lines, 45, hard_vocab_limit=False)
    return tiny_xlnet(folder, pieces, n_layer=2, dropout=0.0, summary_last_dropout=0.0)


def options(**changes: Any) -> TrainingOptions:
    few = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "progress": False, "log_every": 1}
    return TrainingOptions(**{**few, **changes})
