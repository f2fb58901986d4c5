"""A writer of TensorFlow's checkpoints, for those that TensorFlow would not write: changed, odd or old ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from pyxlbert.original.crc32c import crc32c, masked
from pyxlbert.original.table import read_table

DTYPES = {torch.float32: 1, torch.float64: 2, torch.int64: 9, torch.bfloat16: 14, torch.float16: 19}
MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")


def varint(number: int) -> bytes:
    groups = []
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def fixed(field: int, value: int) -> bytes:
    return varint(field << 3 | 5) + value.to_bytes(4, "little")


def stored(content: bytes) -> bytes:
    """Snappy's form of bytes, nothing of it compressed but the runs of a byte."""
    out, place = varint(len(content)), 0
    while place < len(content):
        run = 1
        while run < 65 and content[place : place + run + 1] == content[place : place + 1] * (run + 1):
            run += 1
        out += b"\0" + content[place : place + 1]  # one byte as it is
        if run > 4:
            out += bytes([run - 2 << 2 | 2, 1, 0])  # the rest of the run, a copy from one byte back
        else:
            run = 1
        place += run
    return out


def write_table(path: Path, rows: Mapping[bytes, bytes], compressed: bool = False) -> None:
    """A table of one block."""

    def block(entries: Mapping[bytes, bytes]) -> bytes:
        content = b"".join(
            varint(0) + varint(len(key)) + varint(len(row)) + key + row for key, row in sorted(entries.items())
        )
        content += bytes(4) + (1).to_bytes(4, "little")
        content = stored(content) + b"\1" if compressed else content + b"\0"
        return content + masked(crc32c(content)).to_bytes(4, "little")

    data, handles = b"", []
    for entries in (rows, {}):
        one = block(entries)
        handles.append(varint(len(data)) + varint(len(one) - 5))
        data += one
    index = block({max(rows, default=b""): handles[0]})
    footer = handles[1] + varint(len(data)) + varint(len(index) - 5)
    path.write_bytes(data + index + footer.ljust(40, b"\0") + MAGIC)


def rewrite_index(prefix: Path, change: Callable[[dict[bytes, bytes]], object], compressed: bool = False) -> None:
    """Changes the rows of a checkpoint's index."""
    path = prefix.with_name(f"{prefix.name}.index")
    rows = read_table(path)
    change(rows)
    write_table(path, rows, compressed)


def write_bundle(prefix: Path, tensors: Mapping[str, torch.Tensor], gap: bytes = b"") -> None:
    """A checkpoint of one file of data, with a gap before every tensor."""
    data, rows = b"", {b"": number(1, 1)}
    for name, tensor in sorted(tensors.items()):
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        data += gap
        shape = b"".join(message(2, number(1, size)) for size in tensor.shape)
        rows[name.encode()] = (
            number(1, DTYPES[tensor.dtype]) + message(2, shape) + number(4, len(data)) + number(5, len(content))
        ) + fixed(6, masked(crc32c(content)))
        data += content
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)
    write_table(prefix.with_name(f"{prefix.name}.index"), rows)
