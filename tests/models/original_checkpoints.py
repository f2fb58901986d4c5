"""Small checkpoints of google-research/bert and zihangdai/xlnet: names, shapes and values of their variables.

The files under `tests/models/saved_by_tensorflow/` hold them as TensorFlow wrote them
(`write_tensorflow_checkpoints.py`). A value follows from its variable's name alone, so that a test knows it without
reading the file.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "saved_by_tensorflow"

BERT_CONFIG = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "type_vocab_size": 2,
    "vocab_size": 99,
}
XLNET_CONFIG = {
    "d_head": 8,
    "d_inner": 24,
    "d_model": 16,
    "ff_activation": "gelu",
    "n_head": 2,
    "n_layer": 2,
    "n_token": 80,
    "untie_r": True,
}
CONFIGS = {
    "bert_pretraining": BERT_CONFIG,
    "bert_classifier": BERT_CONFIG,
    "bert_squad": BERT_CONFIG,
    "bert_partitioned": BERT_CONFIG,
    "xlnet_lm": XLNET_CONFIG,
    "xlnet_classifier": {**XLNET_CONFIG, "untie_r": False},
    "xlnet_squad": XLNET_CONFIG,
}
PREFIXES = {
    "bert_pretraining": "bert_model.ckpt",
    "bert_classifier": "model.ckpt-343",
    "bert_squad": "model.ckpt-21",
    "bert_partitioned": "model.ckpt-8",
    "xlnet_lm": "xlnet_model.ckpt",
    "xlnet_classifier": "model.ckpt-100",
    "xlnet_squad": "model.ckpt-200",
}
# Of how many parts a variable is stored, and along which axis, by the end of its name.
PARTS = {"bert_partitioned": {"word_embeddings": (4, 0), "query/kernel": (2, 1), "intermediate/dense/bias": (3, 0)}}
# Kinds that hold the optimiser's slots, and how many files of data a kind has.
WITH_OPTIMISER = ("bert_pretraining",)
SHARDS = {"bert_pretraining": 2, "xlnet_lm": 3}


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 array of a variable: numbers near 1 for LayerNorm's gamma, near 0 for the rest."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape) * 0.25
    return (noise + name.endswith("gamma")).astype(np.float32)


def parts(kind: str, name: str) -> tuple[int, int] | None:
    """The number of parts of a variable and their axis; None of one that is stored whole."""
    return next((cut for end, cut in PARTS.get(kind, {}).items() if name.endswith(end)), None)


def shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """The trainable variables of a kind of checkpoint, in the order in which the original code makes them."""
    return _bert(kind, CONFIGS[kind]) if kind.startswith("bert") else _xlnet(kind, CONFIGS[kind])


def values(kind: str) -> dict[str, np.ndarray]:
    """The trainable variables of a kind of checkpoint."""
    return {name: value(name, shape) for name, shape in shapes(kind).items()}


def _dense(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}/kernel": (inputs, outputs), f"{name}/bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}/LayerNorm/beta": (width,), f"{name}/LayerNorm/gamma": (width,)}


def _bert(kind: str, config: dict) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    found = {
        "bert/embeddings/word_embeddings": (vocabulary, hidden),
        "bert/embeddings/token_type_embeddings": (config["type_vocab_size"], hidden),
        "bert/embeddings/position_embeddings": (config["max_position_embeddings"], hidden),
        **_norm("bert/embeddings", hidden),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"bert/encoder/layer_{index}"
        for part in ("query", "key", "value"):
            found |= _dense(f"{layer}/attention/self/{part}", hidden, hidden)
        found |= _dense(f"{layer}/attention/output/dense", hidden, hidden) | _norm(f"{layer}/attention/output", hidden)
        found |= _dense(f"{layer}/intermediate/dense", hidden, inner)
        found |= _dense(f"{layer}/output/dense", inner, hidden) | _norm(f"{layer}/output", hidden)
    found |= _dense("bert/pooler/dense", hidden, hidden)
    if kind == "bert_pretraining":
        found |= _dense("cls/predictions/transform/dense", hidden, hidden)
        found |= _norm("cls/predictions/transform", hidden) | {"cls/predictions/output_bias": (vocabulary,)}
        found |= {"cls/seq_relationship/output_weights": (2, hidden), "cls/seq_relationship/output_bias": (2,)}
    elif kind == "bert_classifier":
        found |= {"output_weights": (3, hidden), "output_bias": (3,)}
    else:
        found |= {"cls/squad/output_weights": (2, hidden), "cls/squad/output_bias": (2,)}
    return found


def _xlnet(kind: str, config: dict) -> dict[str, tuple[int, ...]]:
    width, inner, layers = config["d_model"], config["d_inner"], config["n_layer"]
    heads = (config["n_head"], config["d_head"])
    several = (layers, *heads) if config["untie_r"] else heads
    found = {f"model/transformer/{name}": several for name in ("r_w_bias", "r_r_bias")}
    found |= {"model/transformer/word_embedding/lookup_table": (config["n_token"], width)}
    if kind == "xlnet_lm":
        # Made when there is a query stream; the released checkpoints hold it.
        found |= {"model/transformer/mask_emb/mask_emb": (1, 1, width)}
    found |= {"model/transformer/r_s_bias": several, "model/transformer/seg_embed": (layers, 2, *heads)}
    for index in range(layers):
        layer = f"model/transformer/layer_{index}"
        found |= {f"{layer}/rel_attn/{part}/kernel": (width, *heads) for part in "kvrqo"}
        found |= _norm(f"{layer}/rel_attn", width)
        found |= _dense(f"{layer}/ff/layer_1", width, inner) | _dense(f"{layer}/ff/layer_2", inner, width)
        found |= _norm(f"{layer}/ff", width)
    if kind == "xlnet_lm":
        found |= {"model/lm_loss/bias": (config["n_token"],)}
    elif kind == "xlnet_classifier":
        found |= _dense("model/sequnece_summary/summary", width, width)  # spelt so in the original
        found |= _dense("model/classification_mnli/logit", width, 3)
    else:
        found |= _dense("start_logits/dense", width, 1)
        found |= _dense("end_logits/dense_0", 2 * width, width) | _norm("end_logits", width)
        found |= _dense("end_logits/dense_1", width, 1)
        found |= _dense("answer_class/dense_0", 2 * width, width) | {"answer_class/dense_1/kernel": (width, 1)}
    return found
