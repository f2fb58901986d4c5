"""Links that lead nowhere are named as they were given, with where they lead, and are not taken for files left out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pyxlbert import SentenceEncoder, cli
from pyxlbert.models import BertModel
from pyxlbert.testing.directories import tiny_bert

LEADS = "(a link to gone/away)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_bert(tmp_path / "m")
    (tmp_path / "good.tsv").write_text("text\tlabel\nthe\ta\nhello\tb\n")
    (tmp_path / "good.txt").write_text("the\n")
    for name in ("l", "l.txt", "l.tsv", "l.parquet", "l.npy"):
        (tmp_path / name).symlink_to("gone/away")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("embed l.txt --model m --out x.npy", f"l.txt {LEADS}: there is no such file"),
        ("embed l.parquet --model m --out x/", f"l.parquet {LEADS} is not there"),
        ("embed good.txt --model l --out x.npy", f"'l' {LEADS} does not exist"),
        ("embed good.txt --model m --out l.npy", f"--out: the directory of 'l.npy' {LEADS} does not exist"),
        ("embed good.txt --model m --out x.npy --precision int8 --ranges l.npy", f"l.npy {LEADS}: there is no such"),
        ("predict l.txt --model m --out x.txt", f"FILE: got 'l.txt' {LEADS}, which is not there"),
        ("finetune text-classification --model m --train l.tsv --out o", f"--train: got 'l.tsv' {LEADS}, which is not"),
        ("finetune text-classification --model l --train good.tsv --out o", f"'l' {LEADS} does not exist"),
        ("evaluate text-classification --model l --data good.tsv", f"'l' {LEADS} does not exist"),
        ("pretrain bert l.txt --out o", f"FILE: 'l.txt' {LEADS} does not exist"),
        ("pretrain bert good.txt --out o --tokenizer l", f"--tokenizer: 'l' {LEADS} does not exist"),
        ("convert m x --config l", f"--config: 'l' {LEADS} is no file"),
        ("export --onnx l x.onnx", f"'l' {LEADS} does not exist"),
        ("evaluate tokens --text l.txt --model m", f"l.txt {LEADS}: there is no such file"),
    ],
)
def test_a_command_names_both(folder: Path, words: str, line: str, capsys) -> None:
    assert cli.main(words.split()) in (1, 2)
    told = capsys.readouterr().err
    assert line in told


FILES = ("config.json", "model.safetensors", "vocab.txt", "tokenizer.json", "tokenizer_config.json", "modules.json")
OTHERS = ("sentence_bert_config.json", "config_sentence_transformers.json")


@pytest.mark.parametrize("name", [*FILES, *OTHERS])
def test_a_models_file_that_is_no_longer_there_is_not_left_out(folder: Path, name: str) -> None:
    """As in a cache of downloads, whose folders are made of links."""
    (folder / "m" / name).unlink(missing_ok=True)
    (folder / "m" / name).symlink_to("../../blobs/1f")
    with pytest.raises(FileNotFoundError, match=f"{name} is a link to ../../blobs/1f, where no file is"):
        SentenceEncoder.from_pretrained(folder / "m")
    if name in ("config.json", "model.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"{name} is a link to ../../blobs/1f, where no file is"):
            BertModel.from_pretrained(folder / "m")


def test_links_that_lead_somewhere_are_followed(folder: Path) -> None:
    shutil.copytree(folder / "m", folder / "blobs")
    for path in (folder / "m").iterdir():
        path.unlink()
        path.symlink_to(f"../blobs/{path.name}")
    os.symlink("m", "model")
    assert SentenceEncoder.from_pretrained("model").encode(["the"]).shape == (1, 32)


def test_an_outputs_form_is_that_of_the_name_that_was_given(folder: Path) -> None:
    (folder / "out.npy").symlink_to("store")
    assert cli.main(["embed", "good.txt", "--model", "m", "--out", "out.npy"]) == 0
    assert np.load(folder / "store").shape == (1, 32) and (folder / "out.npy").is_symlink()


def test_a_folder_of_inputs_loses_none(folder: Path, capsys) -> None:
    (folder / "in").mkdir()
    pq.write_table(pa.table({"text": ["the"]}), folder / "in" / "a.parquet")
    (folder / "in" / "b.parquet").symlink_to("gone")
    assert cli.main(["embed", "in", "--model", "m", "--out", "x/"]) == 2
    assert "in/b.parquet is a link to gone, where no file is" in capsys.readouterr().err


def test_one_text_is_not_read_twice(folder: Path, capsys) -> None:
    """However it is spelt."""
    (folder / "again.txt").symlink_to("good.txt")
    assert cli.main(["pretrain", "bert", "good.txt", "again.txt", "--out", "o"]) in (1, 2)
    assert "FILE: got 'again.txt' twice, wanted each file once" in capsys.readouterr().err
