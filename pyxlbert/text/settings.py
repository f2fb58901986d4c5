"""What sentence-transformers keeps beside a model: prompts, how vectors are compared and cut; and dtypes by name."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pyxlbert import backends
from pyxlbert.files import read_optional_json, setting

from .folder_settings import refuse_other
from .similarities import SIMILARITIES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": "int8"}

FILE = "config_sentence_transformers.json"
# What the library reads of it; versions and requirements are about packages, the activation is a cross-encoder's.
_KEYS = {"prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim", "model_type", "activation_fn"}
_KEYS |= {"__version__", "requirements"}


def model_dtype(dtype: torch.dtype | str) -> tuple[torch.dtype, bool]:
    """The dtype of a model's weights, and whether its layers are to be quantised ("int8").

    Raises:
        TypeError: `dtype` is not one that models run in.
    """
    quantised = dtype == "int8"
    if quantised:
        dtype = torch.bfloat16 if backends.multiplies_bfloat16() else torch.float32
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype: got {dtype!r}, wanted torch.float32, torch.bfloat16, torch.float16 or 'int8'")
    return dtype, quantised


@dataclass(frozen=True)
class SentenceSettings:
    """Prompts, similarity and length of vectors.

    Attributes:
        prompts: what is put before a text, by name; "query" and "document" are always there, and empty unless given.
        default_prompt_name: the prompt of texts for which none is named; None puts nothing before them.
        similarity: "cosine", "dot", "euclidean" or "manhattan".
        truncate_dim: how many numbers of a vector are kept; None keeps all.

    Raises:
        ValueError: the default prompt is none of the prompts, or another value means nothing.
    """

    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity: str = "cosine"
    truncate_dim: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", {"query": "", "document": "", **self.prompts})
        for name, prompt in self.prompts.items():
            if not isinstance(name, str) or not isinstance(prompt, str):
                raise ValueError(f"prompts: got {name!r}: {prompt!r}, wanted names and texts")
        if self.default_prompt_name is not None and self.default_prompt_name not in self.prompts:
            raise ValueError(f"default_prompt_name: got {self.default_prompt_name!r}, {self._known()}")
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"similarity: got {self.similarity!r}, wanted one of {', '.join(SIMILARITIES)}")
        if self.truncate_dim is not None and (isinstance(self.truncate_dim, bool) or self.truncate_dim < 1):
            raise ValueError(f"truncate_dim: got {self.truncate_dim!r}, wanted at least 1")

    @classmethod
    def from_directory(cls, directory: Path) -> SentenceSettings:
        """Reads `config_sentence_transformers.json`; without it nothing is put before texts, and cosines compare.

        Raises:
            ValueError: the file is corrupt, or a value in it means nothing; the message names it.
        """
        path = directory / FILE
        content = read_optional_json(path)
        refuse_other(path, content, "model_type", ("SentenceTransformer", "CrossEncoder"))
        passed = sorted(content.keys() - _KEYS)
        if passed:
            warnings.warn(f"{path}: {', '.join(passed)}: not followed here, nor by sentence-transformers", stacklevel=4)
        prompts = setting(path, content, "prompts", dict, {})
        try:
            return cls(
                {name: "" if prompt is None else prompt for name, prompt in prompts.items()},
                setting(path, content, "default_prompt_name", str),
                setting(path, content, "similarity_fn_name", str, "cosine"),
                setting(path, content, "truncate_dim", int),
            )
        except ValueError as error:
            raise error if str(error).startswith(str(path)) else ValueError(f"{path}: {error}") from None

    def prompt(self, prompt: str | None, prompt_name: str | None) -> str:
        """What is put before a text, of the two arguments of `SentenceEncoder.encode`.

        Raises:
            TypeError: an argument is no str.
            ValueError: no prompt has that name, or both arguments are given.
        """
        for name, value in (("prompt", prompt), ("prompt_name", prompt_name)):
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name}: got {type(value).__name__}, wanted str or None")
        if prompt is not None:
            if prompt_name is not None:
                raise ValueError(f"prompt_name: got {prompt_name!r} with a prompt; wanted one of the two")
            return prompt
        name = self.default_prompt_name if prompt_name is None else prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            raise ValueError(f"prompt_name: got {name!r}, {self._known()}")
        return self.prompts[name]

    def _known(self) -> str:
        return f"wanted one of {', '.join(self.prompts)}"
