"""A tokenised corpus on disk, read through the page cache: any sentence of any document at once, in any process.

Files are read and tokenised once, a part at a time, so a corpus may be larger than memory. What is wrong with the text
is found then, before the first step.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyxlbert.files import file_digest, read_json, require_file, setting, whole_directory
from pyxlbert.training.pretraining.documents import check_files, check_layout, named, read_sentences
from pyxlbert.training.pretraining.vocabularies import Vocabulary

_VERSION = 1
_META, _TOKENS, _SENTENCES, _DOCUMENTS = "store.json", "tokens.bin", "sentences.bin", "documents.bin"
# The library keeps some 700 bytes of each token that it is making.
_CHARACTERS_AT_ONCE, _LONGEST = 1 << 20, 1 << 16


class TokenStore:
    """The tokens of a corpus, and where its sentences and documents begin.

    Attributes:
        tokens: uint16 or int32 ``[N]``, without special tokens but for the vocabulary's `end_id` behind each document.
        sentences: int64 ``[S + 1]``, where each sentence begins among the tokens, and N.
        documents: int64 ``[D + 1]``, where each document begins among the sentences, and S.
        key: names what the store was made of.
    """

    def __init__(self, directory: str | Path) -> None:
        """Opens a store.

        Raises:
            OSError: a file is missing.
            ValueError: a file is not what the store's description says.
        """
        self.directory = Path(directory)
        path = require_file(self.directory, _META)
        meta = read_json(path)
        if meta.get("version") != _VERSION:
            raise ValueError(f"{path}: version is {meta.get('version')!r}, wanted {_VERSION}")
        self.key: str = setting(path, meta, "key", str, "")
        dtype = np.dtype(setting(path, meta, "dtype", str, "int32"))
        self.tokens = self._map(_TOKENS, dtype, setting(path, meta, "tokens", int, 0))
        self.sentences = self._map(_SENTENCES, np.dtype(np.int64), setting(path, meta, "sentences", int, 0) + 1)
        self.documents = self._map(_DOCUMENTS, np.dtype(np.int64), setting(path, meta, "documents", int, 0) + 1)

    def _map(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        path = require_file(self.directory, name)
        size = path.stat().st_size
        if size != count * dtype.itemsize or not count:
            raise ValueError(f"{path} has {size} bytes, wanted {count * dtype.itemsize}")
        # A plain view of the mapping: a memmap's own slices cost ten times as much.
        return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(count,)))

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        # A worker process opens the files itself.
        return TokenStore, (self.directory,)

    @property
    def document_tokens(self) -> np.ndarray:
        """int64 ``[D + 1]``, where each document begins among the tokens, and N."""
        return self.sentences[self.documents]

    def unigram_entropy(self) -> float:
        """The entropy of the corpus's own frequencies of tokens, in nats: the least loss of a model without context."""
        counts = np.zeros(0, dtype=np.int64)
        for start in range(0, len(self.tokens), 1 << 24):
            part = np.bincount(self.tokens[start : start + (1 << 24)], minlength=len(counts))
            part[: len(counts)] += counts
            counts = part
        shares = counts[counts > 0] / len(self.tokens)
        return float(-(shares * np.log(shares)).sum())


def open_or_build(
    files: Sequence[str | Path],
    vocabulary: Vocabulary,
    folder: str | Path,
    *,
    layout: str = "sentences",
    say: Callable[[str], None] = lambda line: None,
) -> TokenStore:
    """The store of some files, which is made where it is not there yet.

    Args:
        files: text files in UTF-8.
        vocabulary: whose tokens they become.
        folder: in which stores lie, one for each text and vocabulary; made if need be.
        layout: see `pyxlbert.training.pretraining.documents.LAYOUTS`.
        say: takes a line for the person who waits.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a line is not UTF-8, or the files hold no text.
    """
    check_layout(layout)
    paths = check_files(files)
    key = _key(paths, vocabulary, layout)
    folder = Path(folder)
    path = folder / key[:16]
    if not path.is_dir():
        say(f"tokenises {named(paths)}")
        folder.mkdir(parents=True, exist_ok=True)
        with whole_directory(path) as temporary:
            meta = _build(paths, vocabulary, temporary, layout)
            text = json.dumps({"version": _VERSION, "key": key, **meta}, indent=2)
            (temporary / _META).write_text(text + "\n", encoding="utf-8")
    store = TokenStore(path)
    if store.key != key:
        raise ValueError(f"{path / _META}: key is {store.key!r}, wanted {key!r}")
    return store


def digest(files: Sequence[str | Path]) -> str:
    """Names the content of some files, in their order."""
    whole = hashlib.sha256()
    for path in files:
        whole.update(bytes.fromhex(file_digest(path)))
    return whole.hexdigest()


def _key(paths: Sequence[Path], vocabulary: Vocabulary, layout: str) -> str:
    """A digest of everything that decides the store's content."""
    said = f"{_VERSION} {layout} {vocabulary.end_id} {vocabulary.fingerprint} {digest(paths)}"
    return hashlib.sha256(said.encode()).hexdigest()


def _build(paths: Sequence[Path], vocabulary: Vocabulary, folder: Path, layout: str) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.int32)
    tokens = sentences = documents = 0
    with (
        (folder / _TOKENS).open("wb") as token_file,
        (folder / _SENTENCES).open("wb") as sentence_file,
        (folder / _DOCUMENTS).open("wb") as document_file,
    ):
        sentence_file.write(array("q", [0]).tobytes())
        document_file.write(array("q", [0]).tobytes())
        begin = 0  # the first sentence of the document
        for ids in _encoded(paths, vocabulary, layout):
            if ids is None and sentences == begin:
                continue  # no sentence of the document had a token
            if ids is None and vocabulary.end_id is not None:
                token_file.write(np.array([vocabulary.end_id], dtype=dtype).tobytes())
                tokens, sentences = tokens + 1, sentences + 1
                sentence_file.write(array("q", [tokens]).tobytes())
            if ids is None:
                documents, begin = documents + 1, sentences
                document_file.write(array("q", [sentences]).tobytes())
            elif ids:
                token_file.write(np.array(ids, dtype=dtype).tobytes())
                tokens, sentences = tokens + len(ids), sentences + 1
                sentence_file.write(array("q", [tokens]).tobytes())
    if not documents:
        holds = "hold" if len(paths) > 1 else "holds"
        raise ValueError(f"files: {', '.join(map(str, paths))} {holds} no text")
    return {"tokens": tokens, "sentences": sentences, "documents": documents, "dtype": dtype.name}


def _encoded(paths: Sequence[Path], vocabulary: Vocabulary, layout: str) -> Iterator[list[int] | None]:
    """The ids of each sentence, and None behind each document."""
    waiting: list[str | None] = []
    size = 0
    for path in paths:
        for sentence in read_sentences(path, layout):
            waiting.append(sentence)
            size += 0 if sentence is None else len(sentence)
            if size >= _CHARACTERS_AT_ONCE:
                yield from _ids(waiting, vocabulary)
                waiting, size = [], 0
    yield from _ids(waiting, vocabulary)


def _ids(waiting: Sequence[str | None], vocabulary: Vocabulary) -> Iterator[list[int] | None]:
    pieces = [[] if sentence is None else _cut(sentence) for sentence in waiting]
    flat = [piece for several in pieces for piece in several]
    found = iter(vocabulary.tokenizer.encode_batch_fast(flat, add_special_tokens=False))
    for sentence, several in zip(waiting, pieces, strict=True):
        ids = [index for _ in several for index in next(found).ids]
        yield None if sentence is None else ids


def _cut(sentence: str) -> list[str]:
    """A sentence in pieces of bounded length, between words where it has any."""
    pieces = []
    while len(sentence) > _LONGEST:
        end = sentence.rfind(" ", 1, _LONGEST)
        end = end if end > 0 else _LONGEST
        pieces.append(sentence[:end])
        sentence = sentence[end:]
    return [*pieces, sentence]
