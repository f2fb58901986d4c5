"""What a task is: everything that the loop, `evaluate` and `predict` ask of it, in one record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from pyxlbert import models
from pyxlbert.models.pretrained import PretrainedModel
from pyxlbert.training.data.table import Place
from pyxlbert.training.encoding import TaskTokenizer
from pyxlbert.training.options import MOST

#: The label that counts for nothing.
IGNORED = -100

Batch = dict[str, Tensor]

#: What names of classes begin with, by the model type of a configuration.
FAMILIES = {
    **{"bert": "Bert", "albert": "Albert", "xlnet": "XLNet"},
    **{"roberta": "Roberta", "xlm-roberta": "Roberta", "camembert": "Roberta"},
}


def family(model_type: str) -> str:
    """What the names of a model type's classes begin with.

    Raises:
        ValueError: models of this type cannot be trained here.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model_type: got {model_type!r}, wanted one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def _wanted(name: str, usual: Any, value: Any) -> str | None:
    """What a setting is to be whose usual value this is; None if it is."""
    number, whole = isinstance(value, int | float), isinstance(value, int)
    if isinstance(value, bool):
        number = whole = False
    if name.endswith("_column"):
        none = usual is None
        good = (isinstance(value, str) and value) or (whole and 1 <= value <= MOST) or (none and value is None)
        return None if good else f"a column's name or its number from 1{', or None' if none else ''}"
    if isinstance(usual, bool):
        return None if isinstance(value, bool) else "True or False"
    if isinstance(usual, int):
        return None if whole and 0 <= value <= MOST else f"a whole number from 0 to {MOST}"
    if isinstance(usual, float):
        return None if number and -MOST <= value <= MOST else f"a number from {-MOST} to {MOST}"
    return None if isinstance(value, str) else "a string"


class Task(ABC):
    """One kind of task.

    An example is what a reader makes of a line; a feature is a row for the model, of which an example may have
    several; an output is what the model gives for a feature; a prediction is what is made of an example's outputs.

    Attributes:
        settings: what a model of the task is saved with, as JSON: columns, lengths, options of the head.
    """

    #: The task's name, as pipelines of transformers have it.
    name: ClassVar[str]
    #: What follows the family in the class of the model.
    head: ClassVar[str]
    #: Of the extra "train", those packages that `rows` imports.
    row_packages: ClassVar[tuple[str, ...]] = ()
    #: The settings and what they are if nobody says.
    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        if settings is not None and not isinstance(settings, Mapping):
            raise TypeError(f"settings: got {type(settings).__name__}, wanted a dict")
        given = dict(settings or {})
        unknown = given.keys() - self.defaults.keys()
        if unknown:
            raise ValueError(f"settings: got {', '.join(sorted(unknown))}, wanted {', '.join(sorted(self.defaults))}")
        self.settings = {**self.defaults, **given}
        self.check_settings()
        self.check_columns([name for name in self.settings if name.endswith("_column")])

    def check_columns(self, names: Sequence[str]) -> None:
        """That no two settings say the same column.

        A column's name and its number may be the same one too: `read_table` finds that.

        Args:
            names: of the settings that are used.

        Raises:
            ValueError: two do; the message names both.
        """
        for place, name in enumerate(names):
            value = self.settings[name]
            for other in names[:place]:
                if value is not None and (type(value), value) == (type(self.settings[other]), self.settings[other]):
                    raise ValueError(f"{name}: got {value!r}, which is {other} too; wanted another column")

    def check_settings(self) -> None:
        """That each setting is of its kind.

        Raises:
            ValueError: one is not; the message names it.
        """
        for name, value in self.settings.items():
            wanted = _wanted(name, self.defaults[name], value)
            if wanted is not None:
                raise ValueError(f"{name}: got {value!r}, wanted {wanted}")

    # The metric

    @property
    def packages(self) -> tuple[str, ...]:
        """Of the extra "train", those that `score` imports."""
        return ()

    @property
    @abstractmethod
    def metric(self) -> str:
        """The score that decides which model is the best; more is better."""

    # Data

    @abstractmethod
    def read(self, path: str | Path, training: bool = False) -> list[Any]:
        """The labelled examples of a file.

        Args:
            path: the file.
            training: whether labels are learned from it; else one that is not known is an error.

        Raises:
            OSError: the file cannot be read.
            ValueError: a line is not what it should be; the message has the file and the line.
        """

    @abstractmethod
    def inputs(self, texts: Sequence[Mapping[str, Any]], places: Sequence[Place]) -> list[Any]:
        """Examples without labels.

        Args:
            texts: values by the names of `columns`.
            places: where each stands.
        """

    @property
    @abstractmethod
    def columns(self) -> dict[str, str | int]:
        """The columns of a table that hold what a prediction is made from, by the task's names for them."""

    # The model

    @abstractmethod
    def config_fields(self) -> dict[str, Any]:
        """Fields of the configuration that the task decides: labels, the kind of problem."""

    def adopt(self, config: Any) -> None:  # noqa: B027 (most tasks have nothing to take)
        """Takes labels from the configuration of a trained model."""

    def model_class(self, model_type: str) -> type[PretrainedModel]:
        """The class of the model."""
        return getattr(models, family(model_type) + self.head)

    # Rows

    @abstractmethod
    def features(self, tokenizer: TaskTokenizer, examples: Sequence[Any], training: bool = False) -> list[Any]:
        """Rows of all examples; each has its `example`, an index, and its `window`.

        Args:
            tokenizer: the model's.
            examples: see `read` and `inputs`.
            training: rows of which nothing is learned may be left out.
        """

    @abstractmethod
    def collate(self, tokenizer: TaskTokenizer, features: Sequence[Any]) -> Batch:
        """A batch of rows, with labels where the examples have them."""

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, int]:
        """How many labels each loss of a batch is a sum over."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The sum of each loss over a batch's labels, under the names that `counts` has."""

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What the model gives for a batch, without labels: tensors ``[B, ...]``."""

    @abstractmethod
    def predict(
        self,
        tokenizer: TaskTokenizer,
        examples: Sequence[Any],
        features: Sequence[Any],
        outputs: Sequence[Mapping[str, np.ndarray]],
    ) -> list[Any]:
        """A prediction for each example from the outputs of its rows."""

    @abstractmethod
    def score(self, examples: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        """The scores of predictions for labelled examples."""

    @abstractmethod
    def rows(self, examples: Sequence[Any], predictions: Sequence[Any]) -> list[dict[str, Any]]:
        """What is written of each example: values that JSON has."""

    def line(self, row: Mapping[str, Any]) -> str:
        """A row as plain text: the label, or what the task has for one."""
        return str(row["label"])


def model_inputs(model: PretrainedModel, batch: Batch) -> dict[str, Tensor]:
    """The encoder's arguments among a batch's tensors."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: batch[name] for name in names}
    if getattr(model.config, "type_vocab_size", None) == 1:
        inputs["token_type_ids"] = None  # RoBERTa has one type for all
    if model.config.model_type == "xlnet":
        inputs["use_mems"] = False
    return inputs
