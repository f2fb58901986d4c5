"""What can be known without a model's weights is told before they are read: here they are missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pyxlbert import cli
from pyxlbert.testing.directories import tiny_bert

ROWS = [("the hello", "a"), ("world the", "b")] * 4


def table(path: Path, rows: list[tuple[str, ...]]) -> None:
    path.write_text("".join("\t".join(row) + "\n" for row in [("text", "label"), *rows]), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder and a trained classifier, both without weights, and inputs with faults."""
    root = tmp_path_factory.mktemp("files")
    tiny_bert(root / "m")
    table(root / "good.tsv", ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert cli.main(f"{FINETUNE} --out trained --max-steps 1".split()) == 0
    for name in ("m", "trained"):
        (root / name / "model.safetensors").unlink()
    table(root / "label.tsv", [("the", "c")])
    (root / "good.txt").write_text("the\n")
    (root / "bad.txt").write_bytes(b"a\n\xff\n")
    (root / "words.txt").write_text("w1 w2.\nw2 w3.\n\nw3 w4.\nw4 w5.\n")
    (root / "sts-dev.csv").write_text("g\tf\t2012\t0\t1\ta\tb")
    np.save(root / "ranges.npy", np.zeros((2, 3), dtype=np.float32))
    question = {"id": "1", "question": "the", "answers": [{"text": "the", "answer_start": 0}]}
    paragraphs = [{"context": "the hello world", "qas": [question]}]
    (root / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    (root / "there.onnx").touch()
    cls = tiny_bert(root / "cls")
    (cls / "model.safetensors").unlink()
    (cls / "1_Pooling").mkdir()
    (cls / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"))
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    (cls / "modules.json").write_text(json.dumps(modules))
    wide = {"n_layer": 1, "d_model": 16, "n_head": 2, "d_inner": 16, "mem_len": 8, "reuse_len": 16}
    (root / "xlnet").mkdir()
    (root / "xlnet/config.json").write_text(json.dumps({"model_type": "xlnet", "vocab_size": 9000, **wide}))
    return root


FINETUNE = "finetune text-classification --model m --train good.tsv"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("embed bad.txt --model m --out x.npy", "bad.txt: line 2 is not UTF-8"),
        *(
            (f"embed good.txt --model m --out {out} {option}", line)
            for out in ("x.npy", "x/")
            for option, line in (
                ("--layers 7", "--layers: got 7"),
                ("--truncate-dim 99", "--truncate-dim: got 99, wanted at most the 32"),
                ("--prompt-name no", "--prompt-name: got 'no'"),
                ("--precision int8 --ranges ranges.npy", "--ranges: got shape (2, 3), wanted (2, 32)"),
                ("--precision int8 --ranges good.txt", "--ranges: 'good.txt' is no .npy file"),
                ("--precision int8", "--ranges: got none for precision 'int8'"),
            )
        ),
        ("predict label.tsv --model trained --out x.tsv --text-column nothing", "has no column 'nothing'"),
        (
            "predict good.tsv --model trained --out x.tsv --choices-column k",
            "--choices-column: text-classification has",
        ),
        ("predict bad.txt --model trained --out x.tsv", "bad.txt: line 2 is not UTF-8"),
        ("predict good.txt --model trained --out x.tsv --words", "--words: the model is trained for text-class"),
        ("predict good.txt --model trained --out m", "--out: got 'm', wanted a name that ends in"),
        ("evaluate text-classification --model trained --data label.tsv", "the label is 'c', wanted one of a, b"),
        ("evaluate text-classification --model trained --data none.tsv", "none.tsv: there is no such file"),
        ("evaluate multiple-choice --model trained --data good.tsv", "--model: 'trained' is trained for text-class"),
        ("evaluate stsb --data . --model cls --compare", "--compare: cls does not pool by mean alone"),
        ("evaluate stsb --data . --model m none", "--model: 'none' is no folder"),
        ("evaluate stsb --data . --model m --batch-size 0", "--batch-size: got 0"),
        ("export --onnx m there.onnx", "OUTPUT.onnx: 'there.onnx' exists"),
        ("export --onnx m x.onnx --task text-generation", "--task: got 'text-generation'"),
        (f"{FINETUNE} --out m", "--out: 'm' is not empty, and holds no run"),
        (f"{FINETUNE} --out trained", "--out: 'trained' holds a run"),
        (f"{FINETUNE} --out trained --resume --max-steps 1 --seed 3", "--seed: got 3, but the run in trained was"),
        (f"{FINETUNE} --out o --max-length 999", "--max-length: got 999, wanted at most 64, the model's positions"),
        (f"{FINETUNE} --out o --max-length 0", "--max-length: got 0, wanted at least 1"),
        (f"{FINETUNE} --out o --dev label.tsv", "the label is 'c', wanted one of a, b"),
        (f"{FINETUNE} --out o --dev none.tsv", "--dev: got 'none.tsv', which is not there"),
        (f"{FINETUNE} --out o --label-column nothing", "has no column 'nothing'"),
        # Before the data too, which is not there.
        *(
            (f"finetune {task} --model m --train none.tsv --out o {option}", f"{line} too; wanted another column")
            for task, option, line in (
                ("text-classification", "--text-column a --label-column a", "--label-column: got 'a', which is --text"),
                ("text-classification", "--pair-column b --label-column b", "--label-column: got 'b', which is --pair"),
                ("text-classification", "--pair-column b --text-column b", "--pair-column: got 'b', which is --text"),
                ("multiple-choice", "--label-column choices", "--label-column: got 'choices', which is --choices"),
            )
            for line in [f"{line}-column"]
        ),
        (
            f"{FINETUNE} --out o --label-column text",
            "good.tsv: label_column 'text' and text_column 1 are the same column",
        ),
        (f"{FINETUNE} --out o --label-column 1", "good.tsv: label_column '1' and text_column 1 are the same column"),
        (
            "predict good.tsv --model trained --out x.tsv --pair-column 1 --text-column 1",
            "--pair-column: got '1', which",
        ),
        ("predict good.tsv --model trained --out x.tsv --pair-column text", "pair_column 'text' and text_column 1 are"),
        ("finetune question-answering --model m --train squad.json --out o --max-length 12", "--stride: got 128"),
        # Of a new model it is the text that takes long.
        ("pretrain xlnet words.txt --out o --perm-size 3", "--perm-size: got 3"),
        ("pretrain xlnet words.txt --out o --num-predict 900", "--num-predict: got 900"),
        ("pretrain xlnet words.txt --out o --reuse-len 16 --config xlnet", "config: 'mem_len' is 8"),
        ("pretrain bert words.txt --out o --config m", "--max-length: got 128, wanted at most max_position_embeddings"),
    ],
)
def test_it_is_told_first(folder: Path, words: str, line: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert cli.main(words.split()) in (1, 2)
    told = capsys.readouterr().err.splitlines()
    assert line in told[-1] and len(told) == 1, told
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [
        "embed good.txt --model m --out x.npy",
        "embed good.txt --model m --out x/",
        "predict good.tsv --model trained --out x.tsv",
        "evaluate text-classification --model trained --data good.tsv",
        "evaluate stsb --data . --model m",
        "export --onnx m x.onnx",
        f"{FINETUNE} --out o",
        "quantise m",
    ],
)
def test_else_the_weights_are_missed(folder: Path, words: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(words.split()) in (1, 2)
    assert "no weights in" in capsys.readouterr().err
