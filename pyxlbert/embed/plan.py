"""What a job is: its inputs, its options, its shards, and how one tells that two are the same job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyxlbert.files import file_digest

NULLS = ("error", "empty", "null")

# What a model is read from. Other formats of the same weights may lie beside it.
_MODEL_FILES = (".json", ".txt", ".model", ".safetensors", ".bin")


@dataclass(frozen=True)
class Options:
    """What decides the content of the shards, beside the inputs and the model.

    Attributes:
        dtype, batch_size, layers, pooling, normalize, prompt, prompt_name, truncate_dim, precision: of
            `SentenceEncoder`, and `dtype` by name.
        ranges: of "int8" and "uint8": two lists of numbers.
        text_column: the column with the texts.
        columns: those that go with the vectors into the output; None is all.
        vector_column: the new column.
        nulls: what becomes of a text that is null: "error" stops before anything is written, "empty" takes it as an
            empty text, "null" gives it no vector.
        shard_rows: rows of one input a shard; the last one of an input has the rest.
    """

    dtype: str = "float32"
    batch_size: int = 32
    layers: int | Sequence[Any] | None = None
    pooling: str | None = None
    normalize: bool | None = None
    prompt: str | None = None
    prompt_name: str | None = None
    truncate_dim: int | None = None
    precision: str = "float32"
    ranges: list[list[float]] | None = None
    text_column: str = "text"
    columns: list[str] | None = None
    vector_column: str = "vector"
    nulls: str = "error"
    shard_rows: int = 50_000


@dataclass(frozen=True)
class Source:
    """One input.

    Attributes:
        path: absolute.
        rows: how many it has.
        offsets: of a text file, the byte at which each shard begins; of Parquet nothing.
        sha256: of its bytes.
        stamp: size and time of the last change when it was looked through.
        row_bytes: of a row in memory, on average.
    """

    path: str
    rows: int
    offsets: list[int] | None
    sha256: str
    stamp: tuple[int, int]
    row_bytes: int = 0


@dataclass(frozen=True)
class Shard:
    """Rows `first` to `first + rows` of an input, and the part of the output that they become."""

    index: int
    source: int
    first: int
    rows: int

    @property
    def name(self) -> str:
        """The file's name. Names sort in the order of the rows."""
        return f"part-{self.index:06}.parquet"


@dataclass(frozen=True)
class Plan:
    """A job: what goes in, what is done with it, and what identifies it.

    Attributes:
        model: the model's folder, absolute.
        model_sha256: of the files that it is read from.
        version: of this package, whose kernels may round otherwise in another version.
    """

    sources: tuple[Source, ...]
    model: str
    model_sha256: str
    options: Options
    version: str

    @property
    def rows(self) -> int:
        """Of all inputs."""
        return sum(source.rows for source in self.sources)

    def shards(self) -> list[Shard]:
        """In the order of the inputs and their rows. A job without rows has one that is empty."""
        return list(self._shards()) or [Shard(0, 0, 0, 0)]

    def _shards(self) -> Iterator[Shard]:
        index = 0
        for number, source in enumerate(self.sources):
            for first in range(0, source.rows, self.options.shard_rows):
                yield Shard(index, number, first, min(self.options.shard_rows, source.rows - first))
                index += 1

    def identity(self) -> dict[str, Any]:
        """What two runs of the same job have in common, as JSON. Inputs are known by content, wherever they lie."""
        content = {
            "pyxlbert": self.version,
            "model": self.model_sha256,
            "options": asdict(self.options),
            "inputs": [{"name": Path(s.path).name, "rows": s.rows, "sha256": s.sha256} for s in self.sources],
        }
        return json.loads(json.dumps(content))  # a tuple is a list there

    @property
    def key(self) -> str:
        """The identity as a short text, without the inputs' names: files may be renamed before a job goes on."""
        content = self.identity()
        content["inputs"] = [{**one, "name": None} for one in content["inputs"]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def mark(self, shard: Shard) -> bytes:
        """What the shard's file carries."""
        return f"{self.key} {shard.index}".encode()


def is_parquet(path: Path) -> bool:
    """By its name; whatever else is no Parquet holds a text a line."""
    return path.suffix.lower() in (".parquet", ".pq")


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Why two identities are not the same job; None where they are."""
    if before["pyxlbert"] != now["pyxlbert"]:
        return f"it was begun by pyxlbert {before['pyxlbert']}, and this is {now['pyxlbert']}"
    if before["model"] != now["model"]:
        return "the model is another"
    for name in sorted({*before["options"], *now["options"]}):
        old, new = before["options"].get(name), now["options"].get(name)
        if old != new:
            return f"{name} was {old!r}, and now is {new!r}"
    if len(before["inputs"]) != len(now["inputs"]):
        return f"it had {len(before['inputs'])} inputs, and now there are {len(now['inputs'])}"
    for number, (old, new) in enumerate(zip(before["inputs"], now["inputs"], strict=True), start=1):
        if (old["sha256"], old["rows"]) != (new["sha256"], new["rows"]):
            change = "its content has changed" if old["name"] == new["name"] else f"it was {old['name']}"
            return f"input {number} is {new['name']}: {change}"
    return None


def model_digest(directory: Path) -> str:
    """SHA-256 of the files that a model may be read from, and of their names."""
    whole = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.suffix in _MODEL_FILES:
            whole.update(f"{path.relative_to(directory)}\0{file_digest(path)}\n".encode())
    return whole.hexdigest()
