"""The table of tiles: complete, and within what the kernels and the hardware can do."""

from __future__ import annotations

import importlib

configurations = importlib.import_module("pyxlbert.kernels._configurations")
ahead = importlib.import_module("pyxlbert.bench.ahead")
TABLE, Key, Card = configurations.TABLE, configurations.Key, configurations.Card
# Those that kernels are compiled for, and newer ones of both kinds.
CARDS = [
    *(Card(*one) for one in ahead.SHARED.items()),
    Card(87, 163 * 1024),
    Card(103, 227 * 1024),
    Card(121, 99 * 1024),
]


def test_every_call_has_a_tile() -> None:
    for kernel in {key.kernel for key in TABLE}:
        for size in (2, 4):
            most = configurations.max_head_size(kernel)
            if kernel.startswith("relative_bwd_queries_table") and size == 4:
                # Rows longer than that never come here: see `backward` of kernels/_relative.py.
                most = 64
            for head_size in (1, 16, 32, 64, 80, 96, 128, 256):
                for extras in (False, True) if kernel != "attention_bwd_bias" else (True,):
                    for segments in (False, True) if kernel.startswith("relative") else (False,):
                        for card in CARDS:
                            if head_size <= most:
                                tile = configurations.row_for(kernel, card, size, head_size, extras, segments)
                                assert tile in TABLE.values()


def test_a_row_holds_until_the_next_architecture() -> None:
    """Of the small cards, or of the large ones."""
    for key, tile in TABLE.items():
        own = Card(key.architecture, ahead.SHARED[key.architecture])
        assert configurations.row_for(key.kernel, own, *key[2:]) == tile
        for newer in CARDS:
            between = [other for other in TABLE if other._replace(architecture=key.architecture) == key]
            between = [other.architecture for other in between if configurations.holds_for(other.architecture, newer)]
            if configurations.holds_for(key.architecture, newer) and key.architecture == max(between):
                assert configurations.row_for(key.kernel, newer, *key[2:]) == tile


def test_calls_without_segments_take_rows_of_their_own_where_there_are_some() -> None:
    rows = [
        Key("fwd", 80, 2, 64, False, True),
        Key("fwd", 90, 2, 64, False, False),
        Key("fwd", 100, 2, 64, False, True),
        Key("fwd", 80, 2, 128, False, True),
    ]

    def found(architecture: int, head_size: int, segments: bool) -> int:
        card = Card(architecture, ahead.SHARED[architecture])
        return rows.index(configurations.best_of(rows, "fwd", card, 2, head_size, False, segments))

    assert [found(n, 64, False) for n in (80, 90, 100)] == [0, 1, 1]
    assert [found(n, 64, True) for n in (80, 90, 100)] == [0, 0, 2]
    assert found(90, 96, False) == 3
    # Attention has no segments, and of relative kernels every row for calls without them stands beside one with.
    for key in TABLE:
        assert not (key.segments and key.kernel.startswith("attention"))
        if key.kernel.startswith("relative") and not key.segments:
            card = Card(key.architecture, ahead.SHARED[key.architecture])
            assert configurations.best_of(TABLE, key.kernel, card, *key[2:5], True).head_size == key.head_size


def test_small_cards_take_no_rows_of_large_ones() -> None:
    for shared, architectures in (
        (99 * 1024, {80, 86, 89, 120}),
        (163 * 1024, {80, 90, 100}),
        (227 * 1024, {80, 90, 100}),
    ):
        assert {n for n in ahead.SHARED if configurations.holds_for(n, Card(999, shared))} == architectures


def test_tiles_are_what_the_kernels_can_do() -> None:
    for key, tile in TABLE.items():
        assert tile.BLOCK_M >= 16 and tile.BLOCK_N >= 16
        # 255 registers for each thread are all that an SM has for 256 threads.
        assert tile.num_warps <= 8
        if key.kernel.startswith("relative") and not key.kernel.endswith("_positions"):
            assert tile.BLOCK_M <= tile.BLOCK_N
        assert (tile.CARRY is not None) == (key.kernel in configurations.CARRYING)
        assert tile.FRESH in (None, True) and (tile.FRESH is None or key.kernel in configurations.RENEWING)
        assert tile.PIECES in (None, 2, 4) and (tile.PIECES is None or key.kernel in configurations.CUTTING)
