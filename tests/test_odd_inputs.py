"""Inputs that a person may name by mistake: said in one line, by what it is and not by what came of it."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pyxlbert import cli
from pyxlbert.embed.job import embed_files
from pyxlbert.models import BertModel
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


def test_a_working_directory_that_is_gone_is_named(folder: Path, capsys, monkeypatch) -> None:
    def gone() -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", gone)
    assert cli.main(["embed", "good.txt", "--model", "m", "--out", "x.npy"]) == 1
    assert "--out: got 'x.npy', but the working directory is gone" in capsys.readouterr().err


def test_a_first_line_without_end_is_not_told_whole(folder: Path, capsys) -> None:
    (folder / "wide.tsv").write_text("x" * 100000 + "\nthe\n")
    assert cli.main([*TASK.split(), "wide.tsv", "--text-column", "text"]) == 1
    told = capsys.readouterr().err
    assert "wide.tsv: has no column 'text'; its header has 'xxx" in told and len(told) < 500


def test_tensors_of_another_layout_are_refused(folder: Path) -> None:
    model = BertModel.from_pretrained(folder / "m")
    nested = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([1])])
    for ids, layout in ((nested, "nested"), (torch.ones(2, 2).long().to_sparse(), "sparse_coo")):
        with pytest.raises(TypeError, match=f"input_ids: got a tensor of layout {layout}, wanted a strided one"):
            model(ids)
        with pytest.raises(TypeError, match=f"attention_mask: got a tensor of layout {layout}, wanted a strided one"):
            model(torch.ones(2, 2).long(), ids)


def test_a_name_with_a_line_end_is_told_in_one_line(folder: Path, capsys) -> None:
    assert cli.main(["embed", "no\nsuch\x1b[2J.txt", "--model", "m", "--out", "x.npy"]) == 1
    assert capsys.readouterr().err == ("pyxlbert embed: error: 'no\\nsuch\\x1b[2J.txt': there is no such file\n")
