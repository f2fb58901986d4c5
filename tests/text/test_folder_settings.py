"""Every key of a sentence-transformers folder is followed as the library does, or refused with its name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyxlbert import CrossEncoder, SentenceEncoder
from pyxlbert.testing import tolerances
from pyxlbert.testing.directories import tiny_bert

TEXTS = ["hello world", "the " * 40, "a b c d e f g h i j k l m n o p q r s t u v w x y z", "un train"]
FILE = "sentence_bert_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """As the library itself writes it."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models

    root = tmp_path_factory.mktemp("folder")
    tiny_bert(root / "bert")
    (root / "bert/tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 32}')
    parts = [models.Transformer(str(root / "bert")), models.Pooling(32), models.Dense(32, 8), models.Normalize()]
    library.SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(root / "saved"))
    return root / "saved"


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "folder")


def change(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | changes))


LIMITS: dict[str, tuple[str, dict[str, Any]]] = {
    "as saved": (FILE, {}),
    "of a call": (FILE, {"processing_kwargs": {"text": {"max_length": 12}}}),
    "of a call, past the tokenizer's": (FILE, {"processing_kwargs": {"text": {"max_length": 50, "padding": True}}}),
    "of a call, with the module's": (FILE, {"max_seq_length": 20, "processing_kwargs": {"text": {"max_length": 9}}}),
    "the module's": (FILE, {"max_seq_length": 20}),
    "the tokenizer's, given": (FILE, {"max_seq_length": 20, "processor_kwargs": {"model_max_length": 11}}),
    "the tokenizer's, by its old name": (FILE, {"tokenizer_args": {"model_max_length": 10}}),
    "in an older file": ("sentence_roberta_config.json", {"max_seq_length": 15, "do_lower_case": True}),
    "of other kinds": (FILE, {"processing_kwargs": {"image": {"size": 3}, "common": {"padding": "longest"}}}),
}


@pytest.mark.parametrize("kind", LIMITS)
def test_the_limit_is_the_librarys(kind: str, folder: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    name, changes = LIMITS[kind]
    if name != FILE:
        (folder / FILE).unlink()
    change(folder / name, **changes)
    ours = SentenceEncoder.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = ours.encode(TEXTS)
    wanted = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    assert np.abs(got - wanted).max() <= tolerances.MODEL_FLOAT32


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (FILE, {"query_length": 8}, "query_length is 8"),
    (FILE, {"document_length": 8}, "document_length is 8"),
    (FILE, {"query_expansion": {"length": 8}}, "query_expansion is "),
    (FILE, {"transformer_task": "fill-mask"}, "transformer_task is 'fill-mask'"),
    (FILE, {"module_output_name": "sentence_embedding"}, "module_output_name is 'sentence_embedding'"),
    (FILE, {"modality_config": {"image": {"method": "forward"}}}, "modality_config.text is None"),
    (FILE, {"modality_config": {"text": {"method": "get_text_features"}}}, "modality_config.text is "),
    (FILE, {"tokenizer_name_or_path": "other"}, "tokenizer_name_or_path is 'other'"),
    (FILE, {"processing_kwargs": {"text": {"add_special_tokens": False}}}, "text.add_special_tokens is False"),
    (FILE, {"processing_kwargs": {"text": {"truncation": False}}}, "text.truncation is False"),
    (FILE, {"processing_kwargs": {"text": {"max_length": 0}}}, "processing_kwargs.text.max_length is 0"),
    (FILE, {"processing_kwargs": {"chat_template": {"x": 1}}}, "processing_kwargs.chat_template is "),
    (FILE, {"processing_kwargs": []}, "processing_kwargs is []; wanted an object"),
    (FILE, {"processor_kwargs": {"do_lower_case": False}}, "processor_kwargs.do_lower_case is False"),
    (FILE, {"config_kwargs": {"num_hidden_layers": 1}}, "config_kwargs.num_hidden_layers is 1"),
    (FILE, {"model_args": {"subfolder": "x"}}, "model_args.subfolder is 'x'"),
    (FILE, {"max_sequence_length": 8}, "max_sequence_length is 8, a key that is not supported"),
    (FILE, {"max_seq_length": float("inf")}, "max_seq_length is inf; wanted a positive number"),
    (FILE, {"max_seq_length": float("nan")}, "max_seq_length is nan; wanted a positive number"),
    ("1_Pooling/config.json", {"embedding_dimension": 16}, "pooling takes 16 numbers a token, the model 32"),
    ("1_Pooling/config.json", {"pooling_mode": ["mean", "max"]}, "Dense layer 1 takes 32 numbers, wanted 64"),
    ("1_Pooling/config.json", {"window": 3}, "window is 3, a key that is not supported"),
    ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name is 'token_embeddings'"),
    ("2_Dense/config.json", {"use_residual": True}, "use_residual is True"),
    ("2_Dense/config.json", {"bias": False}, "bias is False, but the weights have a linear.bias"),
    ("2_Dense/config.json", {"in_features": "32"}, "in_features is '32'; wanted a whole number"),
    ("3_Normalize/config.json", {"module_input_name": "token_embeddings"}, "module_input_name is 'token_embeddings'"),
    ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type is 'SparseEncoder'"),
    ("config_sentence_transformers.json", {"truncate_dim": 0}, "truncate_dim: got 0"),
]


@pytest.mark.parametrize(("file", "changes", "words"), REFUSED, ids=lambda one: str(one)[:40])
def test_what_is_not_followed_is_refused_by_its_name(file: str, changes: dict, words: str, folder: Path) -> None:
    change(folder / file, **changes)
    with pytest.raises(ValueError) as caught:
        SentenceEncoder.from_pretrained(folder)
    assert words in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"type": "sentence_transformers.base.modules.router.Router"}, "router.Router' at this place is not supported"),
        ({"type": "custom_code.Transformer"}, "'custom_code.Transformer' is not of sentence_transformers"),
        ({"kwargs": ["task"]}, "kwargs is ['task']"),
        ({"path": "../other"}, "path '../other' is not a folder of this directory"),
        ({"path": "\ud800"}, "path '\\ud800' is not a folder of this directory"),
        ({"weights": "x"}, "weights is 'x', a key that is not supported"),
    ],
)
def test_modules_of_other_kinds(entry: dict, words: str, folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([modules[0] | entry, *modules[1:]]))
    for kind in (SentenceEncoder, CrossEncoder) if "type" not in entry else (SentenceEncoder,):
        with pytest.raises(ValueError) as caught:
            kind.from_pretrained(folder)
        if kind is SentenceEncoder:
            assert words in str(caught.value) and "modules.json" in str(caught.value)


def test_no_true_pooling_key_is_the_mean(folder: Path) -> None:
    """As in the library."""
    library = pytest.importorskip("sentence_transformers")
    file = folder / "1_Pooling/config.json"
    file.write_text(json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": False}))
    wanted = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS[0])
    assert np.abs(SentenceEncoder.from_pretrained(folder).encode(TEXTS[0]) - wanted).max() <= tolerances.MODEL_FLOAT32


def test_a_key_that_the_library_passes_over_is_warned_of(folder: Path) -> None:
    change(folder / "config_sentence_transformers.json", matryoshka=[8])
    with pytest.warns(UserWarning, match=r"config_sentence_transformers.json: matryoshka: not followed here, nor by"):
        SentenceEncoder.from_pretrained(folder)


@pytest.mark.parametrize("how", [{}, {"token_vectors": True}], ids=str)
def test_texts_that_are_cut_are_counted_once(how: dict, folder: Path) -> None:
    change(folder / FILE, max_seq_length=9)
    encoder = SentenceEncoder.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["a b c d e f g", "a"], **how)  # nine tokens with the special ones
    with pytest.warns(UserWarning, match="texts cut at 9 tokens: 3 of 5; later calls") as caught:
        encoder.encode(["a b c d e f g h", "the " * 9, "word " * 20_000, "a b c d e f g" + " " * 20_000, "b"], **how)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode("the " * 9, **how)
