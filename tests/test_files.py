"""Files appear whole or not at all; what cannot be read is named."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from pyxlbert.files import model_directory, read_json, require_file, said, setting, whole_directory, whole_file

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


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    """The name beside it, which a file has until it is whole, is no longer."""
    path = tmp_path / ("x" * 251 + ".npy")
    with whole_file(path) as part:
        part.write_text("a")
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    folder = tmp_path / ("y" * 255)
    with whole_directory(folder) as part:
        (part / "a").write_text("a")
    assert (folder / "a").is_file()


def test_the_systems_errors_are_said_as_sentences(tmp_path: Path) -> None:
    def of(path: Path) -> str:
        with pytest.raises(OSError) as caught:
            path.read_text()
        return said(caught.value)

    (tmp_path / "file").touch()
    assert of(tmp_path / "absent") == f"{tmp_path / 'absent'}: there is no such file"
    assert of(tmp_path) == f"{tmp_path}: is a folder, wanted a file"
    assert of(tmp_path / "file" / "x") == f"{tmp_path / 'file' / 'x'}: a part of this path is a file, wanted a folder"
    # Words of our own stay, and so do errors that are of no file.
    own = OSError(errno.ENOSPC, "cannot be written: no room", "x.npy")
    assert said(own) == "x.npy: cannot be written: no room"
    assert said(FileNotFoundError("--out: it is missing")) == "--out: it is missing"
    assert said(ValueError("x: got 1")) == "x: got 1"


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np, torch
from pyxlbert.files import whole_file
from pyxlbert.models import BertConfig, BertModel
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = BertModel(BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
folder = Path(sys.argv[1])
def vectors():
    with whole_file(folder / "x.npy") as part, part.open("xb") as file:
        np.save(file, np.zeros(40_000, dtype=np.float32))
for write in (vectors, lambda: model.save_pretrained(folder)):
    try:
        write()
    except OSError as error:
        print(type(error).__name__, error)
print(sorted(one.name for one in folder.iterdir()))
"""


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, left = done.stdout.splitlines()
    assert "cannot be written: 40000 requested and" in first and str(tmp_path / "x.npy") in first
    assert "cannot be written" in second and str(tmp_path / "model.safetensors") in second
    assert left == "[]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "is not JSON that can be read: it is nested too deep"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON: Exceeds the limit"),
        ("{", "is not valid JSON: Expecting property name"),
    ],
    ids=["deep", "digits", "cut"],
)
def test_json_that_cannot_be_read_names_its_file(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        read_json(tmp_path / "x.json")
    assert str(tmp_path / "x.json") in str(caught.value) and words in str(caught.value)
    with pytest.raises(ValueError, match="a is inf; wanted a whole number or a number"):
        setting(tmp_path, {"a": float("inf")}, "a", (int, float))
