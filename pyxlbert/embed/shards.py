"""One shard: rows are read, their texts encoded and both written, block by block, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pyxlbert.text import DTYPES, SentenceEncoder
from pyxlbert.text.sentence_encoder import check_encoding

from .folder import MARK, OutputFolder
from .plan import Options, Plan, Shard
from .sources import Reader, schema_of, text_of

# Of a block, whose texts are encoded together: the most rows, bytes of text and bytes of all columns.
_BLOCK_ROWS, _TEXT_BYTES, _BLOCK_BYTES = 4096, 4 << 20, 32 << 20


class ShardWriter:
    """Writes shards of a job. Each process has its own.

    Args:
        plan: the job.
        out: the folder.
        encoder: the model, if it is at hand.
    """

    def __init__(self, plan: Plan, out: Path, encoder: SentenceEncoder | None = None) -> None:
        self.plan, self.folder = plan, OutputFolder(out)
        self._reader = Reader(plan.sources, plan.options)
        self._encoder = load_encoder(plan.model, plan.options) if encoder is None else encoder
        self._arguments = encode_arguments(plan.options)
        kept = schema_of(Path(plan.sources[0].path), plan.options)
        empty = self._encode([])
        self.width = empty.shape[1]
        self._vector = pa.list_(pa.from_numpy_dtype(empty.dtype), self.width)
        self._kept = kept.names
        self._schema = kept.append(pa.field(plan.options.vector_column, self._vector))

    def write(self, shard: Shard, seen: Callable[[int], None]) -> int:
        """Writes one shard whole, or nothing.

        Args:
            shard: which.
            seen: is told how many rows have been encoded more.

        Returns:
            The number of rows.

        Raises:
            ValueError: the input has changed or cannot be read any more.
            OSError: the part cannot be written.
        """
        schema = self._schema.with_metadata({**(self._schema.metadata or {}), MARK: self.plan.mark(shard)})
        with self.folder.shard(shard) as path, open_part(path) as file, self._writer(file, schema) as writer:
            each = self.plan.sources[shard.source].row_bytes
            most = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // max(1, each)))
            for block in blocks(self._reader.read(shard), self.plan.options, most):
                columns = [block.column(name) for name in self._kept]
                writer.write_table(pa.table([*columns, self._vectors(block)], schema=schema))
                seen(len(block))
        return shard.rows

    def _writer(self, file: BinaryIO, schema: pa.Schema) -> pq.ParquetWriter:
        leaf = f"{self.plan.options.vector_column}.list.element"
        others = list(self._kept)
        return pq.ParquetWriter(
            file,
            schema,
            use_dictionary=others or False,
            write_statistics=others or False,
            compression={**dict.fromkeys(others, "snappy"), leaf: "none"},
            write_page_checksum=True,
        )

    def _vectors(self, block: pa.Table) -> pa.Array:
        texts = text_of(block, self.plan.options)
        absent = np.asarray(pc.is_null(texts))
        words = texts.to_pylist()
        if self.plan.options.nulls != "null":
            absent = np.zeros(len(words), dtype=bool)
            words = ["" if word is None else word for word in words]
        vectors = self._encode([word for word in words if word is not None])
        whole = np.zeros((len(words), self.width), dtype=vectors.dtype)
        whole[~absent] = vectors
        mask = pa.array(absent) if absent.any() else None
        return pa.FixedSizeListArray.from_arrays(pa.array(whole.reshape(-1)), type=self._vector, mask=mask)

    def _encode(self, texts: list[str]) -> np.ndarray:
        return self._encoder.encode(texts, show_progress=False, **self._arguments)


def load_encoder(model: str | Path, options: Options) -> SentenceEncoder:
    """The model, which takes the options.

    Raises:
        FileNotFoundError: a file of the model is missing.
        ValueError: a file is corrupt, or an option means nothing to this model.
    """
    check_encoding(model, **encode_arguments(options))
    return SentenceEncoder.from_pretrained(model, DTYPES[options.dtype])


def encode_arguments(options: Options) -> dict[str, Any]:
    """The arguments of `SentenceEncoder.encode` that a job's options stand for."""
    names = ("batch_size", "layers", "pooling", "normalize", "prompt", "prompt_name", "truncate_dim", "precision")
    arguments = {name: getattr(options, name) for name in names}
    if options.ranges is not None:
        arguments["ranges"] = np.array(options.ranges, dtype=np.float32)
    return arguments


def open_part(path: Path) -> BinaryIO:
    """The file that a part is written to."""
    return path.open("xb")


def blocks(batches: Iterator[pa.RecordBatch], options: Options, most: int) -> Iterator[pa.Table]:
    """The rows in blocks whose ends depend on the texts alone, not on how they came.

    Args:
        batches: of any size.
        options: the job's.
        most: rows of a block.
    """
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        lengths = np.asarray(pc.fill_null(pc.binary_length(text_of(batch, options)), 0), dtype=np.int64)
        start = 0
        while start < len(batch):
            ends = size + np.cumsum(lengths[start : start + most - rows])
            take = int(np.searchsorted(ends, _TEXT_BYTES, side="right"))
            if take == 0 and rows == 0:
                take = 1  # a text of any length is a block of its own
            if take:
                held.append(batch.slice(start, take))
                rows, size, start = rows + take, int(ends[take - 1]), start + take
            if start < len(batch) or rows == most:
                yield pa.Table.from_batches(held)
                held, rows, size = [], 0, 0
    if held:
        yield pa.Table.from_batches(held)
