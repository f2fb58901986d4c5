"""Small texts and vocabularies, which the tests of pretraining share."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from pyxlbert.training.pretraining.store import TokenStore, open_or_build
from pyxlbert.training.pretraining.vocabularies import Vocabulary

BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Each "w3" is a word of one piece, and "w3x" one of two.
WORDS = [f"w{number}" for number in range(60)]


def bert_vocabulary(directory: Path) -> Vocabulary:
    directory.mkdir(parents=True, exist_ok=True)
    lines = [*BERT_SPECIAL, *WORDS, "##x", "##y"]
    (directory / "vocab.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return Vocabulary.read(directory, "bert")


def xlnet_vocabulary(directory: Path) -> Vocabulary:
    from tokenizers import Tokenizer, models

    directory.mkdir(parents=True, exist_ok=True)
    special = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"]
    pieces = [(one, 0.0) for one in special] + [(f"▁{word}", -1.0) for word in WORDS] + [("x", -2.0), ("y", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.add_special_tokens(special)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    settings = {"tokenizer_class": "XLNetTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return Vocabulary.read(directory, "xlnet")


def text(documents: int = 40, seed: int = 0, longest: int = 12) -> str:
    """Documents of 1 to 9 sentences, with pieces of words among them."""
    chance = Random(seed)
    made = []
    for _ in range(documents):
        sentences = []
        for _ in range(chance.randint(1, 9)):
            words = [
                chance.choice(WORDS) + chance.choice(("", "", "", "x", "xy")) for _ in range(chance.randint(1, longest))
            ]
            sentences.append(" ".join(words))
        made.append("\n".join(sentences))
    return "\n\n".join(made) + "\n"


def store(folder: Path, vocabulary: Vocabulary, content: str | None = None, **options: str) -> TokenStore:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "corpus.txt"
    path.write_text(text() if content is None else content, encoding="utf-8")
    return open_or_build([path], vocabulary, folder / "stores", **options)
