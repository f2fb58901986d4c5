"""The architectures of transformers that have a table: small random configurations, heads, batches and labels."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from pyxlbert.testing import models

# Right padding, and holes; every sequence begins with a token.
MASK = torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 1, 1, 0]])
# The first place is padding, too, and a sequence has no token.
LEFT = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0, 0]])

HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)


@dataclass(frozen=True)
class Case:
    """An architecture: the prefix of its classes, and fields of its configuration that differ from BERT's."""

    prefix: str
    fields: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


ZOO = {
    "bert": Case("Bert"),
    "roberta": Case("Roberta", {"pad_token_id": 1}),
    "xlm-roberta": Case("XLMRoberta", {"pad_token_id": 1}),
    "camembert": Case("Camembert", {"pad_token_id": 1}),
    "data2vec-text": Case("Data2VecText", {"pad_token_id": 1}),
    "electra": Case("Electra", {"embedding_size": 16, "summary_last_dropout": 0.0}),
    "albert": Case("Albert", {"embedding_size": 16, "inner_group_num": 2, "classifier_dropout_prob": 0.0}),
    "mpnet": Case("MPNet", {"pad_token_id": 1, "relative_attention_num_buckets": 32}),
    "distilbert": Case(
        "DistilBert",
        {"seq_classif_dropout": 0.0, "qa_dropout": 0.0},
        names={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        },
    ),
}


def configuration(kind: str, seed: int = 0, **fields: Any) -> Any:
    """A small random configuration; `fields` by BERT's names."""
    case, draw = ZOO[kind], random.Random(f"{kind}{seed}")
    heads = draw.choice([2, 3])
    given = {
        "vocab_size": 50,
        "hidden_size": 8 * heads,
        "num_hidden_layers": draw.choice([2, 3]),
        "num_attention_heads": heads,
        "intermediate_size": draw.choice([20, 33]),
        "hidden_act": draw.choice(["gelu", "gelu_new", "relu", "mish"]) if seed else "gelu",
        "max_position_embeddings": 16,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": draw.choice(["eager", "sdpa"]),
        **case.fields,
        **fields,
    }
    if kind == "mpnet":
        given.pop("attn_implementation")
    given = {case.names.get(name, name): value for name, value in given.items()}
    return getattr(transformers, f"{case.prefix}Config")(**given)


def build(kind: str, head: str = "Model", seed: int = 0, **fields: Any) -> Any:
    """A random model in training mode, without dropout unless asked for."""
    torch.manual_seed(seed)
    model = getattr(transformers, f"{ZOO[kind].prefix}{head}")(configuration(kind, seed, **fields))
    models.randomize(model, torch.Generator().manual_seed(seed))
    return model.train()


def batch(model: Any, head: str = "Model", mask: Tensor = MASK) -> dict[str, Tensor]:
    """Arguments of a call, with labels for heads."""
    generator = torch.Generator().manual_seed(3)
    pad = model.config.pad_token_id
    ids = torch.randint(2, model.config.vocab_size, mask.shape, generator=generator)
    given = {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}
    if head == "ForMaskedLM":
        given["labels"] = torch.where(mask.bool(), ids, -100)
    elif head == "ForTokenClassification":
        given["labels"] = torch.where(mask.bool(), ids % 2, -100)
    elif head == "ForSequenceClassification":
        given["labels"] = torch.tensor([0, 1, 1])
    elif head == "ForQuestionAnswering":
        given |= {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([6, 3, 4])}
    elif head == "ForMultipleChoice":
        given = {name: value.repeat(2, 1, 1) for name, value in given.items()}
        given["labels"] = torch.tensor([2, 0])
    return given


def outputs(mask: Tensor, everywhere: bool = False) -> Any:
    """What to compare of an output: at tokens, or everywhere."""
    real = mask.bool()

    def found(output: Any) -> dict[str, Tensor]:
        tensors = {name: value for name, value in output.items() if isinstance(value, Tensor) and name != "loss"}
        if everywhere:
            return tensors
        return {name: value[real] if value.shape[:2] == real.shape else value for name, value in tensors.items()}

    return found


def results(model: Any, head: str = "Model", mask: Tensor = MASK, cotangents: dict[str, Tensor] | None = None) -> Any:
    """Outputs, loss and all gradients, as `pyxlbert.testing.models.results` returns them."""
    found = outputs(mask, everywhere=head == "ForQuestionAnswering")
    arguments = batch(model, head, mask)
    if cotangents is None:
        with torch.no_grad():
            cotangents = models.random_cotangents(found(model(**arguments)), torch.Generator().manual_seed(4))
    return models.results(model, arguments, cotangents, found, lambda output: output.get("loss")), cotangents
