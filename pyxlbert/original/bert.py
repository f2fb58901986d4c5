"""The checkpoints of google-research/bert: names and shapes of their variables.

Source:
    https://github.com/google-research/bert: modeling.py, run_pretraining.py, run_classifier.py, run_squad.py
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from pyxlbert.original.variables import Shape, Variable, dense, norm, one

MODEL_TYPE, CONFIG_FILE, VOCABULARY = "bert", "bert_config.json", "vocab.txt"
FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("max_position_embeddings", "type_vocab_size"),
)
ACTIVATION = "hidden_act"
_KEPT = (*FIELDS, "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")

# What a task's model has beside the encoder. The original code has no classifier of tokens; those who wrote one called
# its variables as the classifier's of sequences are.
_PARTS = {
    "feature-extraction": ("pooler",),
    "pretraining": ("pooler", "masked LM", "next sentence"),
    "fill-mask": ("masked LM",),
    "next-sentence": ("pooler", "next sentence"),
    "text-classification": ("pooler", "classifier"),
    "token-classification": ("classifier",),
    "question-answering": ("answers",),
    "multiple-choice": ("pooler", "choices"),
}


def task_of(names: Iterable[str]) -> str:
    names = set(names)
    for name, task in (
        ("output_weights", "text-classification"),
        ("cls/squad/output_weights", "question-answering"),
        ("cls/predictions/output_bias", "pretraining"),
        ("cls/seq_relationship/output_weights", "next-sentence"),
    ):
        if name in names:
            alone = task == "pretraining" and "cls/seq_relationship/output_weights" not in names
            return "fill-mask" if alone else task
    return "feature-extraction"


def variables(config: Mapping, task: str, found: Mapping[str, Shape]) -> list[Variable]:
    prefix = "" if task == "feature-extraction" else "bert."
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    part = "encoder"
    words, types, places = (
        f"{prefix}embeddings.{name}_embeddings.weight" for name in ("word", "token_type", "position")
    )
    all_of = [
        one("bert/embeddings/word_embeddings", (vocabulary, hidden), words, part),
        one("bert/embeddings/token_type_embeddings", (config["type_vocab_size"], hidden), types, part),
        one("bert/embeddings/position_embeddings", (config["max_position_embeddings"], hidden), places, part),
        *norm("bert/embeddings", hidden, f"{prefix}embeddings.LayerNorm", part),
    ]
    for index in range(config["num_hidden_layers"]):
        theirs, ours = f"bert/encoder/layer_{index}", f"{prefix}encoder.layer.{index}"
        for name in ("query", "key", "value"):
            all_of += dense(f"{theirs}/attention/self/{name}", hidden, hidden, f"{ours}.attention.self.{name}", part)
        all_of += dense(f"{theirs}/attention/output/dense", hidden, hidden, f"{ours}.attention.output.dense", part)
        all_of += norm(f"{theirs}/attention/output", hidden, f"{ours}.attention.output.LayerNorm", part)
        all_of += dense(f"{theirs}/intermediate/dense", hidden, inner, f"{ours}.intermediate.dense", part)
        all_of += dense(f"{theirs}/output/dense", inner, hidden, f"{ours}.output.dense", part)
        all_of += norm(f"{theirs}/output", hidden, f"{ours}.output.LayerNorm", part)
    heads = {
        "pooler": dense("bert/pooler/dense", hidden, hidden, f"{prefix}pooler.dense", "pooler"),
        "masked LM": [
            *dense("cls/predictions/transform/dense", hidden, hidden, "cls.predictions.transform.dense", "masked LM"),
            *norm("cls/predictions/transform", hidden, "cls.predictions.transform.LayerNorm", "masked LM"),
            one("cls/predictions/output_bias", (vocabulary,), "cls.predictions.bias", "masked LM"),
        ],
        "next sentence": _outputs("cls/seq_relationship/", 2, hidden, "cls.seq_relationship", "next sentence"),
        "classifier": _outputs("", _classes(found), hidden, "classifier", "classifier"),
        "answers": _outputs("cls/squad/", 2, hidden, "qa_outputs", "answers"),
        "choices": _outputs("", 1, hidden, "classifier", "choices"),
    }
    return all_of + [variable for name in _PARTS[task] for variable in heads[name]]


def _outputs(scope: str, classes: int, hidden: int, parameter: str, part: str) -> list[Variable]:
    """A head whose weights are ``[classes, hidden]`` in TensorFlow too."""
    return [
        one(f"{scope}output_weights", (classes, hidden), f"{parameter}.weight", part),
        one(f"{scope}output_bias", (classes,), f"{parameter}.bias", part),
    ]


def _classes(found: Mapping[str, Shape]) -> int:
    shape = found.get("output_weights") or found.get("output_bias")
    return shape[0] if shape else 2


def settings(config: Mapping, task: str, found: Mapping[str, Shape]) -> dict:
    kept = {name: config[name] for name in _KEPT if name in config}
    classified = task in ("text-classification", "token-classification")
    return {**kept, "num_labels": _classes(found)} if classified else kept


def fresh(config: Mapping, task: str) -> dict[str, Tensor]:
    return {}
