"""Inputs of the embedding job's tests, and what must come out."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pyxlbert.text import DTYPES, SentenceEncoder

WORDS = ["the", "hello", "world", "train", "trains", "un", "naive", "a", "b", "c", "x", "y", "z", "你", "好"]


def texts(count: int, seed: int = 0) -> list[str]:
    """Of 0 to 30 words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, 30))) for _ in range(count)]


def table(count: int, seed: int = 0, first: int = 0) -> pa.Table:
    """Numbers and texts."""
    return pa.table({"id": list(range(first, first + count)), "text": texts(count, seed)})


def write(folder: Path, counts: tuple[int, ...] = (130, 0, 75), group: int = 40) -> list[Path]:
    """Several Parquet files, one of them without rows."""
    folder.mkdir()
    paths, first = [], 0
    for number, count in enumerate(counts):
        paths.append(folder / f"{'abcdef'[number]}.parquet")
        rows = table(count, number, first).cast(pa.schema([("id", pa.int64()), ("text", pa.string())]))
        pq.write_table(rows, paths[-1], row_group_size=group)
        first += count
    return paths


def vectors(out: Path, column: str = "vector") -> np.ndarray:
    """Of a job's output, [N, E]."""
    found = pq.read_table(out)[column].combine_chunks()
    return found.flatten().to_numpy().reshape(len(found), -1)


def check(out: Path, paths: list[Path], model: Path, dtype: str = "float32", **arguments: Any) -> None:
    """The inputs' rows, all of them once and in order, with the bits of an encoder alone; and no file too many."""
    rows = pq.read_table(out)
    wanted = pa.concat_tables([pq.read_table(path) for path in paths])
    assert rows.drop(["vector"]).equals(wanted)
    encoder = SentenceEncoder.from_pretrained(model, DTYPES[dtype])
    assert np.array_equal(vectors(out), encoder.encode(wanted["text"].to_pylist(), **arguments))
    names = sorted(path.name for path in out.iterdir())
    assert names == ["_job.json", *(f"part-{i:06}.parquet" for i in range(len(names) - 1))]
