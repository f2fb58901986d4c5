"""The README's first example can be pasted with nothing on disk."""

from __future__ import annotations

import re
from pathlib import Path

TEXT = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_first_example_runs(capsys) -> None:
    names: dict = {}
    exec(compile(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[0], "README.md", "exec"), names)
    assert names["query"].shape == names["out"].shape == (2, 512, 12, 64)
    assert "relative_attention on cpu:" in capsys.readouterr().out


def test_it_is_one_screen_of_prose() -> None:
    assert len(TEXT.splitlines()) <= 100
