"""What sentence-transformers keeps of a model's tokenisation: every key is read, is of no effect here, or refused.

The library passes a module's keys to its constructor, where one that it does not know is an error; so it is here, for
a setting that is passed over gives other vectors without a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pyxlbert.files import read_optional_json, setting

# The first that is there and not empty counts, as in the library.
FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# With what they may hold; None always may.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "transformer_task": ("feature-extraction", "sequence-classification"),
    "module_output_name": ("token_embeddings", "scores"),
    "unpad_inputs": (True, False),
    "query_length": (),
    "document_length": (),
    "query_expansion": (),
    "tokenizer_name_or_path": (),
}
_OUTPUTS = ("last_hidden_state", "logits", None)
# Of no effect on a row's vector, of what a tokenizer's call takes: padding is never seen.
_PADDING = ("padding", "pad_to_multiple_of", "return_tensors", "padding_side")
_TRUNCATION = (True, "longest_first", "only_first")
# Of what loads a model: how, not which one.
_LOADING = ("dtype", "torch_dtype", "attn_implementation", "low_cpu_mem_usage", "add_pooling_layer", "device_map")
_LOADING += ("trust_remote_code", "use_safetensors")
_ARGUMENTS = {"model_args": "model_kwargs", "tokenizer_args": "processor_kwargs", "config_args": "config_kwargs"}


class FolderSettings(NamedTuple):
    """What a folder says of its texts.

    Attributes:
        max_length: the most tokens of a text, by this file; None where it says nothing.
        lowercase: whether texts are lower-cased before the tokenizer.
        source: where max_length stands.
    """

    max_length: int | None = None
    lowercase: bool = False
    source: str = ""


def refuse_unknown(path: Path, content: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises for a key that is none of those.

    Raises:
        ValueError: there is one; the message names it.
    """
    unknown = sorted(content.keys() - set(known))
    if unknown:
        raise ValueError(f"{path}: {unknown[0]} is {content[unknown[0]]!r}, a key that is not supported")


def refuse_other(path: Path, content: Mapping[str, Any], key: str, harmless: tuple[Any, ...]) -> None:
    """Raises where a key holds what is not followed here; it may be missing, and None.

    Raises:
        ValueError: it does; the message names it.
    """
    value = content.get(key)
    if value is not None and not any(value is one or (type(value) is type(one) and value == one) for one in harmless):
        wanted = " or ".join(map(repr, harmless)) or "no such key"
        raise ValueError(f"{path}: {key} is {value!r}, which is not supported; wanted {wanted}")


def read(directory: Path) -> FolderSettings:
    """Reads `sentence_bert_config.json`, or one of its older names.

    Raises:
        ValueError: a file is corrupt, or a key in it asks for what is not supported; the message names it.
    """
    path, content = directory / FILES[0], {}
    for name in FILES:
        found = read_optional_json(directory / name)
        if found:
            path, content = directory / name, found
            break
    own = ("max_seq_length", "do_lower_case", "modality_config", "processing_kwargs")
    refuse_unknown(path, content, (*own, *_HARMLESS, *_ARGUMENTS, *_ARGUMENTS.values()))
    for key, harmless in _HARMLESS.items():
        refuse_other(path, content, key, harmless)
    _check_modalities(path, content)
    limits = [("max_seq_length", positive(path, content, "max_seq_length"))]
    for old, new in _ARGUMENTS.items():
        for key in (old, new):
            given = setting(path, content, key, dict, {})
            where = f"{key}.model_max_length"
            if new == "processor_kwargs":
                refuse_unknown_in(path, key, given, ("model_max_length", "trust_remote_code"))
                limits.append((where, positive(path, given, "model_max_length", where)))
            else:
                refuse_unknown_in(path, key, given, _LOADING if new == "model_kwargs" else ("trust_remote_code",))
    limits.append(("processing_kwargs.text.max_length", _of_calls(path, content)))
    # The last counts: a call's own limit before the tokenizer's, and that before the model's.
    where, limit = next(((key, one) for key, one in reversed(limits) if one is not None), ("", None))
    return FolderSettings(limit, setting(path, content, "do_lower_case", bool, False), f"{path}: {where}")


def refuse_unknown_in(path: Path, key: str, content: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """`refuse_unknown` of an object under a key."""
    refuse_unknown(path, {f"{key}.{name}": value for name, value in content.items()}, [f"{key}.{n}" for n in known])


def _check_modalities(path: Path, content: Mapping[str, Any]) -> None:
    """The model is called with texts, and its last layer or its logits are taken."""
    modalities = setting(path, content, "modality_config", dict)
    if modalities is None:
        return
    text = modalities.get("text")
    plain = isinstance(text, dict) and text.get("method", "forward") == "forward"
    if not plain or text.get("method_output_name") not in _OUTPUTS or text.keys() - {"method", "method_output_name"}:
        raise ValueError(f"{path}: modality_config.text is {text!r}, wanted forward and its last_hidden_state")


def _of_calls(path: Path, content: Mapping[str, Any]) -> int | None:
    """The limit in `processing_kwargs`: what the tokenizer is called with."""
    given = setting(path, content, "processing_kwargs", dict, {})
    # The others are of no effect on texts.
    refuse_unknown_in(path, "processing_kwargs", given, ("text", "common", "audio", "image", "video"))
    common, text = (setting(path, given, key, dict, {}) for key in ("common", "text"))
    refuse_unknown_in(path, "processing_kwargs.common", common, _PADDING)
    refuse_unknown_in(path, "processing_kwargs.text", text, (*_PADDING, "truncation", "max_length"))
    where = "processing_kwargs.text.truncation"
    refuse_other(path, {where: text.get("truncation")}, where, _TRUNCATION)
    return positive(path, text, "max_length", "processing_kwargs.text.max_length")


def positive(path: Path, content: Mapping[str, Any], key: str, shown: str | None = None) -> int | None:
    """A number of tokens under a key, which may be written as 1e30; None where there is none.

    Raises:
        ValueError: it is no finite number of at least 1.
    """
    value = content.get(key)
    if value is None:
        return None
    number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    number = number and not isinstance(value, bool)
    if not number or value < 1:
        raise ValueError(f"{path}: {shown or key} is {value!r}; wanted a positive number")
    return int(value)
