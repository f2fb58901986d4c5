"""CRC-32C (Castagnoli), by which TensorFlow's checkpoints tell a changed byte, vectorised with numpy.

A CRC without its first and last complement is linear over GF(2). So long data are cut into chunks whose registers
advance side by side, a word of four bytes at a time, and are then joined: of data A and then B,
register(A B) = shift(register(A), bytes of B) XOR register(B).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_POLYNOMIAL = 0x82F63B78  # reversed: bit 0 is the highest power
_ONES = 0xFFFFFFFF
_CHUNK = 2048  # bytes
_TOGETHER = 2048  # chunks that advance side by side: 4 MiB
_MASK_DELTA = 0xA282EAD8


class _Shift(NamedTuple):
    """A linear map of 32 bits: what its lower and its upper half contribute."""

    lower: np.ndarray  # uint32 [65536]
    upper: np.ndarray  # uint32 [65536]

    def __call__(self, registers: np.ndarray) -> np.ndarray:
        halves = registers.view(np.uint16)  # the lower half of each comes first
        return self.lower.take(halves[::2], mode="wrap") ^ self.upper.take(halves[1::2], mode="wrap")


def _linear(image: Callable[[int], int]) -> _Shift:
    """The tables of a linear map, from its values at single bits."""
    halves = []
    for first in (0, 16):
        table = np.zeros(1, np.uint32)
        for bit in range(first, first + 16):
            table = np.concatenate([table, table ^ np.uint32(image(1 << bit))])
        halves.append(table)
    return _Shift(*halves)


@functools.cache
def _bytes() -> list[int]:
    """The register after a byte, for each one."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


def _advance(register: int, data: bytes) -> int:
    table = _bytes()
    for byte in data:
        register = register >> 8 ^ table[(register ^ byte) & 0xFF]
    return register


@functools.cache
def _word() -> _Shift:
    return _linear(lambda bits: _advance(bits, bytes(4)))


@functools.cache
def _chunk() -> _Shift:
    return _linear(lambda bits: _advance(bits, bytes(_CHUNK)))


def crc32c(data: bytes | memoryview | np.ndarray) -> int:
    """The CRC-32C of bytes.

    Args:
        data: contiguous memory of any element type.
    """
    whole = np.frombuffer(data, np.uint8)
    register = _ONES
    chunks = whole.size // _CHUNK
    if chunks:
        lower, upper = (table.tolist() for table in _chunk())
        for first in range(0, chunks, _TOGETHER):
            count = min(_TOGETHER, chunks - first)
            block = whole[first * _CHUNK : (first + count) * _CHUNK]
            for one in _registers(block).tolist():
                register = lower[register & 0xFFFF] ^ upper[register >> 16] ^ one
    return _advance(register, whole[chunks * _CHUNK :].tobytes()) ^ _ONES


def _registers(block: np.ndarray) -> np.ndarray:
    """The registers of whole chunks, each from zero."""
    words = np.frombuffer(block.tobytes(), "<u4").reshape(-1, _CHUNK // 4)
    step = _word()
    registers = np.zeros(words.shape[0], np.uint32)
    for column in np.ascontiguousarray(words.T):
        registers = step(registers ^ column)
    return registers


def masked(crc: int) -> int:
    """A CRC as LevelDB's tables and TensorFlow's bundles store it, so that data may hold their own."""
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & _ONES


if sys.byteorder != "little":
    raise ImportError(f"pyxlbert.original: got a {sys.byteorder}-endian machine, wanted a little-endian one")
