"""The choice between cuda and triton on a GPU: what a measured table says, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pyxlbert.bench import prefer

import pyxlbert
from pyxlbert.backends import OPS
from pyxlbert.backends import measured as table_of
from pyxlbert.backends.measured import Choice, Key

KEY = Key("attention", "bfloat16", 64, "9.0")


class OnGpu:
    """What the choice looks at of a CUDA tensor."""

    device = type("Device", (), {"type": "cuda", "index": 0})()
    dtype = torch.bfloat16

    def __init__(self, *shape: int) -> None:
        self.shape = torch.Size(shape)

    def numel(self) -> int:
        return self.shape.numel()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[Key, Choice]:
    table: dict[Key, Choice] = {}
    monkeypatch.setattr(table_of, "table", lambda: table)
    monkeypatch.setattr(table_of, "_capability", lambda device: "9.0")
    return table


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        ([(10, 1.0, 2.0), (20, 1.0, 2.0)], Choice(0, "cuda", "cuda")),
        ([(10, 2.0, 1.0), (20, 2.0, 1.0)], Choice(0, "triton", "triton")),
        ([(10, 2.0, 1.0), (20, 1.0, 2.0), (30, 1.0, 3.0)], Choice(20, "triton", "cuda")),
        ([(10, 1.0, 2.0), (20, 1.0, 3.0), (30, 2.0, 1.0)], Choice(30, "cuda", "triton")),
        # One threshold is all: the size in between loses little.
        ([(10, 1.0, 2.0), (20, 1.1, 1.0), (30, 1.0, 2.0)], Choice(0, "cuda", "cuda")),
    ],
)
def test_the_threshold_that_loses_least(times: list[tuple[int, float, float]], wanted: Choice) -> None:
    assert table_of.choose(times) == wanted


def test_the_faster_one_comes_first(measured) -> None:
    measured[KEY] = Choice(1000, "triton", "cuda")
    small, large = OnGpu(1, 2, 2, 64), OnGpu(1, 99, 2, 64)
    order = OPS["attention"]._order
    assert order(small) == ("triton", "cuda", "torch")
    assert order(large) == ("cuda", "triton", "torch")
    # Another head size, dtype or op was not measured.
    assert order(OnGpu(1, 2, 2, 128)) == ("cuda", "triton", "torch")
    assert OPS["layer_norm"]._order(small) == ("cuda", "triton", "torch")
    # A vendor's product has neither.
    assert OPS["linear"]._order(small) == ("cuda", "triton", "torch")


def test_the_reason_is_said(measured) -> None:
    measured[KEY] = Choice(1000, "triton", "cuda")
    assert table_of.reason("attention", OnGpu(1, 2, 2, 64)) == (
        "measured faster below 1000 elements on compute capability 9.0"
    )
    assert table_of.reason("attention", OnGpu(1, 99, 2, 64)).startswith("measured faster from 1000 elements")
    assert "not measured against triton" in table_of.reason("layer_norm", OnGpu(4, 64))


def test_the_table_that_is_shipped_names_ops_and_backends() -> None:
    for key, choice in table_of.table().items():
        assert key.op in OPS and {choice.small, choice.large} <= set(table_of.USUAL)


def test_the_tool_keeps_rows_of_other_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "measured.json"

    def row(capability: str, cuda: float) -> dict:
        return {"key": KEY._replace(capability=capability)._asdict(), "times": [[10, cuda, 1.0]]}

    prefer.write(path, [row("8.0", 2.0), row("9.0", 2.0)])
    prefer.write(path, [row("9.0", 0.5)])
    assert json.loads(path.read_text()) == [row("8.0", 2.0), row("9.0", 0.5)]
    if not torch.cuda.is_available():
        assert prefer.main(["--write", str(path)]) == 2
        assert "nothing was timed" in capsys.readouterr().err


def test_the_tool_tries_its_output_before_any_race(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prefer.main(["--write", "/proc/measured.json"])
    assert "--write: the directory of '/proc/measured.json' is not writable" in capsys.readouterr().err


def test_explain_says_it_for_tensors_on_the_cpu_too() -> None:
    assert "cpu: taken\n" in pyxlbert.backends.explain("layer_norm", torch.ones(2, 8)) + "\n"
