"""The search for tiles: its candidates, its judges, and the table that it writes."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
configurations = importlib.import_module("pyxlbert.kernels._configurations")
tune = importlib.import_module("pyxlbert.bench.tune")
SOURCE = ROOT / "kernels" / "_configurations.py"


def test_the_table_is_what_the_search_would_write(tmp_path) -> None:
    """Written anew it is the same, byte for byte: no row stands there by hand."""
    path = tmp_path / "table.py"
    shutil.copy(SOURCE, path)
    tune.write_table(path, configurations.TABLE)
    assert path.read_bytes() == SOURCE.read_bytes()


def test_rows_that_say_what_an_older_architecture_says_are_left_out(tmp_path) -> None:
    path = tmp_path / "table.py"
    path.write_text("TABLE: dict[Key, Tile] = {\n    old\n}\nrest\n", encoding="utf-8")
    one, other, third = tune.Tile(64, 64, 4, 2), tune.Tile(32, 64, 4, 1, False), tune.Tile(64, 64, 4, 2, maxnreg=None)
    keys = [tune.Key("relative_fwd", architecture, 2, 64, False) for architecture in (80, 90, 100, 120)]
    tune.write_table(path, dict(zip(keys, (one, one, other, third), strict=True)))
    assert path.read_text(encoding="utf-8") == (
        "TABLE: dict[Key, Tile] = {\n"
        '    Key("relative_fwd", 80, 2, 64, False): Tile(64, 64, 4, 2),\n'
        '    Key("relative_fwd", 100, 2, 64, False): Tile(32, 64, 4, 1, False),\n'
        '    Key("relative_fwd", 120, 2, 64, False): Tile(64, 64, 4, 2, maxnreg=None),\n'
        "}\nrest\n"
    )
    path.write_text("nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="got no table"):
        tune.write_table(path, {})
    assert path.read_text(encoding="utf-8") == "nothing\n"


def test_candidates_are_tiles_that_the_kernels_can_do() -> None:
    for key, tile in configurations.TABLE.items():
        found = tune.candidates(key.kernel, key.bytes)
        assert tile in found, (key, tile)
        for one in found:
            assert one.num_warps <= 8 and (one.CARRY is None) == (key.kernel not in configurations.CARRYING)
            if key.kernel.startswith("relative") and not key.kernel.endswith("_positions"):
                assert one.BLOCK_M <= one.BLOCK_N


def test_calls_ask_for_every_row_of_the_table() -> None:
    """In a search every kernel is met, with and without masks: what no call asks for would never be tuned."""
    search = tune.Search(90, lambda *_: 0.0, run=False)
    for head_size in (32, 64, 96, 128):
        for dtype in (torch.bfloat16, torch.float32):
            met = set(search.keys(list(tune.calls(head_size, dtype, [(1, 32)], "cpu"))))
            wanted = {k for k in configurations.TABLE if (k.bytes, k.head_size) == (dtype.itemsize, head_size)}
            wanted = {key._replace(architecture=90) for key in wanted}
            # Every kernel has rows for 64 and 128; between and below them only those whose tiles spill there.
            assert wanted == met if head_size in (64, 128) else wanted <= met


def test_a_search_takes_the_cheapest(monkeypatch) -> None:
    """With a judge that is told what costs what."""
    costs = {tile: 1.0 + place for place, tile in enumerate(reversed(tune.candidates("attention_fwd", 2)))}

    def judge(kernel, grid, arguments, options) -> float | None:
        tile = tune.Tile(*(options[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")))
        return costs[tile] if tile.num_stages < 3 else None

    search = tune.Search(90, judge, run=False)
    calls = list(tune.calls(64, torch.bfloat16, [(1, 32)], "cpu"))
    key = tune.Key("attention_fwd", 90, 2, 64, False)
    for tile, cost in costs.items():
        wanted = None if tile.num_stages == 3 else 3 * cost
        assert search.cost(key, tile, calls) == wanted
    # One that has cost more than the best so far is not measured to its end.
    tile = max(costs, key=costs.__getitem__)._replace(num_stages=2)
    costs[tile] = 5.0
    assert search.cost(key, tile, calls, most=15.0) == 15.0 and len(search.costs) == 3
    assert search.cost(key, tile, calls, most=9.0) is None and len(search.costs) == 2


@pytest.mark.parametrize("mend", [True, False], ids=["mend", "anew"])
def test_mending_leaves_alone_what_needs_no_spills(mend: bool, monkeypatch, capsys, tmp_path) -> None:
    """Of two kernels of the table one is said to spill, at its tile alone."""
    size, extras = (4, 64), (False, True)
    spilling, other = (tune.Key("relative_bwd_rows", 90, *size, extra) for extra in extras)
    card = configurations.Card(90, 227 * 1024)
    before = {key: configurations.row_for(key.kernel, card, *size, key.extras) for key in (spilling, other)}
    candidates = tune.candidates(spilling.kernel, 4)
    assert len({*before.values(), candidates[0]}) == 3

    def judge(kernel, grid, arguments, options) -> float:
        return 8.0 if tune.Tile(*(options.get(name) for name in tune.Tile._fields)) == before[spilling] else 0.0

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tune, "compiled", lambda architecture: judge)
    monkeypatch.setattr(tune.ahead, "compile_for", lambda architecture: None)
    path = tmp_path / "table.py"
    shutil.copy(SOURCE, path)
    options = ["--compile", "90", "--kernels", "relative_bwd_rows", "--head-sizes", "64", "--dtypes", "float32"]
    assert tune.main([*options, *(["--mend"] if mend else []), "--write", str(path)]) == 0
    rows = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert rows[str(tuple(spilling))].startswith(str(tuple(candidates[0])))
    assert rows[str(tuple(other))].startswith(str(tuple(before[other] if mend else candidates[0])))
    written = ", ".join(str(n) for n in candidates[0][:4])
    assert f'    Key("relative_bwd_rows", 90, 4, 64, False): Tile({written}),\n' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mend"], "--mend: wanted --compile beside it"),
        (["--compile", "90", "--write", "nowhere/table.py"], "--write: got nowhere/table.py, which is no file"),
        (["--compile", "91"], "argument --compile: invalid choice: 91"),
    ],
)
def test_wrong_options_are_named_before_the_search(arguments: list[str], message: str, monkeypatch, capsys) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tune.ahead, "compile_for", lambda architecture: pytest.fail("the search began"))
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_what_to_do() -> None:
    if torch.cuda.is_available():
        return
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pyxlbert.bench.tune"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "no CUDA device is here: give --compile ARCHITECTURE" in done.stderr
