"""From text to ids: a thin layer over the `tokenizers` library.

The library does the work; this file decides which settings count. A `tokenizer.json` often carries the padding and
the truncation of whatever was done last with the model (all-MiniLM-L6-v2 ships "pad everything to 128"), so both are
switched off and the length limit is found as `length_limit` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .files import model_directory, read_optional_json, read_text

if TYPE_CHECKING:  # the library is loaded when a tokenizer is, not by `import pyxlbert`
    import tokenizers

# The library hands back one object per text; converting in slices keeps few of them alive.
_SLICE = 1024

_SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


class TokenizedText(NamedTuple):
    """One text with everything that `token_vectors` needs.

    Shape: n tokens, those that the post-processor adds ([CLS], [SEP]) among them.
    """

    text: str  # what was tokenized: surrogates replaced
    ids: np.ndarray  # int32 [n]
    tokens: list[str]
    offsets: np.ndarray  # int64 [n, 2], characters
    words: np.ndarray  # int64 [n], the index of the word a token belongs to, -1 for none
    special: np.ndarray  # bool [n], added by the post-processor


class TextTokenizer:
    """A tokenizer with a fixed length limit; calls only read it, so that threads may share it.

    Args:
        tokenizer: the library's object. It is owned from here on: padding and truncation are set.
        max_length: the most tokens a text may give, special ones included; the rest of the text is dropped.

    Raises:
        ValueError: `max_length` leaves no room for a token, or a single text gets token types other than 0.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, max_length: int) -> None:
        added = tokenizer.num_special_tokens_to_add(False)
        if max_length <= added:
            raise ValueError(f"max_length: got {max_length}; wanted more than the {added} special tokens of every text")
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)
        if any(tokenizer.encode("a").type_ids):
            raise ValueError("tokenizer: gives a single text token types other than 0, which is not supported")
        self._tokenizer = tokenizer
        self.max_length = max_length

    @classmethod
    def from_directory(cls, directory: str | Path, max_positions: int | None = None) -> TextTokenizer:
        """Reads `tokenizer.json`, or else `vocab.txt`, and the settings beside it.

        Args:
            directory: where the files are.
            max_positions: rows of the model's position table; the length limit never passes it.

        Raises:
            FileNotFoundError: the directory or both files are missing.
            ValueError: a file is corrupt, or asks for what is not supported; the message names it.
        """
        path = model_directory(directory)
        return cls(load_tokenizer(path), length_limit(path, max_positions))

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, special tokens included.

        Returns:
            One int32 array per text, at most `max_length` long.
        """
        if len(texts) == 1:  # the batch call wakes a thread pool
            return [np.array(self._tokenizer.encode(well_formed(texts[0])).ids, dtype=np.int32)]
        result: list[np.ndarray] = []
        for start in range(0, len(texts), _SLICE):
            part = [well_formed(text) for text in texts[start : start + _SLICE]]
            result.extend(np.array(e.ids, dtype=np.int32) for e in self._tokenizer.encode_batch_fast(part))
        return result

    def tokenize(self, texts: Sequence[str]) -> list[TokenizedText]:
        """The ids of each text with tokens, character offsets and words. Offsets count Python characters."""
        result: list[TokenizedText] = []
        for start in range(0, len(texts), _SLICE):
            part = [well_formed(text) for text in texts[start : start + _SLICE]]
            for text, e in zip(part, self._tokenizer.encode_batch(part), strict=True):
                result.append(
                    TokenizedText(
                        text=text,
                        ids=np.array(e.ids, dtype=np.int32),
                        tokens=e.tokens,
                        offsets=np.array(e.offsets, dtype=np.int64).reshape(-1, 2),
                        words=np.array([-1 if w is None else w for w in e.word_ids], dtype=np.int64),
                        special=np.array(e.special_tokens_mask, dtype=bool),
                    )
                )
        return result


def well_formed(text: str) -> str:
    """The text with each surrogate code point (which UTF-8 cannot carry) replaced by U+FFFD, one for one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    return text


def length_limit(directory: Path, max_positions: int | None = None) -> int:
    """The most tokens of a text: the sentence-transformers setting, else the tokenizer's, else the position table's.

    Raises:
        ValueError: a setting is not a positive number, or nothing sets a limit.
    """
    limit = None
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        value = read_optional_json(directory / name).get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1:
            raise ValueError(f"{directory / name}: {key} is {value!r}; wanted a positive number")
        limit = int(value)
        break
    limits = [value for value in (limit, max_positions) if value is not None]
    if not limits:
        raise ValueError(
            f"directory: {str(directory)!r} sets no length limit (max_seq_length in sentence_bert_config.json or "
            "model_max_length in tokenizer_config.json), and no position table was given"
        )
    return min(limits)


def load_tokenizer(directory: Path) -> tokenizers.Tokenizer:
    """The library's tokenizer from `tokenizer.json` or `vocab.txt`, without truncation or padding.

    Raises:
        FileNotFoundError: neither file is there.
        ValueError: a file is corrupt, or asks for what is not supported.
    """
    import tokenizers
    from tokenizers import normalizers

    settings = read_optional_json(directory / "tokenizer_config.json")
    saved, vocabulary = directory / "tokenizer.json", directory / "vocab.txt"
    if saved.is_file():
        content = read_text(saved)
        try:
            tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise ValueError(f"{saved} is not a tokenizer that can be read: {error}") from None
        _apply_settings(tokenizer, settings)
    elif vocabulary.is_file():
        tokenizer = _from_vocabulary(vocabulary, settings)
    else:
        raise FileNotFoundError(f"directory: {str(directory)!r} holds neither tokenizer.json nor vocab.txt")
    if read_optional_json(directory / "sentence_bert_config.json").get("do_lower_case"):
        # A normaliser keeps character offsets right where str.lower() would not.
        steps = [normalizers.Lowercase()] + ([tokenizer.normalizer] if tokenizer.normalizer is not None else [])
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _apply_settings(tokenizer: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
    """Where tokenizer_config.json and tokenizer.json disagree about BERT's normaliser, the former wins.

    Directories exist whose tokenizer.json was written with the defaults of the library; `transformers` resolves the
    contradiction the same way.
    """
    from tokenizers import normalizers

    normalizer = tokenizer.normalizer
    if not isinstance(normalizer, normalizers.BertNormalizer):
        return
    names = (
        ("do_lower_case", "lowercase"),
        ("strip_accents", "strip_accents"),
        ("tokenize_chinese_chars", "handle_chinese_chars"),
    )
    for setting, attribute in names:
        if setting in settings:
            setattr(normalizer, attribute, settings[setting])
    tokenizer.normalizer = normalizer


def _from_vocabulary(path: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """BERT's WordPiece from a file with one token a line (its id is the line, from 0)."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    if settings.get("do_basic_tokenize") is False:
        raise ValueError(f"{path.parent / 'tokenizer_config.json'}: do_basic_tokenize is false, which is not supported")
    lines = read_text(path).split("\n")  # not splitlines: U+2028 and others may be tokens
    if lines[-1] == "":
        lines.pop()
    vocab = {line.rstrip("\r"): index for index, line in enumerate(lines)}
    special = dict(_SPECIAL_TOKENS)
    for source in (read_optional_json(path.parent / "special_tokens_map.json"), settings):
        for name in special:
            value = source.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                special[name] = value
    for name in ("unk_token", "cls_token", "sep_token"):
        if special[name] not in vocab:
            raise ValueError(f"{path} has no line {special[name]!r}, the {name}")
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=special["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    cls_token, sep_token = special["cls_token"], special["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls_token}:0 $A:0 {sep_token}:0",
        pair=f"{cls_token}:0 $A:0 {sep_token}:0 $B:1 {sep_token}:1",
        special_tokens=[(cls_token, vocab[cls_token]), (sep_token, vocab[sep_token])],
    )
    tokenizer.add_special_tokens([token for token in special.values() if token in vocab])
    return tokenizer
