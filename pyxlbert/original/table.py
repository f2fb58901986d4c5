"""Tables as LevelDB writes them: sorted keys and values in blocks, each with a checksum, prefixes shared.

TensorFlow's `.index` files are such tables. Blocks may be compressed with Snappy, as those of TensorFlow 1.1 are.

Source:
    https://github.com/google/leveldb/blob/main/doc/table_format.md and
    https://github.com/google/snappy/blob/main/format_description.txt
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pyxlbert.original.crc32c import crc32c, masked

_MAGIC = 0xDB4775248B80FB57
_FOOTER, _TRAILER = 48, 5  # bytes: at the file's end, and behind each block
_RAW, _SNAPPY = 0, 1


def read_table(path: Path) -> dict[bytes, bytes]:
    """Every key and its value.

    Raises:
        ValueError: the file is no table, is truncated, or a block's checksum is wrong; the message names the file.
    """
    data = path.read_bytes()
    try:
        return dict(_rows(data))
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a whole index of a checkpoint: {error}") from None


def _rows(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(data) < _FOOTER or int.from_bytes(data[-8:], "little") != _MAGIC:
        raise ValueError("it does not end as a table of TensorFlow does")
    footer = data[-_FOOTER:]
    place = varint(footer, varint(footer, 0)[1])[1]  # behind the handle of a block that tells nothing here
    for _, handle in _entries(_block(data, footer[place:])):
        yield from _entries(_block(data, handle))


def _block(data: bytes, handle: bytes) -> bytes:
    """The content of the block at a handle, its offset and its size."""
    offset, place = varint(handle, 0)
    size, _ = varint(handle, place)
    end = offset + size
    if end + _TRAILER > len(data) - _FOOTER:
        raise ValueError(f"a block of {size} bytes at {offset} does not lie in it")
    if masked(crc32c(data[offset : end + 1])) != int.from_bytes(data[end + 1 : end + _TRAILER], "little"):
        raise ValueError(f"the checksum of the block at byte {offset} is wrong: the file has changed")
    kind, content = data[end], data[offset:end]
    if kind == _SNAPPY:
        return uncompress(content)
    if kind != _RAW:
        raise ValueError(f"the block at byte {offset} is compressed in a way (number {kind}) that is not known")
    return content


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (restarts + 1)
    if end < 0:
        raise ValueError("a block's list of restarts does not lie in it")
    place, key = 0, b""
    while place < end:
        shared, place = varint(block, place)
        own, place = varint(block, place)
        length, place = varint(block, place)
        if shared > len(key) or place + own + length > end:
            raise ValueError("an entry does not lie in its block")
        key = key[:shared] + block[place : place + own]
        place += own
        yield key, block[place : place + length]
        place += length


def varint(data: bytes, place: int) -> tuple[int, int]:
    """A number in groups of seven bits, lowest first, and the place behind it.

    Raises:
        IndexError: the data end within it.
        ValueError: it has more than 64 bits.
    """
    number = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
    raise ValueError("a number has more than 64 bits")


def uncompress(data: bytes) -> bytes:
    """What Snappy compressed.

    Raises:
        ValueError: the data are not Snappy's.
        IndexError: they end too early.
    """
    wanted, place = varint(data, 0)
    out = bytearray()
    while place < len(data):
        tag = data[place]
        place += 1
        kind, size = tag & 3, (tag >> 2) + 1
        if kind == 0:  # bytes as they are; longer ones say their length in up to four bytes of its own
            extra = max(0, size - 60)
            if extra:
                size = int.from_bytes(data[place : place + extra], "little") + 1
                place += extra
            out += data[place : place + size]
            place += size
            continue
        if kind == 1:
            size, offset = (tag >> 2 & 7) + 4, (tag >> 5) << 8 | data[place]
            place += 1
        else:
            width = 2 if kind == 2 else 4
            offset = int.from_bytes(data[place : place + width], "little")
            place += width
        if place > len(data) or not 0 < offset <= len(out):
            raise ValueError("a compressed block refers to bytes that are not there")
        for _ in range(size):  # what is copied may overlap what is being written
            out.append(out[-offset])
    if len(out) != wanted:
        raise ValueError(f"a compressed block holds {len(out)} bytes, wanted {wanted}")
    return bytes(out)
