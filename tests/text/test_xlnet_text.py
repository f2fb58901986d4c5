"""XLNet's directories: tokens against `transformers`, vectors against its model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pyxlbert import evaluate
from pyxlbert.testing import tolerances
from pyxlbert.testing.directories import tiny_bert, tiny_xlnet, train_pieces
from pyxlbert.text import SentenceEncoder, TextTokenizer

pytest.importorskip("sentencepiece")
transformers = pytest.importorskip("transformers")

# Lewis Carroll, Alice's Adventures in Wonderland (1865), the beginning.
STORY = """
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or twice
she had peeped into the book her sister was reading, but it had no pictures or conversations in it, “and what is the
use of a book,” thought Alice “without pictures or conversations?”
So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and stupid),
whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when
suddenly a White Rabbit with pink eyes ran close by her.
There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear the Rabbit say
to itself, “Oh dear! Oh dear! I shall be late!” (when she thought it over afterwards, it occurred to her that she ought
to have wondered at this, but at the time it all seemed quite natural); but when the Rabbit actually took a watch out
of its waistcoat-pocket, and looked at it, and then hurried on, Alice started to her feet, for it flashed across her
mind that she had never before seen a rabbit with either a waistcoat-pocket, or a watch to take out of it, and burning
with curiosity, she ran across the field after it, and fortunately was just in time to see it pop down a large
rabbit-hole under the hedge.
In another moment down went Alice after it, never once considering how in the world she was to get out again.
""".strip().split("\n")
ODD = [
    "",
    "   ",
    "``Quoted'' and ``so on''",
    "Ünïcode àccents ﬁne ½ ²",
    "12,000 and 3.14, or 7,",
    "a <mask> here<cls>and <sep> there </s>",
    "tabs\tand\r\nlines\u00a0and\u200bmore  spaces  ",
    "x" * 300,
    "你好 😀 – £5 (five)",
    "\ud800 surrogate",
    "the Rabbit (late) in-between.Daisy<eop>daisy chain <eod> a <rabbit> here<rabbit>and<rabbit>  there",
]


@pytest.fixture(scope="module")
def pieces() -> bytes:
    return train_pieces(STORY, 180)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, pieces: bytes) -> Path:
    return tiny_xlnet(tmp_path_factory.mktemp("xlnet"), pieces)


def settings(directory: Path, **values: object) -> Path:
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    return directory


def both(directory: Path) -> tuple[transformers.XLNetTokenizer, TextTokenizer]:
    return transformers.XLNetTokenizer.from_pretrained(directory), TextTokenizer.from_directory(directory)


def expect_the_same(directory: Path) -> None:
    theirs, ours = both(directory)
    texts = [text.replace("\ud800", "\ufffd") for text in STORY + ODD]
    assert [ids.tolist() for ids in ours.ids(STORY + ODD)] == theirs(texts)["input_ids"]
    for text, one in zip(texts, ours.tokenize(STORY + ODD), strict=True):
        assert one.tokens == theirs(text).tokens()
        assert one.special.tolist() == [False] * (len(one.ids) - 2) + [True, True]


@pytest.mark.parametrize("values", [{}, {"do_lower_case": True}, {"keep_accents": False}], ids=str)
def test_tokens_of_a_sentencepiece_model(tmp_path: Path, pieces: bytes, values: dict) -> None:
    expect_the_same(settings(tiny_xlnet(tmp_path, pieces), **values))


def test_tokens_of_a_tokenizer_file(tmp_path: Path, directory: Path) -> None:
    theirs, _ = both(directory)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    assert (tmp_path / "tokenizer.json").is_file() and not (tmp_path / "spiece.model").is_file()
    expect_the_same(tmp_path)


# As transformers 4 writes it; the model's own pieces are the first nine.
OLDER = {
    "added_tokens_decoder": {
        str(place): {
            "content": token,
            "lstrip": token == "<mask>",
            "rstrip": False,
            "normalized": False,
            "single_word": False,
            "special": True,
        }
        for place, token in enumerate(("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"))
    },
    "additional_special_tokens": ["<eop>", "<eod>"],
    "mask_token": "<mask>",
    "keep_accents": False,
    "tokenizer_class": "XLNetTokenizer",
}
NEW = "<rabbit>"


def added(directory: Path, place: int, special: bool = False) -> dict[str, object]:
    """A token behind the vocabulary, as the settings list it."""
    flags = {"lstrip": False, "rstrip": True, "normalized": not special, "single_word": False, "special": special}
    return {**OLDER, "added_tokens_decoder": OLDER["added_tokens_decoder"] | {str(place): {"content": NEW, **flags}}}


def mapped(directory: Path) -> None:
    """As the first versions wrote it: no list with ids, the tokens in a file of their own."""
    (directory / "tokenizer_config.json").unlink(missing_ok=True)
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"mask_token": {"content": "<mask>", "lstrip": True}, "additional_special_tokens": ["daisy", NEW]})
    )


KINDS = {
    "bare": lambda directory, place: settings(directory),
    "older": lambda directory, place: settings(directory, **OLDER),
    "lower": lambda directory, place: settings(directory, do_lower_case=True),
    "older, lower": lambda directory, place: settings(directory, **OLDER, do_lower_case=True),
    "added": lambda directory, place: settings(directory, **added(directory, place)),
    "added special": lambda directory, place: settings(directory, **added(directory, place, True)),
    "extra": lambda directory, place: settings(directory, extra_special_tokens=["<eod>", NEW]),
    "named": lambda directory, place: settings(directory, extra_special_tokens={"rabbit_token": NEW}),
    "own name": lambda directory, place: settings(directory, rabbit_token=NEW),
    "file": lambda directory, place: (directory / "added_tokens.json").write_text(json.dumps({NEW: place})),
    "map": lambda directory, place: mapped(directory),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saved", [False, True], ids=["spiece.model", "tokenizer.json"])
def test_tokens_with_settings(kind: str, saved: bool, tmp_path: Path, directory: Path, pieces: bytes) -> None:
    if saved:
        both(directory)[0].save_pretrained(tmp_path)
        (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    else:
        tiny_xlnet(tmp_path, pieces)
    KINDS[kind](tmp_path, 180)
    expect_the_same(tmp_path)
    if kind not in ("bare", "older", "lower", "older, lower") and (kind, saved) != ("map", False):
        assert NEW in TextTokenizer.from_directory(tmp_path).tokenize([ODD[-1]])[0].tokens


@pytest.mark.parametrize(
    "values, key",
    [
        (added(Path(), 181), r"added_tokens_decoder.*<rabbit>.*181.*180"),
        ({"added_tokens_decoder": {"7": "<eod>", "a": "x"}}, r"added_tokens_decoder.*'a'"),
        ({"added_tokens_decoder": {"7": {"lstrip": True}}}, "added_tokens_decoder.*lstrip"),
        ({"added_tokens_decoder": {"7": {"content": "<eod>", "lstrip": 1}}}, "added_tokens_decoder.*lstrip.*1"),
        ({"added_tokens_decoder": ["<eod>"]}, "added_tokens_decoder"),
        ({"extra_special_tokens": "<eod>"}, "extra_special_tokens"),
        ({"additional_special_tokens": [3]}, "additional_special_tokens.*3"),
    ],
)
def test_a_setting_that_cannot_be_followed_is_named(values: dict, key: str, tmp_path: Path, pieces: bytes) -> None:
    directory = settings(tiny_xlnet(tmp_path, pieces), **values)
    with pytest.raises(ValueError, match=key):
        TextTokenizer.from_directory(directory)


def test_lower_case_is_refused_where_it_cannot_be_followed(tmp_path: Path, directory: Path) -> None:
    both(directory)[0].save_pretrained(tmp_path)
    settings(tmp_path, do_lower_case=True, tokenizer_class="PreTrainedTokenizerFast")
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    with pytest.raises(ValueError, match="do_lower_case"):
        TextTokenizer.from_directory(tmp_path)


def test_which_pieces_begin_a_word(directory: Path) -> None:
    tokenizer = TextTokenizer.from_directory(directory)
    starts = tokenizer.word_starts()
    assert starts.shape == (180,) and 0 < starts.sum() < 180
    for ids, one in zip(tokenizer.ids(STORY), tokenizer.tokenize(STORY), strict=True):
        expected = [token[0] in "▁<" or token in '.,()"-:;?!' for token in one.tokens]
        assert starts[ids].tolist() == expected


def test_special_pieces_that_the_model_lacks(tmp_path: Path) -> None:
    bare = train_pieces(STORY, 170, control_symbols=[], user_defined_symbols=["<mask>"])
    expect_the_same(tiny_xlnet(tmp_path, bare))


def test_pieces_are_sentencepieces_own_where_it_has_no_symbols_to_cut_out(tmp_path: Path) -> None:
    import sentencepiece

    plain = train_pieces(STORY, 170, user_defined_symbols=[])
    library = sentencepiece.SentencePieceProcessor(model_proto=plain)
    tokenizer = TextTokenizer.from_directory(tiny_xlnet(tmp_path, plain))
    for text, ids in zip(STORY, tokenizer.ids(STORY), strict=True):
        assert ids[:-2].tolist() == library.encode(text)


def test_padding_is_on_the_left(directory: Path) -> None:
    theirs, ours = both(directory)
    texts = [STORY[0], "Alice", "", STORY[3]]
    wanted, got = theirs(texts, padding=True), ours.padded(texts)
    np.testing.assert_array_equal(got.ids, wanted["input_ids"])
    np.testing.assert_array_equal(got.mask, wanted["attention_mask"])
    assert ours.padded([]).ids.shape == (0, 0)


def test_padding_side_may_be_set(tmp_path: Path, pieces: bytes) -> None:
    theirs, ours = both(settings(tiny_xlnet(tmp_path, pieces), padding_side="right"))
    texts = [STORY[0], "Alice"]
    np.testing.assert_array_equal(ours.padded(texts).ids, theirs(texts, padding=True)["input_ids"])


def test_length_is_limited_only_by_the_directory(tmp_path: Path, directory: Path, pieces: bytes) -> None:
    assert len(TextTokenizer.from_directory(directory).ids(["rabbit " * 3000])[0]) > 3000
    limited = TextTokenizer.from_directory(settings(tiny_xlnet(tmp_path, pieces), model_max_length=20))
    ids = limited.ids(["rabbit " * 3000])[0]
    assert len(ids) == 20 and ids[-2:].tolist() == [4, 3]


def test_words_and_offsets(directory: Path) -> None:
    text = "Alice ran  across the rabbit-hole"
    (result,) = TextTokenizer.from_directory(directory).tokenize([text])
    assert all(text[start:end] for start, end in result.offsets[:-2])
    words = SentenceEncoder.from_pretrained(directory).encode(text, token_vectors="word")
    assert words.tokens == ["Alice", "ran", "across", "the", "rabbit", "-", "hole"]


# Vectors


def states(directory: Path, texts: list[str], **options: object) -> list[np.ndarray]:
    """The last layer's rows of each text by `transformers`, one text at a time: nothing is padded."""
    tokenizer = transformers.XLNetTokenizer.from_pretrained(directory)
    model = transformers.XLNetModel.from_pretrained(directory).eval()
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt", **options))[0][0].numpy() for text in texts]


def close(got: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(got - expected).max() <= tolerances.MODEL_FLOAT32 * np.abs(expected).max()


def test_vectors_equal_transformers(directory: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(directory)
    texts = [*STORY[:5], "", "Alice"]
    wanted = states(directory, texts)
    close(encoder.encode(texts, batch_size=3), np.stack([rows.mean(0) for rows in wanted]))
    close(encoder.encode("Alice"), wanted[-1].mean(0))
    close(encoder.encode(texts, pooling="max", layers=-1), np.stack([rows.max(0) for rows in wanted]))
    tokens = encoder.encode("Alice ran", token_vectors=True)
    close(tokens.vectors, states(directory, ["Alice ran"])[0][:-2])
    assert encoder.size == 32


def test_the_classification_token_stands_last(directory: Path, tmp_path: Path, pieces: bytes) -> None:
    wanted = np.stack([rows[-1] for rows in states(directory, STORY[:3])])
    close(SentenceEncoder.from_pretrained(directory).encode(STORY[:3], pooling="cls"), wanted)
    tiny_xlnet(tmp_path, pieces)
    (tmp_path / "pooling").mkdir()
    (tmp_path / "pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    kinds = {"": "Transformer", "pooling": "Pooling"}
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    close(SentenceEncoder.from_pretrained(tmp_path).encode(STORY[:3]), wanted)


def test_a_model_trained_on_both_directions_reads_forwards(directory: Path, tmp_path: Path, pieces: bytes) -> None:
    both_ways = SentenceEncoder.from_pretrained(tiny_xlnet(tmp_path, pieces, bi_data=True))
    encoder = SentenceEncoder.from_pretrained(directory)
    for count in (1, 2, 3):
        np.testing.assert_array_equal(both_ways.encode(STORY[:count]), encoder.encode(STORY[:count]))


def test_token_types_are_given_where_the_directory_lists_them(tmp_path: Path, pieces: bytes) -> None:
    names = ["input_ids", "token_type_ids", "attention_mask"]
    directory = settings(tiny_xlnet(tmp_path, pieces), model_input_names=names)
    tokenizer = TextTokenizer.from_directory(directory)
    assert tokenizer.types(5).tolist() == [0, 0, 0, 0, 2]
    wanted = states(directory, STORY[:3], return_token_type_ids=True)
    close(SentenceEncoder.from_pretrained(directory).encode(STORY[:3]), np.stack([rows.mean(0) for rows in wanted]))


# The evaluation command


def test_the_command_counts_lines_that_differ(directory: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(STORY), encoding="utf-8")
    for model in (directory, directory / "spiece.model"):
        assert evaluate.main(["tokens", "--text", str(text), "--model", str(model)]) == 0
        assert "differ    0\n" in capsys.readouterr().out
    assert evaluate.main(["tokens", "--text", str(text), "--model", str(tmp_path)]) == 1
    assert evaluate.differing_lines([np.array([1, 2]), np.array([3])], [[1, 2], [3, 4]]) == [1]
    monkeypatch.setattr(TextTokenizer, "ids", lambda self, texts: [np.array([7])] * len(texts))
    assert evaluate.main(["tokens", "--text", str(text), "--model", str(directory)]) == 1
    assert f"differ    {len(STORY)}\n" in capsys.readouterr().out


# Bad files


def test_a_corrupt_model_is_named(tmp_path: Path, pieces: bytes) -> None:
    directory = tiny_xlnet(tmp_path, pieces)
    for content in (b"not a model", pieces[: len(pieces) // 2], b""):
        (directory / "spiece.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"spiece\.model"):
            TextTokenizer.from_directory(directory)
    (directory / "spiece.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"spiece\.model"):
        TextTokenizer.from_directory(directory)


def test_another_kind_of_model_is_refused(tmp_path: Path, pieces: bytes) -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(STORY), model_writer=model, vocab_size=120, model_type="bpe", minloglevel=2
    )
    directory = tiny_xlnet(tmp_path, pieces)
    (directory / "spiece.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match="unigram"):
        TextTokenizer.from_directory(directory)


def plain_pieces(pieces: bytes):
    """SentencePiece itself."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=pieces)


def without_symbols(lines: list[str]) -> bytes:
    """Pieces trained without the symbols that are cut out of a text before SentencePiece sees it."""
    return train_pieces(lines, 110, user_defined_symbols=[], hard_vocab_limit=False, character_coverage=1.0)


@pytest.mark.parametrize("saved", [False, True], ids=["spiece.model", "tokenizer.json"])
def test_accents_are_kept_where_the_directory_says_so(saved: bool, tmp_path: Path) -> None:
    """As SentencePiece alone keeps them; transformers 5 drops them whatever the directory says."""
    lines = ["ö é à ü ñ école élève été", "où ça naïve Ünïcode àccents"] * 8
    pieces = without_symbols(lines)
    directory = settings(tiny_xlnet(tmp_path / "a", pieces), keep_accents=True)
    if saved:
        both(directory)[0].save_pretrained(tmp_path / "b")
        (tmp_path / "b/config.json").write_bytes((directory / "config.json").read_bytes())
        directory = settings(tmp_path / "b", keep_accents=True)
    ours = TextTokenizer.from_directory(directory)
    for line in lines[:2]:
        assert ours.tokenize([line])[0].tokens[:-2] == plain_pieces(pieces).encode(line, out_type=str)
        assert ours.tokenize([line])[0].ids.tolist()[:-2] == plain_pieces(pieces).encode(line)
    settings(directory, keep_accents="yes")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: keep_accents is 'yes'; wanted true or false"):
        TextTokenizer.from_directory(directory)


def test_accents_of_an_albert_folder(tmp_path: Path) -> None:
    tokenizer = transformers.AlbertTokenizer(
        vocab=[("<unk>", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("<pad>", 0.0), ("▁", -3.0), ("ö", -3.0), ("o", -3.0)]
    )
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "albert"}')
    for keep, wanted in ((False, ["▁", "o"]), (True, ["▁", "ö"])):
        settings(tmp_path, keep_accents=keep, model_max_length=9)
        assert TextTokenizer.from_directory(tmp_path).tokenize(["ö"])[0].tokens[1:-1] == wanted, keep
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"spiece.model: is of model_type 'albert', wanted XLNet's"):
        TextTokenizer.from_directory(tmp_path)


def original_pieces(pieces: bytes, text: str) -> list[str]:
    """`encode_pieces` of Google's prepro_utils.py, line by line."""
    model = plain_pieces(pieces)
    result: list[str] = []
    for piece in model.encode(text, out_type=str):
        if len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit():
            current = model.encode(piece[:-1].replace("▁", ""), out_type=str)
            if piece[0] != "▁" and current[0][0] == "▁":
                if len(current[0]) == 1:
                    current = current[1:]
                else:
                    current[0] = current[0][1:]
            current.append(piece[-1])
            result.extend(current)
        else:
            result.append(piece)
    return result


def test_numbers_as_in_the_original_code(tmp_path: Path) -> None:
    lines = ["It cost 9,500 and 12,000 or 7, and 1,234,567 of 9, then 10,000,000, 500, 700", "in 1999, in 2000,"] * 9
    pieces = without_symbols(lines)
    directory = settings(tiny_xlnet(tmp_path, pieces))
    plain = TextTokenizer.from_directory(directory)
    ours = TextTokenizer.from_directory(directory, original_numbers=True)
    texts = [*lines[:2], "9,500", "no numbers", "", "x9, 9,, ,9", "1," * 9000]
    for text, one, ids in zip(texts, ours.tokenize(texts), ours.ids(texts), strict=True):
        wanted = original_pieces(pieces, text)
        model = plain_pieces(pieces)
        assert ids.tolist()[:-2] == [model.piece_to_id(piece) for piece in wanted]
        assert one.ids.tolist() == ids.tolist() and len(one.special) == len(ids) and not one.cut
        for token, (start, end) in zip(one.tokens[:-2], one.offsets.tolist(), strict=False):
            assert token in ("<unk>", "▁", "▁" + text[start:end].strip(), text[start:end])
    assert plain.ids(["9,500"])[0].tolist() != ours.ids(["9,500"])[0].tolist(), "the pieces have none of the kind"
    settings(directory, model_max_length=6)
    cut = TextTokenizer.from_directory(directory, original_numbers=True)
    whole = ours.ids([lines[0]])[0].tolist()
    (short,), count = cut.ids_and_cut([lines[0]])
    assert short.tolist() == [*whole[:4], *whole[-2:]] and count == 1 and cut.tokenize([lines[0]])[0].cut
    settings(directory, model_max_length=6, truncation_side="left")
    left = TextTokenizer.from_directory(directory, original_numbers=True)
    assert left.ids([lines[0]])[0].tolist() == whole[-6:]
    with pytest.raises(ValueError, match="pairs: got a tokenizer with original_numbers"):
        left.pairs(["a"], ["b"])


def test_numbers_of_another_kind_of_tokenizer(tmp_path: Path) -> None:
    tiny_bert(tmp_path)
    with pytest.raises(ValueError, match="original_numbers: got True with a model of kind WordPiece, wanted XLNet's"):
        SentenceEncoder.from_pretrained(tmp_path, original_numbers=True)
