"""Model directories for tests: small, random, written in a moment."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# Lower-cased WordPiece: whole words, single letters and their continuations, so that any plain text has tokens.
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
VOCABULARY = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("the", "hello", "world", "un", "##believ", "##able", "train", "##s", "naive"),
    *_LETTERS,
    *(f"##{letter}" for letter in _LETTERS if letter != "s"),
    *".,!?'-",
    *"你好世界",
    *("Hello", "H", "ï", "##ï"),
)


# What XLNet's SentencePiece model holds beside what it has learned.
XLNET_CONTROL = ("<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>")
XLNET_PUNCTUATION = (".", "(", ")", '"', "-", "–", "£", "€")


def train_pieces(lines: Iterable[str], size: int, **options: Any) -> bytes:
    """A SentencePiece model as XLNet's was made: unigram, its special pieces in front.

    Args:
        lines: the text.
        size: pieces in all.
        options: of SentencePiece's trainer.
    """
    import sentencepiece

    model = io.BytesIO()
    given = {
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "control_symbols": list(XLNET_CONTROL),
        "user_defined_symbols": list(XLNET_PUNCTUATION),
        "minloglevel": 2,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=size, model_type="unigram", **given
    )
    return model.getvalue()


def tiny_xlnet(directory: Path, pieces: bytes, *, seed: int = 0, **overrides: Any) -> Path:
    """Writes a random XLNet encoder with a `spiece.model` as a Hugging Face directory.

    Args:
        directory: made if it does not exist.
        pieces: the content of `spiece.model`.
        seed: of the weights.
        overrides: fields of `config.json`.

    Returns:
        The directory.
    """
    import sentencepiece

    from pyxlbert.models import XLNetConfig, XLNetModel
    from pyxlbert.testing.models import randomize

    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=pieces).vocab_size()
    fields = {"vocab_size": vocabulary, "d_model": 32, "n_layer": 3, "n_head": 2, "d_inner": 48, **overrides}
    model = XLNetModel(XLNetConfig.from_dict(fields))
    randomize(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(directory)
    (directory / "spiece.model").write_bytes(pieces)
    return directory


def tiny_bert(directory: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Writes a random BERT encoder with a `vocab.txt` as a Hugging Face directory.

    Args:
        directory: made if it does not exist.
        seed: of the weights.
        overrides: fields of `config.json`.

    Returns:
        The directory.
    """
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        **overrides,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    save_file(_weights(config, seed), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, feed_forward = config["hidden_size"], config["intermediate_size"]
    state: dict[str, torch.Tensor] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * 0.2

    def linear(name: str, outputs: int, inputs: int) -> None:
        matrix(name, outputs, inputs)
        state[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.1

    def norm(name: str) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(hidden, generator=generator) * 0.1
        state[f"{name}.bias"] = torch.randn(hidden, generator=generator) * 0.1

    matrix("embeddings.word_embeddings", config["vocab_size"], hidden)
    matrix("embeddings.position_embeddings", config["max_position_embeddings"], hidden)
    matrix("embeddings.token_type_embeddings", config["type_vocab_size"], hidden)
    norm("embeddings.LayerNorm")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            linear(f"{prefix}.attention.self.{part}", hidden, hidden)
        linear(f"{prefix}.attention.output.dense", hidden, hidden)
        norm(f"{prefix}.attention.output.LayerNorm")
        linear(f"{prefix}.intermediate.dense", feed_forward, hidden)
        linear(f"{prefix}.output.dense", hidden, feed_forward)
        norm(f"{prefix}.output.LayerNorm")
    return state
