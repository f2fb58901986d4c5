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


Slice = tuple[tuple[int, int], ...]
_WHOLE = -1  # a length: all of a dimension


class Entry(NamedTuple):
    """What the index says of a tensor.

    Attributes:
        dtype: None where it is not one of torch's numbers; `dtype_name` then says what it is.
        shard: the number of its file of data.
        offset, size: of its bytes there.
        checksum: their masked CRC-32C.
        slices: of a partitioned variable, which is stored in parts: the start and length of each part in each
            dimension; none of a variable that is stored whole.
    """

    name: str
    dtype: torch.dtype | None
    dtype_name: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    slices: tuple[Slice, ...] = ()


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
            self._parts = {name: self._parts_of(entry, rows) for name, entry in self.entries.items() if entry.slices}
        except (ValueError, IndexError) as error:
            raise ValueError(f"{self.index} is not the index of a checkpoint: {error}") from None
        if endianness:
            raise ValueError(f"{self.index}: the checkpoint is big-endian; wanted a little-endian one")
        self._prefix = prefix
        self._maps: dict[int, mmap.mmap | bytes] = {}
        for entry in self.entries.values():
            for one in self._parts[entry.name] if entry.slices else [entry]:
                self._check(one)

    def _parts_of(self, whole: Entry, rows: dict[bytes, bytes]) -> list[Entry]:
        """What the index says of each part of a partitioned variable, in the order of `slices`."""
        found = []
        for one in whole.slices:
            if len(one) != len(whole.shape):
                raise ValueError(f"a part of {whole.name!r} has {len(one)} dimensions, wanted {len(whole.shape)}")
            row = rows.get(_key(whole.name, one))
            if row is None:
                raise ValueError(f"it lacks the part {_spelt(one)} of {whole.name!r}")
            part = _entry(f"{whole.name}, part {_spelt(one)}", row)
            shape = tuple(b - a for a, b in _ranges(whole, one))
            if part.shape != shape or part.dtype_name != whole.dtype_name:
                got, wanted = f"{list(part.shape)} of {part.dtype_name}", f"{list(shape)} of {whole.dtype_name}"
                raise ValueError(f"{part.name!r} is {got}, wanted {wanted}")
            found.append(part)
        _check_cover(whole)
        return found

    def file_of(self, entry: Entry) -> Path:
        """The file with a tensor's data."""
        return self._prefix.with_name(f"{self._prefix.name}.data-{entry.shard:05d}-of-{self._shards:05d}")

    def _check(self, entry: Entry) -> None:
        """Whether an entry's data are all there."""
        file = self.file_of(entry)
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
        """A tensor, which shares the mapped file's memory unless it is put together of parts; checksums are checked.

        Raises:
            ValueError: its bytes have changed since it was written; the message names file and tensor.
            TypeError: it is no tensor of numbers.
        """
        entry = self.entries[name]
        if entry.dtype is None:
            raise TypeError(f"{self.index}: {name!r} is of dtype {entry.dtype_name}, wanted a floating-point dtype")
        if not entry.slices:
            return self._stored(entry, entry.dtype)
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for one, part in zip(entry.slices, self._parts[name], strict=True):
            whole[tuple(slice(a, b) for a, b in _ranges(entry, one))] = self._stored(part, entry.dtype)
        return whole

    def _stored(self, entry: Entry, dtype: torch.dtype) -> Tensor:
        data = memoryview(self._maps[entry.shard])[entry.offset : entry.offset + entry.size]
        if masked(crc32c(data)) != entry.checksum:
            raise ValueError(f"{self.file_of(entry)}: the checksum of {entry.name!r} is wrong: the file has changed")
        if not entry.size:
            return torch.empty(entry.shape, dtype=dtype)
        if entry.offset % dtype.itemsize:
            data = bytearray(data)  # a tensor lies at a multiple of its element's size
        return torch.frombuffer(data, dtype=dtype).view(entry.shape)


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
    slices = []
    for number, value in _fields(message):
        fields[number] = value
        if number == 7:
            slices.append(_slice(value))
    kind = int(fields.get(1, 0))
    dtype = _DTYPES.get(kind)
    dtype_name = str(dtype).removeprefix("torch.") if dtype else _OTHERS.get(kind, f"number {kind}")
    dimensions = [dict(_fields(value)) for number, value in _fields(fields.get(2, b"")) if number == 2]
    shape = tuple(int(dimension.get(1, 0)) for dimension in dimensions)
    place = (int(fields.get(number, 0)) for number in (3, 4, 5, 6))
    return Entry(name, dtype, dtype_name, shape, *place, tuple(slices))


def _slice(message: bytes) -> Slice:
    extents = [dict(_fields(value)) for number, value in _fields(message) if number == 1]
    return tuple((_signed(one.get(1, 0)), _signed(one.get(2, _WHOLE))) for one in extents)


def _signed(number: int) -> int:
    """Of protobuf, which writes a negative number as 64 bits."""
    return number - 2**64 if number >= 2**63 else number


def _spelt(one: Slice) -> str:
    return ":".join("-" if length == _WHOLE else f"{start},{length}" for start, length in one)


def _ranges(whole: Entry, one: Slice) -> list[tuple[int, int]]:
    """Where a part begins and ends in each dimension."""
    return [
        (0, size) if length == _WHOLE else (start, start + length)
        for size, (start, length) in zip(whole.shape, one, strict=True)
    ]


def _check_cover(whole: Entry) -> None:
    """Whether the parts of a variable are all of it, each element once."""
    boxes = [_ranges(whole, one) for one in whole.slices]
    inside = all(0 <= a < b <= size for box in boxes for (a, b), size in zip(box, whole.shape, strict=True))
    apart = all(
        any(b <= c or d <= a for (a, b), (c, d) in zip(one, other, strict=True))
        for place, one in enumerate(boxes)
        for other in boxes[:place]
    )
    volume = sum(math.prod(b - a for a, b in box) for box in boxes)
    if not (inside and apart and volume == math.prod(whole.shape)):
        parts = " and ".join(map(_spelt, whole.slices))
        raise ValueError(f"{whole.name!r} is {list(whole.shape)}, which is not what its parts {parts} make up")


def _key(name: str, one: Slice) -> bytes:
    """The key of a part in the index.

    Source:
        tensorflow/core/util/saved_tensor_slice_util.cc and tensorflow/core/lib/strings/ordered_code.cc
    """
    text = b"".join({0: b"\0\xff", 255: b"\xff\0"}.get(one, bytes([one])) for one in name.encode())
    extents = (_ordered(number) for extent in one for number in extent)
    return b"\0" + text + b"\0\1" + bytes([1, len(one)] if one else [0]) + b"".join(extents)


def _ordered(number: int) -> bytes:
    """A signed number in bytes that are in the order of numbers: its length in ones, then 6 bits and 7 more a byte."""
    magnitude = ~number if number < 0 else number
    length = next(length for length in range(1, 11) if magnitude < 1 << (7 * length - 1))
    ones = (0xFFFF << 16 - length) & 0xFFFF  # as many at the start as there are bytes
    header = ones << 8 * (length - 2) if length > 1 else ones >> 8
    return ((number & (1 << 8 * length) - 1) ^ header).to_bytes(length, "big")


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
