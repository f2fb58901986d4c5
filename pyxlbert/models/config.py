"""Configurations: dataclasses read from and written to Hugging Face's ``config.json``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from pyxlbert.models import checkpoints

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
            self.dtype = str(self.dtype).removeprefix("torch.")
        if self.id2label is not None:
            self.id2label = {int(index): label for index, label in self.id2label.items()}
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
        for name, harmless in self.unsupported.items():
            value = getattr(self, name) if hasattr(self, name) else self.extra.get(name, harmless[0])
            if value not in harmless:
                raise ValueError(f"{name}: got {value!r}, which this model does not support; wanted {harmless[0]!r}")
        self._integer("num_labels", 1)
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            raise ValueError(
                f"problem_type: got {self.problem_type!r}, wanted None or one of {', '.join(PROBLEM_TYPES)}"
            )
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError("num_labels: got 1, wanted at least 2 for problem_type 'single_label_classification'")

    def _integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: got {value!r}, wanted an integer of at least {least}")

    def _number(self, name: str, least: float, most: float = math.inf) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            wanted = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"{name}: got {value!r}, wanted a number {wanted}")

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> Self:
        """The configuration for the keys of a ``config.json``.

        Args:
            values: the parsed file.
            overrides: fields to replace.

        Raises:
            ValueError: a field cannot be honoured, or the file is another model's.
        """
        values = dict(values)
        model_type = values.pop("model_type", None) or cls.model_type
        if model_type != cls.model_type:
            raise ValueError(f"model_type: got {model_type!r}, wanted {cls.model_type!r}")
        if "torch_dtype" in values:
            old = values.pop("torch_dtype")
            values.setdefault("dtype", old)
        if "num_labels" in overrides and "id2label" not in overrides:
            values.pop("id2label", None)
            values.pop("label2id", None)
        values.update(overrides)
        known = {f.name for f in fields(cls) if f.name != "extra"}
        extra = {name: value for name, value in values.items() if name not in known}
        known_values = {name: value for name, value in values.items() if name in known}
        return cls(**known_values, extra=extra)

    @classmethod
    def from_pretrained(cls, directory: str | Path, **overrides: Any) -> Self:
        """Read ``config.json`` of a directory.

        Raises:
            FileNotFoundError: the directory or the file is missing.
            ValueError: the file is not JSON, or a field cannot be honoured.
        """
        return cls.from_dict(checkpoints.read_json(checkpoints.require_file(directory, "config.json")), **overrides)

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
        with checkpoints.whole_file(Path(directory) / "config.json") as path:
            path.write_text(text, encoding="utf-8")
