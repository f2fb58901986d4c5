"""The checkpoints of zihangdai/xlnet: names and shapes of their variables.

Source:
    https://github.com/zihangdai/xlnet: modeling.py, function_builder.py, xlnet.py
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from pyxlbert.original.variables import Parameter, Shape, Variable, as_it_is, dense, norm, one

MODEL_TYPE, CONFIG_FILE, VOCABULARY = "xlnet", "xlnet_config.json", "spiece.model"
FIELDS = ("n_token", "d_model", "n_layer", "n_head", "d_head", "d_inner", "ff_activation", "untie_r")
ACTIVATION = "ff_activation"
_NAMES = {"n_token": "vocab_size"}

_PARTS = {
    "feature-extraction": (),
    "text-generation": ("LM",),
    "text-classification": ("summary", "classifier"),
    "token-classification": ("tokens",),
    "question-answering": ("answers",),
    "question-answering-simple": ("spans",),
    "multiple-choice": ("summary", "choices"),
}
# A task's own scope: classification_mnli, regression_sts-b.
_LOGIT = re.compile(r"model/(?:classification|regression)_[^/]*/logit/(?:kernel|bias)")


def task_of(names: Iterable[str]) -> str:
    names = list(names)
    for pattern, task in (
        (_LOGIT, "text-classification"),
        (re.compile("start_logits/dense/kernel"), "question-answering"),
        (re.compile("logits/dense/kernel"), "multiple-choice"),
        (re.compile("model/lm_loss/bias"), "text-generation"),
    ):
        if any(pattern.fullmatch(name) for name in names):
            return task
    return "feature-extraction"


def variables(config: Mapping, task: str, found: Mapping[str, Shape]) -> list[Variable]:
    prefix = "" if task == "feature-extraction" else "transformer."
    width, inner, layers, vocabulary = (config[name] for name in ("d_model", "d_inner", "n_layer", "n_token"))
    heads = (config["n_head"], config["d_head"])
    scope, part = "model/transformer", "encoder"
    mask = one(f"{scope}/mask_emb/mask_emb", (1, 1, width), f"{prefix}mask_emb", part)
    all_of = [
        one(f"{scope}/word_embedding/lookup_table", (vocabulary, width), f"{prefix}word_embedding.weight", part),
        # Fine-tuned models have none: it stands for a target, and they have no targets.
        Variable(mask.name, mask.shape, mask.parameters, part, optional=True),
    ]
    shapes = dict.fromkeys(("r_w_bias", "r_r_bias", "r_s_bias"), heads) | {"seg_embed": (2, *heads)}
    for name, shape in shapes.items():
        stacked = config["untie_r"] or name == "seg_embed"
        parameters = tuple(
            Parameter(f"{prefix}layer.{index}.rel_attn.{name}", _row(index) if stacked else as_it_is)
            for index in range(layers)
        )
        all_of.append(Variable(f"{scope}/{name}", (layers, *shape) if stacked else shape, parameters, part))
    for index in range(layers):
        theirs, ours = f"{scope}/layer_{index}", f"{prefix}layer.{index}"
        for name in "qkvor":
            all_of.append(one(f"{theirs}/rel_attn/{name}/kernel", (width, *heads), f"{ours}.rel_attn.{name}", part))
        all_of += norm(f"{theirs}/rel_attn", width, f"{ours}.rel_attn.layer_norm", part)
        all_of += dense(f"{theirs}/ff/layer_1", width, inner, f"{ours}.ff.layer_1", part)
        all_of += dense(f"{theirs}/ff/layer_2", inner, width, f"{ours}.ff.layer_2", part)
        all_of += norm(f"{theirs}/ff", width, f"{ours}.ff.layer_norm", part)
    return all_of + [variable for name in _PARTS[task] for variable in _head(name, config, found)]


def _row(index: int) -> Callable[[Tensor], Tensor]:
    """A layer's row of what all layers have in one variable."""
    return functools.partial(torch.select, dim=0, index=index)


def _head(part: str, config: Mapping, found: Mapping[str, Shape]) -> list[Variable]:
    width, vocabulary = config["d_model"], config["n_token"]
    if part == "LM":
        own = [one("model/lm_loss/weight", (vocabulary, width), "lm_loss.weight", part)] if _untied(found) else []
        return [*own, one("model/lm_loss/bias", (vocabulary,), "lm_loss.bias", part)]
    if part == "summary":
        return dense("model/sequnece_summary/summary", width, width, "sequence_summary.summary", part)
    if part == "answers":
        return [
            *dense("start_logits/dense", width, 1, "start_logits.dense", part),
            *dense("end_logits/dense_0", 2 * width, width, "end_logits.dense_0", part),
            *norm("end_logits", width, "end_logits.LayerNorm", part),
            *dense("end_logits/dense_1", width, 1, "end_logits.dense_1", part),
            *dense("answer_class/dense_0", 2 * width, width, "answer_class.dense_0", part),
            *dense("answer_class/dense_1", width, 1, "answer_class.dense_1", part, bias=False),
        ]
    # The original code has no classifier of tokens and no simple one of spans: these are always new.
    scopes = {"classifier": _logit(found), "choices": "logits/dense", "tokens": "classifier", "spans": "qa_outputs"}
    parameters = {"classifier": "logits_proj", "choices": "logits_proj", "tokens": "classifier", "spans": "qa_outputs"}
    classes = {"classifier": _classes(found), "choices": 1}.get(part, 2)
    return dense(scopes[part], width, classes, parameters[part], part)


def _untied(found: Mapping[str, Shape]) -> bool:
    """Whether the decoder has weights of its own."""
    return "model/lm_loss/weight" in found


def _logit(found: Mapping[str, Shape]) -> str:
    """The scope of a classifier's variables."""
    name = next((name for name in found if _LOGIT.fullmatch(name)), "model/classification/logit/kernel")
    return name.rpartition("/")[0]


def _classes(found: Mapping[str, Shape]) -> int:
    scope = _logit(found)
    shape = found.get(f"{scope}/kernel") or found.get(f"{scope}/bias")
    return shape[-1] if shape else 2


def settings(config: Mapping, task: str, found: Mapping[str, Shape]) -> dict:
    kept = {_NAMES.get(name, name): config[name] for name in FIELDS}
    if task == "text-classification":
        kept["num_labels"] = _classes(found)
    return {**kept, "tie_word_embeddings": not _untied(found)}


def fresh(config: Mapping, task: str) -> dict[str, Tensor]:
    prefix = "" if task == "feature-extraction" else "transformer."
    return {f"{prefix}mask_emb": torch.zeros(1, 1, config["d_model"])}
