"""From text files to tokens on disk: layouts, vocabularies, and what is refused with file and line."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import corpora
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from pyxlbert.testing import tolerances
from pyxlbert.text import TextTokenizer
from pyxlbert.training.pretraining import (
    SegmentOptions,
    TokenStore,
    Vocabulary,
    open_or_build,
    train_albert,
    train_unigram,
    train_wordpiece,
)
from pyxlbert.training.pretraining import store as store_module
from pyxlbert.training.pretraining.documents import check_files, named, read_sentences, split_sentences
from pyxlbert.training.pretraining.run import Pretraining


def test_many_files_are_named_in_few_words() -> None:
    assert named(["a.txt"]) == "a.txt" and named([f"{number}.txt" for number in range(60)]) == "0.txt and 59 more"


def test_layouts(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffOne. Two\r\nthree.\n \n\n\n Four.\n".encode())
    assert list(read_sentences(path, "sentences")) == ["One. Two", "three.", None, "Four.", None]
    assert list(read_sentences(path, "paragraphs")) == ["One.", "Two three.", None, "Four.", None]
    assert list(read_sentences(path, "files")) == ["One.", "Two three.", "Four.", None]
    path.write_bytes(b"\n \n\t\n")
    assert all(list(read_sentences(path, layout)) == [] for layout in ("sentences", "paragraphs", "files"))
    with pytest.raises(ValueError, match="layout: got 'lines', wanted one of sentences, paragraphs, files"):
        list(read_sentences(path, "lines"))


def test_sentences_of_raw_text() -> None:
    assert split_sentences(
        'He left. "Go on!" she said, e.g. with 5.3 m. (So he did.) 3 cats? The end . 你好。“再见！”好 '
    ) == [
        "He left.",
        '"Go on!" she said, e.g. with 5.3 m.',
        "(So he did.)",
        "3 cats?",
        "The end .",
        "你好。",
        "“再见！”",
        "好",
    ]


def test_raw_text_without_an_end_is_bounded(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("word " * 50_000 + "\n" + "More. " * 30_000, encoding="utf-8")
    found = [one for one in read_sentences(path, "files") if one]
    assert " ".join(found).split() == path.read_text().split()
    assert len(found) > 1000


def test_a_store_holds_every_sentence_in_its_place(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(store_module, "_CHARACTERS_AT_ONCE", 100)
    vocabulary = corpora.bert_vocabulary(tmp_path / "v")
    content = corpora.text()
    store = corpora.store(tmp_path, vocabulary, content)
    documents = [document.split("\n") for document in content.strip().split("\n\n")]
    assert len(store.documents) == len(documents) + 1
    for number, sentences in enumerate(documents):
        first, last = store.documents[number : number + 2]
        assert last - first == len(sentences)
        for place, sentence in zip(range(first, last), sentences, strict=True):
            ids = store.tokens[slice(*store.sentences[place : place + 2])]
            assert ids.tolist() == vocabulary.tokenizer.encode(sentence, add_special_tokens=False).ids
    assert store.document_tokens[-1] == len(store.tokens) and store.tokens.dtype == np.uint16


def test_albert_has_words_in_texts_without_spaces(tmp_path: Path) -> None:
    """Pieces that are no parts of English words are words, as the authors' code has it; to XLNet they are not."""
    special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]", "<cls>", "<sep>", "<mask>", "<s>", "</s>", "<eod>"]
    pieces = {
        "▁new": True,
        "er": False,
        "Er": False,
        "'s": False,
        ".": True,
        "19": True,
        "中": True,
        "中a": True,
        "é": True,
    }
    model = models.Unigram([(one, -1.0) for one in (*special, *pieces)], unk_id=1, byte_fallback=False)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(special)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    found = {kind: Vocabulary.read(tmp_path, kind).word_starts[len(special) :].tolist() for kind in ("albert", "xlnet")}
    assert found["albert"] == list(pieces.values())
    assert [one for one, start in zip(pieces, found["xlnet"], strict=True) if start] == ["▁new", "."]


def test_documents_of_xlnet_have_an_end(tmp_path) -> None:
    vocabulary = corpora.xlnet_vocabulary(tmp_path / "v")
    store = corpora.store(tmp_path, vocabulary, "w1 w2\nw3\n\n\nw4\n")
    pieces = [vocabulary.tokenizer.id_to_token(int(index)) for index in store.tokens]
    assert pieces == ["▁w1", "▁w2", "▁w3", "<eod>", "▁w4", "<eod>"]
    assert store.sentences.tolist() == [0, 2, 3, 4, 5, 6] and store.documents.tolist() == [0, 3, 5]


def test_a_store_is_made_once_and_follows_its_text(tmp_path) -> None:
    vocabulary = corpora.bert_vocabulary(tmp_path / "v")
    said: list[str] = []
    path = tmp_path / "corpus.txt"
    path.write_text("w1 w2\n")
    stores = [open_or_build([path], vocabulary, tmp_path / "stores", say=said.append) for _ in range(2)]
    assert len(said) == 1 and stores[0].key == stores[1].key
    path.write_text("w1 w3\n")
    other = open_or_build([path], vocabulary, tmp_path / "stores", say=said.append)
    assert len(said) == 2 and other.tokens.tolist() != stores[0].tokens.tolist()
    again = pickle.loads(pickle.dumps(other))
    assert again.tokens.tolist() == other.tokens.tolist() and len(pickle.dumps(other)) < 1000
    (other.directory / "tokens.bin").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"tokens.bin has 1 bytes, wanted 4"):
        TokenStore(other.directory)
    assert not [one for one in (tmp_path / "stores").iterdir() if one.name.startswith(".")]


def test_long_lines_lose_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(store_module, "_LONGEST", 50)
    vocabulary = corpora.bert_vocabulary(tmp_path / "v")
    line = " ".join(corpora.WORDS)
    store = corpora.store(tmp_path, vocabulary, line + "\n")
    assert len(store.sentences) == 2
    assert store.tokens.tolist() == vocabulary.tokenizer.encode(line, add_special_tokens=False).ids


def test_unigram_entropy(tmp_path) -> None:
    store = corpora.store(tmp_path, corpora.bert_vocabulary(tmp_path / "v"), "w1 w2 w1 w3\n")
    wanted = 0.5 * np.log(2) + 0.5 * np.log(4)
    assert store.unigram_entropy() == pytest.approx(wanted, rel=tolerances.FLOAT64)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"w1\nw2\n\xff\xfe\n", r"corpus.txt: line 3 is not UTF-8: invalid start byte at byte 0"),
        (b"", r"files: .*corpus.txt holds no text"),
        (b"\n \n\n", r"files: .*corpus.txt holds no text"),
        ("\u200b\n\n\u00ad".encode(), r"files: .*corpus.txt holds no text"),  # of which the tokenizer leaves nothing
    ],
)
def test_bad_text_is_refused_and_nothing_written(tmp_path, content: bytes, words: str) -> None:
    vocabulary = corpora.bert_vocabulary(tmp_path / "v")
    path = tmp_path / "corpus.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        open_or_build([path], vocabulary, tmp_path / "stores")
    assert not list((tmp_path / "stores").iterdir())
    if content != "\u200b\n\n\u00ad".encode():
        with pytest.raises(ValueError, match=words):
            train_wordpiece([path], tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_bad_files_are_refused(tmp_path) -> None:
    vocabulary = corpora.bert_vocabulary(tmp_path / "v")
    for files, error, words in (
        ([], ValueError, "files: got none"),
        ([tmp_path / "no.txt"], FileNotFoundError, "no.txt' does not exist"),
        ([tmp_path], IsADirectoryError, "is a directory, wanted a text file"),
        ([tmp_path / "v" / "vocab.txt"] * 2, ValueError, "twice"),
        ([""], ValueError, "files: got '', wanted a name"),
        (["a\0b"], ValueError, "files: got 'a\\\\x00b', which is no file's name"),
        ([3], TypeError, "files: got int, wanted a str or a Path"),
    ):
        with pytest.raises(error, match=words):
            open_or_build(files, vocabulary, tmp_path / "stores")
        with pytest.raises(error, match=words):
            train_unigram(files, tmp_path / "new")
    assert not (tmp_path / "stores").exists()


def test_a_corpus_of_many_files_is_looked_at_once(tmp_path, monkeypatch) -> None:
    """Each file for itself: among some thousands, every pair of them would take minutes."""
    files = [tmp_path / f"{number}.txt" for number in range(200)]
    for path in files:
        path.write_text("text", encoding="utf-8")
    asked, usual = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **how: (asked.append(path), usual(path, **how))[1])
    assert check_files(files) == files
    Pretraining(files=files[:100], evaluate=files[100:], data=SegmentOptions()).check()
    monkeypatch.undo()
    assert len(asked) < 3000
    (tmp_path / "link.txt").symlink_to(files[150])
    os.link(files[50], tmp_path / "hard.txt")
    for name in ("link.txt", "hard.txt"):
        with pytest.raises(ValueError, match=f"{name}' twice"):
            check_files([*files, tmp_path / name])
        with pytest.raises(ValueError, match=f"evaluate: got .*{name}', which is trained on"):
            Pretraining(files=files, evaluate=[tmp_path / name], data=SegmentOptions()).check()


@pytest.mark.parametrize(
    ("kind", "train"), [("bert", train_wordpiece), ("albert", train_albert), ("xlnet", train_unigram)]
)
def test_trained_vocabularies(kind: str, train, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "corpus.txt"
    sentence = "The quick brown foxes quickly jumped over lazy dogs; browner ones didn't."
    path.write_text(f"{sentence}\n" * 5 + "Dogs were quicker than a fox.\n\n", encoding="utf-8")
    directory = train([path], tmp_path / "new", vocab_size=120)
    vocabulary = Vocabulary.read(directory, kind)
    assert vocabulary.size <= 120
    ids = vocabulary.tokenizer.encode(sentence, add_special_tokens=False).ids
    theirs = transformers.AutoTokenizer.from_pretrained(str(directory))
    ours = TextTokenizer.from_directory(directory, 512)
    assert theirs(sentence)["input_ids"] == ours.ids([sentence])[0].tolist()
    special = (
        [*ids, vocabulary.sep_id, vocabulary.cls_id]
        if kind == "xlnet"
        else [vocabulary.cls_id, *ids, vocabulary.sep_id]
    )
    assert theirs(sentence)["input_ids"] == special
    assert theirs.mask_token_id == vocabulary.mask_id and theirs.pad_token_id == vocabulary.pad_id
    if kind == "albert":
        assert (vocabulary.pad_id, vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id) == (0, 2, 3, 4)
    if kind == "xlnet":
        assert (vocabulary.cls_id, vocabulary.sep_id, vocabulary.pad_id, vocabulary.end_id) == (3, 4, 5, 7)
    with pytest.raises(ValueError, match="vocab_size: got 20"):
        train([path], tmp_path / "small", vocab_size=20)
    with pytest.raises(ValueError, match="vocab_size: got 4, wanted a whole number from 16 to"):
        train([path], tmp_path / "small", vocab_size=4)
    assert not (tmp_path / "small").exists()


def test_a_vocabulary_without_a_special_token_is_refused(tmp_path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nw1\n")
    with pytest.raises(ValueError, match=r"has no '\[MASK\]', the mask_token of bert"):
        Vocabulary.read(tmp_path, "bert")
    with pytest.raises(ValueError, match="kind: got 'gpt', wanted one of bert, albert, xlnet"):
        Vocabulary.read(tmp_path, "gpt")


def test_an_albert_may_have_the_vocabulary_of_a_bert(tmp_path) -> None:
    bert = corpora.bert_vocabulary(tmp_path)
    albert = Vocabulary.read(tmp_path, "albert")
    assert (albert.pad_id, albert.mask_id, albert.size) == (bert.pad_id, bert.mask_id, bert.size)
