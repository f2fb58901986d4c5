"""Settings of a directory's tokenizer, against `transformers` where it has an opinion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from pyxlbert.testing.directories import VOCABULARY, tiny_bert
from pyxlbert.text import TextTokenizer, tokenizer
from pyxlbert.text.tokenizer import length_limit, load_tokenizer, well_formed

pytestmark = pytest.mark.quick

TEXTS = [
    "",
    " ",
    "Hello world!",
    "unbelievable trains, the naïve 你好 world",
    "a\u0301 e\u0301 ÀÉÎ",
    "emoji 😀 \u200b zero\u00a0width\ttab\r\nend",
    "[MASK] and [CLS] in a text",
    "x" * 150,
    "\ufffd\x00 replaced",
    "don't-stop...",
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny_bert(tmp_path)


def write(directory: Path, name: str, content: object) -> None:
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps(content), encoding="utf-8")


def ids_of(directory: Path, texts: list[str], positions: int = 512) -> list[list[int]]:
    return [ids.tolist() for ids in TextTokenizer.from_directory(directory, positions).ids(texts)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": False, "strip_accents": True},
        {"do_lower_case": True, "strip_accents": False},
        {"tokenize_chinese_chars": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("source", ["vocab.txt", "tokenizer.json"])
def test_ids_equal_transformers(directory: Path, settings: dict, source: str) -> None:
    transformers = pytest.importorskip("transformers")
    if source == "tokenizer.json":  # written with the library's defaults, which tokenizer_config.json overrules
        saved = load_tokenizer(directory)
        saved.enable_padding(length=40)
        saved.enable_truncation(5)
        saved.save(str(directory / "tokenizer.json"))
        (directory / "vocab.txt").unlink()
    write(directory, "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", **settings})
    reference = transformers.BertTokenizer.from_pretrained(directory)
    assert ids_of(directory, TEXTS) == reference(TEXTS)["input_ids"]


def test_one_text_and_many_texts_agree(directory: Path) -> None:
    tokenizer = TextTokenizer.from_directory(directory, 64)
    for text, ids in zip(TEXTS, tokenizer.ids(TEXTS), strict=True):
        assert tokenizer.ids([text])[0].tolist() == ids.tolist()
        assert tokenizer.tokenize([text])[0].ids.tolist() == ids.tolist()
    assert tokenizer.ids([]) == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_very_long_texts_take_another_way_to_the_same_ids(
    directory: Path, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are cut here, and few texts are with the library at once."""
    write(directory, "tokenizer_config.json", {"truncation_side": side})
    texts = [*TEXTS, "the world " * 60, "a" * 99 + " \ud800 b" * 30, "x y " * 31]
    wanted = ids_of(directory, texts, 64)
    assert max(map(len, wanted)) == 64
    for characters in (1, 30):
        monkeypatch.setattr(tokenizer, "_SLICE_CHARACTERS", characters)
        assert ids_of(directory, texts, 64) == wanted
    for long, characters in ((200, 8), (1, 1), (0, 2)):
        monkeypatch.setattr(tokenizer, "_LONG", long)
        monkeypatch.setattr(tokenizer, "_CHARACTERS_PER_TOKEN", characters)
        assert ids_of(directory, texts, 64) == wanted
        assert [ids_of(directory, [text], 64)[0] for text in texts] == wanted


def test_special_tokens_by_other_names(directory: Path) -> None:
    renamed = {"[CLS]": "<s>", "[SEP]": "</s>", "[UNK]": "<unk>"}
    lines = [renamed.get(token, token) for token in VOCABULARY]
    (directory / "vocab.txt").write_text("\n".join(lines), encoding="utf-8")  # no line end after the last
    write(directory, "special_tokens_map.json", {"cls_token": "<s>", "sep_token": {"content": "</s>"}})
    write(directory, "tokenizer_config.json", {"unk_token": "<unk>"})
    (result,) = TextTokenizer.from_directory(directory, 64).tokenize(["hello ☃"])
    assert result.tokens == ["<s>", "hello", "<unk>", "</s>"]
    assert result.special.tolist() == [True, False, False, True]


def test_offsets_count_characters_and_words_join_pieces(directory: Path) -> None:
    text = "Unbelievable 😀 naïve trains!"
    (result,) = TextTokenizer.from_directory(directory, 64).tokenize([text])
    pieces = [text[start:end] for start, end in result.offsets]
    assert pieces == ["", "Un", "believ", "able", "😀", "naïve", "train", "s", "!", ""]
    assert result.words.tolist() == [-1, 0, 0, 0, 1, 2, 3, 3, 4, -1]


def test_surrogates_become_replacement_characters() -> None:
    assert well_formed("a\ud800b\udfff") == "a\ufffdb\ufffd"
    assert well_formed("\ud83d\ude00") == "\ufffd\ufffd"  # two code points stay two: offsets hold
    assert well_formed("plain 😀") == "plain 😀"


def test_a_surrogate_is_read_as_the_replacement_character(directory: Path) -> None:
    assert ids_of(directory, ["a \udc80 b", "\ud800"]) == ids_of(directory, ["a \ufffd b", "\ufffd"])


def test_length_limit_order(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no length limit"):
        length_limit(tmp_path)
    assert length_limit(tmp_path, 512) == 512
    write(tmp_path, "tokenizer_config.json", {"model_max_length": int(1e30)})
    assert length_limit(tmp_path, 512) == 512
    write(tmp_path, "tokenizer_config.json", {"model_max_length": 100})
    assert length_limit(tmp_path, 512) == 100
    write(tmp_path, "sentence_bert_config.json", {"max_seq_length": None})
    assert length_limit(tmp_path, 512) == 100
    write(tmp_path, "sentence_bert_config.json", {"max_seq_length": 256})
    assert length_limit(tmp_path, 512) == 256
    assert length_limit(tmp_path, 64) == 64
    for bad in (0, -3, "128", True):
        write(tmp_path, "sentence_bert_config.json", {"max_seq_length": bad})
        with pytest.raises(ValueError, match="max_seq_length"):
            length_limit(tmp_path, 512)


def test_long_texts_are_cut_and_keep_their_special_tokens(directory: Path) -> None:
    (ids,) = ids_of(directory, ["hello " * 500], positions=64)
    names = [VOCABULARY[i] for i in ids]
    assert names == ["[CLS]", *["hello"] * 62, "[SEP]"]
    for limit in (0, 2):
        with pytest.raises(ValueError, match="max_length"):
            TextTokenizer.from_directory(directory, limit)


def test_sentence_transformers_may_ask_for_lower_case(directory: Path) -> None:
    write(directory, "tokenizer_config.json", {"do_lower_case": False})
    write(directory, "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": True})
    (result,) = TextTokenizer.from_directory(directory, 64).tokenize(["HELLO İx"])
    assert result.tokens[1] == "hello"
    assert result.offsets[1].tolist() == [0, 5]


def test_a_tokenizer_without_a_template_gives_no_special_tokens(directory: Path) -> None:
    saved = tokenizers.Tokenizer(tokenizers.models.WordPiece({t: i for i, t in enumerate(VOCABULARY)}))
    saved.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    saved.save(str(directory / "tokenizer.json"))
    assert ids_of(directory, ["", "the world"]) == [[], [VOCABULARY.index("the"), VOCABULARY.index("world")]]


def test_missing_and_corrupt_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TextTokenizer.from_directory(tmp_path / "nowhere", 64)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        TextTokenizer.from_directory(tmp_path / "file", 64)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json nor vocab\.txt"):
        TextTokenizer.from_directory(tmp_path, 64)
    tiny_bert(tmp_path)
    for content in (b"", b"{", b"{}", b"[1, 2]", b'{"model": 3}', b"\xff\xfe"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            TextTokenizer.from_directory(tmp_path, 64)
    for kind in (tokenizers.models.WordPiece, tokenizers.models.WordLevel):
        tokenizers.Tokenizer(kind({"the": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match=r"tokenizer\.json: model\.unk_token is '\[UNK\]', which model\.vocab"):
            TextTokenizer.from_directory(tmp_path, 64)
    (tmp_path / "tokenizer.json").unlink()
    for content in (b"{", b"[]", b"\xff"):
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
            TextTokenizer.from_directory(tmp_path, 64)
    write(tmp_path, "tokenizer_config.json", {"do_basic_tokenize": False})
    with pytest.raises(ValueError, match="do_basic_tokenize"):
        TextTokenizer.from_directory(tmp_path, 64)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "vocab.txt").write_bytes(b"[UNK]\n[CLS]\n\xff\n")
    with pytest.raises(ValueError, match=r"vocab\.txt is not UTF-8"):
        TextTokenizer.from_directory(tmp_path, 64)
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\nthe\n")
    with pytest.raises(ValueError, match=r"\[SEP\]"):
        TextTokenizer.from_directory(tmp_path, 64)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("source", ["vocab.txt", "tokenizer.json"])
def test_long_texts_are_cut_where_the_directory_says(directory: Path, side: str, source: str) -> None:
    transformers = pytest.importorskip("transformers")
    if source == "tokenizer.json":
        load_tokenizer(directory).save(str(directory / "tokenizer.json"))
    write(directory, "tokenizer_config.json", {"truncation_side": side, "model_max_length": 6})
    peer = transformers.BertTokenizerFast.from_pretrained(directory)
    texts = ["hello world the trains hello", "the", "a b c d e f g h"]
    assert ids_of(directory, texts) == peer(texts, truncation=True)["input_ids"]


@pytest.mark.parametrize("older", [False, True])
def test_tokens_beside_a_vocabulary_equal_transformers(directory: Path, older: bool) -> None:
    transformers = pytest.importorskip("transformers")
    size = len(VOCABULARY)
    if older:
        write(directory, "added_tokens.json", {"<second>": size + 1, "<First>": size})
    else:
        flags = {"single_word": False, "lstrip": False, "rstrip": False}
        decoder = {
            str(size): {"content": "<First>", "normalized": True, "special": False, **flags},
            str(size + 1): {"content": "<second>", "normalized": False, "special": True, **flags, "lstrip": True},
        }
        write(directory, "tokenizer_config.json", {"added_tokens_decoder": decoder})
    peer = transformers.BertTokenizerFast.from_pretrained(directory)
    texts = ["hello <First> world<second>the", "<FIRST>", "a  <second> b", "<first>"]
    ours = ids_of(directory, texts)
    assert ours == peer(texts)["input_ids"]
    assert any(size in ids for ids in ours) and any(size + 1 in ids for ids in ours)


def test_an_added_token_with_a_gap_before_it(directory: Path) -> None:
    write(directory, "added_tokens.json", {"<far>": len(VOCABULARY) + 5})
    with pytest.raises(ValueError, match=r"<far>.*listed with id"):
        TextTokenizer.from_directory(directory, 512)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"do_lower_case": "no"}),
        ("tokenizer_config.json", {"tokenize_chinese_chars": 1}),
        ("tokenizer_config.json", {"strip_accents": []}),
        ("tokenizer_config.json", {"do_basic_tokenize": "false"}),
        ("tokenizer_config.json", {"model_input_names": "input_ids"}),
        ("tokenizer_config.json", {"padding_side": 1}),
        ("tokenizer_config.json", {"truncation_side": "middle"}),
        ("tokenizer_config.json", {"model_max_length": True}),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<a>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"one": {"content": "<a>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"99": "<a>"}}),
        ("added_tokens.json", {"<a>": "99"}),
        ("sentence_bert_config.json", {"do_lower_case": "yes"}),
        ("sentence_bert_config.json", {"max_seq_length": "64"}),
    ],
    ids=str,
)
def test_settings_of_a_wrong_type(directory: Path, name: str, content: dict) -> None:
    write(directory, name, content)
    key = next(iter(content))
    with pytest.raises(ValueError, match=f"{name}.*{key}"):
        TextTokenizer.from_directory(directory, 512)


VOCABULARIES = [
    "[PAD]\n[UNK]\n[CLS]\n[SEP] \n[MASK]\nhello \n world\nthe\t\nx\u00a0\ny\u3000\n\nz\r\nw\x0b\nq\u2028\nv\x1c\n",
    "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\nhello \nthe",
]


@pytest.mark.parametrize("text", VOCABULARIES, ids=["blanks", "twice"])
def test_lines_that_end_in_blanks_are_read_as_transformers_reads_them(text: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text(text, encoding="utf-8", newline="")
    write(tmp_path, "config.json", {"model_type": "bert"})
    wanted = transformers.BertTokenizer.from_pretrained(tmp_path).get_vocab()
    assert load_tokenizer(tmp_path).get_vocab(with_added_tokens=False) == wanted
