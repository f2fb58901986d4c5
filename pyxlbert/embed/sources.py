"""Inputs: found, looked through once before the work begins, and read row by row in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pyxlbert.files import file_digest, is_there, leads, real_path, refuse_encoded

from .plan import Options, Shard, Source, is_parquet

# Rows and bytes that are read at once.
_BATCH_ROWS, _BATCH_BYTES = 1024, 4 << 20
_BUFFER = 1 << 20
_BOM = b"\xef\xbb\xbf"


def find(names: Sequence[str]) -> list[Path]:
    """The files that the names stand for, in order; a folder stands for the Parquet files in it, sorted by path.

    Raises:
        FileNotFoundError: nothing is there, or a folder holds no Parquet file.
        ValueError: a file is named twice, is a device or a pipe, or has a name that no file can have.
    """
    found: list[Path] = []
    for name in names:
        real_path("inputs", name)  # for names that no file can have
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*.parquet") if not p.name.startswith((".", "_")) and is_there(p))
            if not inside:
                raise FileNotFoundError(f"{name} is a folder without Parquet files")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            if path.exists():
                raise ValueError(f"{name} is a device or a pipe, wanted a file, which can be read twice")
            raise FileNotFoundError(f"{name}{leads(name)} is not there")
    seen: dict[Path, Path] = {}
    for path in found:
        other = seen.setdefault(path.resolve(), path)
        if other is not path:
            also = "" if str(other) == str(path) else f", also as {other}"
            raise ValueError(f"{path} is given twice{also}")
    return list(seen)


def schema_of(path: Path, options: Options) -> pa.Schema:
    """The columns of an input that go into the output.

    Raises:
        ValueError: the file cannot be read, or lacks a column, or its texts are no strings.
    """
    if not is_parquet(path):
        whole = pa.schema([pa.field(options.text_column, pa.string(), nullable=False)])
    else:
        with _parquet(path) as file:
            whole = file.schema_arrow
    names = whole.names if options.columns is None else options.columns
    for name in (options.text_column, *names):
        if whole.names.count(name) != 1:
            has = f"{whole.names.count(name)} columns" if name in whole.names else "no column"
            raise ValueError(f"{path} has {has} {name!r}; it has {', '.join(map(repr, whole.names))}")
    kind = whole.field(options.text_column).type
    if not _holds_strings(kind):
        raise ValueError(f"{path}: the column {options.text_column!r} holds {kind}, wanted strings")
    if options.vector_column in names:
        raise ValueError(
            f"{path} has a column {options.vector_column!r} already; name another for the vectors, or leave it out"
        )
    return pa.schema([whole.field(name) for name in names], metadata=whole.metadata)


def survey(path: Path, options: Options) -> Source:
    """Reads an input once from end to end, so that whatever is wrong with it is found before the work.

    Args:
        path: the file.
        options: the job's.

    Raises:
        ValueError: it cannot be read, has a null where none may be, or is not UTF-8; the message says where.
        OSError: it cannot be opened.
    """
    stamp = stamp_of(path)
    digest = file_digest(path)
    rows, size, offsets = _survey_parquet(path, options) if is_parquet(path) else _survey_text(path, options)
    if stamp_of(path) != stamp:
        raise ValueError(f"{path} changes while it is read")
    return Source(str(path), rows, offsets, digest, stamp, size // max(1, rows))


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and time of the last change."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


class Reader:
    """Reads shards of inputs. The next shard of the same input goes on where the last one ended.

    Args:
        sources: the job's.
        options: the job's.
    """

    def __init__(self, sources: Sequence[Source], options: Options) -> None:
        self._sources, self._options = sources, options
        self._rows: Iterator[pa.RecordBatch] = iter(())
        self._source, self._next = -1, 0
        self._left: pa.RecordBatch | None = None

    def read(self, shard: Shard) -> Iterator[pa.RecordBatch]:
        """The shard's rows, `text_column` first among the columns if it is not kept, in batches of any size.

        Raises:
            ValueError: the input has changed since the job looked it through, or cannot be read any more.
        """
        source = self._sources[shard.source]
        path = Path(source.path)
        self._check(path, source)
        if self._source != shard.source or self._next > shard.first or not is_parquet(path):
            self._rows = self._open(path, source, shard)
            self._source, self._left = shard.source, None
        skip, wanted = shard.first - self._next, shard.rows
        while wanted:
            batch = self._left if self._left is not None else next(self._rows, None)
            self._left = None
            if batch is None:
                raise ValueError(f"{path} has fewer rows than it had")
            self._next += len(batch)
            if skip >= len(batch):
                skip -= len(batch)
                continue
            batch, skip = batch.slice(skip), 0
            if len(batch) > wanted:
                self._left, batch = batch.slice(wanted), batch.slice(0, wanted)
                self._next -= len(self._left)
            wanted -= len(batch)
            yield batch
        self._check(path, source)

    def _open(self, path: Path, source: Source, shard: Shard) -> Iterator[pa.RecordBatch]:
        if not is_parquet(path):
            self._next = shard.first
            offset = (source.offsets or [0])[shard.first // self._options.shard_rows]
            return _text_batches(path, offset, shard, self._options)
        group, self._next = _group_of(path, shard.first)
        return _parquet_batches(path, group, _needed(self._options))

    @staticmethod
    def _check(path: Path, source: Source) -> None:
        if stamp_of(path) != source.stamp:
            raise ValueError(f"{path} has changed since the job began")


def text_of(batch: pa.RecordBatch | pa.Table, options: Options) -> pa.Array | pa.ChunkedArray:
    """The texts of a batch, whatever kind of strings the column holds."""
    return batch.column(options.text_column).cast(pa.large_string())


def _holds_strings(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _needed(options: Options) -> list[str] | None:
    if options.columns is None or options.text_column in options.columns:
        return options.columns
    return [options.text_column, *options.columns]


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Parquet file that can be read: {_first_line(error)}") from None
    with file:
        yield file


def _group_of(path: Path, row: int) -> tuple[int, int]:
    """The row group that holds a row, and the group's first row."""
    first = 0
    with _parquet(path) as file:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < first + rows:
                return group, first
            first += rows
    return file.num_row_groups, first


def _parquet_batches(path: Path, first_group: int, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    with _parquet(path) as file:
        start = sum(file.metadata.row_group(group).num_rows for group in range(first_group))
        for group in range(first_group, file.num_row_groups):
            about = file.metadata.row_group(group)
            each = max(1, about.total_byte_size // max(1, about.num_rows))
            size = max(1, min(_BATCH_ROWS, _BATCH_BYTES // each))
            batches = file.iter_batches(batch_size=size, row_groups=[group], columns=columns, use_threads=False)
            count = 0
            try:
                for batch in batches:
                    batch.validate(full=True)
                    count += len(batch)
                    yield batch
            except (pa.ArrowException, OSError) as error:
                where = f"row group {group} (rows {start} to {start + about.num_rows - 1}, the first row being 0)"
                raise ValueError(f"{path}: {where} cannot be read: {_first_line(error)}") from None
            if count != about.num_rows:
                raise ValueError(f"{path}: row group {group} has {count} rows, and {about.num_rows} by its own account")
            start += about.num_rows


def _survey_parquet(path: Path, options: Options) -> tuple[int, int, None]:
    rows = size = 0
    for batch in _parquet_batches(path, 0, _needed(options)):
        texts = text_of(batch, options)
        if texts.null_count and options.nulls == "error":
            row = rows + pc.index(pc.is_null(texts), True).as_py()
            raise ValueError(
                f"{path}: row {row} (the first is 0) has no text; nulls 'empty' takes it as an empty text, "
                "and 'null' gives it no vector"
            )
        rows, size = rows + len(batch), size + batch.nbytes
    return rows, size, None


def _survey_text(path: Path, options: Options) -> tuple[int, int, list[int]]:
    rows, offsets = 0, []
    with path.open("rb") as file:
        refuse_encoded(path, file.read(4))
        file.seek(0)
        offset = _skip_mark(file)
        for line in file:
            if rows % options.shard_rows == 0:
                offsets.append(offset)
            offset += len(line)
            rows += 1
            _decoded(line, path, rows)
    return rows, offset, offsets


def _text_batches(path: Path, offset: int, shard: Shard, options: Options) -> Iterator[pa.RecordBatch]:
    schema = schema_of(path, Options(text_column=options.text_column))
    with path.open("rb") as file:
        file.seek(offset)
        texts: list[str] = []
        size = 0
        for row, line in enumerate(file, start=shard.first):
            texts.append(_decoded(line, path, row + 1))
            size += len(line)
            if len(texts) == _BATCH_ROWS or size > _BATCH_BYTES:
                yield pa.record_batch([pa.array(texts, pa.string())], schema=schema)
                texts, size = [], 0
        if texts:
            yield pa.record_batch([pa.array(texts, pa.string())], schema=schema)


def _skip_mark(file: BinaryIO) -> int:
    if file.read(len(_BOM)) == _BOM:
        return len(_BOM)
    file.seek(0)
    return 0


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: line {number} is not UTF-8: {error.reason} at byte {error.start}") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
