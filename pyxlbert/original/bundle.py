"""TensorFlow's checkpoints without TensorFlow: an index of tensors and files of their data.

``model.ckpt.index`` is a table from a tensor's name to a message with its dtype, shape, place and checksum;
``model.ckpt.data-00000-of-00001`` and its like hold the numbers as they lie in memory, little-endian. Data are mapped
into memory, and a tensor's bytes are read when it is asked for.

Source:
    tensorflow/core/protobuf/tensor_bundle.proto, tensorflow/core/framework/types.proto and
    https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyxlbert.files import read_text
from pyxlbert.original.crc32c import crc32c, masked
from pyxlbert.original.table import read_table, varint

# TensorFlow's numbers of dtypes; the rest are named in messages only.
_DTYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 9: torch.int64, 14: torch.bfloat16, 19: torch.float16}
_OTHERS = {4: "uint8", 5: "int16", 6: "int8", 7: "string", 8: "complex64", 10: "bool", 20: "resource", 21: "variant"}

_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5  # how protobuf writes a field


class Entry(NamedTuple):
    """What the index says of a tensor.

    Attributes:
        dtype: None where it is not one of torch's numbers; `dtype_name` then says what it is.
        shard: the number of its file of data.
        offset, size: of its bytes there.
        checksum: their masked CRC-32C.
        sliced: whether it is stored in parts, as a partitioned variable is.
    """

    name: str
    dtype: torch.dtype | None
    dtype_name: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    sliced: bool


class Bundle:
    """A checkpoint.

    Args:
        prefix: what its files' names begin with, such as ``folder/bert_model.ckpt``.

    Raises:
        FileNotFoundError: the index or a file of data is missing.
        ValueError: a file is truncated, changed or of another kind; the message names it, and a tensor in it.

    Attributes:
        entries: what the index says of each tensor.
    """

    def __init__(self, prefix: Path) -> None:
        self.index = prefix.with_name(f"{prefix.name}.index")
        rows = read_table(self.index)
        header = rows.pop(b"", None)
        if header is None:
            raise ValueError(f"{self.index} is a table, but has no header of a checkpoint")
        try:
            self._shards, endianness = _header(header)
            self.entries = {key.decode(): _entry(key.decode(), row) for key, row in rows.items() if key[:1] != b"\0"}
        except (ValueError, IndexError) as error:
            raise ValueError(f"{self.index} is not the index of a checkpoint: {error}") from None
        if endianness:
            raise ValueError(f"{self.index}: the checkpoint is big-endian; wanted a little-endian one")
        self._prefix = prefix
        self._maps: dict[int, mmap.mmap | bytes] = {}
        for entry in self.entries.values():
            self._check(entry)

    def file_of(self, entry: Entry) -> Path:
        """The file with a tensor's data."""
        return self._prefix.with_name(f"{self._prefix.name}.data-{entry.shard:05d}-of-{self._shards:05d}")

    def _check(self, entry: Entry) -> None:
        """Whether an entry's data are all there."""
        file = self.file_of(entry)
        if entry.sliced:
            return  # its data are elsewhere
        if entry.shard not in self._maps:
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing; {self.index} places {entry.name!r} in it")
            self._maps[entry.shard] = _mapped(file)
        have = len(self._maps[entry.shard])
        if entry.offset < 0 or entry.size < 0 or entry.offset + entry.size > have:
            wanted = entry.offset + entry.size
            raise ValueError(f"{file} is truncated: it has {have} bytes, and {entry.name!r} ends at byte {wanted}")
        if entry.dtype is not None and entry.size != math.prod(entry.shape) * entry.dtype.itemsize:
            wanted = f"{list(entry.shape)} of {entry.dtype_name}"
            raise ValueError(f"{self.index}: {entry.name!r} has {entry.size} bytes, which is not its shape, {wanted}")

    def tensor(self, name: str) -> Tensor:
        """A tensor, which shares the mapped file's memory; its checksum is checked.

        Raises:
            ValueError: its bytes have changed since it was written; the message names file and tensor.
            TypeError: it is no tensor of numbers, or a partitioned one.
        """
        entry = self.entries[name]
        if entry.sliced:
            raise TypeError(f"{self.index}: {name!r} is a partitioned variable, which is not supported")
        if entry.dtype is None:
            raise TypeError(f"{self.index}: {name!r} is of dtype {entry.dtype_name}, wanted a floating-point dtype")
        data = memoryview(self._maps[entry.shard])[entry.offset : entry.offset + entry.size]
        if masked(crc32c(data)) != entry.checksum:
            raise ValueError(f"{self.file_of(entry)}: the checksum of {name!r} is wrong: the file has changed")
        if not entry.size:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.offset % entry.dtype.itemsize:
            data = bytearray(data)  # a tensor lies at a multiple of its element's size
        return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)


def _mapped(file: Path) -> mmap.mmap | bytes:
    with file.open("rb") as opened:
        # Private and writable: torch knows no memory that is read-only. Nobody writes to it.
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) if file.stat().st_size else b""


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The numbers and values of a message's fields."""
    place = 0
    while place < len(message):
        tag, place = varint(message, place)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, place = varint(message, place)
        elif kind in (_EIGHT, _FOUR):
            size = 8 if kind == _EIGHT else 4
            value, place = int.from_bytes(message[place : place + size], "little"), place + size
        elif kind == _BYTES:
            size, place = varint(message, place)
            value, place = message[place : place + size], place + size
        else:
            raise ValueError(f"a message has a field of the unknown kind {kind}")
        if place > len(message):
            raise ValueError("a message ends within a field")
        yield number, value


def _header(message: bytes) -> tuple[int, int]:
    """How many files of data there are, and 1 for a big-endian checkpoint."""
    fields = dict(_fields(message))
    return int(fields.get(1, 0)), int(fields.get(2, 0))


def _entry(name: str, message: bytes) -> Entry:
    fields: dict[int, int | bytes] = {}
    sliced = False
    for number, value in _fields(message):
        fields[number] = value
        sliced = sliced or number == 7
    kind = int(fields.get(1, 0))
    dtype = _DTYPES.get(kind)
    dtype_name = str(dtype).removeprefix("torch.") if dtype else _OTHERS.get(kind, f"number {kind}")
    dimensions = [dict(_fields(value)) for number, value in _fields(fields.get(2, b"")) if number == 2]
    shape = tuple(int(dimension.get(1, 0)) for dimension in dimensions)
    place = (int(fields.get(number, 0)) for number in (3, 4, 5, 6))
    return Entry(name, dtype, dtype_name, shape, *place, sliced)


def find_checkpoint(source: Path) -> Path | None:
    """The prefix of the checkpoint that a path means; None for a folder without any.

    Args:
        source: a folder, a prefix such as ``folder/bert_model.ckpt``, or the name of one of its files.

    Raises:
        FileNotFoundError: there is nothing of that name, or data without their index.
        ValueError: the folder holds several checkpoints and no file ``checkpoint`` that names the last.
    """
    if not source.is_dir():
        prefix = source.with_name(re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", source.name))
        if not prefix.with_name(f"{prefix.name}.index").is_file():
            raise FileNotFoundError(
                f"{source} is no folder, and {prefix.name}.index is missing beside it; wanted a folder, or a "
                "checkpoint's name such as bert_model.ckpt"
            )
        return prefix
    found = sorted(path.name.removesuffix(".index") for path in source.glob("*.index"))
    data = sorted(source.glob("*.data-?????-of-?????"))
    if not found and data:
        name = re.sub(r"\.data-\d{5}-of-\d{5}$", "", data[0].name)
        raise FileNotFoundError(f"{source / f'{name}.index'} is missing: {data[0].name} has no index")
    if len(found) > 1:
        named = _last_saved(source / "checkpoint")
        if named not in found:
            raise ValueError(f"{source} holds several checkpoints, name one of them: {', '.join(found)}")
        found = [named]
    return source / found[0] if found else None


def _last_saved(path: Path) -> str | None:
    """The checkpoint that training saved last, as the file beside them has it."""
    match = re.search(r'^model_checkpoint_path: "(.*)"$', read_text(path), re.MULTILINE) if path.is_file() else None
    return match[1].rpartition("/")[2] if match else None
