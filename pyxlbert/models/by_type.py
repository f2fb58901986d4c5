"""Which encoder reads a directory, by the `model_type` of its configuration."""

from __future__ import annotations

from pathlib import Path

from pyxlbert.files import read_json, require_file
from pyxlbert.models.albert import AlbertModel
from pyxlbert.models.bert import BertModel
from pyxlbert.models.pretrained import PretrainedModel
from pyxlbert.models.roberta import RobertaModel
from pyxlbert.models.xlnet import XLNetModel


def encoder_class(directory: str | Path) -> type[PretrainedModel]:
    """`BertModel`, `RobertaModel`, `AlbertModel` or `XLNetModel`; BERT's where the type is not said.

    Raises:
        FileNotFoundError: the directory or its ``config.json`` is missing.
        ValueError: the file is not JSON, or names another type.
    """
    path = require_file(directory, "config.json")
    model_type = read_json(path).get("model_type") or BertModel.config_class.model_type
    encoders = (BertModel, RobertaModel, AlbertModel, XLNetModel)
    kinds = {kind: encoder for encoder in encoders for kind in encoder.config_class.kinds()}
    if model_type not in kinds:
        raise ValueError(f"{path}: model_type is {model_type!r}; wanted one of {', '.join(kinds)}")
    return kinds[model_type]
