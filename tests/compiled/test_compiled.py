"""A check that has passed is known by the content of what it depends on, and by nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import compiled
import pytest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compiled, "ROOT", tmp_path)
    monkeypatch.setattr(compiled, "FILE", tmp_path / "compiled.json")
    monkeypatch.setattr(compiled, "ALL", False)
    monkeypatch.setattr(compiled, "WRITES", True)
    (tmp_path / "kernel.cu").write_text("a")
    (tmp_path / "header.h").write_text("b")
    return tmp_path


def test_a_digest_is_of_names_contents_and_words(folder: Path) -> None:
    files = [folder / "kernel.cu", folder / "header.h"]
    first = compiled.digest(files, "-O3", "13.0")
    assert first == compiled.digest(files[::-1] + files, "-O3", "13.0")
    others = {compiled.digest(files, "-O3", "13.1"), compiled.digest(files[:1], "-O3", "13.0"), compiled.digest(files)}
    (folder / "header.h").write_text("c")
    others.add(compiled.digest(files, "-O3", "13.0"))
    (folder / "header.h").write_text("b")
    (folder / "header.h").rename(folder / "other.h")
    others.add(compiled.digest([files[0], folder / "other.h"], "-O3", "13.0"))
    assert len(others) == 5 and first not in others


def test_what_has_passed_is_written_and_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled.write("cuda b", "1")
    compiled.write("cuda a", "2")
    compiled.write("cuda b", "3")
    assert json.loads(compiled.FILE.read_text()) == {"cuda a": "2", "cuda b": "3"}
    # A run that writes makes every check, and one that fails has not passed, whatever was before.
    assert not compiled.passed("cuda b", "3") and not compiled.passed("cuda c", "3")
    assert json.loads(compiled.FILE.read_text()) == {"cuda a": "2"}
    compiled.write("cuda b", "3")
    monkeypatch.setattr(compiled, "WRITES", False)
    assert compiled.passed("cuda b", "3") and not compiled.passed("cuda b", "1") and not compiled.passed("cuda c", "3")
    compiled.write("cuda c", "4")
    assert not compiled.passed("cuda c", "4")
    # So does one of everything, which writes nothing: it compiles something else.
    monkeypatch.setattr(compiled, "ALL", True)
    assert not compiled.passed("cuda b", "3")
    monkeypatch.setattr(compiled, "WRITES", True)
    compiled.write("cuda c", "4")
    assert "cuda c" not in compiled.FILE.read_text()


def test_no_file_says_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "WRITES", False)
    assert not compiled.passed("cuda a", "1")


@pytest.mark.parametrize("number", [1, 2])
def test_a_known_test_is_made_once(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    @compiled.known(lambda: "1")
    def test(number: int) -> None:
        made.append(number)
        assert number == 1, "planted"

    def fails() -> bool:
        try:
            test(number=number)
        except AssertionError as error:
            return "planted" in str(error)
        return False

    for write in (True, False):
        monkeypatch.setattr(compiled, "WRITES", write)
        assert fails() == (number == 2)
    # One that fails is made again.
    assert made == [number] * number
    name = f"tests/compiled/test_compiled.py::test_a_known_test_is_made_once[{number}]"
    assert json.loads(compiled.FILE.read_text()) == ({name: "1"} if number == 1 else {})


def test_files_of_editors_count_for_nothing(folder: Path) -> None:
    before = compiled.sources(".", ".cu", ".h")
    (folder / ".kernel.cu").symlink_to(folder / "nowhere")
    (folder / "kernel.cu.orig").write_text("d")
    assert compiled.sources(".", ".cu", ".h") == before
