"""`pyxlbert pretrain` from text to a folder: what it holds, how it goes on, and what is refused without a trace."""

from __future__ import annotations

import contextlib
import csv
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import corpora
import pytest
import torch
from safetensors.torch import load_file

from pyxlbert import cli
from pyxlbert.models import BertConfig, BertForPreTraining, XLNetConfig, XLNetLMHeadModel
from pyxlbert.testing import tolerances
from pyxlbert.training.options import TrainingOptions
from pyxlbert.training.pretraining import PairOptions, SegmentOptions
from pyxlbert.training.pretraining.run import MODELS, Pretraining, pretrain
from pyxlbert.training.pretraining.vocabularies import FILES, TRAINERS

BERT = {"vocab_size": 67, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
XLNET = {"vocab_size": 71, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "mem_len": 24, "reuse_len": 16}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    corpora.bert_vocabulary(tmp_path / "bert")
    corpora.xlnet_vocabulary(tmp_path / "xlnet")
    BertConfig(**BERT).save_pretrained(tmp_path / "bert")
    XLNetConfig(**XLNET).save_pretrained(tmp_path / "xlnet")
    (tmp_path / "train.txt").write_text(corpora.text(30), encoding="utf-8")
    (tmp_path / "held_out.txt").write_text(corpora.text(10, seed=1), encoding="utf-8")
    return tmp_path


def run(
    files: Path, kind: str, out: str, resume: bool = False, say=lambda line: None, **given: Any
) -> dict[str, float]:
    data = PairOptions(max_length=32) if kind == "bert" else SegmentOptions(max_length=32, reuse_len=16, num_predict=6)
    what = Pretraining(
        files=[files / "train.txt"],
        data=data,
        config=files / kind,
        tokenizer=files / kind,
        evaluate=[files / "held_out.txt"],
    )
    usual = {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "evaluate_every": 2, "progress": False}
    return pretrain(what, files / out, options=TrainingOptions(**usual | given), resume=resume, say=say)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


class _Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["bert", "xlnet"])
def test_a_run_goes_on_to_the_same_bits(files: Path, kind: str) -> None:
    scores = run(files, kind, "straight", micro_batch_size=2)

    def kill(line: str) -> None:
        if line.startswith("step 4:"):
            raise _Killed

    with pytest.raises(_Killed):
        run(files, kind, "broken", say=kill, micro_batch_size=2)
    said: list[str] = []
    assert run(files, kind, "broken", resume=True, say=said.append, workers=1, micro_batch_size=2) == scores
    assert "goes on after step 2" in said
    one, other = weights(files / "straight"), weights(files / "broken")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with (files / "straight" / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert any(row["dev_unigram_entropy"] for row in rows)
    loaded = (BertForPreTraining if kind == "bert" else XLNetLMHeadModel).from_pretrained(files / "straight")
    assert loaded.loading_info["missing_keys"] == []
    assert all((files / "straight" / name).is_file() for name in FILES if (files / kind / name).is_file())


def test_a_step_of_passes_is_a_step_of_one(files: Path) -> None:
    """Of another number of labels each, in one pass or in four."""
    dropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertConfig(**BERT | dropped).save_pretrained(files / "bert")
    whole = run(files, "bert", "whole")
    parts = run(files, "bert", "parts", micro_batch_size=1)
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=tolerances.MODEL_GRADIENT_FLOAT32)


def test_an_xlnet_learns_and_its_memories_help(files: Path) -> None:
    """Each document has four words of its own, of which a memory knows more than a row shows."""
    for name, documents in (("train.txt", 150), ("held_out.txt", 20)):
        chance = Random(name)
        made = []
        for _ in range(documents):
            words = chance.sample(corpora.WORDS, 4)
            made.append("\n".join(" ".join(chance.choices(words, k=8)) for _ in range(12)))
        (files / name).write_text("\n\n".join(made), encoding="utf-8")
    sizes = {"d_model": 32, "n_layer": 2, "d_inner": 64, "dropout": 0.0, "initializer_range": 0.1}
    XLNetConfig(**XLNET | sizes).save_pretrained(files / "xlnet")
    options = {"max_steps": 100, "evaluate_every": 100, "batch_size": 16, "schedule": "constant"}
    scores = run(files, "xlnet", "out", learning_rate=5e-3, **options)
    assert scores["loss"] < scores["unigram_entropy"] - 0.3
    assert scores["loss"] < scores["loss_without_memories"]


def command(files: Path, kind: str, *options: str) -> list[str]:
    usual = ["--size", "tiny", "--max-length", "32", "--batch-size", "4", "--steps", "2", "--vocab-size", "100"]
    return ["pretrain", kind, str(files / "train.txt"), "--out", str(files / "out"), *usual, *options]


def test_a_run_goes_on_with_its_text_however_that_is_spelt(files: Path, capsys, monkeypatch) -> None:
    own = ["--eval", str(files / "held_out.txt"), "--tokenizer", str(files / "bert"), "--config", str(files / "bert")]
    assert cli.main([*command(files, "bert"), *own]) == 0
    monkeypatch.chdir(files)
    (files / "link.txt").symlink_to("train.txt")
    (files / "link").symlink_to("bert")
    (files / "config.json").write_bytes((files / "bert" / "config.json").read_bytes())
    for text in ("train.txt", "../" + files.name + "/train.txt", "link.txt"):
        given = ["--eval", "./held_out.txt", "--tokenizer", "link/", "--config", "config.json", "--resume"]
        words = [text if one == str(files / "train.txt") else one for one in command(files, "bert")]
        assert cli.main([*words, *given]) == 0, capsys.readouterr().err
        assert "the run is finished already" in capsys.readouterr().err
    os.link("train.txt", "linked.txt")
    assert cli.main([*command(files, "bert"), "--eval", "linked.txt", "--resume"]) == 1
    assert "--eval: got 'linked.txt', which is trained on" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bert", "albert", "xlnet"])
def test_the_command_trains_a_tokenizer_and_a_model(files: Path, kind: str, capsys) -> None:
    own = {"bert": ["--whole-words", "--max-gram", "2"], "albert": [], "xlnet": ["--reuse-len", "16"]}[kind]
    assert cli.main(command(files, kind, "--eval", str(files / "held_out.txt"), *own)) == 0
    told = capsys.readouterr()
    names = [line.split()[0] for line in told.out.splitlines()]
    second = {"bert": "next_sentence_loss", "albert": "sentence_order_loss", "xlnet": "loss_without_memories"}[kind]
    assert names == ["loss", second, "unigram_entropy"]
    assert "trains a tokenizer of 100 pieces" in told.err and "unigram entropy" in told.err
    assert MODELS[kind].from_pretrained(files / "out").loading_info["missing_keys"] == []
    assert cli.main(command(files, kind, "--eval", str(files / "held_out.txt"), *own)) == 1
    assert "holds a run; --resume goes on with it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("xlnet", ("--reuse-len", "30"), "--reuse-len: got 30"),
        ("xlnet", ("--reuse-len", "16", "--perm-size", "3"), "--perm-size: got 3"),
        ("xlnet", ("--reuse-len", "16", "--mem-len", "8"), "--mem-len: got 8"),
        ("xlnet", ("--reuse-len", "16", "--batch-size", "5", "--micro-batch-size", "2"), "--batch-size: got 5"),
        ("bert", ("--batch-size", "100000"), "--batch-size: got 100000, but the text has"),
        ("bert", ("--max-length", "3"), "--max-length: got 3"),
        ("bert", ("--config", "nowhere"), "nowhere"),
        ("bert", ("--dropout", "2"), "--dropout: got 2"),
        ("albert", ("--max-gram", "0"), "--max-gram: got 0"),
        ("albert", ("--config", "nowhere", "--dropout", "0"), "--dropout: given together with config"),
        ("bert", ("--threads", "0"), "--threads: got 0"),
        ("bert", ("--threads", "2147483648"), "--threads: got 2147483648, wanted at most 4096"),
        ("bert", ("--learning-rate", "-1"), "--learning-rate: got -1"),
        # The library that trains it takes memory for so many at once, and ends the process.
        ("bert", ("--vocab-size", "2147483647"), "--vocab-size: got 2147483647, wanted at most"),
        ("bert", ("--max-length", "2147483647"), "--max-length: got 2147483647, wanted at most"),
        ("xlnet", ("--mem-len", "2147483647"), "--mem-len: got 2147483647, wanted at most"),
        ("bert", ("--config", "bert"), "--vocab-size: got 100, wanted at most the configuration's, 67"),
        ("xlnet", ("--config", "few", "--tokenizer", "xlnet", "--reuse-len", "16"), "'vocab_size' is 70, wanted at"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    files: Path, kind: str, options, words: str, capsys, monkeypatch
) -> None:
    """And before the text is read, unless it says so."""
    XLNetConfig(**XLNET | {"vocab_size": 70}).save_pretrained(files / "few")
    monkeypatch.chdir(files)
    if "the text has" not in words:
        monkeypatch.setattr(
            "pyxlbert.training.pretraining.run.open_or_build", lambda *_, **__: pytest.fail("the text was read")
        )
        monkeypatch.setitem(TRAINERS, kind, lambda *_, **__: pytest.fail("a tokenizer was trained"))
    assert cli.main(command(files, kind, *options)) == 1
    assert words in capsys.readouterr().err
    assert not (files / "out").exists()


def test_a_model_that_cannot_be_made_leaves_nothing(files: Path, monkeypatch) -> None:
    """Where its memory is not there, above all."""
    monkeypatch.setitem(MODELS, "bert", lambda config: torch.empty(2**60))
    assert cli.main(command(files, "bert")) == 1
    assert not (files / "out").exists()


@pytest.mark.parametrize("ended", [KeyboardInterrupt, SystemExit(143), OSError(28, "the disk is full")])
def test_what_is_prepared_stays_when_a_new_run_is_broken_off(files: Path, ended, capsys, monkeypatch) -> None:
    """At the moment when a model is built: the tokenizer and the tokens are there, and are not made again."""
    build = MODELS["bert"]

    def broken_off(config: BertConfig) -> None:
        raise ended

    broken_off.config_class = build.config_class
    monkeypatch.setitem(MODELS, "bert", broken_off)
    with contextlib.suppress(SystemExit):
        assert cli.main(command(files, "bert")) in (1, 130)
    assert "keeps what is prepared; the same command with --resume goes on" in capsys.readouterr().err
    assert not (files / "out" / ".lock").exists()
    monkeypatch.setitem(MODELS, "bert", build)
    # What a kill leaves of a tokenizer and of a text that are half made.
    for name in (".tokenizer.0.part", "text/.0.1.part"):
        (files / "out" / name).mkdir()
    assert cli.main(command(files, "bert", "--resume")) == 0
    told = capsys.readouterr().err
    assert "trains a tokenizer" not in told and "tokenises" not in told
    assert not list((files / "out").rglob("*.part"))


def test_a_link_as_output_keeps_pointing_where_it_did(files: Path) -> None:
    (files / "out").symlink_to("elsewhere")
    assert cli.main(command(files, "bert")) == 0
    assert (files / "out").is_symlink() and (files / "elsewhere" / "model.safetensors").is_file()


def test_a_run_that_is_broken_off_at_once_leaves_nothing(files: Path, monkeypatch) -> None:
    monkeypatch.setitem(TRAINERS, "bert", lambda *given, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(command(files, "bert")) == 130
    assert not (files / "out").exists()


def test_two_processes_in_one_folder(files: Path, capsys) -> None:
    """The second one is told before it reads anything, and leaves the first one's files alone."""
    assert cli.main(command(files, "bert")) == 0
    code = "import sys; from pathlib import Path; from pyxlbert.training.claim import claimed\n"
    code += "with claimed(Path(sys.argv[1])):\n    print('mine', flush=True); sys.stdin.read()"
    ends = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(files / "out")], **ends) as other:
        assert other.stdout.readline() == b"mine\n"
        capsys.readouterr()
        (files / "out" / "checkpoints" / ".step-00000009.0.part").mkdir()
        assert cli.main(command(files, "bert", "--resume")) == 1
        assert "--out: another process trains in" in capsys.readouterr().err
        assert (files / "out" / "checkpoints" / ".step-00000009.0.part").is_dir()
        other.kill()
    assert cli.main(command(files, "bert", "--resume")) == 0
    assert not (files / "out" / ".lock").exists()


def test_text_that_is_trained_on_is_not_held_out(files: Path, capsys) -> None:
    assert cli.main(command(files, "bert", "--eval", str(files / "train.txt"))) == 1
    assert "which is trained on" in capsys.readouterr().err
    (files / "bad.txt").write_bytes(b"w1\nw2 \xff\n")
    assert cli.main(command(files, "bert", "--eval", str(files / "bad.txt"))) == 1
    assert "bad.txt: line 2 is not UTF-8" in capsys.readouterr().err
    assert not (files / "out").exists()
