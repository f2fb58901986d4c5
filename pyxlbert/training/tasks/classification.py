"""Texts, or pairs of texts, with a class or a number each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyxlbert.training.data.table import Place, read_table
from pyxlbert.training.encoding import TaskTokenizer, Window, windows
from pyxlbert.training.tasks.base import Batch, Task, model_inputs


class Text(NamedTuple):
    """An example."""

    place: Place
    text: str
    pair: str | None = None
    label: Any = None  # the class's name, or a number


class TextRow(NamedTuple):
    """A feature."""

    example: int
    window: Window
    label: float | None


class TextClassification(Task):
    """Classes (accuracy, F1), or with `regression` numbers (Pearson, Spearman).

    Settings:
        text_column, pair_column, label_column: names of columns, or their numbers from 1; `pair_column` None for
            single texts.
        header: whether tables name their columns in the first line.
        regression: whether labels are numbers.
        long_texts: ``"cut"``, or ``"windows"``: a prediction is the mean over all parts of a text.
        stride: how many pieces two parts share.
    """

    name = "text-classification"
    head = "ForSequenceClassification"
    defaults = {  # noqa: RUF012 (declared in the base)
        "text_column": 1,
        "pair_column": None,
        "label_column": 2,
        "header": True,
        "regression": False,
        "long_texts": "cut",
        "stride": 32,
    }

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(settings)
        self.labels: list[str] = []

    def check_settings(self) -> None:
        super().check_settings()
        if self.settings["long_texts"] not in ("cut", "windows"):
            raise ValueError(f"long_texts: got {self.settings['long_texts']!r}, wanted cut or windows")

    @property
    def packages(self) -> tuple[str, ...]:
        return ("scipy",) if self.settings["regression"] else ("sklearn",)

    @property
    def metric(self) -> str:
        return "spearman" if self.settings["regression"] else "accuracy"

    @property
    def columns(self) -> dict[str, str | int]:
        columns = {"text": self.settings["text_column"]}
        if self.settings["pair_column"] is not None:
            columns["pair"] = self.settings["pair_column"]
        return columns

    def read(self, path: str | Path, training: bool = False) -> list[Text]:
        columns = {**self.columns, "label": self.settings["label_column"]}
        rows = read_table(path, columns, self.settings["header"])
        examples = [self._text(row.values, row.place) for row in rows]
        regression = self.settings["regression"]
        labels = [(number if regression else name)(row.values["label"], row.place) for row in rows]
        if training and not regression:
            self.labels = sorted(set(labels), key=_order)
            if len(self.labels) < 2:
                raise ValueError(f"{path}: all rows have the label {self.labels[0]!r}, wanted at least two labels")
        if not regression:
            for row, label in zip(rows, labels, strict=True):
                if label not in self.labels:
                    raise ValueError(f"{row.place}: the label is {label!r}, wanted one of {', '.join(self.labels)}")
        return [example._replace(label=label) for example, label in zip(examples, labels, strict=True)]

    def inputs(self, texts: Sequence[Mapping[str, Any]], places: Sequence[Place]) -> list[Text]:
        return [self._text(values, place) for values, place in zip(texts, places, strict=True)]

    @staticmethod
    def _text(values: Mapping[str, Any], place: Place) -> Text:
        for column in ("text", "pair"):
            if column in values and not isinstance(values[column], str):
                raise ValueError(f"{place}: the {column} is {values[column]!r}, wanted a string")
        return Text(place, values["text"], values.get("pair"))

    def config_fields(self) -> dict[str, Any]:
        if self.settings["regression"]:
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "num_labels": len(self.labels),
            "problem_type": "single_label_classification",
        }

    def adopt(self, config: Any) -> None:
        if not self.settings["regression"]:
            self.labels = [config.id2label[index] for index in range(config.num_labels)]

    def features(self, tokenizer: TaskTokenizer, examples: Sequence[Text], training: bool = False) -> list[TextRow]:
        first = tokenizer.texts([example.text for example in examples])
        second = tokenizer.texts([example.pair or "" for example in examples])
        places = {label: index for index, label in enumerate(self.labels)}
        rows = []
        for index, example in enumerate(examples):
            label = example.label if self.settings["regression"] else places.get(example.label)
            if example.pair is not None:
                found = [tokenizer.pair(first[index], second[index])]
            elif training or self.settings["long_texts"] == "cut":
                found = [tokenizer.single(first[index])]
            else:
                stride = min(self.settings["stride"], tokenizer.room - 1)
                cuts = windows(len(first[index].ids), tokenizer.room, stride)
                found = [tokenizer.part(first[index], cut.begin, cut.end) for cut in cuts]
            rows += [TextRow(index, window, label) for window in found]
        return rows

    def collate(self, tokenizer: TaskTokenizer, features: Sequence[TextRow]) -> Batch:
        batch = tokenizer.batch([row.window for row in features])
        if features[0].label is not None:
            dtype = torch.float32 if self.settings["regression"] else torch.int64
            batch["labels"] = torch.tensor([row.label for row in features], dtype=dtype)
        return batch

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"loss": len(batch["labels"])}

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(**model_inputs(model, batch)).logits.float()  # [B, labels]
        if self.settings["regression"]:
            return {"loss": F.mse_loss(logits[:, 0], batch["labels"], reduction="sum")}
        return {"loss": F.cross_entropy(logits, batch["labels"], reduction="sum")}

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"logits": model(**model_inputs(model, batch)).logits.float()}

    def predict(
        self,
        tokenizer: TaskTokenizer,
        examples: Sequence[Text],
        features: Sequence[TextRow],
        outputs: Sequence[Mapping[str, np.ndarray]],
    ) -> list[np.ndarray]:
        """Of each example its probabilities, float64 ``[labels]``, or its number ``[1]``."""
        sums = np.zeros((len(examples), outputs[0]["logits"].shape[0] if outputs else 1))
        parts = np.zeros(len(examples))
        for row, output in zip(features, outputs, strict=True):
            logits = output["logits"].astype(np.float64)
            if not self.settings["regression"]:
                logits = np.exp(logits - logits.max())
                logits /= logits.sum()
            sums[row.example] += logits
            parts[row.example] += 1
        return list(sums / np.maximum(parts, 1)[:, None])

    def score(self, examples: Sequence[Text], predictions: Sequence[np.ndarray]) -> dict[str, float]:
        if self.settings["regression"]:
            return correlations([float(p[0]) for p in predictions], [example.label for example in examples])
        from sklearn.metrics import accuracy_score, f1_score

        wanted = [example.label for example in examples]
        found = [self.labels[int(p.argmax())] for p in predictions]
        scores = {"accuracy": float(accuracy_score(wanted, found))}
        scores["f1_macro"] = float(f1_score(wanted, found, average="macro", labels=self.labels, zero_division=0.0))
        if len(self.labels) == 2:
            # Of the second label, as GLUE has it.
            scores["f1"] = float(f1_score(wanted, found, pos_label=self.labels[1], zero_division=0.0))
        return scores

    def rows(self, examples: Sequence[Text], predictions: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        rows = []
        for example, p in zip(examples, predictions, strict=True):
            row: dict[str, Any] = {"text": example.text}
            if example.pair is not None:
                row["pair"] = example.pair
            if self.settings["regression"]:
                row["value"] = float(p[0])
            else:
                row["label"] = self.labels[int(p.argmax())]
                row["probability"] = float(p.max())
                row["probabilities"] = {label: float(value) for label, value in zip(self.labels, p, strict=True)}
            rows.append(row)
        return rows

    def line(self, row: Mapping[str, Any]) -> str:
        return repr(row["value"]) if self.settings["regression"] else row["label"]


def name(value: Any, place: Place) -> str:
    """A label's name.

    Raises:
        ValueError: there is none.
    """
    label = str(value).strip()
    if not label or isinstance(value, (list, dict)):
        raise ValueError(f"{place}: the label is {value!r}, wanted a name")
    return label


def number(value: Any, place: Place) -> float:
    """A label that is a number.

    Raises:
        ValueError: it is none, or not finite.
    """
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{place}: the label is {value!r}, wanted a finite number")
    return found


def _order(label: str) -> tuple[int, float, str]:
    """Numbers by their size, before names."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def correlations(found: Sequence[float], wanted: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's; 0 where one side is constant, which correlates with nothing."""
    from scipy.stats import pearsonr, spearmanr

    if len(found) < 2 or np.ptp(found) == 0 or np.ptp(wanted) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(found, wanted).statistic),
        "spearman": float(spearmanr(found, wanted).statistic),
    }
