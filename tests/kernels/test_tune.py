"""The search for tiles: its candidates, its judges, and the table that it writes."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
configurations = importlib.import_module("pyxlbert.kernels._configurations")
tiles = importlib.import_module("pyxlbert.bench.tiles")
tune = importlib.import_module("pyxlbert.bench.tune")
SOURCE = ROOT / "kernels" / "tiles.csv"
HEAD = ",".join((*configurations.Key._fields, *configurations.Tile._fields)) + "\n"


def test_the_table_is_what_the_search_would_write(tmp_path) -> None:
    """Written anew it is the same, byte for byte: no row stands there by hand."""
    path = tmp_path / "table.csv"
    shutil.copy(SOURCE, path)
    tune.write_table(path, configurations.TABLE)
    assert path.read_bytes() == SOURCE.read_bytes()


def test_rows_that_say_what_an_older_architecture_says_are_left_out(tmp_path) -> None:
    path = tmp_path / "table.csv"
    one, other, third = tune.Tile(64, 64, 4, 2), tune.Tile(32, 64, 4, 1, False), tune.Tile(64, 64, 4, 2, maxnreg=None)
    keys = [tune.Key("relative_fwd", architecture, 2, 64, False) for architecture in (80, 90, 100, 120)]
    tune.write_table(path, dict(zip(keys, (one, one, other, third), strict=True)))
    assert path.read_text(encoding="utf-8") == (
        f"{HEAD}"
        "relative_fwd,80,2,64,False,False,64,64,4,2,,255,,\n"
        "relative_fwd,100,2,64,False,False,32,64,4,1,False,255,,\n"
        "relative_fwd,120,2,64,False,False,64,64,4,2,,,,\n"
    )
    # Nor are those for calls without segments that say what those with them say.
    keys = [
        tune.Key("relative_fwd", *key) for key in ((80, 2, 64, False, True), (80, 2, 64, False), (90, 2, 64, False))
    ]
    tune.write_table(path, dict(zip(keys, (one, one, other), strict=True)))
    assert path.read_text(encoding="utf-8") == (
        f"{HEAD}"
        "relative_fwd,80,2,64,False,True,64,64,4,2,,255,,\n"
        "relative_fwd,90,2,64,False,False,32,64,4,1,False,255,,\n"
    )


ROW = "relative_fwd,80,2,64,False,True,64,64,4,2,,255,,\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got no table of tiles, wanted kernel,architecture,bytes,head_size,extras,segments,BLOCK_M,"),
        (ROW, "got no table of tiles, wanted kernel,architecture,"),
        (f"{HEAD}{ROW}{ROW}", "line 3: got a second row for ('relative_fwd', 80, 2, 64, False, True)"),
        (f"{HEAD}relative_fwd,80,2,64\n", "line 2: got relative_fwd,80,2,64, which is no row of tiles"),
        (f"{HEAD}{ROW.strip()},1\n", "line 2: got relative_fwd,80,2,64,False,True,64,64,4,2,,255,,,1, which is no row"),
        (f"{HEAD}{ROW.replace('80', 'ada')}", "line 2: got relative_fwd,ada,2,64,"),
        (f"{HEAD}\n", "line 2: got nothing, wanted a row of tiles"),
    ],
    ids=["empty", "no names", "twice", "short", "long", "no number", "empty line"],
)
def test_what_is_no_table_of_tiles_is_named(text: str, message: str, tmp_path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        configurations.read_table(path)


def test_candidates_are_tiles_that_the_kernels_can_do() -> None:
    for key, tile in configurations.TABLE.items():
        found = tiles.candidates(key.kernel, key.bytes)
        assert tile in found, (key, tile)
        for one in found:
            assert one.num_warps <= 8 and (one.CARRY is None) == (key.kernel not in configurations.CARRYING)
            assert one.FRESH is None or key.kernel in configurations.RENEWING
            assert one.PIECES is None or key.kernel in configurations.CUTTING
            if key.kernel.startswith("relative") and not key.kernel.endswith("_positions"):
                assert one.BLOCK_M <= one.BLOCK_N


def test_calls_ask_for_every_row_of_the_table() -> None:
    """In a search every kernel is met, with and without masks: what no call asks for would never be tuned."""
    search = tiles.Search(90, lambda *_: 0.0, run=False)
    for head_size in (32, 64, 96, 128):
        for dtype in (torch.bfloat16, torch.float32):
            met = set(search.keys(list(tiles.calls(head_size, dtype, [(1, 32)], "cpu"))))
            wanted = {k for k in configurations.TABLE if (k.bytes, k.head_size) == (dtype.itemsize, head_size)}
            wanted = {key._replace(architecture=90) for key in wanted}
            # Every kernel has rows for 64 and 128; between and below them only those whose tiles spill there.  Calls
            # without segments may go by the rows of those with them.
            if head_size in (64, 128):
                met = {key if key in wanted else key._replace(segments=key.kernel.startswith("rel")) for key in met}
                assert wanted == met
            else:
                assert wanted <= met


def test_a_search_takes_the_cheapest(monkeypatch) -> None:
    """With a judge that is told what costs what."""
    costs = {tile: 1.0 + place for place, tile in enumerate(reversed(tiles.candidates("attention_fwd", 2)))}

    def judge(kernel, grid, arguments, options) -> float | None:
        tile = tune.Tile(*(options[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")))
        return costs[tile] if tile.num_stages < 3 else None

    search = tiles.Search(90, judge, run=False)
    calls = list(tiles.calls(64, torch.bfloat16, [(1, 32)], "cpu"))
    key = tune.Key("attention_fwd", 90, 2, 64, False)
    for tile, cost in costs.items():
        wanted = None if tile.num_stages == 3 else 3 * cost
        assert search.cost(key, tile, calls) == wanted
    # One that has cost more than the best so far is not measured to its end.
    tile = max(costs, key=costs.__getitem__)._replace(num_stages=2)
    costs[tile] = 5.0
    assert search.cost(key, tile, calls, most=15.0) == 15.0 and len(search.costs) == 3
    assert search.cost(key, tile, calls, most=9.0) is None and len(search.costs) == 2


def watch(judge, monkeypatch) -> None:
    """A search that asks this judge in the compiler's place."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tune, "compiled", lambda architecture: judge)
    monkeypatch.setattr(tune.ahead, "compile_for", lambda architecture: None)


def test_a_search_that_was_ended_goes_on_where_it_was(monkeypatch, tmp_path) -> None:
    """Every row is written as it is found, no tile is compiled twice, and what has changed since is compiled anew."""
    table, state = tmp_path / "table.csv", tmp_path / "state.json"
    table.write_text(HEAD, encoding="utf-8")
    command = ["--compile", "90", "--only", "attention_bwd_r*", "attention_fwd", "--head-sizes", "64"]
    command += ["--dtypes", "bfloat16", "--write", str(table), "--state", str(state)]
    compiled, sources, limits = [], {}, {"most": None}

    def judge(kernel, grid, arguments, options) -> float:
        if len(compiled) == limits["most"]:
            raise KeyboardInterrupt
        compiled.append((kernel, options["BLOCK_M"], options["BLOCK_N"], options["num_warps"], options["num_stages"]))
        return 0.0 if options["num_warps"] == 8 else 4.0

    watch(judge, monkeypatch)
    usual = tiles.source_of
    monkeypatch.setattr(
        tiles, "source_of", lambda kernel, *rest: usual(kernel, *rest) + sources.get(kernel.__name__, "")
    )
    assert tune.main(command) == 0
    whole, needed = table.read_text(encoding="utf-8"), list(compiled)
    assert len(configurations.read_table(table)) == 4
    assert tune.main(command) == 0 and compiled == needed
    # A kernel that has changed is compiled anew, and no other.
    sources["fwd"] = "changed"
    assert tune.main(command) == 0
    again = compiled[len(needed) :]
    assert again and {kernel.__name__ for kernel, *_ in again} == {"fwd"}
    # The same from nothing, ended twice on its way.
    table.write_text(HEAD, encoding="utf-8")
    state.unlink()
    compiled.clear()
    for limits["most"] in (len(needed) // 3, len(needed) // 2):
        with pytest.raises(KeyboardInterrupt):
            tune.main(command)
        assert len(configurations.read_table(table)) < 4 and state.exists()
    assert configurations.read_table(table)
    limits["most"] = None
    assert tune.main(command) == 0 and table.read_text(encoding="utf-8") == whole
    # Only the tile at which it was ended was begun again.
    assert len(compiled) <= len(needed) + 2 * max(needed.count(one) for one in needed)
    state.write_text('{"key": 1}', encoding="utf-8")
    with pytest.raises(SystemExit):
        tune.main(command)


def test_rows_that_another_search_has_written_stay(tmp_path) -> None:
    path = tmp_path / "table.csv"
    shutil.copy(SOURCE, path)
    assert configurations.read_table(path) == configurations.TABLE
    keys = [tune.Key("attention_fwd", architecture, 2, 64, False) for architecture in (86, 90)]
    for key in keys:
        tune.write_rows(path, {key: tune.Tile(16, 16, 2, 1, maxnreg=None)})
    assert configurations.read_table(path) == configurations.TABLE | dict.fromkeys(
        keys, tune.Tile(16, 16, 2, 1, maxnreg=None)
    )


@pytest.mark.parametrize("mend", [True, False], ids=["mend", "anew"])
def test_mending_leaves_alone_what_needs_no_spills(mend: bool, monkeypatch, capsys, tmp_path) -> None:
    """Of three rows of the table one is said to spill, at its tile alone."""
    kinds = (True, True), (False, True), (False, False)
    spilling, *others = (tune.Key("relative_bwd_rows", 90, 4, 64, *kind) for kind in kinds)
    card = configurations.Card(90, 227 * 1024)
    before = {key: configurations.row_for(key.kernel, card, *key[2:]) for key in (spilling, *others)}
    candidates = tiles.candidates(spilling.kernel, 4)
    assert before[spilling] not in [before[key] for key in others] and candidates[0] not in before.values()

    compiled = []

    def judge(kernel, grid, arguments, options) -> float:
        compiled.append(tune.Tile(*(options.get(name) for name in tune.Tile._fields)))
        return 8.0 if compiled[-1] == before[spilling] else 0.0

    def told(key) -> str:
        return f"{tuple(key)}: {tuple(before[key])} {8 * compiled.count(before[key])} bytes of stack\n"

    watch(judge, monkeypatch)
    path = tmp_path / "table.csv"
    shutil.copy(SOURCE, path)
    options = ["--compile", "90", "--only", "relative_bwd_rows", "--head-sizes", "64", "--dtypes", "float32"]
    options += ["--state", str(tmp_path / "state.json")]
    assert tune.main([*options, "--check"]) == 1
    assert capsys.readouterr().out == told(spilling)
    assert tune.main([*options, *(["--mend"] if mend else []), "--write", str(path)]) == 0
    # What holds is not searched for, and said nothing of.
    lines = [line for line in capsys.readouterr().out.splitlines() if "before" in line]
    assert len(lines) == (1 if mend else 3)
    rows = dict(line.split(": ", 1) for line in lines)
    assert rows[str(tuple(spilling))].startswith(str(tuple(candidates[0])))
    if not mend:
        assert all(rows[str(tuple(other))].startswith(str(tuple(candidates[0]))) for other in others)
    assert configurations.read_table(path)[spilling] == candidates[0]


def test_a_mended_row_changes_no_key_that_holds(monkeypatch, tmp_path) -> None:
    """Calls without segments had the tile of those with them, and go on having it where it needs no spills."""
    asked = []

    def cost(search, key, tile, calls, most=None) -> float:
        asked.append((key, tile))
        return 8.0 if key == spilling and tile == before else 0.0

    watch(None, monkeypatch)
    monkeypatch.setattr(tiles.Search, "cost", cost)
    path = tmp_path / "table.csv"
    spilling = tune.Key("relative_bwd_table", 86, 4, 128, False, True)
    plain = spilling._replace(segments=False)
    search = tiles.Search(86, None, run=False)
    before = search.row(spilling)
    assert search.row(plain) == before != tiles.candidates(spilling.kernel, 4)[0]
    shutil.copy(SOURCE, path)
    options = ["--compile", "86", "--only", spilling.kernel, "--head-sizes", "128", "96", "--dtypes", "float32"]
    assert tune.main([*options, "--mend", "--write", str(path), "--state", str(tmp_path / "state.json")]) == 0
    best = tiles.candidates(spilling.kernel, 4)[0]
    search.table = configurations.read_table(path)
    assert (search.row(spilling), search.row(plain)) == (best, before)
    # Heads of 96 are asked with what was found for 128.
    assert [tile for key, tile in asked if key == spilling._replace(head_size=96)] == [best]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mend"], "--mend: wanted --compile beside it"),
        (["--check"], "--check: wanted --compile beside it"),
        (["--compile", "90", "--only", "rows"], "--only: got 'rows', wanted names or patterns of attention_bwd_bias,"),
        (["--compile", "90", "--check", "--write", "x.csv"], "--check and --write: got both"),
        (["--compile", "90", "--write", "nowhere/table.csv"], "--write: got nowhere/table.csv, which is no file"),
        (["--compile", "90", "--write", "/proc/version"], "--write: the directory of '/proc/version' is not writable"),
        (["--compile", "90", "--state", "/proc/x/state.json"], "--state: '/proc' is not writable"),
        (["--compile", "91"], "argument --compile: invalid choice: 91"),
    ],
)
def test_wrong_options_are_named_before_the_search(arguments: list[str], message: str, monkeypatch, capsys) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tune.ahead, "compile_for", lambda architecture: pytest.fail("the search began"))
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        tune.main([])
    assert ended.value.code == 2 and "no CUDA device is here: give --compile ARCHITECTURE" in capsys.readouterr().err
