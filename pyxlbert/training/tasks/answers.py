"""Answers that stand in a text."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyxlbert import models
from pyxlbert.models.pretrained import PretrainedModel
from pyxlbert.training.data.squad import Question, read_squad
from pyxlbert.training.data.table import Place
from pyxlbert.training.encoding import Cut, TaskTokenizer, Window
from pyxlbert.training.tasks.base import Batch, Task, family, model_inputs

# How many starts and ends of a row are tried with each other.
_BEST = 20


class AnswerRow(NamedTuple):
    """A feature: the question with a part of the text."""

    example: int
    window: Window
    cut: Cut
    offsets: np.ndarray  # int32 [n, 2], characters in the text of the part's pieces
    start: int | None  # the answer's first and last place in the row; that of the classification token for none
    end: int | None


class FoundAnswer(NamedTuple):
    """A prediction: a part of the text, or an empty one for no answer."""

    text: str
    start: int | None
    end: int | None
    probability: float


class Answers(Task):
    """Extractive question answering; exact matches and F1 as SQuAD counts them, in percent of 1.

    Settings:
        question_column, text_column, header: where `predict` finds questions and texts in a table.
        stride: pieces of the text that two rows share.
        max_question, max_answer: pieces of a question that are read, and of an answer at most.
        nulls: whether a question may have no answer.
        null_threshold: by how much no answer has to be more likely than the best one, as a difference of logits.
    """

    name = "question-answering"
    head = "ForQuestionAnswering"
    defaults = {  # noqa: RUF012 (declared in the base)
        "question_column": 1,
        "text_column": 2,
        "header": True,
        "stride": 128,
        "max_question": 64,
        "max_answer": 30,
        "nulls": False,
        "null_threshold": 0.0,
    }

    def check_settings(self) -> None:
        super().check_settings()
        for name in ("max_question", "max_answer"):
            if self.settings[name] < 1:
                raise ValueError(f"{name}: got {self.settings[name]!r}, wanted a whole number of at least 1")

    @property
    def metric(self) -> str:
        return "f1"

    @property
    def columns(self) -> dict[str, str | int]:
        return {"question": self.settings["question_column"], "text": self.settings["text_column"]}

    def read(self, path: str | Path, training: bool = False) -> list[Question]:
        return read_squad(path, self.settings["nulls"])

    def inputs(self, texts: Sequence[Mapping[str, Any]], places: Sequence[Place]) -> list[Question]:
        for values, place in zip(texts, places, strict=True):
            for name in ("question", "text"):
                if not isinstance(values[name], str):
                    raise ValueError(f"{place}: the {name} is {values[name]!r}, wanted a string")
        return [Question(place, v["question"], v["text"]) for v, place in zip(texts, places, strict=True)]

    def config_fields(self) -> dict[str, Any]:
        return {"num_labels": 2}

    def model_class(self, model_type: str) -> type[PretrainedModel]:
        simple = family(model_type) == "XLNet"  # its other head searches by a beam, which no other family has
        return models.XLNetForQuestionAnsweringSimple if simple else super().model_class(model_type)

    def features(
        self, tokenizer: TaskTokenizer, examples: Sequence[Question], training: bool = False
    ) -> list[AnswerRow]:
        questions = tokenizer.texts([example.question.strip() for example in examples])
        # A text has many questions.
        contexts = list(dict.fromkeys(example.context for example in examples))
        pieces = dict(zip(contexts, tokenizer.texts(contexts), strict=True))
        rows = []
        for index, example in enumerate(examples):
            text = pieces[example.context]
            answer = example.answers[0] if example.answers else None
            first = last = -1
            if answer is not None:
                inside = (text.offsets[:, 1] > answer.start) & (text.offsets[:, 0] < answer.end)
                touched = np.flatnonzero(inside)
                first, last = (int(touched[0]), int(touched[-1])) if len(touched) else (-1, -1)
            asked = self.settings["max_question"]
            for window, cut in tokenizer.question(questions[index], text, self.settings["stride"], asked):
                start = end = None
                if example.answers is not None:
                    start = end = tokenizer.class_place(len(window.ids))
                    if first >= 0 and cut.begin <= first and last < cut.end:
                        start, end = window.first + first - cut.begin, window.first + last - cut.begin
                rows.append(AnswerRow(index, window, cut, text.offsets[cut.begin : cut.end], start, end))
        return rows

    def collate(self, tokenizer: TaskTokenizer, features: Sequence[AnswerRow]) -> Batch:
        batch = tokenizer.batch([row.window for row in features])
        if features[0].start is not None:
            length = batch["input_ids"].shape[1]
            for name in ("start", "end"):
                places = [
                    getattr(row, name) + (length - len(row.window.ids) if tokenizer.pad_left else 0) for row in features
                ]
                batch[name] = torch.tensor(places)
        return batch

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"loss": len(batch["start"])}

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        output = model(**model_inputs(model, batch))
        start = F.cross_entropy(output.start_logits.float(), batch["start"], reduction="sum")
        return {"loss": (start + F.cross_entropy(output.end_logits.float(), batch["end"], reduction="sum")) / 2}

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        output = model(**model_inputs(model, batch))
        return {"start": output.start_logits.float(), "end": output.end_logits.float()}

    def predict(
        self,
        tokenizer: TaskTokenizer,
        examples: Sequence[Question],
        features: Sequence[AnswerRow],
        outputs: Sequence[Mapping[str, np.ndarray]],
    ) -> list[FoundAnswer]:
        nothing = np.full(len(examples), np.inf)
        candidates: list[list[tuple[float, int, int]]] = [[] for _ in examples]
        for row, output in zip(features, outputs, strict=True):
            start, end = (tokenizer.unpadded(output[name], row.window).astype(np.float64) for name in ("start", "end"))
            none = tokenizer.class_place(len(start))
            nothing[row.example] = min(nothing[row.example], start[none] + end[none])
            candidates[row.example] += self._spans(row, start, end)
        return [
            self._choose(example, none, found)
            for example, none, found in zip(examples, nothing, candidates, strict=True)
        ]

    def _spans(self, row: AnswerRow, start: np.ndarray, end: np.ndarray) -> list[tuple[float, int, int]]:
        """The best parts of a row's text: score, first and last character's places, the latter's plus one."""
        window, cut = row.window, row.cut
        inside = slice(window.first, window.first + window.count)
        starts, ends = start[inside], end[inside]
        found = []
        for first in np.argsort(-starts, kind="stable")[:_BEST]:
            # A start is left to the row in which it has more around it.
            if not cut.own_begin <= cut.begin + first < cut.own_end:
                continue
            for last in np.argsort(-ends, kind="stable")[:_BEST]:
                if first <= last < first + self.settings["max_answer"]:
                    score = float(starts[first] + ends[last])
                    found.append((score, int(row.offsets[first, 0]), int(row.offsets[last, 1])))
        return found

    def _choose(self, example: Question, nothing: float, found: list[tuple[float, int, int]]) -> FoundAnswer:
        nulls = self.settings["nulls"]
        scores = np.array([score for score, _, _ in found] + ([nothing] if nulls or not found else []))
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        best = max(range(len(found)), key=lambda n: found[n][0], default=None)
        if best is None or (nulls and nothing - found[best][0] > self.settings["null_threshold"]):
            return FoundAnswer("", None, None, float(shares[-1]))
        _, start, end = found[best]
        text = example.context[start:end]
        start, end = start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
        return FoundAnswer(example.context[start:end], start, end, float(shares[best]))

    def score(self, examples: Sequence[Question], predictions: Sequence[FoundAnswer]) -> dict[str, float]:
        exact, f1 = [], []
        for example, found in zip(examples, predictions, strict=True):
            wanted = [answer.text for answer in example.answers] or [""]
            exact.append(max(float(plain(found.text) == plain(text)) for text in wanted))
            f1.append(max(overlap(found.text, text) for text in wanted))
        scores = {"f1": float(np.mean(f1)), "exact": float(np.mean(exact))}
        answered = np.array([bool(example.answers) for example in examples])
        if not answered.all() and answered.any():
            scores |= {"f1_answered": float(np.mean(np.array(f1)[answered]))}
            scores |= {"f1_unanswered": float(np.mean(np.array(f1)[~answered]))}
        return scores

    def rows(self, examples: Sequence[Question], predictions: Sequence[FoundAnswer]) -> list[dict[str, Any]]:
        return [
            {
                **({} if example.name is None else {"id": example.name}),
                "question": example.question,
                "text": example.context,
                "answer": found.text,
                "start": found.start,
                "end": found.end,
                "probability": found.probability,
            }
            for example, found in zip(examples, predictions, strict=True)
        ]

    def line(self, row: Mapping[str, Any]) -> str:
        return row["answer"]


def plain(text: str) -> str:
    """A text as SQuAD compares it: lower case, without punctuation, articles and further white space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def overlap(found: str, wanted: str) -> float:
    """F1 of the words of two texts."""
    a, b = plain(found).split(), plain(wanted).split()
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))
