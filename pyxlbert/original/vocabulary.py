"""The tokenizer's files of a converted model: the original vocabulary, settings, and a `tokenizer.json` of both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from pyxlbert.files import is_there, read_optional_json, read_text, require_file, setting
from pyxlbert.text.tokenizer import load_tokenizer


class Vocabulary(NamedTuple):
    """What a tokenizer is made of.

    Attributes:
        file: ``vocab.txt`` or ``spiece.model``, under whatever name.
        name: the name it gets.
        lower_case: whether text is lower-cased.
        reason: why, in words.
    """

    file: Path
    name: str
    lower_case: bool
    reason: str


def find_vocabulary(folder: Path, name: str, given: Path | None, lower_case: bool | None) -> Vocabulary:
    """The vocabulary of a model, and whether its text is lower-cased.

    Args:
        folder: where the checkpoint is.
        name: ``vocab.txt`` or ``spiece.model``.
        given: the file, where it is named.
        lower_case: whether, where it is said. Else `tokenizer_config.json` of the folder says it, and without one the
            vocabulary: a lower-cased one has no token with a capital letter.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the settings cannot be followed, or the vocabulary is not UTF-8.
    """
    file = folder / name if given is None else given
    if not is_there(file):
        raise FileNotFoundError(
            f"{file} is missing: name the vocabulary by --vocab, or say --no-tokenizer to go without one"
        )
    if lower_case is not None:
        return Vocabulary(file, name, lower_case, "as --uncased says" if lower_case else "as --cased says")
    settings = folder / "tokenizer_config.json"
    said = setting(settings, read_optional_json(settings), "do_lower_case", bool)
    if said is not None:
        return Vocabulary(file, name, said, f"as {settings.name} says")
    if name != "vocab.txt":
        return Vocabulary(file, name, False, "as the released models are cased")
    tokens = (line.strip() for line in read_text(file).split("\n"))
    capital = next((t for t in tokens if t != t.lower() and not (t.startswith("[") and t.endswith("]"))), None)
    reason = "the vocabulary has no capital letter" if capital is None else f"the vocabulary has {capital!r}"
    return Vocabulary(file, name, capital is None, reason)


def write_tokenizer(folder: Path, vocabulary: Vocabulary, tokenizer_class: str, max_length: int | None) -> int:
    """Writes the vocabulary, `tokenizer_config.json` and `tokenizer.json` beside a `config.json`.

    Returns:
        How many tokens there are.

    Raises:
        ValueError: the vocabulary is corrupt or lacks a special token.
        ImportError: `spiece.model` is read by packages that are not installed.
    """
    from tokenizers import decoders

    require_file(folder, "config.json")  # by which a tokenizer is known to be XLNet's
    shutil.copyfile(vocabulary.file, folder / vocabulary.name)
    settings = {"tokenizer_class": tokenizer_class, "do_lower_case": vocabulary.lower_case}
    if max_length is not None:
        settings["model_max_length"] = max_length
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    if vocabulary.name == "vocab.txt":
        tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()
