"""Tokenizers for pretraining: trained from text by the `tokenizers` library, saved as directories, read from them."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyxlbert.files import model_directory, read_optional_json, whole_file
from pyxlbert.text.tokenizer import UNLIMITED, TextTokenizer, load_tokenizer
from pyxlbert.text.xlnet_tokenizer import SPECIAL_TOKENS as XLNET_TOKENS
from pyxlbert.training.pretraining.documents import check_files, check_layout, read_sentences
from pyxlbert.training.pretraining.rules import MOST_PIECES

if TYPE_CHECKING:  # the library is loaded when a tokenizer is
    import tokenizers

BERT_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
# The order of XLNet's own vocabulary, in which <cls> is 3, <sep> 4 and <pad> 5.
_UNIGRAM_ORDER = ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>")
END_OF_DOCUMENT = "<eod>"
# In the order of ALBERT's own vocabulary.
ALBERT_TOKENS = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
TOKENS = {"bert": BERT_TOKENS, "albert": ALBERT_TOKENS, "xlnet": XLNET_TOKENS}
# A piece of a word that others can be parts of; everything else is a word to ALBERT's masks.
_ENGLISH = re.compile(f"[A-Za-z{re.escape(string.punctuation)}]*")
# What a tokenizer is read from, in a directory.
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    "spiece.model",
)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer and what pretraining asks of it.

    Attributes:
        directory: where it was read.
        kind: "bert", "albert" or "xlnet".
        tokenizer: the library's, without truncation and padding.
        size: one more than the largest id.
        cls_id, sep_id, pad_id, mask_id: of the special tokens.
        end_id: of what follows each document, for XLNet; None if the tokenizer has none.
        word_starts: bool ``[V]``, True for tokens that begin a word; ALBERT's pieces with anything but English letters
            and punctuation marks are words too, as in its authors' code, so that a text without spaces has words.
        fingerprint: of everything that decides the ids of a text.
    """

    directory: Path
    kind: str
    tokenizer: tokenizers.Tokenizer
    size: int
    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    end_id: int | None
    word_starts: np.ndarray
    fingerprint: str

    @classmethod
    def read(cls, directory: str | Path, kind: str) -> Vocabulary:
        """The vocabulary of a directory.

        Args:
            directory: with `tokenizer.json`, `vocab.txt` or `spiece.model`.
            kind: "bert", "albert" or "xlnet".

        Raises:
            OSError: a file is missing.
            ValueError: a file is corrupt, a special token is missing, or the pieces are of another kind.
        """
        from tokenizers import models

        if kind not in TRAINERS:
            raise ValueError(f"kind: got {kind!r}, wanted one of {', '.join(TRAINERS)}")
        path = model_directory(directory)
        tokenizer = load_tokenizer(path)
        settings = {**read_optional_json(path / "special_tokens_map.json")}
        settings |= read_optional_json(path / "tokenizer_config.json")
        ids: dict[str, int] = {}
        for name, usual in TOKENS[kind].items():
            # Some ALBERTs have BERT's vocabulary.
            known = tokenizer.token_to_id(usual) is not None or kind != "albert"
            token = settings.get(name) or (usual if known else BERT_TOKENS[name])
            token = token["content"] if isinstance(token, dict) else token
            found = tokenizer.token_to_id(token)
            if found is None and name[:-6] in ("cls", "sep", "pad", "mask"):
                raise ValueError(f"tokenizer: {str(path)!r} has no {token!r}, the {name} of {kind}")
            ids[name] = found
        starts = TextTokenizer(load_tokenizer(path), UNLIMITED, special_types=True).word_starts()
        if kind == "albert" and isinstance(tokenizer.model, models.Unigram):
            pieces = (tokenizer.id_to_token(index) or "" for index in range(len(starts)))
            starts |= np.array([not _ENGLISH.fullmatch(piece) for piece in pieces], dtype=bool)
        return cls(
            directory=path,
            kind=kind,
            tokenizer=tokenizer,
            size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
            cls_id=ids["cls_token"],
            sep_id=ids["sep_token"],
            pad_id=ids["pad_token"],
            mask_id=ids["mask_token"],
            end_id=tokenizer.token_to_id(END_OF_DOCUMENT) if kind == "xlnet" else None,
            word_starts=starts,
            fingerprint=hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        )


def train_wordpiece(
    files: Sequence[str | Path],
    directory: str | Path,
    *,
    vocab_size: int = 30522,
    lowercase: bool = True,
    layout: str = "sentences",
) -> Path:
    """Trains BERT's WordPiece and writes its directory: `tokenizer.json`, `tokenizer_config.json` and `vocab.txt`.

    Args:
        files: text files in UTF-8.
        directory: made if need be.
        vocab_size: pieces at most, special tokens among them.
        lowercase: whether capitals and accents count for nothing.
        layout: see `pyxlbert.training.pretraining.documents.LAYOUTS`.

    Returns:
        The directory.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a line is not UTF-8, the files hold no text, or `vocab_size` is too small for the letters.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    _check_size(vocab_size)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(BERT_TOKENS.values()), show_progress=False
    )
    _train(tokenizer, trainer, files, layout, vocab_size)
    cls_id, sep_id = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep_id), ("[CLS]", cls_id))
    settings = {"do_lower_case": lowercase, "tokenizer_class": "BertTokenizer", **BERT_TOKENS}
    path = _write(tokenizer, Path(directory), settings)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    with whole_file(path / "vocab.txt") as temporary:
        temporary.write_text("".join(f"{piece}\n" for piece, _ in pieces), encoding="utf-8")
    return path


def train_unigram(
    files: Sequence[str | Path],
    directory: str | Path,
    *,
    vocab_size: int = 32000,
    lowercase: bool = False,
    layout: str = "sentences",
) -> Path:
    """Trains XLNet's Unigram pieces and writes their directory: `tokenizer.json` and `tokenizer_config.json`.

    Arguments, result and errors are those of `train_wordpiece`.
    """
    settings = {"tokenizer_class": "XLNetTokenizer", **XLNET_TOKENS}
    settings |= {"padding_side": "left", "extra_special_tokens": ["<eop>", "<eod>"]}
    rows = ("$A:0 <sep>:0 <cls>:2", "$A:0 <sep>:0 $B:1 <sep>:1 <cls>:2")
    words = _Pieces(_UNIGRAM_ORDER, *rows, settings)
    return _train_pieces(words, files, directory, vocab_size, lowercase, layout)


def train_albert(
    files: Sequence[str | Path],
    directory: str | Path,
    *,
    vocab_size: int = 30000,
    lowercase: bool = True,
    layout: str = "sentences",
) -> Path:
    """Trains ALBERT's Unigram pieces and writes their directory: `tokenizer.json` and `tokenizer_config.json`.

    Arguments, result and errors are those of `train_wordpiece`.
    """
    settings = {"tokenizer_class": "AlbertTokenizer", **ALBERT_TOKENS}
    rows = ("[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1")
    words = _Pieces(tuple(ALBERT_TOKENS.values()), *rows, settings)
    return _train_pieces(words, files, directory, vocab_size, lowercase, layout)


class _Pieces(NamedTuple):
    """Special tokens in the order of their ids, where they stand in a row and in a pair, what the settings say."""

    order: tuple[str, ...]
    single: str
    pair: str
    settings: dict[str, Any]


def _train_pieces(
    words: _Pieces,
    files: Sequence[str | Path],
    directory: str | Path,
    vocab_size: int,
    lowercase: bool,
    layout: str,
) -> Path:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    _check_size(vocab_size)
    tokenizer = Tokenizer(models.Unigram())
    steps: list[Any] = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    steps += [normalizers.NFKD(), normalizers.StripAccents()]
    tokenizer.normalizer = normalizers.Sequence(steps + ([normalizers.Lowercase()] if lowercase else []))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=list(words.order), unk_token="<unk>", show_progress=False
    )
    _train(tokenizer, trainer, files, layout, vocab_size)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=words.single,
        pair=words.pair,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in words.order if token in words.pair],
    )
    return _write(tokenizer, Path(directory), {"do_lower_case": lowercase, **words.settings})


TRAINERS = {"bert": train_wordpiece, "albert": train_albert, "xlnet": train_unigram}


def _check_size(vocab_size: int) -> None:
    """Before a trainer takes memory for so many pieces."""
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 16 <= vocab_size <= MOST_PIECES:
        raise ValueError(f"vocab_size: got {vocab_size!r}, wanted a whole number from 16 to {MOST_PIECES}")


def _train(
    tokenizer: tokenizers.Tokenizer, trainer: Any, files: Sequence[str | Path], layout: str, vocab_size: int
) -> None:
    check_layout(layout)
    paths, found = check_files(files), False

    def sentences() -> Iterator[str]:
        nonlocal found
        for path in paths:
            for sentence in read_sentences(path, layout):
                if sentence is not None:
                    found = True
                    yield sentence

    # The library hides which error its iterator has raised, so that what can be wrong with the files is found first.
    for _ in sentences():
        pass
    if not found:
        holds = "hold" if len(paths) > 1 else "holds"
        raise ValueError(f"files: {', '.join(map(str, paths))} {holds} no text")
    try:
        tokenizer.train_from_iterator(sentences(), trainer)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"vocab_size: got {vocab_size}; the tokenizer cannot be trained: {error}") from None
    got = tokenizer.get_vocab_size()
    if got > vocab_size:
        raise ValueError(f"vocab_size: got {vocab_size}, wanted at least {got}: so many letters the text has")


def _write(tokenizer: tokenizers.Tokenizer, path: Path, settings: dict[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    texts = {"tokenizer.json": tokenizer.to_str(pretty=True), "tokenizer_config.json": json.dumps(settings, indent=2)}
    for name, text in texts.items():
        with whole_file(path / name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    return path
