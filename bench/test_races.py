"""The races as a pytest-benchmark suite, some minutes long: `python -m pytest bench --benchmark-only -k bias_gelu`.

pytest-benchmark times our call; the peers' medians of the interleaved race and the ratio stand in `extra_info`.  The
longest sequences and models of full depth are left to `python -m pyxlbert.bench`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pyxlbert.bench import models, ops

ALL = [race for suite in ("ops", "relative", "two_stream") for race in ops.races(ops.SUITES[suite])]
OPS = [race for race in ALL if not any(f"x{length}x" in race.case for length in (2048, 8192))]
MODELS = [
    replace(race, size="BERT 2 layers", rounds=3)
    for race in models.races()
    if isinstance(race, models.ModelRace) and race.length == 128
]


def _name(race: ops.Race | models.ModelRace) -> str:
    return str(race).replace("torch.", "")


def record(benchmark: Any, race: Any) -> None:
    """Runs a race and hands its samples to pytest-benchmark."""
    row = race.run()
    assert not row.faults, row.faults
    benchmark.group = f"{row.subject} {row.case} {row.dtype}"
    benchmark.extra_info |= {name: timing.median for name, timing in row.timings.items()}
    benchmark.extra_info |= {"limit": row.limit, "note": row.note}
    peer = row.best_peer
    if peer is not None:
        benchmark.extra_info |= {"best_peer": peer[0], "ratio": peer[1].median / row.ours.median}
    print(row.line())


@pytest.mark.parametrize("race", OPS, ids=_name)
def test_op(benchmark: Any, race: ops.Race) -> None:
    record(benchmark, race)
    benchmark.pedantic(race.build().ours, rounds=5, iterations=1, warmup_rounds=1)


@pytest.mark.parametrize("race", MODELS, ids=_name)
def test_model(benchmark: Any, race: models.ModelRace) -> None:
    record(benchmark, race)
    benchmark.pedantic(race.ours(), rounds=3, iterations=1, warmup_rounds=1)
