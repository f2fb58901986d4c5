"""The table of tiles: complete, and within what the kernels and the hardware can do."""

from __future__ import annotations

import importlib

configurations = importlib.import_module("pyxlbert.kernels._configurations")
TABLE, Key = configurations.TABLE, configurations.Key


def test_every_call_has_a_tile() -> None:
    for kernel in {key.kernel for key in TABLE}:
        for size in (2, 4):
            most = configurations.most_head_size(kernel)
            if kernel.startswith("relative_bwd_queries_table") and size == 4:
                # Rows longer than that never come here: see `backward` of kernels/_relative.py.
                most = 64
            for head_size in (1, 16, 32, 64, 80, 96, 128, 256):
                for extras in (False, True) if kernel != "attention_bwd_bias" else (True,):
                    for device in (80, 86, 89, 90, 100, 120):
                        if head_size <= most:
                            assert configurations.row_for(kernel, device, size, head_size, extras) in TABLE.values()


def test_a_row_holds_until_the_next_architecture() -> None:
    for key, tile in TABLE.items():
        newer = [other.architecture for other in TABLE if other[2:] == key[2:] and other.kernel == key.kernel]
        assert configurations.row_for(key.kernel, key.architecture, *key[2:]) == tile
        if key.architecture == max(newer):
            assert configurations.row_for(key.kernel, 120, *key[2:]) == tile


def test_tiles_are_what_the_kernels_can_do() -> None:
    for key, tile in TABLE.items():
        assert tile.BLOCK_M >= 16 and tile.BLOCK_N >= 16
        # 255 registers for each thread are all that an SM has for 256 threads.
        assert tile.num_warps <= 8
        if key.kernel.startswith("relative") and not key.kernel.endswith("_positions"):
            assert tile.BLOCK_M <= tile.BLOCK_N
        assert (tile.CARRY is not None) == (key.kernel in configurations.CARRYING)
