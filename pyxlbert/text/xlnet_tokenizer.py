"""XLNet's tokenizer from `spiece.model` or `tokenizer.json`, with the tokens that the files beside it add.

Both files give the pieces alone: what happens to a text before it is cut into them is XLNet's own, and the tokens that
are taken from a text as they stand come from the settings. So does `transformers`, which this is equal to.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pyxlbert.files import is_there, read_json, read_optional_json, setting

if TYPE_CHECKING:  # the library is loaded when a tokenizer is, not by `import pyxlbert`
    import tokenizers

# In the order in which those that a vocabulary lacks get ids behind its own.
SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "<sep>",
    "pad_token": "<pad>",
    "cls_token": "<cls>",
    "mask_token": "<mask>",
}
# Those that a tokenizer.json is given where its settings name no others.
_EXTRA_TOKENS = ("<eop>", "<eod>")
# Kinds of pieces in a SentencePiece model that stand in a text as they are.
_CONTROL, _USER_DEFINED = 3, 4
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Pieces(NamedTuple):
    """What a vocabulary file holds."""

    vocab: list[tuple[str, float]]
    unk_id: int
    replacements: bytes | None  # the model's own normalisation, compiled
    extra: list[dict[str, Any]]  # tokens that stand in a text as they are, unless the settings name others
    added: dict[int, dict[str, Any]] | None  # what a tokenizer.json lists with ids; None for a SentencePiece model


@contextmanager
def library_errors(path: Path) -> Iterator[None]:
    """Gives what the library raises the file's name: bare Exceptions, and the panics of its code, which are not even
    those.

    Raises:
        ValueError: something was raised inside of the block.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        if isinstance(error, (ValueError, OSError, ImportError)) and str(path.parent) in str(error):
            raise
        raise ValueError(f"{path} is not a tokenizer that can be read: {error}") from None


def probe(tokenizer: tokenizers.Tokenizer) -> None:
    """Has a tokenizer normalise every character: a corrupt table of replacements panics at some of them alone."""
    if tokenizer.normalizer is not None and "Precompiled" in str(tokenizer.normalizer):
        tokenizer.normalizer.normalize_str(_CHARACTERS)


_CHARACTERS = "".join(chr(one) for one in range(0x10000) if not 0xD800 <= one < 0xE000)


def is_xlnet(directory: Path, settings: dict[str, Any]) -> bool:
    """Whether a directory is XLNet's: by `config.json`, the class that its settings name, or its file of pieces."""
    model_type = read_optional_json(directory / "config.json").get("model_type")
    if model_type is not None:
        return model_type == "xlnet"
    named = str(settings.get("tokenizer_class") or "").startswith("XLNet")
    return named or is_there(directory / "spiece.model")


def from_sentencepiece(path: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a `spiece.model`.

    Raises:
        ImportError: `sentencepiece` or `protobuf`, which reads its files, is not installed.
        ValueError: the file or a setting is corrupt; the message names it.
    """
    proto = _read_sentencepiece(path)
    unigram = 1
    if proto.trainer_spec.model_type != unigram:
        raise ValueError(f"{path}: is not a unigram model, which XLNet's are")
    pieces = Pieces(
        [(piece.piece, piece.score) for piece in proto.pieces],
        proto.trainer_spec.unk_id,
        proto.normalizer_spec.precompiled_charsmap or None,
        [
            {"content": p.piece, "normalized": False, "special": p.type == _CONTROL}
            for p in proto.pieces
            if p.type in (_CONTROL, _USER_DEFINED)
        ],
        None,
    )
    with library_errors(path):
        return _build(pieces, path.parent, settings)


def from_saved(path: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer | None:
    """The tokenizer of a `tokenizer.json`; None where the file is to be taken as it stands.

    Raises:
        ValueError: the file or a setting is corrupt; the message names it.
    """
    content = read_json(path)
    model = setting(path, content, "model", dict, {})
    vocab, own_class = model.get("vocab"), settings.get("tokenizer_class")
    if own_class not in (None, "XLNetTokenizer", "XLNetTokenizerFast") or not isinstance(vocab, list):
        if settings.get("do_lower_case"):
            raise ValueError(
                f"{path.parent / 'tokenizer_config.json'}: do_lower_case is true, which cannot be followed with a "
                "tokenizer.json that is not XLNet's unigram model"
            )
        return None
    # The library has read the file before: what is of another kind than these lines take cannot be here.
    replacements = [
        base64.b64decode(step["precompiled_charsmap"])
        for step in _normalizers(path, content)
        if step.get("type") == "Precompiled"
    ]
    config = path.with_name("tokenizer_config.json")
    pieces = Pieces(
        [(piece, score) for piece, score in vocab],
        setting(config, settings, "unk_id", int, model.get("unk_id") or 0),
        replacements[0] if replacements else None,
        [_token(path, "extra_special_tokens", token) for token in _EXTRA_TOKENS],
        {token["id"]: _token(path, "added_tokens", token) for token in content.get("added_tokens") or []},
    )
    with library_errors(path):
        return _build(pieces, path.parent, settings)


def with_accents(path: Path, settings: dict[str, Any]) -> str | None:
    """A tokenizer.json as `keep_accents` of the settings beside it wants it, as ALBERT's is; None where it stays.

    Raises:
        ValueError: `keep_accents` is neither true nor false.
    """
    if not setting(path.parent / "tokenizer_config.json", settings, "keep_accents", bool, False):
        return None
    content = read_json(path)
    steps = _normalizers(path, content)
    kept = [step for step in steps if step.get("type") not in ("NFKD", "StripAccents")]
    if len(kept) == len(steps):
        return None
    return json.dumps(content | {"normalizer": {"type": "Sequence", "normalizers": kept}})


def _normalizers(path: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a `tokenizer.json`'s normalizer.

    Raises:
        ValueError: one is written as a list, which the library reads as the fields of an object in their order.
    """
    normalizer = content.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else [normalizer]
    for step in steps:
        if not isinstance(step, dict):
            raise ValueError(f"{path}: normalizer: got a step of type {type(step).__name__}, wanted an object")
    return steps


def special_tokens(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that count: those of `special_tokens_map.json` too where no tokens are listed with their ids."""
    if "added_tokens_decoder" in settings:
        return settings
    return {**settings, **read_optional_json(directory / "special_tokens_map.json")}


def _build(pieces: Pieces, directory: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """Doubled quotation marks become one, accents go unless `keep_accents` keeps them (which `transformers` 5 passes
    over), the model's own table of replacements follows; words are what white space divides. Added tokens are taken
    from a text before all this; what follows one in the middle of a word begins as a word does, which SentencePiece
    itself would not do.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces.vocab, unk_id=pieces.unk_id, byte_fallback=False))
    steps = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    if not setting(directory / "tokenizer_config.json", settings, "keep_accents", bool, False):
        steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if settings.get("do_lower_case"):
        steps.append(normalizers.Lowercase())
    if pieces.replacements:
        steps.append(normalizers.Precompiled(pieces.replacements))
    tokenizer.normalizer = normalizers.Sequence(steps)
    probe(tokenizer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    named, tokens, places = _added_tokens(pieces, directory, settings)
    tokenizer.add_tokens([tokenizers.AddedToken(**token) for token in tokens])
    for content, (source, place) in places.items():
        found = tokenizer.token_to_id(content)
        if found != place:
            raise ValueError(
                f"{source}: {content!r} is given the id {place}, wanted {found}, its place in the vocabulary"
            )
    tokenizer.encode_special_tokens = setting(
        directory / "tokenizer_config.json", settings, "split_special_tokens", bool, False
    )
    sep_token, cls_token = named["sep_token"]["content"], named["cls_token"]["content"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A:0 {sep_token}:0 {cls_token}:2",
        pair=f"$A:0 {sep_token}:0 $B:1 {sep_token}:1 {cls_token}:2",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (sep_token, cls_token)],
    )
    return tokenizer


def _added_tokens(
    pieces: Pieces, directory: Path, settings: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]], dict[str, tuple[str, int]]]:
    """The special tokens by name, all tokens to add in their order, and the ids that files give to some of them."""
    config = directory / "tokenizer_config.json"
    merged = special_tokens(directory, settings)
    extra = _extra_tokens(config, settings, merged, pieces)
    named = {
        # A text's white space before a mask belongs to it.
        name: _token(config, name, _or(merged.get(name), default), lstrip=name == "mask_token")
        for name, default in SPECIAL_TOKENS.items()
    }
    # Names of a model's own; v5 of transformers saves them as a table.
    others = {n: t for n, t in merged.items() if n.endswith("_token") and n not in named and isinstance(t, (str, dict))}
    named_extra = merged.get("extra_special_tokens")
    others |= named_extra if isinstance(named_extra, dict) else {}
    named |= {name: _token(config, name, token) for name, token in others.items()}

    listed: dict[int, dict[str, Any]] = {}
    sources: dict[int, str] = {}
    if "added_tokens_decoder" in settings:
        key = f"{config}: added_tokens_decoder"
        for place, token in _table(key, settings["added_tokens_decoder"]).items():
            listed[_place(key, place)] = _token(config, "added_tokens_decoder", token)
        sources = dict.fromkeys(listed, key)
    else:
        file = directory / "added_tokens.json"
        given = {_named(merged.get(name)) for name in SPECIAL_TOKENS} | {token["content"] for token in extra}
        for content, place in read_optional_json(file).items():
            special = content in given
            place = _place(str(file), place)
            listed[place] = {"content": content, "normalized": not special, "special": special}
            sources[place] = str(file)
        added = pieces.added or {}
        listed |= added
        sources |= dict.fromkeys(added, f"{directory / 'tokenizer.json'}: added_tokens")

    flags = {token["content"]: token for token in listed.values()}
    # The list with ids knows more of a named token than its name.
    named = {name: flags.get(token["content"], token) for name, token in named.items()}
    special = {token["content"] for token in named.values()}
    tokens: dict[str, dict[str, Any]] = {}
    for token in (*named.values(), *extra):
        # The flags of the last of equal tokens count, except beside the list with ids.
        tokens[token["content"]] = token
    tokens = {listed[place]["content"]: listed[place] for place in sorted(listed)} | {
        content: token for content, token in tokens.items() if content not in flags
    }
    # A named token is special, but is looked for in the raw or in the normalised text as its flags say.
    tokens = {
        content: {**token, "special": token.get("special", False) or content in special}
        for content, token in tokens.items()
    }
    places = {token["content"]: (sources[place], place) for place, token in listed.items()}
    return named, list(tokens.values()), places


def _extra_tokens(
    config: Path, settings: dict[str, Any], merged: dict[str, Any], pieces: Pieces
) -> list[dict[str, Any]]:
    """Special tokens without a name, those of the settings in place of the pieces' own."""
    for source, key in ((settings, "extra_special_tokens"), (settings, "additional_special_tokens")):
        if source.get(key) is not None:
            # A table names its tokens, so that those without a name stay.
            return pieces.extra if isinstance(source[key], dict) else _tokens(config, key, source[key])
    # The map's list counts for a tokenizer.json only: a SentencePiece model has its own.
    path = config.with_name("special_tokens_map.json")
    if merged.get("extra_special_tokens") is not None:
        value = merged["extra_special_tokens"]
        return pieces.extra if isinstance(value, dict) else _tokens(path, "extra_special_tokens", value)
    if pieces.added is not None and merged.get("additional_special_tokens") is not None:
        return _tokens(path, "additional_special_tokens", merged["additional_special_tokens"])
    return pieces.extra


def _tokens(path: Path, key: str, values: Any) -> list[dict[str, Any]]:
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"{path}: {key} is {values!r}; wanted a list of tokens")
    return [_token(path, key, value) for value in values]


def _token(path: Path, key: str, value: Any, lstrip: bool = False) -> dict[str, Any]:
    """The arguments of the library's added token, from a string or from an object with its content."""
    if isinstance(value, str):
        value = {"content": value, "special": True, "normalized": False, "lstrip": lstrip}
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, str) or not content:
        raise ValueError(f"{path}: {key} holds {value!r}; wanted a token, or an object with its content")
    flags = {name: value[name] for name in _FLAGS if name in value}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{path}: {key}: {name} of {content!r} is {flag!r}; wanted true or false")
    return {"content": content, **flags}


def _or(value: Any, default: str) -> Any:
    return default if value is None else value


def _named(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _table(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r}; wanted an object with a token for each id")
    return value


def _place(source: str, value: Any) -> int:
    if isinstance(value, bool) or not str(value).isdecimal():
        raise ValueError(f"{source} holds the id {value!r}; wanted a number of 0 or more")
    return int(value)


def _read_sentencepiece(path: Path) -> Any:
    """The model in a SentencePiece file.

    Raises:
        ImportError: `sentencepiece` or `protobuf`, which reads its files, is not installed.
        ValueError: the file is corrupt.
    """
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError as error:
        raise ImportError(f"{path}: reading it takes sentencepiece and protobuf: {error}") from None
    content = path.read_bytes()
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        SentencePieceProcessor(model_proto=content)
        proto.ParseFromString(content)
    except (DecodeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from None
    if not proto.pieces:
        raise ValueError(f"{path} is not a SentencePiece model: it has no pieces")
    if not 0 <= proto.trainer_spec.unk_id < len(proto.pieces):
        last = len(proto.pieces) - 1
        raise ValueError(f"{path}: the unknown piece's id is {proto.trainer_spec.unk_id}; wanted one from 0 to {last}")
    return proto
