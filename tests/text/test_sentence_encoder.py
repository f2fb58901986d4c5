"""The sentence encoder on a small random model, against `transformers` and against itself."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import pyxlbert
from pyxlbert.testing import tolerances
from pyxlbert.testing.directories import tiny_bert
from pyxlbert.text import SentenceEncoder

TEXTS = [
    "hello world",
    "",
    "unbelievable trains, the naïve world!",
    "你好 世界 😀",
    "the " * 200,
    "\ud800",
    "a",
    "x y z " * 9,
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def encoder(directory: Path) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(directory)


@pytest.fixture(scope="module")
def states(directory: Path) -> list[list[np.ndarray]]:
    """Each layer's rows of each text by `transformers`, one text at a time: nothing is padded."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.BertTokenizer.from_pretrained(directory)
    model = transformers.BertModel.from_pretrained(directory).eval()
    result = []
    for text in TEXTS:
        text = text.replace("\ud800", "\ufffd")
        inputs = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            result.append([h[0].numpy() for h in model(**inputs, output_hidden_states=True).hidden_states])
    return result


def close(got: np.ndarray, expected: np.ndarray) -> None:
    scale = np.abs(expected).max()
    assert np.abs(got - expected).max() <= tolerances.MODEL_FLOAT32 * scale


def modules(root: Path, normalize: bool = True, **pooling: bool) -> Path:
    tiny_bert(root)
    (root / "1_Pooling").mkdir()
    (root / "1_Pooling/config.json").write_text(json.dumps(pooling))
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    entries = [{"path": p, "type": f"sentence_transformers.models.{k}"} for k, p in zip(kinds, paths, strict=False)]
    (root / "modules.json").write_text(json.dumps(entries))
    return root


@pytest.mark.quick
def test_vectors_equal_transformers(encoder: SentenceEncoder, states: list[list[np.ndarray]]) -> None:
    vectors = encoder.encode(TEXTS, batch_size=3)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), 32)
    close(vectors, np.stack([s[-1].mean(0) for s in states]))


REDUCE = {None: lambda x: x.mean(0), "mean": lambda x: x.mean(0), "cls": lambda x: x[0], "max": lambda x: x.max(0)}
COMBINE = [
    (None, lambda s: s[-1]),
    (-1, lambda s: s[3]),
    (0, lambda s: s[0]),
    (-4, lambda s: s[0]),
    (-2, lambda s: s[2]),
    ([1, 2], lambda s: (s[1] + s[2]) / 2),
    (("mean", 0, -1), lambda s: (s[0] + s[3]) / 2),
    (("sum", -3, -2, -1), lambda s: s[1] + s[2] + s[3]),
    (np.int64(2), lambda s: s[2]),
]


@pytest.mark.parametrize("pooling", REDUCE)
@pytest.mark.parametrize("normalize", [None, False, True])
def test_layers_pooling_and_normalisation(
    encoder: SentenceEncoder, states: list[list[np.ndarray]], pooling: str | None, normalize: bool | None
) -> None:
    for layers, combine in COMBINE:
        vectors = encoder.encode(TEXTS, pooling=pooling, layers=layers, normalize=normalize)
        expected = np.stack([REDUCE[pooling](combine(s)) for s in states])
        if normalize:
            expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        close(vectors, expected)


@pytest.mark.quick
def test_one_text_is_one_row(encoder: SentenceEncoder) -> None:
    assert np.array_equal(encoder.encode("hello world"), encoder.encode(["hello world"])[0])
    assert encoder.encode("hello world").shape == (32,)


@pytest.mark.quick
def test_no_texts(encoder: SentenceEncoder) -> None:
    for none in ([], (), iter([])):
        result = encoder.encode(none)
        assert (result.shape, result.dtype) == ((0, 32), np.float32)
    assert encoder.encode([], token_vectors=True) == []


@pytest.mark.quick
def test_defined_results_of_odd_texts(encoder: SentenceEncoder) -> None:
    empty, space, lone, zero = encoder.encode(["", " \t\n", "\ud800", "\x00"])
    assert np.isfinite(empty).all()
    for other in (space, lone, zero):
        close(other, empty)  # nothing is left of them but the special tokens
    long, cut = encoder.encode(["the " * 500, "the " * 62])
    close(long, cut)


def test_order_and_batch_size_do_not_matter(encoder: SentenceEncoder) -> None:
    texts = [("the world " * (i % 7) + "train " * (i % 3)).strip() for i in range(20)]
    expected = np.stack([encoder.encode(text) for text in texts])
    for size in (1, 7, 1000):
        close(encoder.encode(texts, batch_size=size), expected)
    close(encoder.encode(texts[::-1]), expected[::-1])
    close(encoder.encode(np.array(texts)), expected)
    close(encoder.encode(text for text in texts), expected)


def test_the_directory_decides(tmp_path: Path, states: list[list[np.ndarray]]) -> None:
    root = modules(tmp_path, pooling_mode_cls_token=True, pooling_mode_max_tokens=True)
    (root / "sentence_bert_config.json").write_text('{"max_seq_length": 9, "do_lower_case": false}')
    encoder = SentenceEncoder.from_pretrained(root)
    assert encoder.tokenizer.max_length == 9
    assert encoder.size == 64
    short = [0, 1, 3, 5, 6]
    vectors = encoder.encode([TEXTS[i] for i in short])
    expected = np.stack([np.concatenate([s[-1][0], s[-1].max(0)]) for s in (states[i] for i in short)])
    close(encoder.encode([TEXTS[i] for i in short], normalize=False), expected)
    close(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True))
    # Another pooling keeps the directory's normalisation.
    mean = np.stack([states[i][-1].mean(0) for i in short])
    close(encoder.encode([TEXTS[i] for i in short], pooling="mean"), mean / np.linalg.norm(mean, axis=1, keepdims=True))


def test_dense_layers_follow_the_directorys_pooling(tmp_path: Path) -> None:
    root = modules(tmp_path, normalize=False, pooling_mode_mean_tokens=True)
    plain = SentenceEncoder.from_pretrained(root).encode(TEXTS)
    (root / "2_Dense").mkdir()
    weight = torch.randn(5, 32)
    save_file({"linear.weight": weight}, root / "2_Dense/model.safetensors")
    (root / "2_Dense/config.json").write_text('{"activation_function": "torch.nn.modules.linear.Identity"}')
    entries = json.loads((root / "modules.json").read_text())
    entries.append({"path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (root / "modules.json").write_text(json.dumps(entries))
    encoder = SentenceEncoder.from_pretrained(root)
    assert encoder.encode(TEXTS).shape == (len(TEXTS), 5)
    assert encoder.encode([]).shape == (0, 5)
    close(encoder.encode(TEXTS), plain @ weight.numpy().T)
    close(encoder.encode(TEXTS, pooling="mean"), plain)


@pytest.mark.quick
def test_token_vectors(encoder: SentenceEncoder, states: list[list[np.ndarray]]) -> None:
    results = encoder.encode(TEXTS, token_vectors=True, batch_size=3)
    for text, result, state in zip(TEXTS, results, states, strict=True):
        assert len(result.tokens) == len(result.offsets) == len(result.vectors) == len(state[-1]) - 2
        if len(result.tokens):
            close(result.vectors, state[-1][1:-1])
        for token, (start, end) in zip(result.tokens, result.offsets, strict=True):
            piece = token.removeprefix("##")
            assert piece == "[UNK]" or text[start:end].lower().replace("ï", "i") == piece
    tokens, offsets, vectors = encoder.encode("hello trains", token_vectors=True, layers=("sum", 0, 1), normalize=True)
    assert tokens == ["hello", "train", "##s"]
    assert offsets.tolist() == [[0, 5], [6, 11], [11, 12]]
    assert vectors.dtype == np.float32
    close(np.linalg.norm(vectors, axis=1), np.ones(3, dtype=np.float32))


@pytest.mark.quick
def test_word_vectors(encoder: SentenceEncoder) -> None:
    text = "Unbelievable trains, 你好!"
    pieces = encoder.encode(text, token_vectors=True)
    words = encoder.encode(text, token_vectors="word")
    assert words.tokens == ["Unbelievable", "trains", ",", "你", "好", "!"]
    assert words.offsets.tolist() == [[0, 12], [13, 19], [19, 20], [21, 22], [22, 23], [23, 24]]
    spans = [(0, 3), (3, 5), (5, 6), (6, 7), (7, 8), (8, 9)]
    close(words.vectors, np.stack([pieces.vectors[a:b].mean(0) for a, b in spans]))
    empty = encoder.encode(["", text], token_vectors="word")[0]
    assert (empty.tokens, empty.offsets.shape, empty.vectors.shape) == ([], (0, 2), (0, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(directory: Path, encoder: SentenceEncoder, dtype: torch.dtype) -> None:
    half = SentenceEncoder.from_pretrained(directory, dtype=dtype)
    got, expected = half.encode(TEXTS, normalize=True), encoder.encode(TEXTS, normalize=True)
    assert got.dtype == np.float32
    assert 1 - (got.astype(np.float64) * expected).sum(1).min() <= tolerances.COSINE[dtype]


def test_eight_threads_get_the_bits_of_one(encoder: SentenceEncoder) -> None:
    work = [[f"the {word} " * (i + 1) for i in range(12)] for word in "abcdefgh"]
    alone = [encoder.encode(texts, batch_size=5) for texts in work]
    alone_tokens = [encoder.encode(texts, token_vectors="word") for texts in work]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            together = list(pool.map(lambda texts: encoder.encode(texts, batch_size=5), work))
            tokens = list(pool.map(lambda texts: encoder.encode(texts, token_vectors="word"), work))
            assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
            for one, other in zip(alone_tokens, tokens, strict=True):
                assert all(np.array_equal(a.vectors, b.vectors) for a, b in zip(one, other, strict=True))


def test_the_model_is_left_alone(encoder: SentenceEncoder) -> None:
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    encoder.encode(TEXTS)
    assert not encoder.model.training
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in encoder.model.state_dict().items())


def test_progress_bar(encoder: SentenceEncoder, capsys: pytest.CaptureFixture[str]) -> None:
    encoder.encode(TEXTS, batch_size=2)
    assert capsys.readouterr().err == ""  # not a terminal
    encoder.encode(TEXTS, batch_size=2, show_progress=False)
    assert capsys.readouterr().err == ""
    encoder.encode(TEXTS, batch_size=2, show_progress=True)
    assert f"{len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"texts": None}, TypeError, "texts"),
        ({"texts": b"bytes"}, TypeError, "texts: got bytes"),
        ({"texts": {"a": 1}}, TypeError, "texts: got dict"),
        ({"texts": {"a"}}, TypeError, "texts: got set"),
        ({"texts": ["a", 3]}, TypeError, "item 1 is int"),
        ({"texts": ["a", None]}, TypeError, "item 1 is NoneType"),
        ({"texts": ["a", ["b"]]}, TypeError, "item 1 is list"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"batch_size": -1}, ValueError, "batch_size: got -1"),
        ({"batch_size": 2.0}, TypeError, "batch_size: got float"),
        ({"batch_size": True}, TypeError, "batch_size: got bool"),
        ({"pooling": "median"}, ValueError, "pooling: got 'median'"),
        ({"pooling": ["mean"]}, ValueError, "pooling"),
        ({"layers": 4}, ValueError, "layers: got 4; wanted layers from -4 to 3"),
        ({"layers": -5}, ValueError, "layers: got -5"),
        ({"layers": [0, 9]}, ValueError, "layers: got 9"),
        ({"layers": []}, ValueError, "names no layer"),
        ({"layers": ("sum",)}, ValueError, "names no layer"),
        ({"layers": "last"}, TypeError, "layers"),
        ({"layers": 1.5}, TypeError, "layers"),
        ({"layers": True}, TypeError, "layers"),
        ({"layers": [1, "sum"]}, TypeError, "layers"),
        ({"token_vectors": "char"}, ValueError, "token_vectors: got 'char'"),
        ({"token_vectors": True, "pooling": "mean"}, ValueError, "pooling"),
    ],
    ids=str,
)
def test_bad_arguments(encoder: SentenceEncoder, arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        encoder.encode(**{"texts": ["a"], **arguments})


@pytest.mark.quick
def test_bad_directories(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SentenceEncoder.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        SentenceEncoder.from_pretrained(tmp_path)
    tiny_bert(tmp_path)
    for dtype in (torch.float64, torch.int8, "float32"):
        with pytest.raises(TypeError, match="dtype"):
            SentenceEncoder.from_pretrained(tmp_path, dtype=dtype)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        SentenceEncoder.from_pretrained(tmp_path)


def test_public_name() -> None:
    assert pyxlbert.SentenceEncoder is SentenceEncoder


@pytest.mark.parametrize("field", [{"return_dict": False}, {"output_attentions": True}, {"output_hidden_states": True}])
def test_outputs_that_a_configuration_asks_for_change_nothing(
    tmp_path: Path, encoder: SentenceEncoder, field: dict
) -> None:
    root = tiny_bert(tmp_path)
    config = json.loads((root / "config.json").read_text()) | field
    (root / "config.json").write_text(json.dumps(config))
    other = SentenceEncoder.from_pretrained(root)
    for options in ({}, {"layers": (-1, -2)}):
        assert np.array_equal(other.encode(TEXTS, **options), encoder.encode(TEXTS, **options))


@pytest.mark.parametrize("name", ["normalize", "show_progress"])
@pytest.mark.parametrize("value", [1, "yes", np.True_])
def test_switches_are_true_false_or_none(encoder: SentenceEncoder, name: str, value: object) -> None:
    with pytest.raises(TypeError, match=name):
        encoder.encode("a", **{name: value})


def test_numpy_integers_and_arrays(encoder: SentenceEncoder) -> None:
    wanted = encoder.encode(TEXTS, batch_size=3, layers=[-2, -1])
    assert np.array_equal(encoder.encode(TEXTS, batch_size=np.int64(3), layers=np.array([-2, -1])), wanted)
    with pytest.raises(TypeError, match="layers"):
        encoder.encode("a", layers=np.array([[1]]))
    with pytest.raises(TypeError, match="layers"):
        encoder.encode("a", layers=np.array([0.5]))


def test_words_keep_the_accents_behind_them(encoder: SentenceEncoder) -> None:
    """The normaliser strips them, so that no token has them; the text's words do."""
    text = "cafe\u0301 nai\u0308ve\u0301\u0323"
    words = encoder.encode(text, token_vectors="word")
    assert words.tokens == ["cafe\u0301", "nai\u0308ve\u0301\u0323"]
    assert [text[a:b] for a, b in words.offsets] == words.tokens


def test_ids_past_the_vocabulary_of_the_model(tmp_path: Path) -> None:
    root = tiny_bert(tmp_path)
    size = json.loads((root / "config.json").read_text())["vocab_size"]
    lines = (root / "vocab.txt").read_text(encoding="utf-8")
    more = "".join(f"more{i}\n" for i in range(size + 1 - lines.count("\n")))
    (root / "vocab.txt").write_text(lines + more, encoding="utf-8")
    with pytest.raises(ValueError, match=f"ids up to {size}.*vocab_size {size}"):
        SentenceEncoder.from_pretrained(root)


@pytest.mark.parametrize(
    "pooling",
    [{"pooling_mode": {"a": 1}}, {"pooling_mode": [{}]}, {"pooling_mode": 3}, {"pooling_mode_odd": True}],
    ids=str,
)
def test_pooling_settings_of_a_wrong_type(tmp_path: Path, pooling: dict) -> None:
    root = modules(tmp_path, **pooling)
    with pytest.raises(ValueError, match=r"config\.json: pooling.mode"):
        SentenceEncoder.from_pretrained(root)


def test_prompts_of_a_wrong_type(tmp_path: Path) -> None:
    root = modules(tmp_path, pooling_mode_mean_tokens=True)
    (root / "config_sentence_transformers.json").write_text('{"default_prompt_name": "query", "prompts": ["query"]}')
    with pytest.raises(ValueError, match=r"config_sentence_transformers\.json: prompts"):
        SentenceEncoder.from_pretrained(root)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "int8"])
def test_a_vector_has_the_same_bits_in_any_company(directory: Path, dtype: torch.dtype | str) -> None:
    encoder = SentenceEncoder.from_pretrained(directory, dtype)
    alone = [encoder.encode(text) for text in TEXTS]
    for batch_size in (1, 2, 3, 8):
        for vector, other in zip(encoder.encode(TEXTS, batch_size=batch_size), alone, strict=True):
            assert np.array_equal(vector, other)
    # On another number of threads, in another order, after other calls.
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        turned = encoder.encode(TEXTS[::-1], batch_size=5)[::-1]
    finally:
        torch.set_num_threads(threads)
    assert all(np.array_equal(vector, other) for vector, other in zip(turned, alone, strict=True))


def test_eight_bit_integers(directory: Path, encoder: SentenceEncoder) -> None:
    found, wanted = (one.encode(TEXTS) for one in (SentenceEncoder.from_pretrained(directory, "int8"), encoder))
    cosine = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert 1 - cosine.min() < tolerances.COSINE_INT8
    assert np.abs(found - wanted).max() > tolerances.MODEL_FLOAT32 * np.abs(wanted).max(), "it is not in integers"
    with pytest.raises(TypeError, match=r"dtype: got 'int4', wanted .* or 'int8'"):
        SentenceEncoder.from_pretrained(directory, "int4")
