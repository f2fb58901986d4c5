"""Files appear whole or not at all; what cannot be read is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyxlbert.files import model_directory, require_file, whole_file

pytestmark = pytest.mark.quick


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.npy"
    with whole_file(path) as first:
        first.write_bytes(b"first")
        with pytest.raises(ZeroDivisionError), whole_file(path) as failing:
            failing.write_bytes(b"half")
            raise ZeroDivisionError
        with whole_file(path) as second:
            second.write_bytes(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


def test_a_block_that_wrote_nothing_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("before")
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "x"):
        pass
    assert (tmp_path / "x").read_text() == "before"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="no-such"):
        model_directory(tmp_path / "no-such")
    with pytest.raises(NotADirectoryError, match="file"):
        require_file(tmp_path / "file", "config.json")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        require_file(tmp_path, "config.json")
