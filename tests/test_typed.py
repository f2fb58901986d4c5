"""Errors on the command line call options as they are typed, errors of Python's functions as Python does."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyxlbert import cli
from pyxlbert.commands import typed
from pyxlbert.testing.directories import tiny_bert
from pyxlbert.training.options import TrainingOptions

TASKS = {
    "text-classification": "bad.tsv",
    "token-classification": "bad.tsv",
    "question-answering": "bad.json",
    "multiple-choice": "bad.jsonl",
}
# Commands of which nothing is wrong but the data, or the model where there are none: what is read last of all.
COMMANDS = {
    "embed": "embed bad.txt --model m --out x.npy",
    "embed, many files": "embed bad.txt --model m --out x/",
    "predict": "predict bad.txt --model m --out x.tsv",
    "export": "export --onnx none x.onnx",
    "bench": "bench --picture x.svg",
    "evaluate stsb": "evaluate stsb --data . --model m",
    **{f"finetune {task}": f"finetune {task} --model m --train {file} --out o" for task, file in TASKS.items()},
    **{f"evaluate {task}": f"evaluate {task} --model m --data {file}" for task, file in TASKS.items()},
    **{f"pretrain {kind}": f"pretrain {kind} bad.txt --out o" for kind in ("bert", "albert", "xlnet")},
}
# What the texts come before: how many layers the model has, and places of its own.
ANY = {"--layers", "--max-length"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_bert(Path("m"))
    Path("bad.tsv").write_text("text\tlabel\nonly\n")
    Path("bad.txt").write_bytes(b"a\n\xff\n")
    for name in ("bad.json", "bad.jsonl"):
        Path(name).write_text("{")
    return tmp_path


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of what a command that fails says."""
    try:
        status = cli.main(words)
    except SystemExit as ended:
        status = ended.code
    assert status in (1, 2)
    return capsys.readouterr().err.splitlines()[-1]


def numbers(words: list[str]) -> Iterator[argparse.Action]:
    """The options of a command that take a number, or what looks like one."""
    parser = cli._parser()
    for action in typed._leaf(parser, parser.parse_args(words))._actions:
        if action.option_strings and action.type not in (None, Path) and not action.choices:
            yield action


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_out_of_bounds_is_named(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = COMMANDS[name].split()
    whole = run(words, capsys)
    actions = list(numbers(words))
    assert actions or name == "export"
    for action in actions:
        option = action.option_strings[0]
        given = ["-1", "nan", "1e40"] if action.type is float else ["-1", "0", str(10**30)]
        said = [run([*words, f"{option}={value}"], capsys) for value in given]
        named = [line for line in said if re.search(rf"error: .*{option}[: ]", line)]
        # Another option may not go with it; a value that means something is not spoken of: what was wrong before is.
        assert set(said) - set(named) <= {whole}, (option, said)
        assert named or option in ANY, (option, said)


def test_python_names_the_field() -> None:
    with pytest.raises(ValueError, match=r"^batch_size: got 0, wanted"):
        TrainingOptions(batch_size=0)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("pretrain bert bad.txt --out o --steps 0", "--steps: got 0, wanted"),
        ("pretrain bert bad.txt --out o --eval-every 0", "--eval-every: got 0, wanted"),
        ("pretrain bert bad.txt --out o --eval none", "--eval: 'none' does not exist"),
        ("pretrain bert bad.txt --out o --eval bad.txt", "--eval: got 'bad.txt', which is trained on"),
        ("pretrain bert none --out o", "FILE: 'none' does not exist"),
        ("pretrain bert bad.txt --out m", "--out: 'm' is not empty"),
        ("pretrain bert bad.txt --out o --config none", "--config: 'none' does not exist"),
        ("pretrain bert bad.txt --out o --tokenizer none", "--tokenizer: 'none' does not exist"),
        ("pretrain xlnet bad.txt --out o --mem-len 8", "--mem-len: got 8, wanted at least --reuse-len, 64"),
        ("finetune text-classification --model m --train bad.tsv --out m", "--out: 'm' is not empty"),
        ("predict bad.txt --model m --out x.csv", "--out: got 'x.csv', wanted"),
        ("predict bad.txt --model m --out bad.txt", "--out: got 'bad.txt', which is the input"),
        ("embed bad.jsonl --model m --out ./bad.jsonl", "--out: got './bad.jsonl', which is the input"),
        ("evaluate tokens --text bad.txt --model m", "bad.txt is not UTF-8"),
        ("pretrain bert /dev/null --out o", "FILE: '/dev/null' is a device or a pipe"),
        ("pretrain bert bad.txt --out o --tokenizer .", "--tokenizer: '.' holds neither tokenizer.json nor"),
        ("pretrain bert bad.txt --out o --tokenizer bad.txt", "--tokenizer: 'bad.txt' is a file, wanted a folder"),
        ("pretrain bert bad.txt --out o --config bad.txt", "--config: 'bad.txt' is a file, wanted a folder"),
        ("predict none.txt --model m --out x.tsv", "FILE: got 'none.txt', which is not there"),
        ("predict bad.txt --model none --out x.tsv", "--model: 'none' is no folder"),
        ("evaluate multiple-choice --model none --data bad.jsonl", "--model: 'none' is no folder"),
        ("quantise none", "DIR: 'none' does not exist"),
        ("convert none/none o", "SOURCE: 'none/none' does not exist"),
        ("convert m m", "OUTPUT: 'm' is not empty"),
        ("export --onnx none x.onnx", "MODEL_DIR: 'none' does not exist"),
        ("export --onnx m x", "OUTPUT.onnx: got 'x', wanted"),
        ("export --onnx m x.onnx --opset 3", "--opset: got 3, wanted"),
        ("embed bad.txt --model none --out x/", "--model: 'none' is no folder"),
        ("embed bad.txt --model m --out x/ --columns a,a", "--columns: got a, a, one of them twice"),
    ],
)
def test_what_is_wrong_is_called_as_it_is_typed(folder: Path, words: str, line: str, capsys) -> None:
    assert f"error: {line}" in run(words.split(), capsys)


def test_a_run_that_goes_on_otherwise(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("in.txt").write_text("a b c.\nb c d.\n\nc d e.\nd e f.\n")
    Path("other.txt").write_text("f e d.\ne d c.\n")
    usual = [
        "--size",
        "tiny",
        "--vocab-size",
        "40",
        "--steps",
        "1",
        "--batch-size",
        "1",
        "--max-length",
        "16",
        "--out",
        "o",
    ]
    assert cli.main(["pretrain", "bert", "in.txt", *usual]) == 0
    for change, line in (
        ("--batch-size 2", "--batch-size: got 2, but the run in o was started with 1"),
        ("--steps 3", "--steps: got 3, but"),
        ("--max-length 30", "--max-length: got 30, but"),
        ("--size mini", "hidden_size: got 256, but"),
        ("--cased", "--cased: got True, but the run in o was started with None"),
        ("--no-cased", "--no-cased: got True, but the run in o was started with None"),
        ("--eval other.txt", "--eval: got another content than that with which the run in o was started"),
    ):
        assert f"error: {line}" in run(["pretrain", "bert", "in.txt", *usual, "--resume", *change.split()], capsys)


@pytest.mark.parametrize(
    ("words", "message", "line"),
    [
        # An option that is given stands for False.
        ("finetune text-classification --model m --train a --out o --no-header", "header: got False, but True", None),
        # The subject is a file, which is called like an option.
        ("predict text_column --model m --out x.tsv", "text_column: line 3 is not UTF-8", "text_column: line 3"),
        # What is quoted is what was given.
        ("predict a --model m --out x.tsv", "text_column: got 'pair_column', pair_column", "--text-column: got 'pair_"),
        # Of other names the words stay.
        ("predict a --model m --out x.tsv", "model_type: got 'x', wanted batch_size", "model_type: got 'x', wanted b"),
    ],
)
def test_words(folder: Path, words: str, message: str, line: str | None) -> None:
    Path("text_column").touch()
    parser = cli._parser()
    options = parser.parse_args(words.split())
    said = typed.speaker(parser, options, words.split())(ValueError(message))
    assert said == "--no-header: got True, but False" if line is None else said.startswith(line)
    if "'pair_column'" in message:
        assert said == "--text-column: got 'pair_column', --pair-column"
