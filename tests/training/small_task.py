"""Small encoders, files with labels and options, which the tests of training share."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from pyxlbert.models import AlbertConfig, AlbertModel
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


def albert(folder: Path) -> Path:
    """Of the tokenizer and the sizes of `bert`; two layers share their weights."""
    fields = json.loads((bert(folder) / "config.json").read_text())
    fields.pop("model_type")
    torch.manual_seed(0)
    AlbertModel(AlbertConfig.from_dict({}, **_sizes(fields), embedding_size=8)).save_pretrained(folder)
    return folder


def _sizes(fields: dict[str, Any]) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return {name: fields[name] for name in (*names, "max_position_embeddings", "pad_token_id")}


def xlnet(folder: Path) -> Path:
    lines = [" ".join(words) for words in sentences(300)]
    pieces = train_pieces(lines, 45, hard_vocab_limit=False)
    return tiny_xlnet(folder, pieces, n_layer=2, dropout=0.0, summary_last_dropout=0.0)


def options(**changes: Any) -> TrainingOptions:
    few = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "progress": False, "log_every": 1}
    return TrainingOptions(**{**few, **changes})


def squad(path: Path, count: int = 24) -> Path:
    """Questions for the word behind hello; half of the texts have none."""
    paragraphs = []
    for number in range(count):
        words = [word for word in sentences(1, number)[0] if word != "hello"] + ["c"]
        place = number % len(words)
        impossible = number % 2 == 1
        text = " ".join([*words[:place], *(["x"] if impossible else ["hello"]), *words[place:]])
        answers = [] if impossible else [{"text": words[place], "answer_start": text.index("hello ") + 6}]
        asked = {"id": f"q{number}", "question": "what hello", "is_impossible": impossible, "answers": answers}
        paragraphs.append({"context": text, "qas": [asked]})
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path


def choices(path: Path, count: int = 30) -> Path:
    """Of two or three texts the one with hello in it is right."""
    rows = []
    for number in range(count):
        texts = [" ".join(word for word in words if word != "hello") for words in sentences(2 + number % 2, number)]
        label = number % len(texts)
        texts[label] += " hello"
        rows.append({"text": "the world", "choices": texts, "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
