"""The races as a pytest-benchmark suite: `python -m pytest bench --benchmark-only`.

pytest-benchmark times our call; the peers' medians of the interleaved race and the ratio stand in `extra_info`.
"""

from __future__ import annotations

from typing import Any

import pytest
from pyxlbert.bench import models, ops


def _name(race: Any) -> str:
    parts = (getattr(race, name) for name in ("subject", "case", "dtype") if hasattr(race, name))
    return " ".join(map(str, parts)).replace("torch.", "") or str(race)


def record(benchmark: Any, race: Any) -> None:
    """Runs a race and hands its samples to pytest-benchmark."""
    row = race.run()
    benchmark.group = f"{row.subject} {row.case} {row.dtype}"
    benchmark.extra_info |= {name: timing.median for name, timing in row.timings.items()}
    benchmark.extra_info |= {"limit": row.limit, "note": row.note}
    peer = row.best_peer
    if peer is not None:
        benchmark.extra_info |= {"best_peer": peer[0], "ratio": peer[1].median / row.ours.median}
    print(row.line())


@pytest.mark.parametrize("race", list(ops.races()), ids=_name)
def test_op(benchmark: Any, race: ops.Race) -> None:
    record(benchmark, race)
    ours, _, _ = race.build()
    benchmark.pedantic(ours, rounds=5, iterations=1, warmup_rounds=1)


@pytest.mark.parametrize("race", list(models.races()), ids=_name)
def test_model(benchmark: Any, race: models.ModelRace) -> None:
    record(benchmark, race)
    benchmark.pedantic(race.ours(), rounds=3, iterations=1, warmup_rounds=1)
