"""A real pretrained model on real sentences, against `transformers` in float32."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from pyxlbert.demo import TOPICS, minilm_directory, transformers_encoder
from pyxlbert.testing import tolerances
from pyxlbert.text import SentenceEncoder

SENTENCES = [text for texts in TOPICS.values() for text in texts]
TEXTS = [
    *SENTENCES,
    "",
    "Café Zürich, naïve façade — 100 % „quoted“ text…",
    "今天天气很好。",
    "I ❤ trains 🚂🚃",
    "antidisestablishmentarianism " * 3,
    " ".join(SENTENCES),
    " ".join(SENTENCES * 3),  # past the limit of 256
]


@pytest.fixture(scope="module")
def directory() -> Path:
    return minilm_directory()  # a part of the development environment: without it these tests fail


@pytest.fixture(scope="module")
def expected(directory: Path) -> np.ndarray:
    return transformers_encoder(directory, 256)(TEXTS).astype(np.float64)


@pytest.fixture(scope="module")
def encoder(directory: Path) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(directory)


def worst(got: np.ndarray, expected: np.ndarray) -> float:
    got = got.astype(np.float64)
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    return float((1 - (got * expected).sum(1) / norms).max())


@pytest.mark.quick
def test_float32(encoder: SentenceEncoder, expected: np.ndarray) -> None:
    assert encoder.tokenizer.max_length == 256
    vectors = encoder.encode(TEXTS)
    assert worst(vectors, expected) < tolerances.COSINE[torch.float32]
    assert worst(encoder.encode(TEXTS, batch_size=5), expected) < tolerances.COSINE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(directory: Path, expected: np.ndarray, dtype: torch.dtype) -> None:
    encoder = SentenceEncoder.from_pretrained(directory, dtype)
    assert worst(encoder.encode(TEXTS), expected) < tolerances.COSINE[dtype]


def test_neighbours_are_of_the_same_topic(encoder: SentenceEncoder) -> None:
    vectors = encoder.encode(SENTENCES)
    similarity = vectors @ vectors.T - 2 * np.eye(len(SENTENCES))
    assert (similarity.argmax(1) // 4 == np.arange(len(SENTENCES)) // 4).all()


def test_eight_threads_get_the_bits_of_one(encoder: SentenceEncoder) -> None:
    work = [SENTENCES[i : i + 9] for i in range(8)]
    alone = [encoder.encode(texts, batch_size=4) for texts in work]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda texts: encoder.encode(texts, batch_size=4), work))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
