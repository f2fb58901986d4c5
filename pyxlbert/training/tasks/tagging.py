"""Words with a tag each, and the entities that tags make."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyxlbert.models.pretrained import PretrainedModel
from pyxlbert.training.data.table import Place
from pyxlbert.training.data.tags import OUTSIDE, Sentence, read_tags, split_words
from pyxlbert.training.encoding import TaskTokenizer, Window, first_pieces, windows
from pyxlbert.training.taggers import CHAIN, LSTM, TAGGERS
from pyxlbert.training.tasks.base import IGNORED, Batch, Task, family, model_inputs

#: The largest width of a BiLSTM's direction.
MOST_LSTM = 2**16

#: The tag of a word's further pieces, with `pieces` "x".
CONTINUED = "X"


class TagRow(NamedTuple):
    """A feature.

    Shape: n places of the window.
    """

    example: int
    window: Window
    words: np.ndarray  # int64 [n], the word whose first piece stands there and is this window's to tag, else -1
    continued: np.ndarray  # bool [n], further pieces that are this window's to tag; all False unless they are labelled
    labels: np.ndarray | None  # int64 [n]


class Tagging(Task):
    """Tags of words; entity precision, recall and F1 as `seqeval` counts them.

    Settings:
        pieces: ``"first"``: a word's first piece has its tag, and the others are left out of loss and prediction;
            ``"x"``: the others have the tag X.
        crf: whether a CRF reads the sequence of tags.
        lstm: width of each direction of a BiLSTM between encoder and classifier; 0 for none.
        stride: pieces that two windows of a long sentence share.
        text_column, header: where `predict` finds texts in a table.
    """

    name = "token-classification"
    head = "ForTokenClassification"
    row_packages = ("seqeval",)
    defaults = {  # noqa: RUF012 (declared in the base)
        "pieces": "first",
        "crf": False,
        "lstm": 0,
        "stride": 32,
        "text_column": 1,
        "header": True,
    }

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(settings)
        self.labels: list[str] = []

    def check_settings(self) -> None:
        super().check_settings()
        if self.settings["pieces"] not in ("first", "x"):
            raise ValueError(f"pieces: got {self.settings['pieces']!r}, wanted first or x")
        if self.settings["lstm"] > MOST_LSTM:
            raise ValueError(f"lstm: got {self.settings['lstm']}, wanted a width of at most {MOST_LSTM}, or 0 for none")

    @property
    def packages(self) -> tuple[str, ...]:
        return ("seqeval",)

    @property
    def metric(self) -> str:
        return "f1"

    @property
    def columns(self) -> dict[str, str | int]:
        return {"text": self.settings["text_column"]}

    @property
    def _continues(self) -> bool:
        return self.settings["pieces"] == "x"

    def read(self, path: str | Path, training: bool = False) -> list[Sentence]:
        known = None if training else frozenset(self.labels) - {CONTINUED}
        sentences = read_tags(path, known)
        if training:
            tags = {tag for sentence in sentences for tag in sentence.tags}
            self.labels = [OUTSIDE, *sorted(tags - {OUTSIDE})] + [CONTINUED] * self._continues
            if not tags - {OUTSIDE}:
                raise ValueError(f"{path}: all words have the tag {OUTSIDE}, wanted some entities")
        return sentences

    def inputs(self, texts: Sequence[Mapping[str, Any]], places: Sequence[Place]) -> list[Sentence]:
        for values, place in zip(texts, places, strict=True):
            if not isinstance(values["text"], str):
                raise ValueError(f"{place}: the text is {values['text']!r}, wanted a string")
        return [split_words(place, values["text"]) for values, place in zip(texts, places, strict=True)]

    def config_fields(self) -> dict[str, Any]:
        return {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "num_labels": len(self.labels),
            "extra": {CHAIN: bool(self.settings["crf"]), LSTM: self.settings["lstm"]} if self._own_model else {},
        }

    @property
    def _own_model(self) -> bool:
        return bool(self.settings["crf"] or self.settings["lstm"])

    def adopt(self, config: Any) -> None:
        self.labels = [config.id2label[index] for index in range(config.num_labels)]

    def model_class(self, model_type: str) -> type[PretrainedModel]:
        return TAGGERS[family(model_type)] if self._own_model else super().model_class(model_type)

    def features(self, tokenizer: TaskTokenizer, examples: Sequence[Sentence], training: bool = False) -> list[TagRow]:
        places = {label: index for index, label in enumerate(self.labels)}
        rows = []
        for index, pieces in enumerate(tokenizer.words([example.words for example in examples])):
            sentence = examples[index]
            starts = first_pieces(pieces, len(sentence.words))
            owner = np.full(len(pieces.ids), -1, dtype=np.int64)  # of each piece, the word that it is the first of
            owner[starts[starts >= 0]] = np.flatnonzero(starts >= 0)
            for cut in windows(len(pieces.ids), tokenizer.room, min(self.settings["stride"], tokenizer.room - 1)):
                window = tokenizer.part(pieces, cut.begin, cut.end)
                words = np.full(len(window.ids), -1, dtype=np.int64)
                own = slice(window.first + cut.own_begin - cut.begin, window.first + cut.own_end - cut.begin)
                words[own] = owner[cut.own_begin : cut.own_end]
                continued = np.zeros(len(window.ids), dtype=bool)
                if self._continues:
                    continued[own] = words[own] < 0
                labels = None
                if sentence.tags is not None:
                    labels = np.full(len(window.ids), IGNORED, dtype=np.int64)
                    labels[words >= 0] = [places[sentence.tags[word]] for word in words[words >= 0]]
                    labels[continued] = places.get(CONTINUED, IGNORED)
                    if training and (labels == IGNORED).all():
                        continue
                rows.append(TagRow(index, window, words, continued, labels))
        return rows

    def collate(self, tokenizer: TaskTokenizer, features: Sequence[TagRow]) -> Batch:
        batch = tokenizer.batch([row.window for row in features])
        batch["first"] = tokenizer.pad([row.words >= 0 for row in features], 0, torch.bool)
        batch["continued"] = tokenizer.pad([row.continued for row in features], 0, torch.bool)
        if features[0].labels is not None:
            batch["labels"] = tokenizer.pad([row.labels for row in features], IGNORED)
        return batch

    def counts(self, batch: Batch) -> dict[str, int]:
        labelled = batch["labels"] != IGNORED
        # A CRF has one likelihood for all tags of a row.
        return {"loss": int(labelled.any(dim=1).sum() if self.settings["crf"] else labelled.sum())}

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(**model_inputs(model, batch)).logits.float()  # [B, T, labels]
        labels = batch["labels"]  # [B, T]
        if self.settings["crf"]:
            return {"loss": model.crf(logits, labels, labels != IGNORED).sum()}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")}

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(**model_inputs(model, batch)).logits.float()  # [B, T, labels]
        if self._continues:
            # Further pieces are X, and nothing else is.
            other = torch.arange(logits.shape[-1], device=logits.device) == self.labels.index(CONTINUED)
            logits = logits.masked_fill(batch["continued"][..., None] != other, -torch.inf)
        found = {"probability": logits.softmax(-1).amax(-1)}
        if self.settings["crf"]:
            found["tags"] = model.crf.decode(logits, batch["first"] | batch["continued"])
            chosen = logits.softmax(-1).gather(-1, found["tags"].clamp(min=0)[..., None])
            found["probability"] = chosen.squeeze(-1)
        else:
            found["tags"] = logits.argmax(-1)
        return found

    def predict(
        self,
        tokenizer: TaskTokenizer,
        examples: Sequence[Sentence],
        features: Sequence[TagRow],
        outputs: Sequence[Mapping[str, np.ndarray]],
    ) -> list[tuple[list[str], np.ndarray]]:
        """Of each example its words' tags, O for words without pieces, and their probabilities, float64 ``[words]``."""
        tags = [[OUTSIDE] * len(example.words) for example in examples]
        probabilities = [np.zeros(len(example.words)) for example in examples]
        for row, output in zip(features, outputs, strict=True):
            found, sure = (tokenizer.unpadded(output[key], row.window) for key in ("tags", "probability"))
            for place in np.flatnonzero(row.words >= 0):
                word = row.words[place]
                tags[row.example][word] = self.labels[found[place]]
                probabilities[row.example][word] = sure[place]
        return list(zip(tags, probabilities, strict=True))

    def score(
        self, examples: Sequence[Sentence], predictions: Sequence[tuple[list[str], np.ndarray]]
    ) -> dict[str, float]:
        from seqeval.metrics import classification_report

        wanted, found = [example.tags for example in examples], [tags for tags, _ in predictions]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a kind of entity that was never predicted has no precision: 0
            report = classification_report(wanted, found, output_dict=True, zero_division=0)
        micro, macro = report["micro avg"], report["macro avg"]
        scores = {name: float(micro[key]) for name, key in (("precision", "precision"), ("recall", "recall"))}
        scores["f1"], scores["f1_macro"] = float(micro["f1-score"]), float(macro["f1-score"])
        kinds = {kind: row for kind, row in report.items() if not kind.endswith(" avg")}
        return scores | {f"f1_{kind}": float(row["f1-score"]) for kind, row in kinds.items()}

    def rows(
        self, examples: Sequence[Sentence], predictions: Sequence[tuple[list[str], np.ndarray]]
    ) -> list[dict[str, Any]]:
        return [self._row(example, *found) for example, found in zip(examples, predictions, strict=True)]

    @staticmethod
    def _row(example: Sentence, tags: list[str], probabilities: np.ndarray) -> dict[str, Any]:
        from seqeval.metrics.sequence_labeling import get_entities

        text, offsets = example.text, example.offsets
        if text is None:
            # The words of a file side by side, with a space between.
            text, ends = " ".join(example.words), np.cumsum([len(word) + 1 for word in example.words])
            offsets = [(int(end) - 1 - len(word), int(end) - 1) for word, end in zip(example.words, ends, strict=True)]
        entities = []
        for kind, first, last in get_entities(tags):
            start, end = offsets[first][0], offsets[last][1]
            entity = {"type": kind, "text": text[start:end], "start": start, "end": end}
            entities.append({**entity, "probability": float(probabilities[first : last + 1].min())})
        return {"text": text, "entities": entities, "words": example.words, "tags": tags}

    def line(self, row: Mapping[str, Any]) -> str:
        return " ".join(f"{entity['text']}/{entity['type']}" for entity in row["entities"])
