"""RoBERTa as fairseq saved it: `model.pt`, which holds the arguments of training and the weights.

Source:
    https://github.com/facebookresearch/fairseq: models/roberta/model.py, modules/transformer_sentence_encoder.py and
    modules/multihead_attention.py, whose query, key and value are one matrix in files of before 2019's end
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyxlbert.models import RobertaConfig, checkpoints
from pyxlbert.models.tasks import class_name
from pyxlbert.models.without_memory import without_memory
from pyxlbert.original.report import INITIALISED, NEW, NEW_ZEROS, UNUSED, Row

FILES = ("model.pt", "checkpoint_best.pt", "checkpoint_last.pt")
_SENTENCES = "sentence_encoder."
_PROJECTIONS = ("query", "key", "value")
# What holds no weights: a number of a version, and tables that are computed.
_NO_WEIGHTS = ("version", "_float_tensor")
_LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
_EMBEDDINGS = {
    "embed_tokens": "embeddings.word_embeddings",
    "embed_positions": "embeddings.position_embeddings",
    "emb_layer_norm": "embeddings.LayerNorm",
    "layernorm_embedding": "embeddings.LayerNorm",
}
_LM_HEAD = {"dense": "lm_head.dense", "layer_norm": "lm_head.layer_norm"}


class Fairseq(NamedTuple):
    """What is to be written."""

    tensors: dict[str, Tensor]
    config: RobertaConfig
    class_name: str
    rows: list[Row]

    def save(self, folder: Path) -> None:
        """Writes the weights."""
        checkpoints.write_weights(folder, self.tensors)


def find(source: Path) -> Path | None:
    """The file of weights that a path means, a file or a folder; None if there is none."""
    if source.is_file():
        return source if source.suffix == ".pt" else None
    return next((source / name for name in FILES if (source / name).is_file()), None)


def read(file: Path, task: str | None) -> Fairseq:
    """The model in a file.

    Args:
        file: as fairseq's training wrote it.
        task: see `convert`; None: that of the file's heads.

    Raises:
        ValueError: it is no such file, lacks weights, or is of a model that RoBERTa's layers do not compute.
    """
    given, weights = _load(file)
    found = {_without_owner(name): tensor for name, tensor in weights.items()}
    if f"{_SENTENCES}embed_tokens.weight" not in found:
        names = ", ".join(list(weights)[:3])
        raise ValueError(f"{file} holds {names} and no {_SENTENCES}embed_tokens.weight: it is no RoBERTa of fairseq")
    if any(name.startswith((f"{_SENTENCES}layer_norm.", f"{_SENTENCES}layers.0.self_attn.k_norm")) for name in found):
        raise ValueError(f"{file} normalises before its layers (encoder_normalize_before), which RoBERTa does not")
    heads = sorted({name.split(".")[1] for name in found if name.startswith("classification_heads.")})
    task = _task_of(file, found, heads) if task is None else task
    headed = task != "feature-extraction"
    places = _places(found, "roberta." if headed else "", task, heads)
    tensors = _tensors(file, found, places)
    config = _config(file, given, found, task, tensors)
    rows = [
        Row(name, tuple(tensor.shape), INITIALISED if places.get(_without_owner(name)) else UNUSED, own)
        for name, tensor in weights.items()
        for own in [places.get(_without_owner(name), ())]
    ]
    types = f"{'roberta.' if headed else ''}embeddings.token_type_embeddings.weight"
    tensors[types] = torch.zeros(1, config.hidden_size, dtype=next(iter(tensors.values())).dtype)
    rows.append(Row("(token types)", tuple(tensors[types].shape), NEW_ZEROS, (types,)))
    return Fairseq(tensors, config, class_name("roberta", task), rows + _missing(file, tensors, config, task))


def _load(file: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """The arguments of training, and the weights."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can raise whatever unpickling meets on its way
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{file} is not a whole file of numbers and arguments alone: {reason}") from error
    weights = state.get("model") if isinstance(state, dict) else None
    if not isinstance(weights, Mapping) or not all(isinstance(one, Tensor) for one in weights.values()):
        raise ValueError(f"{file} has no dictionary of tensors under 'model', so it is no checkpoint of fairseq")
    arguments = state.get("args")
    if arguments is None:
        arguments = (state.get("cfg") or {}).get("model") if isinstance(state.get("cfg"), dict) else None
    return (vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments or {}), dict(weights)


def _without_owner(name: str) -> str:
    """A name without the module that holds the encoder: "decoder" in early files, "encoder" in later ones."""
    return re.sub(r"^(encoder|decoder)\.(?=sentence_encoder\.|lm_head\.|classification_heads\.)", "", name)


def _task_of(file: Path, found: Mapping[str, Tensor], heads: list[str]) -> str:
    if len(heads) > 1:
        raise ValueError(f"{file} has the heads {', '.join(heads)}, of which a model has one: name a task by --task")
    return "text-classification" if heads else "fill-mask" if "lm_head.bias" in found else "feature-extraction"


def _places(found: Mapping[str, Tensor], prefix: str, task: str, heads: list[str]) -> dict[str, tuple[str, ...]]:
    """The parameters that each of the file's tensors becomes."""
    places: dict[str, tuple[str, ...]] = {}
    for name in found:
        owner, _, kind = name.removeprefix(_SENTENCES).rpartition(".")
        layer = re.fullmatch(r"sentence_encoder\.layers\.(\d+)\.(.+)", name)
        if layer is not None:
            inside = layer[2].rpartition(".")[0]
            ours = f"{prefix}encoder.layer.{layer[1]}."
            if layer[2] in ("self_attn.in_proj_weight", "self_attn.in_proj_bias"):
                kind = layer[2].rpartition("_")[2]
                places[name] = tuple(f"{ours}attention.self.{one}.{kind}" for one in _PROJECTIONS)
            elif inside in _LAYER:
                places[name] = (f"{ours}{_LAYER[inside]}.{kind}",)
        elif name.startswith(_SENTENCES) and owner in _EMBEDDINGS:
            places[name] = (f"{prefix}{_EMBEDDINGS[owner]}.{kind}",)
        elif name.startswith("lm_head.") and task == "fill-mask":
            own = {"lm_head.bias": "lm_head.bias"}.get(name) or f"{_LM_HEAD.get(owner[8:], '')}.{kind}"
            places[name] = (own,) if name == "lm_head.bias" or owner[8:] in _LM_HEAD else ()
        elif name.startswith("classification_heads.") and task == "text-classification" and len(heads) == 1:
            places[name] = (f"classifier.{name.split('.', 2)[2]}",)
    return places


def _tensors(file: Path, found: Mapping[str, Tensor], places: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, own in places.items():
        whole = found[name]
        if whole.shape[0] % max(1, len(own)):
            raise ValueError(f"{file}: {name}: got {list(whole.shape)}, wanted query, key and value of one size")
        parts = whole.chunk(len(own)) if own else ()
        tensors |= {one: part.clone() for one, part in zip(own, parts, strict=True)}
    tied = found.get("lm_head.weight")
    if tied is not None and not torch.equal(tied, found[f"{_SENTENCES}embed_tokens.weight"]):
        raise ValueError(f"{file}: lm_head.weight is not embed_tokens.weight, to which RoBERTa's head is tied")
    return tensors


def _config(
    file: Path, given: Mapping[str, Any], found: Mapping[str, Tensor], task: str, tensors: Mapping[str, Tensor]
) -> RobertaConfig:
    words = found[f"{_SENTENCES}embed_tokens.weight"]
    places = found.get(f"{_SENTENCES}embed_positions.weight")
    layers = {int(match[1]) for name in found if (match := re.match(r"sentence_encoder\.layers\.(\d+)\.", name))}
    inner = found.get(f"{_SENTENCES}layers.0.fc1.weight")
    if places is None or inner is None or layers != set(range(len(layers))):
        raise ValueError(f"{file} lacks embed_positions, fc1 or one of its layers")
    heads, activation = given.get("encoder_attention_heads"), given.get("activation_fn", "gelu")
    if type(heads) is not int:
        raise ValueError(f"{file}: args.encoder_attention_heads: got {heads!r}, wanted the number of heads")
    if activation not in ("gelu", "relu"):
        raise ValueError(f"{file}: args.activation_fn: got {activation!r}, wanted 'gelu' or 'relu'")
    dropouts = {"hidden_dropout_prob": "dropout", "attention_probs_dropout_prob": "attention_dropout"}
    fields: dict[str, Any] = {ours: given[name] for ours, name in dropouts.items() if name in given}
    if "classifier.out_proj.weight" in tensors:
        fields["num_labels"] = len(tensors["classifier.out_proj.weight"])
    try:
        config = RobertaConfig.from_dict(
            fields,
            vocab_size=words.shape[0],
            hidden_size=words.shape[1],
            num_hidden_layers=len(layers),
            num_attention_heads=heads,
            intermediate_size=inner.shape[0],
            hidden_act=activation,
            max_position_embeddings=places.shape[0],
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            pad_token_id=1,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None
    config.dtype = str(words.dtype).removeprefix("torch.")
    return config


def _missing(file: Path, tensors: Mapping[str, Tensor], config: RobertaConfig, task: str) -> list[Row]:
    """What a task's model has beside the tensors: the whole encoder must be there, a head may be new."""
    from pyxlbert import models

    with without_memory():
        wanted = getattr(models, class_name("roberta", task))(config)
    rows, absent, tied = [], [], wanted.tied_names()
    for name, parameter in wanted.state_dict().items():
        shape = tuple(parameter.shape)
        if name in tensors:
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"{file}: {name}: got {list(tensors[name].shape)}, wanted {list(shape)}")
        elif name not in tied:
            encoder = ("embeddings.", "encoder.", "roberta.embeddings.", "roberta.encoder.")
            (absent if name.startswith(encoder) else rows).append(Row("", shape, NEW, (name,)))
    if absent:
        raise ValueError(f"{file} lacks {', '.join(row.parameters[0] for row in absent[:8])}")
    return rows
