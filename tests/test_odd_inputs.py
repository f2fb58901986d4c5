"""Inputs that a person may name by mistake: said in one line, by what it is and not by what came of it."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pyxlbert import cli
from pyxlbert.embed.job import embed_files
from pyxlbert.testing.directories import tiny_bert


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_bert(tmp_path / "m")
    (tmp_path / "good.txt").write_text("the\n")
    pq.write_table(pa.table({"text": ["the"]}), tmp_path / "there.parquet")
    for name in ("utf16.txt", "utf16.tsv", "utf16.json"):
        (tmp_path / name).write_bytes("text\tlabel\nthe\ta\n".encode("utf-16"))
    for name in ("packed.txt", "packed.tsv"):
        (tmp_path / name).write_bytes(gzip.compress(b"text\tlabel\nthe\ta\n"))
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


TASK = "finetune text-classification --model m --out o --train"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("embed utf16.txt --model m --out x.npy", "utf16.txt is UTF-16, wanted UTF-8: convert it first"),
        ("embed packed.txt --model m --out x.npy", "packed.txt is packed by gzip, wanted UTF-8: unpack it first"),
        ("embed utf16.txt --model m --out x/", "utf16.txt is UTF-16, wanted UTF-8: convert it first"),
        ("embed packed.txt --model m --out x/", "packed.txt is packed by gzip, wanted UTF-8: unpack it first"),
        (f"{TASK} utf16.tsv", "utf16.tsv is UTF-16, wanted UTF-8"),
        (f"{TASK} packed.tsv", "packed.tsv is packed by gzip, wanted UTF-8"),
        ("pretrain bert utf16.txt --out o", "utf16.txt is UTF-16, wanted UTF-8"),
        ("pretrain bert packed.txt --out o", "packed.txt is packed by gzip, wanted UTF-8"),
        ("embed pipe --model m --out x/", "pipe is a device or a pipe, wanted a file, which can be read twice"),
        ("embed good.txt ./good.txt --model m --out x/", "good.txt is given twice"),
        ("embed good.txt --model m --out x/ --vector-column=", "--vector-column: got '', wanted a name"),
    ],
)
def test_it_is_told_what_it_is(folder: Path, words: str, line: str, capsys) -> None:
    assert cli.main(words.split()) in (1, 2)
    told = capsys.readouterr().err
    assert line in told, told


@pytest.mark.parametrize("out", ["x.npy", "x/"])
@pytest.mark.parametrize("others", [[], ["good.txt"]])
def test_an_empty_name_is_not_the_working_directory(folder: Path, out: str, others: list[str], capsys) -> None:
    """Whose Parquet files would be inputs that nobody named."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["embed", "", *others, "--model", "m", "--out", out])
    assert ended.value.code == 2 and "FILE: got '', wanted a name" in capsys.readouterr().err
    with pytest.raises(ValueError, match="inputs: got '', wanted a name"):
        embed_files(["", *others], folder / "m", folder.parent / "x")


def test_a_name_with_a_line_end_is_told_in_one_line(folder: Path, capsys) -> None:
    assert cli.main(["embed", "no\nsuch\x1b[2J.txt", "--model", "m", "--out", "x.npy"]) == 1
    assert capsys.readouterr().err == ("pyxlbert embed: error: 'no\\nsuch\\x1b[2J.txt': there is no such file\n")
