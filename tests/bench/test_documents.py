"""README and docs show what `bench/results` holds, and nothing by hand."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace

import pytest
from pyxlbert.bench import documents, report, tables
from pyxlbert.bench.counted import counted

from pyxlbert import cli


@pytest.mark.parametrize("page", documents.documents(), ids=lambda page: page.name)
def test_a_page_shows_the_results(page) -> None:
    text = page.read_text(encoding="utf-8")
    assert documents.filled(text) == text, "python -m pyxlbert.bench.documents --write"


def test_every_picture_is_of_the_results() -> None:
    folder, wanted = documents.ROOT / "docs" / "benchmarks", documents.drawings()
    assert wanted and {path.name for path in folder.glob("*.svg")} == {path.name for path in wanted}
    for path, svg in wanted.items():
        assert path.read_text(encoding="utf-8") == svg, f"{path.name}: python -m pyxlbert.bench.documents --write"


def test_every_device_has_a_page_with_pictures_first() -> None:
    for results in documents.RESULTS.glob("*.json"):
        text = (documents.ROOT / "docs" / "benchmarks" / f"{results.stem}.md").read_text(encoding="utf-8")
        assert 0 < text.index("![") < text.index("\n## ") < text.index("<!-- results")
        overview = (documents.ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
        assert f"](benchmarks/{results.stem}.md)" in overview


def test_a_device_without_a_page_gets_one(tmp_path, monkeypatch) -> None:
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    shutil.copy(documents.RESULTS / "epyc-zen4-2-cores.json", results / "mine.json")
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    monkeypatch.setattr(documents, "RESULTS", results)
    monkeypatch.setattr(documents, "documents", lambda: sorted((tmp_path / "docs").rglob("*.md")))
    assert documents.main([]) == 1 and documents.main(["--write"]) == 0 and documents.main([]) == 0
    text = (tmp_path / "docs" / "benchmarks" / "mine.md").read_text(encoding="utf-8")
    assert "](mine-ratios.svg)" in text and "## MiniLM" in text and "x86_64 AMD EPYC" in text
    (tmp_path / "docs" / "benchmarks" / "mine-ratios.svg").write_text("old")
    assert documents.main([]) == 1


def test_every_table_of_ratios_comes_from_results() -> None:
    for page in documents.documents():
        outside = documents._BLOCK.sub("", page.read_text(encoding="utf-8"))
        assert not re.search(r"^\|.*\| ratio \|.*\| of limit \|", outside, re.MULTILINE), page.name


def test_a_wrong_number_is_made_anew(tmp_path, monkeypatch, capsys) -> None:
    page = tmp_path / "page.md"
    block = "<!-- results epyc-zen4-2-cores.json: MiniLM -->\n{}<!-- end -->"
    page.write_text(f"before\n{block.format('| old |')}\nafter", encoding="utf-8")
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    monkeypatch.setattr(documents, "documents", lambda: [page])
    monkeypatch.setattr(documents, "drawings", dict)
    assert documents.main([]) == 1 and "old" in page.read_text(encoding="utf-8")
    assert documents.main(["--write"]) == 0 and documents.main([]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter") and "old" not in text
    assert tables.table(documents._of("epyc-zen4-2-cores.json", "MiniLM")) in text
    page.write_text(block.replace("MiniLM", "nothing"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"epyc-zen4-2-cores\.json: got no rows of 'nothing'"):
        documents.main([])


def test_every_model_that_was_trained_is_on_a_page() -> None:
    shown = " ".join(
        block["subjects"]
        for page in documents.documents()
        for block in documents._BLOCK.finditer(page.read_text(encoding="utf-8"))
        if block["what"] == "runs"
    )
    for results in documents.TRAINED.glob("*.json"):
        runs = json.loads(results.read_text(encoding="utf-8"))["runs"]
        assert runs and [run["name"] for run in runs if run["name"] not in shown] == []
    with pytest.raises(ValueError, match=r"results.json: got no run 'nothing'"):
        documents.filled("<!-- runs results.json: nothing -->\n<!-- end -->")


def test_a_command_that_is_shown_has_options_that_there_are() -> None:
    """What a page says to type is what the command takes."""
    for results in documents.TRAINED.glob("*.json"):
        for run in json.loads(results.read_text(encoding="utf-8"))["runs"]:
            program, *words = shlex.split(run["command"])
            assert program == "pyxlbert" and cli._parser().parse_args(words)


def test_results_of_before_work_was_counted_have_it_from_the_specs() -> None:
    """What a row would say if it was raced today, beside what an older file's limit and rate say of it."""
    entry = next(row for row in documents._of("xeon-amx-2-cores.json", "relative_attention") if not row["work"])
    device = documents._results("xeon-amx-2-cores.json")["device"]
    (row,) = counted([report.row_from(entry)])
    assert row.work.length and row.work.bytes
    assert 0.8 < row.work.flops / row.limit / 1e9 / device["gemm_float32"] < 1.25
    assert counted([row]) == [row]
    (unknown,) = counted([replace(row, case="3x3", work=report.Work())])
    assert unknown.work == report.Work()
