"""Configurations: dataclasses read from and written to Hugging Face's ``config.json``."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from pyxlbert.files import read_json, require_file, whole_file
from pyxlbert.hub import Hub

# What is built of a file's fields, before any weights are met, must end, and its sizes multiply without overflow.
MOST_LAYERS, MOST_WIDTH, MOST_LABELS, MOST_ANYTHING = 1024, 2**24, 2**20, 2**31 - 1


def _labels(given: object) -> dict[int, str]:
    """`id2label` with integers for keys, as JSON cannot have them."""
    try:
        if len(given) > MOST_LABELS:
            raise ValueError
        return {int(index): label for index, label in given.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"id2label: got {given!r}, wanted an object of numbers and their labels") from None


def _dtype(given: object) -> str:
    """The name of a dtype that weights may have."""
    name = str(given).removeprefix("torch.") if isinstance(given, str | torch.dtype) else ""
    found = getattr(torch, name, None) if name.isidentifier() else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype: got {given!r}, wanted the name of a floating-point dtype of torch, such as 'bfloat16'"
        )
    return name


PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(kw_only=True)
class ModelConfig:
    """What every model's configuration has. Subclasses add their fields and their checks.

    A key of ``config.json`` that is no field here is kept in `extra` and written back, unless it asks for something
    that would change the result: `unsupported` names those with the values that are harmless.

    Raises:
        ValueError: a field has a value that cannot be honoured; the message names it.
    """

    model_type: ClassVar[str] = ""
    #: What transformers' classes of this model type begin with, where ours begin otherwise: their beginning for ours.
    prefix: ClassVar[tuple[str, str]] = ("", "")
    unsupported: ClassVar[dict[str, tuple]] = {
        "is_encoder_decoder": (False, None),
        "tie_encoder_decoder": (False, None),
        "pruned_heads": ({}, None),
        "quantization_config": (None,),
        "per_layer_config": ({}, None),
    }

    architectures: list[str] | None = None
    dtype: str | None = None
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    num_labels: int | None = None
    problem_type: str | None = None
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype is not None:
            self.dtype = _dtype(self.dtype)
        if self.id2label is not None:
            self.id2label = _labels(self.id2label)
            # As in transformers, the map wins over a count that disagrees with it.
            self.num_labels = len(self.id2label)
        elif self.num_labels is None:
            self.num_labels = 2
        self.validate()
        self._name_labels()

    def _name_labels(self) -> None:
        if self.id2label is None or len(self.id2label) != self.num_labels:
            self.id2label = {index: f"LABEL_{index}" for index in range(self.num_labels)}
            self.label2id = None
        if self.label2id is None:
            self.label2id = {label: index for index, label in self.id2label.items()}

    def validate(self) -> None:
        """Check every field.

        Raises:
            ValueError: a value cannot be honoured; the message names the field, what it is and what was wanted.
        """
        if not isinstance(self.extra, dict):
            raise ValueError(f"extra: got {self.extra!r}, wanted an object of fields that are none of this model's")
        for name, harmless in self.unsupported.items():
            value = getattr(self, name) if hasattr(self, name) else self.extra.get(name, harmless[0])
            if value not in harmless:
                raise ValueError(f"{name}: got {value!r}, which this model does not support; wanted {harmless[0]!r}")
        self._integer("num_labels", 1, MOST_LABELS)
        for f in fields(self):
            if f.type == "bool" and not isinstance(getattr(self, f.name), bool):
                raise ValueError(f"{f.name}: got {getattr(self, f.name)!r}, wanted True or False")
        self._kinds()
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            raise ValueError(
                f"problem_type: got {self.problem_type!r}, wanted None or one of {', '.join(PROBLEM_TYPES)}"
            )
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError("num_labels: got 1, wanted at least 2 for problem_type 'single_label_classification'")

    def _kinds(self) -> None:
        """Fields that no other check looks into: names, lists of names, and the labels' maps."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type.startswith("str") and not (isinstance(value, str) or (value is None and "None" in f.type)):
                raise ValueError(f"{f.name}: got {value!r}, wanted a string")
        names = self.architectures
        if names is not None and not (isinstance(names, list) and all(isinstance(one, str) for one in names)):
            raise ValueError(f"architectures: got {names!r}, wanted a list of names")
        labels = self.label2id
        if labels is not None and not isinstance(labels, dict):
            raise ValueError(f"label2id: got {labels!r}, wanted an object of labels and their numbers")

    def _integer(self, name: str, least: int, most: int = MOST_ANYTHING) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: got {value!r}, wanted an integer of at least {least}")
        if value > most:
            raise ValueError(f"{name}: got {value!r}, wanted an integer of at most {most}")

    def _number(self, name: str, least: float, most: float = math.inf) -> None:
        value = getattr(self, name)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        # A whole number may be too large to be made a float.
        good = good and (abs(value) <= MOST_ANYTHING if isinstance(value, int) else math.isfinite(value))
        if not good or not least <= value <= most:
            wanted = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"{name}: got {value!r}, wanted a finite number {wanted}")

    @property
    def depth(self) -> int:
        """How many layers a row goes through, and so how many `hidden_states` follow the first."""
        return self.num_hidden_layers

    @classmethod
    def kinds(cls) -> dict[str, type[ModelConfig]]:
        """The configurations that a model of this configuration takes, by model type."""
        return {cls.model_type: cls}

    def architecture(self, model: type) -> str:
        """The name of transformers' class for a class of ours."""
        ours, theirs = self.prefix
        return theirs + model.__name__.removeprefix(ours)

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> Self:
        """The configuration for the keys of a ``config.json``.

        Args:
            values: the parsed file.
            overrides: fields to replace.

        Raises:
            ValueError: a field cannot be honoured, or the file is another model's.
            TypeError: an override is no field, or `values` are no dict whose keys are strings.
        """
        if not isinstance(values, dict):
            raise TypeError(f"values: got {type(values).__name__}, wanted a dict of fields")
        for name in values:
            if not isinstance(name, str):
                raise TypeError(f"values: got the key {name!r}, wanted a field's name")
        values = dict(values)
        if "torch_dtype" in overrides:
            overrides["dtype"] = overrides.pop("torch_dtype")
        known = {f.name for f in fields(cls) if f.name != "extra"}
        for name in overrides.keys() - known - cls.unsupported.keys() - {"model_type"}:
            near = difflib.get_close_matches(name, known)
            raise TypeError(f"{name}: no field of {cls.__name__}" + (f"; near: {', '.join(near)}" if near else ""))
        model_type = values.pop("model_type", None)
        model_type = cls.model_type if model_type in (None, "") else model_type
        kinds = cls.kinds()
        if not isinstance(model_type, str) or model_type not in kinds:
            wanted = " or ".join(map(repr, kinds))
            raise ValueError(f"model_type: got {model_type!r}, wanted {wanted}")
        if "torch_dtype" in values:
            old = values.pop("torch_dtype")
            values.setdefault("dtype", old)
        if "num_labels" in overrides and "id2label" not in overrides:
            values.pop("id2label", None)
            values.pop("label2id", None)
        values.update(overrides)
        extra = {name: value for name, value in values.items() if name not in known}
        known_values = {name: value for name, value in values.items() if name in known}
        return kinds[model_type](**known_values, extra=extra)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> Self:
        """Read ``config.json`` of a directory.

        Args:
            directory: the folder, or the name of a model of the hub.
            revision, cache_dir, token, local_files_only: how the hub is asked: see `pyxlbert.hub.Hub`.
            overrides: fields to replace.

        Raises:
            FileNotFoundError: the directory or the file is missing, or a model of the hub cannot be had.
            ValueError: the file is not JSON, or a field cannot be honoured.
        """
        hub = Hub(revision, cache_dir, token, local_files_only)
        path = require_file(hub.folder(directory, weights=False), "config.json")
        values = read_json(path)
        try:
            return cls.from_dict(values, **overrides)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The keys of a ``config.json``, unknown ones that were read included."""
        self._name_labels()
        values = {**self.extra, "model_type": self.model_type}
        for f in fields(self):
            if f.name not in ("extra", "num_labels"):
                values[f.name] = getattr(self, f.name)
        values["id2label"] = {str(index): label for index, label in self.id2label.items()}
        return {name: value for name, value in values.items() if value is not None or name == "pad_token_id"}

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` into a directory, which is made if need be; the file appears whole or not at all."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        with whole_file(Path(directory) / "config.json") as path:
            path.write_text(text, encoding="utf-8")
