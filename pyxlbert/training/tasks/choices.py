"""One of several texts that goes best with another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyxlbert.training.data.table import Place, read_table
from pyxlbert.training.encoding import TaskTokenizer, Window
from pyxlbert.training.tasks.base import Batch, Task, model_inputs


class Choice(NamedTuple):
    """An example."""

    place: Place
    text: str
    choices: tuple[str, ...]
    label: int | None = None


class ChoiceRow(NamedTuple):
    """A feature: a row of ids for each choice."""

    example: int
    windows: list[Window]
    label: int | None

    @property
    def window(self) -> Window:
        """The longest."""
        return max(self.windows, key=lambda window: len(window.ids))


class MultipleChoice(Task):
    """Which of several texts goes with a text; accuracy. Examples are JSON lines: ``text``, ``choices``, ``label``.

    Settings:
        text_column, choices_column, label_column: other keys.
        header: of no use here.
    """

    name = "multiple-choice"
    head = "ForMultipleChoice"
    defaults = {  # noqa: RUF012 (declared in the base)
        "text_column": "text",
        "choices_column": "choices",
        "label_column": "label",
        "header": True,
    }

    @property
    def metric(self) -> str:
        return "accuracy"

    @property
    def columns(self) -> dict[str, str | int]:
        return {"text": self.settings["text_column"], "choices": self.settings["choices_column"]}

    def read(self, path: str | Path, training: bool = False) -> list[Choice]:
        rows = read_table(path, {**self.columns, "label": self.settings["label_column"]})
        examples = []
        for row, example in zip(rows, self.inputs([r.values for r in rows], [r.place for r in rows]), strict=True):
            label, last = row.values["label"], len(example.choices) - 1
            if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label <= last:
                raise ValueError(f"{row.place}: the label is {label!r}, wanted a whole number from 0 to {last}")
            examples.append(example._replace(label=label))
        return examples

    def inputs(self, texts: Sequence[Mapping[str, Any]], places: Sequence[Place]) -> list[Choice]:
        for values, place in zip(texts, places, strict=True):
            choices = values["choices"]
            if not isinstance(values["text"], str):
                raise ValueError(f"{place}: the text is {values['text']!r}, wanted a string")
            if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) for one in choices):
                raise ValueError(f"{place}: the choices are {choices!r}, wanted a list of at least two strings")
        return [Choice(place, v["text"], tuple(v["choices"])) for v, place in zip(texts, places, strict=True)]

    def config_fields(self) -> dict[str, Any]:
        return {"num_labels": 1}

    def features(self, tokenizer: TaskTokenizer, examples: Sequence[Choice], training: bool = False) -> list[ChoiceRow]:
        first = tokenizer.texts([example.text for example in examples])
        second = iter(tokenizer.texts([choice for example in examples for choice in example.choices]))
        return [
            ChoiceRow(index, [tokenizer.pair(first[index], next(second)) for _ in example.choices], example.label)
            for index, example in enumerate(examples)
        ]

    def collate(self, tokenizer: TaskTokenizer, features: Sequence[ChoiceRow]) -> Batch:
        most = max(len(row.windows) for row in features)
        # Who has fewer choices has his first again, which cannot be chosen.
        windows = [window for row in features for window in row.windows + row.windows[:1] * (most - len(row.windows))]
        batch = tokenizer.batch(windows)
        batch = {name: value.view(len(features), most, -1) for name, value in batch.items()}
        batch["there"] = torch.arange(most) < torch.tensor([[len(row.windows)] for row in features])
        if features[0].label is not None:
            batch["labels"] = torch.tensor([row.label for row in features])
        return batch

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"loss": len(batch["labels"])}

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**model_inputs(model, batch)).logits.float()  # [B, C]
        return logits.masked_fill(~batch["there"], -torch.inf)

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self._logits(model, batch), batch["labels"], reduction="sum")}

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"probabilities": self._logits(model, batch).softmax(-1)}

    def predict(
        self,
        tokenizer: TaskTokenizer,
        examples: Sequence[Choice],
        features: Sequence[ChoiceRow],
        outputs: Sequence[Mapping[str, np.ndarray]],
    ) -> list[np.ndarray]:
        """Of each example its choices' probabilities, float32 ``[choices]``."""
        return [output["probabilities"][: len(row.windows)] for row, output in zip(features, outputs, strict=True)]

    def score(self, examples: Sequence[Choice], predictions: Sequence[np.ndarray]) -> dict[str, float]:
        right = [int(p.argmax()) == example.label for example, p in zip(examples, predictions, strict=True)]
        return {"accuracy": float(np.mean(right))}

    def rows(self, examples: Sequence[Choice], predictions: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        return [
            {
                "text": example.text,
                "choices": list(example.choices),
                "label": int(p.argmax()),
                "choice": example.choices[int(p.argmax())],
                "probabilities": [float(value) for value in p],
            }
            for example, p in zip(examples, predictions, strict=True)
        ]
