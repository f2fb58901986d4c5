"""From text to ids: a thin layer over the `tokenizers` library, for BERT's, RoBERTa's and XLNet's directories.

The library does the work; this file decides which settings count. A `tokenizer.json` often carries the padding and
the truncation of whatever was done last with the model (all-MiniLM-L6-v2 ships "pad everything to 128"), so both are
switched off and the length limit is found as `length_limit` says.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyxlbert.files import is_there, model_directory, read_json, read_optional_json, read_text, setting

from . import folder_settings, xlnet_tokenizer
from .original_numbers import OriginalNumbers

if TYPE_CHECKING:  # the library is loaded when a tokenizer is, not by `import pyxlbert`
    import tokenizers

# The library hands back one object per text; converting in slices of so many texts and characters keeps few of them
# alive.
_SLICE, _SLICE_CHARACTERS = 1024, 1 << 18

# Of a text that is cut, the library keeps what is cut off as well, 700 bytes a token. From so many characters on
# another way is taken, which begins with so many characters for each token that is kept.
_LONG, _CHARACTERS_PER_TOKEN = 1 << 14, 8

# XLNet has no position table, so its texts may be of any length.
UNLIMITED = 2**31 - 1

# Pieces that are a word of their own in XLNet's pretraining.
_PUNCTUATION = frozenset(string.punctuation) - {"'"}

# White space of Unicode, with which a line of a vocabulary may end.
_BLANKS = "\t\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))

_SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_ROBERTA_TOKENS = {
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
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
    cut: bool  # whether the text was longer


class PaddedIds(NamedTuple):
    """Several texts as one rectangle.

    Shape: B texts, T the longest one's tokens.
    """

    ids: np.ndarray  # int64 [B, T]
    mask: np.ndarray  # int64 [B, T], 1 for a token, 0 for padding


class TextTokenizer:
    """A tokenizer with a fixed length limit; calls only read it, so that threads may share it.

    Args:
        tokenizer: the library's object. It is owned from here on: padding and truncation are set.
        max_length: the most tokens a text may give, special ones included; the rest of the text is dropped.
        special_types: special tokens may have token types other than 0, as XLNet's classification token has.
        token_types: whether the model is given these types.
        pad_token: what stands in the places that `padded` fills up.
        pad_left: whether these places are on the left.
        cut_left: whether a text that is too long loses its beginning instead of its end.
        original_numbers: see `from_directory`.

    Raises:
        ValueError: `max_length` leaves no room for a token, or a single text gets token types other than 0 that are
            not expected.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        max_length: int,
        *,
        special_types: bool = False,
        token_types: bool = False,
        pad_token: str = "[PAD]",
        pad_left: bool = False,
        cut_left: bool = False,
        original_numbers: bool = False,
    ) -> None:
        added = tokenizer.num_special_tokens_to_add(False)
        if max_length <= added:
            raise ValueError(f"max_length: got {max_length}; wanted more than the {added} special tokens of every text")
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length, direction="left" if cut_left else "right")
        probe = tokenizer.encode("a")
        special = np.array(probe.special_tokens_mask, dtype=bool)
        types = np.array(probe.type_ids, dtype=np.int64)
        if types.any() if not special_types else types[~special].any():
            raise ValueError("tokenizer: gives a single text token types other than 0, which is not supported")
        # Types of the special tokens before and behind a text.
        text = np.flatnonzero(~special)
        front, back = (text[0], len(types) - 1 - text[-1]) if len(text) else (0, 0)
        self._types = (types[:front], types[len(types) - back :]) if token_types else None
        ids = np.array(probe.ids, dtype=np.int32)
        # The special tokens themselves, where they can be told from the text's.
        self._around = (ids[:front], ids[len(ids) - back :]) if len(text) else None
        self._cut_left = cut_left
        self._tokenizer = tokenizer
        self._uncut: tokenizers.Tokenizer | None = None
        self._numbers: OriginalNumbers | None = None
        if original_numbers:
            self._numbers = OriginalNumbers(tokenizer)
            tokenizer.no_truncation()  # a text is cut behind the rule
        self._pad_id, self._pad_left = tokenizer.token_to_id(pad_token), pad_left
        self.max_length = max_length
        #: The largest id that a text may give, added tokens among them; -1 without any token.
        self.largest_id = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if self.largest_id >= 2**31:
            raise ValueError(f"tokenizer: got an id of {self.largest_id}, wanted less than 2**31")

    @classmethod
    def from_directory(
        cls, directory: str | Path, max_positions: int | None = None, *, original_numbers: bool = False
    ) -> TextTokenizer:
        """Reads `tokenizer.json`, or else `vocab.txt`, `spiece.model`, or `vocab.json` with `merges.txt`, and the
        settings beside it.

        XLNet's directories (by `config.json`, or because they hold `spiece.model`) have no length limit of their own,
        pad on the left, and give their token types to the model where `tokenizer_config.json` lists them among its
        `model_input_names`, as in `transformers`.

        Args:
            directory: where the files are.
            max_positions: rows of the model's position table; the length limit never passes it.
            original_numbers: of XLNet's pieces, cut the comma off one that ends in a digit and a comma, as in the
                code that its checkpoints were trained with; by default as in `transformers`, which does not.

        Raises:
            FileNotFoundError: the directory or the files are missing.
            ValueError: a file is corrupt, or asks for what is not supported; the message names it.
            ImportError: `spiece.model` is to be read and `sentencepiece` or `protobuf` is not installed.
        """
        path = model_directory(directory)
        file = path / "tokenizer_config.json"
        settings = read_optional_json(file)
        xlnet = xlnet_tokenizer.is_xlnet(path, settings)
        if xlnet and max_positions is None:
            max_positions = UNLIMITED
        tokenizer = load_tokenizer(path)
        limit = length_limit(path, max_positions)
        padding = "[PAD]" if tokenizer.token_to_id("[PAD]") is not None and not xlnet else "<pad>"
        with xlnet_tokenizer.library_errors(path):
            return cls(
                tokenizer,
                limit,
                special_types=xlnet,
                token_types="token_type_ids" in setting(file, settings, "model_input_names", list, ()),
                pad_token=_named(
                    xlnet_tokenizer.special_tokens(path, settings) if xlnet else settings,
                    "pad_token",
                    padding,
                ),
                pad_left=_side(file, settings, "padding_side", "left" if xlnet else "right") == "left",
                cut_left=_side(file, settings, "truncation_side", "right") == "left",
                original_numbers=original_numbers,
            )

    @property
    def pad_id(self) -> int | None:
        """The id of the padding token; None where there is none."""
        return self._pad_id

    @property
    def pad_left(self) -> bool:
        """Whether `padded` fills up on the left."""
        return self._pad_left

    @property
    def cut_left(self) -> bool:
        """Whether a text that is too long loses its beginning."""
        return self._cut_left

    def types(self, length: int) -> np.ndarray | None:
        """int64 ``[length]``, the token types of a text that gave so many ids; None where the model is given none."""
        if self._types is None:
            return None
        front, back = self._types
        middle = np.zeros(length - len(front) - len(back), dtype=np.int64)
        return np.concatenate([front, middle, back])

    def word_starts(self) -> np.ndarray:
        """Which tokens begin a word, for `pyxlbert.training.PermutationLanguageModeling`.

        In XLNet's pieces: those with the mark of a word, those in angle brackets, and punctuation marks. In BERT's:
        those without the mark of a continuation.

        Returns:
            bool ``[V]``, added tokens among them.

        Raises:
            ValueError: the tokenizer has neither XLNet's kind of pieces nor BERT's.
        """
        from tokenizers import models

        model, size = self._tokenizer.model, self._tokenizer.get_vocab_size()
        tokens = [self._tokenizer.id_to_token(index) or "" for index in range(size)]
        if isinstance(model, models.Unigram):
            return np.array([token.startswith(("▁", "<")) or token in _PUNCTUATION for token in tokens], dtype=bool)
        if isinstance(model, models.WordPiece):
            return np.array([not token.startswith(model.continuing_subword_prefix) for token in tokens], dtype=bool)
        raise ValueError(f"tokenizer: got a model of kind {type(model).__name__}, wanted Unigram or WordPiece")

    def padded(self, texts: Sequence[str]) -> PaddedIds:
        """Several texts side by side, those shorter than the longest filled up.

        Raises:
            ValueError: the tokenizer has no padding token.
        """
        if self._pad_id is None:
            raise ValueError("tokenizer: has no padding token")
        ids = self.ids(texts)
        longest = max((len(one) for one in ids), default=0)
        result = PaddedIds(
            np.full((len(ids), longest), self._pad_id, dtype=np.int64), np.zeros((len(ids), longest), dtype=np.int64)
        )
        for row, one in enumerate(ids):
            place = slice(longest - len(one), None) if self._pad_left else slice(len(one))
            result.ids[row, place], result.mask[row, place] = one, 1
        return result

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, special tokens included.

        Returns:
            One int32 array per text, at most `max_length` long.
        """
        return self.ids_and_cut(texts)[0]

    def ids_and_cut(self, texts: Sequence[str]) -> tuple[list[np.ndarray], int]:
        """What `ids` returns, and how many of the texts were longer than `max_length`."""
        cut = 0
        result: list[np.ndarray] = []

        def add(encoding: tokenizers.Encoding) -> None:
            nonlocal cut
            if self._numbers is not None:
                ids, kept, before = self._renumbered(encoding)
                cut += len(kept) < before
                result.append(ids[kept])
                return
            ids = np.array(encoding.ids, dtype=np.int32)
            cut += len(ids) == self.max_length and bool(encoding.overflowing)
            result.append(ids)

        if len(texts) == 1 and len(texts[0]) < _LONG:  # the batch call wakes a thread pool
            add(self._tokenizer.encode(well_formed(texts[0])))
            return result, cut
        part: list[str] = []
        size = 0

        def convert() -> None:
            for encoding in self._tokenizer.encode_batch_fast(part):
                add(encoding)
            part.clear()

        for text in map(well_formed, texts):
            around = self._around if len(text) >= _LONG and self._numbers is None else None
            if around or len(part) == _SLICE or size + len(text) > _SLICE_CHARACTERS:
                convert()
                size = 0
            if around:
                ids, is_cut = self._long_ids(text, around)
                result.append(ids)
                cut += is_cut
            else:
                part.append(text)
                size += len(text)
        convert()
        return result, cut

    def _long_ids(self, text: str, around: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, bool]:
        """The ids of a long text, cut here, between the special tokens `around` it; and whether it was cut."""
        if self._uncut is None:
            uncut = type(self._tokenizer).from_str(self._tokenizer.to_str())
            uncut.no_truncation()
            self._uncut = uncut
        front, back = around
        room = self.max_length - len(front) - len(back)
        size = room * _CHARACTERS_PER_TOKEN if self._words_are_apart() else len(text)
        while True:
            # Words in front of a space have the same tokens whatever follows.
            end = text.rfind(" ", 0, size) if size < len(text) else len(text)
            ids: list[int] = []
            if end > 0:
                ids = self._uncut.encode_batch_fast([text[:end]], add_special_tokens=False)[0].ids
            if len(ids) >= room or end == len(text):
                break
            size *= 4
        kept = ids[max(0, len(ids) - room) :] if self._cut_left else ids[:room]
        is_cut = len(ids) > room or bool(text[end:].strip())
        return np.concatenate([front, np.array(kept, dtype=np.int32), back]), is_cut

    def _renumbered(self, encoding: tokenizers.Encoding) -> tuple[np.ndarray, np.ndarray, int]:
        """The ids after the rule for numbers, the places of those that are kept, and how many there were."""
        ids, _ = self._numbers.apply(np.array(encoding.ids, dtype=np.int32))  # type: ignore[union-attr]
        places, extra = np.arange(len(ids)), max(0, len(ids) - self.max_length)
        front, back = (0, 0) if self._around is None else map(len, self._around)
        first = front if self._cut_left else len(ids) - back - extra
        return ids, np.delete(places, slice(first, first + extra)), len(ids)

    def _words_are_apart(self) -> bool:
        """Whether the tokens in front of a space are known without what is behind it: so in BERT's tokenizers."""
        from tokenizers import models, normalizers, pre_tokenizers

        t = self._tokenizer
        return (
            not self._cut_left
            and isinstance(t.model, models.WordPiece)
            and isinstance(t.normalizer, (normalizers.BertNormalizer, type(None)))
            and isinstance(t.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
            and not any(" " in token.content for token in t.get_added_tokens_decoder().values())
        )

    def pairs(self, first: Sequence[str], second: Sequence[str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The ids of each pair of texts and their token types, special tokens included.

        Args:
            first, second: as many texts each; of a pair that is too long the longer text is cut first.

        Returns:
            Two lists of int32 arrays, at most `max_length` long.
        """
        if self._numbers is not None:
            raise ValueError("pairs: got a tokenizer with original_numbers, wanted one without")
        ids: list[np.ndarray] = []
        types: list[np.ndarray] = []
        both = list(zip(map(well_formed, first), map(well_formed, second), strict=True))
        for start in range(0, len(both), _SLICE):
            for e in self._tokenizer.encode_batch(both[start : start + _SLICE]):
                ids.append(np.array(e.ids, dtype=np.int32))
                types.append(np.array(e.type_ids, dtype=np.int32))
        return ids, types

    def tokenize(self, texts: Sequence[str]) -> list[TokenizedText]:
        """The ids of each text with tokens, character offsets and words. Offsets count Python characters."""
        result: list[TokenizedText] = []
        for start in range(0, len(texts), _SLICE):
            part = [well_formed(text) for text in texts[start : start + _SLICE]]
            for text, e in zip(part, self._tokenizer.encode_batch(part), strict=True):
                result.append(self._tokenized(text, e))
        return result

    def _tokenized(self, text: str, e: tokenizers.Encoding) -> TokenizedText:
        ids, tokens = np.array(e.ids, dtype=np.int32), e.tokens
        found = TokenizedText(
            text=text,
            ids=ids,
            tokens=tokens,
            offsets=np.array(e.offsets, dtype=np.int64).reshape(-1, 2),
            words=np.array([-1 if w is None else w for w in e.word_ids], dtype=np.int64),
            special=np.array(e.special_tokens_mask, dtype=bool),
            cut=len(e) == self.max_length and bool(e.overflowing),
        )
        if self._numbers is None:
            return found
        numbered, kept, before = self._renumbered(e)
        sources = self._numbers.apply(ids)[1][kept]
        return TokenizedText(
            text=text,
            ids=numbered[kept],
            tokens=[self._tokenizer.id_to_token(one) or "" for one in numbered[kept].tolist()],
            offsets=self._numbers.offsets(ids, found.offsets)[kept],
            words=found.words[sources],
            special=found.special[sources],
            cut=len(kept) < before,
        )


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
    limit = folder_settings.read(directory).max_length
    if limit is None:
        path = directory / "tokenizer_config.json"
        limit = folder_settings.positive(path, read_optional_json(path), "model_max_length")
    limits = [value for value in (limit, max_positions) if value is not None]
    if not limits:
        raise ValueError(
            f"directory: {str(directory)!r} sets no length limit (max_seq_length in sentence_bert_config.json or "
            "model_max_length in tokenizer_config.json), and no position table was given"
        )
    return min(limits)


def load_tokenizer(directory: Path) -> tokenizers.Tokenizer:
    """The library's tokenizer from the first of these, without truncation or padding: `tokenizer.json`, `vocab.txt`,
    `spiece.model`, `vocab.json` with `merges.txt`.

    Raises:
        FileNotFoundError: none of them is there.
        ValueError: a file is corrupt, or asks for what is not supported.
    """
    import tokenizers
    from tokenizers import normalizers

    settings = read_optional_json(directory / "tokenizer_config.json")
    saved, vocabulary, pieces = (directory / name for name in ("tokenizer.json", "vocab.txt", "spiece.model"))
    if is_there(saved):
        content = read_text(saved)
        with xlnet_tokenizer.library_errors(saved):
            tokenizer = tokenizers.Tokenizer.from_str(content)
            xlnet_tokenizer.probe(tokenizer)
        _check_unknown(saved, tokenizer)
        own = xlnet_tokenizer.from_saved(saved, settings) if xlnet_tokenizer.is_xlnet(directory, settings) else None
        if own is None:
            kept = xlnet_tokenizer.with_accents(saved, settings)
            tokenizer = tokenizer if kept is None else tokenizers.Tokenizer.from_str(kept)
            _apply_settings(tokenizer, settings, directory / "tokenizer_config.json")
        else:
            tokenizer = own
    elif is_there(vocabulary):
        tokenizer = _from_vocabulary(vocabulary, settings)
    elif is_there(pieces):
        if not xlnet_tokenizer.is_xlnet(directory, settings):
            kind = read_optional_json(directory / "config.json").get("model_type")
            raise ValueError(f"{pieces}: is of model_type {kind!r}, wanted XLNet's, or a tokenizer.json beside it")
        tokenizer = xlnet_tokenizer.from_sentencepiece(pieces, settings)
    elif all(is_there(directory / name) for name in ("vocab.json", "merges.txt")):
        tokenizer = _from_byte_pairs(directory, settings)
    else:
        raise FileNotFoundError(
            f"directory: {str(directory)!r} holds neither tokenizer.json nor vocab.txt nor spiece.model, nor "
            "vocab.json with merges.txt"
        )
    if folder_settings.read(directory).lowercase:
        # A normaliser keeps character offsets right where str.lower() would not.
        steps = [normalizers.Lowercase()] + ([tokenizer.normalizer] if tokenizer.normalizer is not None else [])
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _side(path: Path, settings: dict[str, Any], key: str, default: str) -> str:
    side = setting(path, settings, key, str, default)
    if side not in ("left", "right"):
        raise ValueError(f"{path}: {key} is {side!r}; wanted 'left' or 'right'")
    return side


def _apply_settings(tokenizer: tokenizers.Tokenizer, settings: dict[str, Any], path: Path) -> None:
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
    for name, attribute in names:
        if name in settings and (settings[name] is not None or attribute == "strip_accents"):
            setattr(normalizer, attribute, setting(path, settings, name, bool))
    tokenizer.normalizer = normalizer


def _from_vocabulary(path: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """BERT's WordPiece from a file with one token a line (its id is the line, from 0)."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    file = path.parent / "tokenizer_config.json"
    if setting(file, settings, "do_basic_tokenize", bool) is False:
        raise ValueError(f"{file}: do_basic_tokenize is false, which is not supported")
    lines = read_text(path).split("\n")  # not splitlines: U+2028 and others may be tokens
    if lines[-1] == "":
        lines.pop()
    # As the library reads it, which transformers leaves it to; of equal lines the last counts.
    vocab = {line.rstrip(_BLANKS): index for index, line in enumerate(lines)}
    special = _special_tokens(_SPECIAL_TOKENS, path.parent, settings)
    for name in ("unk_token", "cls_token", "sep_token"):
        if special[name] not in vocab:
            raise ValueError(f"{path} has no line {special[name]!r}, the {name}")
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=special["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=setting(file, settings, "tokenize_chinese_chars", bool, True),
        strip_accents=setting(file, settings, "strip_accents", bool),
        lowercase=setting(file, settings, "do_lower_case", bool, True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    cls_token, sep_token = special["cls_token"], special["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls_token}:0 $A:0 {sep_token}:0",
        pair=f"{cls_token}:0 $A:0 {sep_token}:0 $B:1 {sep_token}:1",
        special_tokens=[(cls_token, vocab[cls_token]), (sep_token, vocab[sep_token])],
    )
    tokenizer.add_special_tokens([token for token in special.values() if token in vocab])
    _add_tokens(tokenizer, file, settings)
    return tokenizer


def _from_byte_pairs(directory: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """RoBERTa's pairs of bytes, from `vocab.json` and `merges.txt`."""
    import tokenizers
    from tokenizers import AddedToken, models, pre_tokenizers, processors

    file, vocabulary, merges = (directory / name for name in ("tokenizer_config.json", "vocab.json", "merges.txt"))
    vocab = read_json(vocabulary)
    try:
        _, pairs = models.BPE.read_file(str(vocabulary), str(merges))
        model = models.BPE(vocab, pairs)
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise ValueError(f"{vocabulary} and {merges} are not pairs of bytes that can be read: {error}") from None
    special = _special_tokens(_ROBERTA_TOKENS, directory, settings)
    for name in ("cls_token", "sep_token"):
        if special[name] not in vocab:
            raise ValueError(f"{vocabulary} has no entry {special[name]!r}, the {name}")
    prefix = setting(file, settings, "add_prefix_space", bool, False)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.post_processor = processors.RobertaProcessing(
        (special["sep_token"], vocab[special["sep_token"]]),
        (special["cls_token"], vocab[special["cls_token"]]),
        trim_offsets=setting(file, settings, "trim_offsets", bool, True),
        add_prefix_space=prefix,
    )
    # The mask takes the space before it, as a word would.
    known = [(name, token) for name, token in special.items() if token in vocab]
    tokenizer.add_special_tokens([AddedToken(token, lstrip=name == "mask_token") for name, token in known])
    _add_tokens(tokenizer, file, settings)
    return tokenizer


def _check_unknown(path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """The token of what is unknown is one of the model's: the library asks for it at the first such text.

    Raises:
        ValueError: it is not.
    """
    from tokenizers import models

    model = tokenizer.model
    if isinstance(model, models.Unigram):
        return
    unknown = model.unk_token
    if unknown is not None and model.token_to_id(unknown) is None:
        raise ValueError(f"{path}: model.unk_token is {unknown!r}, which model.vocab does not hold")


def _add_tokens(tokenizer: tokenizers.Tokenizer, file: Path, settings: dict[str, Any]) -> None:
    """Tokens beside the vocabulary, from tokenizer_config.json or, in older directories, from added_tokens.json.

    Raises:
        ValueError: an entry is no token, or would not have the id it is listed with.
    """
    from tokenizers import AddedToken

    listed: dict[int, AddedToken] = {}
    decoder = setting(file, settings, "added_tokens_decoder", dict)
    if decoder is None:
        older = file.with_name("added_tokens.json")
        for content, place in read_optional_json(older).items():
            if isinstance(place, bool) or not isinstance(place, int):
                raise ValueError(f"{older}: {content!r} is {place!r}; wanted its id, a whole number")
            listed[place] = AddedToken(content, normalized=True)
    else:
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        for place, token in decoder.items():
            if not place.isdecimal() or not isinstance(token, dict) or not isinstance(token.get("content"), str):
                raise ValueError(f"{file}: added_tokens_decoder has {place!r}: {token!r}; wanted an id and its token")
            options = {name: setting(file, token, name, bool) for name in flags}
            listed[int(place)] = AddedToken(token["content"], **{n: v for n, v in options.items() if v is not None})
    for place, token in sorted(listed.items(), key=lambda item: item[0]):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != place:
            raise ValueError(
                f"{file.parent}: the added token {token.content!r} is listed with id {place}, but comes to "
                f"{tokenizer.token_to_id(token.content)} behind the vocabulary"
            )


def _named(source: dict[str, Any], name: str, default: str) -> str:
    """A special token as a settings file has it: a string, or an object with its content."""
    value = source.get(name)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else default


def _special_tokens(defaults: dict[str, str], directory: Path, settings: dict[str, Any]) -> dict[str, str]:
    special = dict(defaults)
    for source in (read_optional_json(directory / "special_tokens_map.json"), settings):
        special = {name: _named(source, name, token) for name, token in special.items()}
    return special
