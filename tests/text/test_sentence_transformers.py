"""What users of sentence-transformers know, against the library itself: prompts, cut and quantised vectors, pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pyxlbert import CrossEncoder, SentenceEncoder
from pyxlbert.testing import tolerances
from pyxlbert.testing.directories import tiny_bert
from pyxlbert.text import SentenceSettings, quantise, similarity, similarity_pairwise

TEXTS = ["hello world", "", "unbelievable trains, the world!", "你好 世界", "the " * 200, "a", "x y z " * 9]
PAIRS = [("hello", "world trains"), ("", "a b"), ("the world", ""), ("a " * 90, "hello"), ("hello", "a " * 90)]
PAIRS += [("a " * 50, "b " * 60), ("un train", "the trains")]
PROMPTS = {"query": "hello: ", "clustering": "the world "}


def close(got: Any, wanted: Any) -> None:
    got, wanted = np.asarray(got, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= tolerances.MODEL_FLOAT32 * max(1, np.abs(wanted).max())


def sentence_directory(
    root: Path, pooling: dict[str, Any] | None = None, normalize: bool = True, **settings: Any
) -> Path:
    tiny_bert(root)
    (root / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 64}')
    (root / "1_Pooling").mkdir()
    pooling = {"pooling_mode": "mean"} | (pooling or {})
    (root / "1_Pooling/config.json").write_text(json.dumps({"embedding_dimension": 32, **pooling}))
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    entries = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{k}"}
        for i, (p, k) in enumerate(kinds)
    ]
    (root / "modules.json").write_text(json.dumps(entries))
    (root / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return root


def cross_directory(root: Path, labels: int, **config: Any) -> Path:
    tiny_bert(
        root,
        architectures=["BertForSequenceClassification"],
        id2label={str(i): f"LABEL_{i}" for i in range(labels)},
        **config,
    )
    (root / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 64}')
    state = {f"bert.{name}": tensor for name, tensor in load_file(root / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(3)
    for name, size in (("bert.pooler.dense", 32), ("classifier", labels)):
        state[f"{name}.weight"] = torch.randn(size, 32, generator=generator) * 0.4
        state[f"{name}.bias"] = torch.randn(size, generator=generator)
    save_file(state, root / "model.safetensors", metadata={"format": "pt"})
    return root


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_directory(tmp_path_factory.mktemp("sentence") / "bert", prompts=PROMPTS)


@pytest.fixture(scope="module")
def encoder(directory: Path) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(directory)


@pytest.fixture(scope="module")
def peer(library: Any, directory: Path) -> Any:
    return library.SentenceTransformer(str(directory), device="cpu")


@pytest.mark.parametrize(
    "given",
    [{}, {"prompt_name": "query"}, {"prompt": "a b: "}, {"prompt": ""}, {"truncate_dim": 7}],
    ids=str,
)
@pytest.mark.parametrize("normalize", [None, True])
def test_prompts_and_length(encoder: SentenceEncoder, peer: Any, given: dict, normalize: bool | None) -> None:
    ours = encoder.encode(TEXTS, normalize=normalize, **given)
    close(ours, peer.encode(TEXTS, normalize_embeddings=bool(normalize), **given))


def test_queries_and_documents(encoder: SentenceEncoder, peer: Any) -> None:
    close(encoder.encode_query(TEXTS), peer.encode_query(TEXTS))
    close(encoder.encode_document(TEXTS), peer.encode_document(TEXTS))
    close(encoder.encode_query(TEXTS, prompt="a "), peer.encode_query(TEXTS, prompt="a "))
    assert encoder.prompts == peer.prompts


@pytest.mark.parametrize("mode", ["mean", "weightedmean", "cls", "max", "mean_sqrt_len_tokens", "lasttoken"])
def test_a_prompt_left_out_of_the_pooling(library: Any, tmp_path: Path, mode: str) -> None:
    """The default prompt, a length and a similarity from the directory, too."""
    root = sentence_directory(
        tmp_path / "m",
        {"pooling_mode": mode, "include_prompt": False},
        normalize=False,
        prompts=PROMPTS,
        default_prompt_name="clustering",
        truncate_dim=20,
        similarity_fn_name="manhattan",
    )
    ours, theirs = SentenceEncoder.from_pretrained(root), library.SentenceTransformer(str(root), device="cpu")
    texts = [text for text in TEXTS if text != "the " * 200]
    a, b = ours.encode(texts), theirs.encode(texts)
    close(a, b)
    assert ours.size == a.shape[1] == 20
    close(ours.similarity(a, a[:2]), theirs.similarity(b, b[:2]))
    close(ours.encode(texts, prompt=""), theirs.encode(texts, prompt=""))
    close(ours.encode_query(texts), theirs.encode_query(texts))
    close(ours.encode_document(texts), theirs.encode_document(texts))


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity(library: Any, name: str) -> None:
    functions = library.SimilarityFunction
    a, b = (np.random.default_rng(seed).standard_normal((5, 9), dtype=np.float32) for seed in (0, 1))
    close(similarity(a, b[:3], name), functions.to_similarity_fn(name)(a, b[:3]))
    close(similarity(a[0], b, name), functions.to_similarity_fn(name)(a[0], b))
    close(similarity_pairwise(a, b, name), functions.to_similarity_pairwise_fn(name)(a, b))
    with pytest.raises(ValueError, match="b: got shape"):
        similarity(a, b[:, :4], name)
    with pytest.raises(ValueError, match="b: got shape"):
        similarity_pairwise(a, b[:4], name)


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_quantised_vectors_are_the_librarys(library: Any, encoder: SentenceEncoder, precision: str) -> None:
    from sentence_transformers.util.quantization import quantize_embeddings

    rng = np.random.default_rng(4)
    vectors = rng.standard_normal((150, 33), dtype=np.float32)
    vectors[:, 5] = 0.5  # a column without a range
    vectors[3, 2] = -0.0
    ranges = np.stack([vectors.min(0) / 2, vectors.max(0) / 2])
    for given, theirs in (
        ({}, {}),
        ({"ranges": ranges}, {"ranges": ranges}),
        ({"calibration": vectors[:40]}, {"calibration_embeddings": vectors[:40]}),
    ):
        ours, wanted = quantise(vectors, precision, **given), quantize_embeddings(vectors, precision, **theirs)
        assert ours.dtype == wanted.dtype
        assert np.array_equal(ours, wanted)
    assert np.array_equal(quantise(vectors[0], precision, ranges), quantize_embeddings(vectors[0], precision, ranges))
    assert quantise(vectors[:0], precision).shape == quantize_embeddings(vectors[:0], precision).shape
    plain = encoder.encode(TEXTS)
    assert np.array_equal(encoder.encode(TEXTS, precision=precision), quantize_embeddings(plain, precision))
    if precision in ("int8", "uint8"):
        limits = np.stack([plain.min(0), plain.max(0)])
        one = encoder.encode(TEXTS[0], precision=precision, ranges=limits)
        assert np.array_equal(one, quantize_embeddings(plain, precision, limits)[0])
        with pytest.raises(ValueError, match="ranges"):
            encoder.encode(TEXTS[0], precision=precision)
        with pytest.raises(ValueError, match="not finite"):
            quantise(np.full((2, 2), np.nan, dtype=np.float32), precision)


def test_layers_side_by_side(encoder: SentenceEncoder) -> None:
    one, two = (encoder.encode(TEXTS, layers=layer, normalize=False) for layer in (-1, -2))
    joined = encoder.encode(TEXTS, layers=("concat", -1, -2), normalize=False)
    assert np.array_equal(joined, np.concatenate([one, two], axis=1))
    tokens = encoder.encode("hello world", layers=("concat", 0, -1), token_vectors=True)
    assert tokens.vectors.shape == (2, 64)
    maxima = encoder.encode(TEXTS, layers=("concat", -1, -2), pooling="max", truncate_dim=40)
    assert maxima.shape == (len(TEXTS), 40)
    assert np.array_equal(encoder.encode(TEXTS, layers=("concat", -1)), encoder.encode(TEXTS))
    with pytest.raises(ValueError, match="layers: got 9"):
        encoder.encode(TEXTS, layers=("concat", -1, 9))


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"prompt_name": "no"}, ValueError, "prompt_name: got 'no', wanted one of query, document, clustering"),
        ({"prompt": 3}, TypeError, "prompt: got int"),
        ({"prompt": "a", "prompt_name": "query"}, ValueError, "prompt_name: got 'query' with a prompt"),
        ({"truncate_dim": 0}, ValueError, "truncate_dim: got 0"),
        ({"truncate_dim": 33}, ValueError, "truncate_dim: got 33, wanted at most the 32"),
        ({"precision": "int4"}, ValueError, "precision: got 'int4'"),
        ({"ranges": np.zeros((2, 32))}, ValueError, "ranges: got some with precision 'float32'"),
        ({"precision": "int8", "ranges": np.zeros((2, 5))}, ValueError, r"ranges: got shape \(2, 5\)"),
        ({"precision": "int8", "token_vectors": True}, ValueError, "precision: got 'int8' with token_vectors"),
        ({"truncate_dim": 3, "token_vectors": True}, ValueError, "truncate_dim: got 3 with token_vectors"),
    ],
    ids=str,
)
def test_refusals(encoder: SentenceEncoder, given: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        encoder.encode(TEXTS, **given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"default_prompt_name": "no"}, "default_prompt_name: got 'no'"),
        ({"similarity_fn_name": "best"}, "similarity: got 'best'"),
        ({"truncate_dim": -1}, "truncate_dim: got -1"),
        ({"truncate_dim": "3"}, "truncate_dim is '3'"),
        ({"prompts": {"a": 3}}, "prompts: got 'a': 3"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing(tmp_path: Path, settings: dict, message: str) -> None:
    path = tmp_path / "config_sentence_transformers.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message) as error:
        SentenceSettings.from_directory(tmp_path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("labels", "config"),
    [
        (1, {}),
        (3, {}),
        (1, {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}),
        (1, {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"}),
    ],
    ids=str,
)
def test_pairs(library: Any, tmp_path: Path, labels: int, config: dict) -> None:
    root = cross_directory(tmp_path / "m", labels, **config)
    ours, theirs = CrossEncoder.from_pretrained(root), library.CrossEncoder(str(root), device="cpu")
    scores = ours.predict(PAIRS, batch_size=3)
    assert scores.dtype == np.float32
    close(scores, theirs.predict(PAIRS))
    close(ours.predict(PAIRS[0]), theirs.predict(PAIRS[0]))
    close(ours.predict(PAIRS, prompt="a: "), theirs.predict(PAIRS, prompt="a: "))
    close(ours.predict(PAIRS, activation="Identity"), theirs.predict(PAIRS, activation_fn=torch.nn.Identity()))
    if labels > 1:
        close(ours.predict(PAIRS, apply_softmax=True), theirs.predict(PAIRS, apply_softmax=True))
        with pytest.raises(ValueError, match="rank: the model has 3 labels"):
            ours.rank("hello", ["a"])
    else:
        documents = [second for _, second in PAIRS]
        a, b = (one.rank("hello", documents, top_k=4, return_documents=True) for one in (ours, theirs))
        assert [x["corpus_id"] for x in a] == [x["corpus_id"] for x in b]
        assert [x["text"] for x in a] == [x["text"] for x in b]
        close([x["score"] for x in a], [x["score"] for x in b])
    # As the library writes it now: modules.json, the activation among its own settings.
    theirs.save(str(tmp_path / "saved"))
    assert CrossEncoder.from_pretrained(tmp_path / "saved").activation == ours.activation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "int8"])
def test_a_score_has_the_same_bits_in_any_company(tmp_path: Path, dtype: torch.dtype | str) -> None:
    encoder = CrossEncoder.from_pretrained(cross_directory(tmp_path / "m", 1), dtype)
    alone = [encoder.predict(pair) for pair in PAIRS]
    for size in (1, 2, 7):
        assert np.array_equal(encoder.predict(PAIRS, batch_size=size), alone)
    assert encoder.predict([]).shape == (0,)


def test_what_is_no_cross_encoder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no cross-encoder: .*classifier\.weight"):
        CrossEncoder.from_pretrained(tiny_bert(tmp_path / "m"))
    root = cross_directory(tmp_path / "c", 1, sbert_ce_default_activation_function="my.module.Odd")
    with pytest.raises(ValueError, match=r"config\.json: the activation 'my\.module\.Odd'"):
        CrossEncoder.from_pretrained(root)
    with pytest.raises(ValueError, match="one module Transformer"):
        CrossEncoder.from_pretrained(sentence_directory(tmp_path / "s"))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [("ab", "pairs: got str"), (["a"], "item 0 is 'a'"), ([("a", "b"), ("a",)], "item 1"), ([("a", 3)], "item 0")],
    ids=str,
)
def test_what_is_no_pair(tmp_path: Path, pairs: Any, message: str) -> None:
    encoder = CrossEncoder.from_pretrained(cross_directory(tmp_path / "m", 1))
    with pytest.raises(TypeError, match=message):
        encoder.predict(pairs)


def test_processes_give_the_bits_of_one(directory: Path, encoder: SentenceEncoder, tmp_path: Path) -> None:
    texts = TEXTS * 3
    cross = CrossEncoder.from_pretrained(cross_directory(tmp_path / "m", 1), "int8")
    with encoder.start_multi_process_pool(["cpu", "cpu"]) as pool:
        for options in ({}, {"precision": "uint8"}, {"prompt_name": "query", "layers": ("concat", -1, -2)}):
            got = encoder.encode(texts, pool=pool, chunk_size=4, **options)
            assert np.array_equal(got, encoder.encode(texts, **options))
        alone = encoder.encode(texts, token_vectors="word")
        for got, wanted in zip(encoder.encode(texts, pool=pool, token_vectors="word"), alone, strict=True):
            assert np.array_equal(got.vectors, wanted.vectors)
        with pytest.raises(ValueError, match="chunk_size: got 0"):
            encoder.encode(texts, pool=pool, chunk_size=0)
    pool = cross.start_multi_process_pool(["cpu"])
    try:
        assert np.array_equal(cross.predict(PAIRS, pool=pool, chunk_size=2), cross.predict(PAIRS))
    finally:
        cross.stop_multi_process_pool(pool)


@pytest.mark.parametrize(
    ("devices", "kind"), [([], ValueError), ("cpu", TypeError), (["abacus"], ValueError), ([3], TypeError)]
)
def test_devices_that_are_none(encoder: SentenceEncoder, devices: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="target_devices"):
        encoder.start_multi_process_pool(devices)
