"""One set of races: whoever times an op reads its spec, and no shape stands twice."""

from __future__ import annotations

import re
from collections import Counter

from pyxlbert.bench import lengths, on_gpu, ops, revision, test_races
from pyxlbert.bench.documents import ROOT

from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import BOTH, Use

CASES = {(spec.name, case.id): case for spec in SPECS.values() for case in spec.cases}


def test_every_race_is_a_case_of_its_ops_spec() -> None:
    suites = [race for suite in ops.SUITES.values() for race in ops.races(suite)]
    gpu = [race for race in on_gpu.races() if isinstance(race, ops.Race)]
    assert len(suites) > 80 and len(gpu) > 20 and len(test_races.OPS) > 40
    for race in (*suites, *gpu, *test_races.OPS):
        assert (race.subject, race.case) in CASES, race
    for race in lengths.races():
        assert race.case is CASES[lengths.SPEC.name, race.case.id]
    for race in on_gpu.races():
        if isinstance(race, on_gpu.HostRace):
            assert race.case is CASES[race.spec.name, race.case.id]
    for name, case, _, _ in revision.cases(list(SPECS), BOTH, []):
        assert case is CASES[name, case.id]


def test_no_case_stands_twice() -> None:
    for spec in SPECS.values():
        for use in Use:
            found = Counter((case.id, case.gradients) for case in spec.used(use))
            assert not [one for one, count in found.items() if count > 1], (spec.name, use)


def test_no_shape_is_written_where_it_is_raced() -> None:
    """Inputs of an op are made in its spec alone, and widths of the models that are raced stand in one file."""
    for path in sorted((ROOT / "bench").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(?:Inputs|Case|Scores)\(", text), path.name
        if path.name != "sizes.py":
            assert not re.search(r"\b(?:3072|1536)\b", text), path.name
