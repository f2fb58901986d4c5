"""One mutation of a file: of its bytes, and where it is JSON of a place in it."""

from __future__ import annotations

import json
import random
from typing import Any

# What a field may hold that nobody foresaw.
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 10**4, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", "a", "[CLS]", "\ud800", "\x00", "../x", "x" * 300, "é\u2028", "mean", "true"),
    *([], {}, [[]], [None], {"": None}, {"content": "[UNK]"}, [0], ["mean", "mean"], {"0": "a"}, [{"id": 0}]),
)
_BYTES = (b"\x00", b"\xff", b"\n", b'"', b"{", b"}", b"[" * 40, b"1e999", b"NaN", b"9" * 20, b"\xc3\x28", b"\\ud800")


def mutate(data: bytes, rng: random.Random, most: int = 1 << 16) -> bytes:
    """Another file, at most `most` bytes long, one to three steps away."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = _json(data, rng) if rng.random() < 0.6 else _bytes(data, rng)
    return data[:most]


def _json(data: bytes, rng: random.Random) -> bytes:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes(data, rng)
    places = list(_places(content))
    if not places:
        return json.dumps(rng.choice(HOSTILE)).encode()
    holder, key = rng.choice(places)
    step = rng.randrange(6)
    if step == 0:
        del holder[key]
    elif step == 1 and isinstance(holder, dict):
        holder[rng.choice((*HOSTILE[17:29], *(str(k) for k in holder)))] = rng.choice(HOSTILE)
    elif step == 2:
        other, where = rng.choice(places)
        holder[key] = other[where] if _is_in(other, where) else None
    elif step == 3:
        deep: Any = holder[key]
        for _ in range(rng.choice((2, 30, 400))):
            deep = [deep]
        holder[key] = deep
    else:
        holder[key] = rng.choice(HOSTILE)
    try:
        return json.dumps(content).encode()
    except (ValueError, RecursionError):
        return data


def _places(content: Any, depth: int = 0) -> Any:
    if depth > 20:
        return
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in list(keys)[:200]:
        yield content, key
        yield from _places(content[key], depth + 1)


def _is_in(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _bytes(data: bytes, rng: random.Random) -> bytes:
    # The beginning is where formats keep sizes.
    end = len(data) if rng.random() < 0.6 else min(len(data), 64)
    place = rng.randint(0, max(0, end))
    step = rng.randrange(7)
    if step == 0:
        return data[:place]
    if step == 1:
        return data[:place] + rng.choice(_BYTES) + data[place:]
    if step == 2:
        return data[:place] + data[place + rng.randint(1, 16) :]
    if step == 3:
        return data[:place] + data[place : place + rng.randint(1, 64)] * rng.choice((2, 3, 50)) + data[place:]
    if step == 4:
        size = rng.choice((1, 2, 4, 8))
        value = rng.choice((0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), rng.getrandbits(8 * size)))
        return data[:place] + value.to_bytes(size, "little") + data[place + size :]
    if step == 5 and place < len(data):
        return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
    return data[:place] + rng.randbytes(rng.randint(1, 8)) + data[place + rng.randint(0, 8) :]
