"""A task's model in its directory: that of transformers, with the task's settings beside it."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyxlbert.files import file_digest, is_there, read_json, require_file, whole_file
from pyxlbert.hub import Hub
from pyxlbert.models.by_type import encoder_class
from pyxlbert.models.pretrained import PretrainedModel
from pyxlbert.training.encoding import TaskTokenizer
from pyxlbert.training.tasks import TASKS, Task

FILE = "task.json"
# What a tokenizer is read from.
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("spiece.model", "vocab.json", "merges.txt", "sentence_bert_config.json"),
)


@dataclass(frozen=True)
class Unread:
    """A directory of which all is read but the weights, which take longest.

    Attributes:
        task: has its labels.
        folder: of the files.
        config: the model's.
        tokenizer: fits the model.
    """

    task: Task
    folder: Path
    config: Any
    tokenizer: TaskTokenizer

    def digest(self) -> str:
        """SHA-256 of all that is read but the weights, as hexadecimal digits."""
        lengths = sorted(path.name for path in self.folder.glob("sentence_*_config.json"))
        names = [name for name in ("config.json", *_TOKENIZER, *lengths) if is_there(self.folder / name)]
        said = "".join(f"{name} {file_digest(self.folder / name)}\n" for name in names)
        return hashlib.sha256(said.encode()).hexdigest()

    def trained(self, dtype: torch.dtype = torch.float32) -> Trained:
        """The model of a directory that `write` has written.

        Raises:
            OSError, ValueError: a file is missing or corrupt, or lacks a weight.
        """
        model = _read(self.task, self.folder, self.config, dtype)
        missing = model.loading_info["missing_keys"]
        if missing:
            raise ValueError(f"{self.folder}: the weights lack {', '.join(missing)}")
        return Trained(self.task, model, self.tokenizer)

    def new(self, fresh: bool = False) -> tuple[Trained, list[str]]:
        """A model that is yet to learn the task, and the names of the weights that are new.

        Args:
            fresh: all weights are new; the directory needs none.

        Raises:
            OSError, ValueError: as `PretrainedModel.from_pretrained`.
        """
        made = self.task.model_class(self.config.model_type)
        model = made(self.config) if fresh else _read(self.task, self.folder, self.config)
        return Trained(self.task, model, self.tokenizer), [] if fresh else model.loading_info["missing_keys"]


@dataclass(frozen=True)
class Trained:
    """A model that knows its task."""

    task: Task
    model: PretrainedModel
    tokenizer: TaskTokenizer


def open_new(task: Task, directory: str | Path, max_length: int | None, hub: Hub | None = None) -> Unread:
    """A model for a task that it is yet to learn, its weights unread.

    Args:
        task: has its labels.
        directory: of an encoder, or of any model with one; or a name in the hub.
        max_length: the most places of a row; None: as the directory says.
        hub: how the hub is asked.

    Raises:
        OSError, ValueError: as the configuration's `from_pretrained` and `TaskTokenizer`; a model type that is not
            trained here, or a tokenizer with more tokens than the model.
    """
    folder = Path((hub or Hub()).folder(directory, text=True))
    fields = task.config_fields()
    extra = fields.pop("extra", {})
    config = encoder_class(folder).config_class.from_pretrained(folder, **fields)
    config.extra.update(extra)
    return Unread(task, folder, config, _tokenizer(folder, task, config, max_length))


def open_trained(directory: str | Path, hub: Hub | None = None) -> Unread:
    """A model as `write` has saved it, its weights unread.

    Raises:
        OSError: a file is missing.
        ValueError: a file is corrupt, or the directory is not that of a trained task.
    """
    folder = Path((hub or Hub()).folder(directory, text=True))
    path = require_file(folder, FILE)
    saved = read_json(path)
    name, settings, max_length = saved.get("task"), saved.get("settings", {}), saved.get("max_length")
    if not isinstance(name, str) or name not in TASKS:
        raise ValueError(f"{path}: task is {name!r}; wanted one of {', '.join(TASKS)}")
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: settings is {settings!r}; wanted an object")
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ValueError(f"{path}: max_length is {max_length!r}; wanted an integer of at least 1")
    try:
        task = TASKS[name](settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    config = encoder_class(folder).config_class.from_pretrained(folder)
    task.adopt(config)
    return Unread(task, folder, config, _tokenizer(folder, task, config, max_length))


def _read(task: Task, folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> PretrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # new weights are told of by the caller
        return task.model_class(config.model_type).from_pretrained(folder, config=config, dtype=dtype)


def _tokenizer(folder: Path, task: Task, config: Any, max_length: int | None) -> TaskTokenizer:
    longest = task.model_class(config.model_type).encoder_class.max_tokens_of(config)
    tokenizer = TaskTokenizer(folder, longest, max_length)
    if tokenizer.largest_id >= config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has ids up to {tokenizer.largest_id}, but config.json says vocab_size "
            f"{config.vocab_size}"
        )
    return tokenizer


def write(trained: Trained, source: Path, directory: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Writes the model, its tokenizer and its task; each file appears whole or not at all.

    Args:
        trained: what is written.
        source: where the tokenizer's files come from.
        directory: made if need be.
        state: weights in place of the model's own.
    """
    directory.mkdir(exist_ok=True)
    for name in _TOKENIZER:
        if is_there(source / name) and source.resolve() != directory.resolve():
            with whole_file(directory / name) as path:
                shutil.copyfile(source / name, path)
    saved = {
        "task": trained.task.name,
        "settings": trained.task.settings,
        "max_length": trained.tokenizer.max_length,
    }
    with whole_file(directory / FILE) as path:
        path.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    trained.model.save_pretrained(directory, state)
