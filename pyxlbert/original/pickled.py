"""BERT as the first PyTorch code saved it: `pytorch_model.bin`, LayerNorm's gamma and beta, `bert_config.json`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pyxlbert import models
from pyxlbert.models import BertConfig, checkpoints
from pyxlbert.models.config import ModelConfig
from pyxlbert.models.pretrained import PretrainedModel
from pyxlbert.models.tasks import class_name
from pyxlbert.original.report import INITIALISED, UNUSED, Row


class Pickled(NamedTuple):
    """What is to be written: a model that was read."""

    model: PretrainedModel
    config: ModelConfig
    class_name: str
    rows: list[Row]

    def save(self, folder: Path) -> None:
        """Writes the weights and the configuration."""
        self.model.save_pretrained(folder)


def from_pickle(folder: Path, file: Path, original: dict[str, Any], task: str | None) -> Pickled:
    """The model in a folder.

    Args:
        folder: with its weights, in any form that `from_pretrained` reads.
        file: the configuration's, for messages.
        original: the configuration.
        task: see `convert`; all weights of its model must be there.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: they are another model's, or do not fit the configuration.
    """
    found = checkpoints.read_weights(folder)
    task = _task_of(found) if task is None else task
    name = class_name("bert", task)
    model_class: type[PretrainedModel] = getattr(models, name)
    given = dict(original)
    if "classifier.weight" in found and task.endswith("-classification") and "id2label" not in given:
        given["num_labels"] = found["classifier.weight"].shape[0]
    try:
        config = BertConfig.from_dict(given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None
    pooled = task != "feature-extraction" or any("pooler." in one for one in found)
    options = {} if pooled else {"add_pooling_layer": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says what has no place
        model, info = model_class.from_pretrained(
            folder, config=config, output_loading_info=True, pack=False, **options
        )
    if info["missing_keys"]:
        raise ValueError(f"the weights in {folder} lack what {name} has: {', '.join(info['missing_keys'])}")
    return Pickled(model, model.config, name, _rows(found, model))


def _task_of(names: Iterable[str]) -> str:
    names = set(names)
    if "cls.predictions.bias" in names:
        return "pretraining" if "cls.seq_relationship.weight" in names else "fill-mask"
    for name, task in (
        ("cls.seq_relationship.weight", "next-sentence"),
        ("qa_outputs.weight", "question-answering"),
        ("classifier.weight", "text-classification"),
    ):
        if name in names:
            return task
    return "feature-extraction"


def _rows(found: dict[str, Tensor], model: PretrainedModel) -> list[Row]:
    headed = model.base_model is not model
    ours = checkpoints.own_names(found, base=model.base_model_prefix, base_parts=model.base_parts, headed=headed)
    places = model.state_dict().keys()
    return [
        Row(name, tuple(tensor.shape), *((INITIALISED, (ours[name],)) if ours[name] in places else (UNUSED, ())))
        for name, tensor in found.items()
    ]
