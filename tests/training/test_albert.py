"""ALBERT in every task, and begun from nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from small_task import albert, bert, choices, options, squad, table, tagged

from pyxlbert import cli
from pyxlbert.testing import tolerances
from pyxlbert.training.finetune import evaluate, finetune
from pyxlbert.training.saved import open_trained

DATA = {
    "text-classification": (table, {}),
    "token-classification": (tagged, {"crf": True, "lstm": 4}),
    "question-answering": (squad, {"nulls": True, "stride": 4, "max_question": 8}),
    "multiple-choice": (choices, {}),
}


@pytest.mark.parametrize("task", DATA)
def test_a_task_of_an_albert(tmp_path: Path, task: str) -> None:
    make, settings = DATA[task]
    data = make(tmp_path / ("a.json" if task == "question-answering" else "a.jsonl" if "choice" in task else "a.tsv"))
    given = options(epochs=1, evaluate_every=100)
    scores = finetune(task, albert(tmp_path / "m"), data, data, tmp_path / "out", settings=settings, options=given)
    assert evaluate(tmp_path / "out", data) == pytest.approx(scores, abs=tolerances.FLOAT64)
    assert type(open_trained(tmp_path / "out").trained().model).__name__.startswith("Albert")
    if not settings.get("crf"):
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        peer = getattr(transformers, config["architectures"][0])
        _, info = peer.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("kind", [albert, bert])
def test_a_model_is_begun_from_nothing(kind, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = table(tmp_path / "a.tsv")
    folder = kind(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    command = ["finetune", "text-classification", "--model", str(folder), "--train", str(data), "--dev", str(data)]
    assert cli.main([*command, "--out", str(tmp_path / "a"), "--max-steps", "1"]) == 1
    assert "no weights in" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert cli.main([*command, "--out", str(tmp_path / "a"), "--max-steps", "1", "--fresh"]) == 0
    assert "new: all weights" in capsys.readouterr().err


def test_texts_that_are_cut_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pairs have no windows: what is beyond the limit is not read, and said."""
    data = tmp_path / "a.tsv"
    rows = [("the " * number, "hello " * number, "yes" if number % 2 else "no") for number in range(1, 9)]
    data.write_text("a\tb\tlabel\n" + "".join(f"{a}\t{b}\t{label}\n" for a, b, label in rows))
    command = ["finetune", "text-classification", "--model", str(bert(tmp_path / "m")), "--train", str(data)]
    command += ["--dev", str(data), "--pair-column", "2", "--label-column", "3", "--max-length", "11"]
    assert cli.main([*command, "--out", str(tmp_path / "a"), "--max-steps", "1", "--long-texts", "windows"]) == 0
    said = f"{data}: 4 texts or pairs are longer than 11 tokens and were cut"
    assert capsys.readouterr().err.count(said) == 2
    assert cli.main(["evaluate", "text-classification", "--model", str(tmp_path / "a"), "--data", str(data)]) == 0
    assert said in capsys.readouterr().err
    assert cli.main(["predict", str(data), "--model", str(tmp_path / "a"), "--out", str(tmp_path / "x.txt")]) == 0
    assert said in capsys.readouterr().err and len((tmp_path / "x.txt").read_text().splitlines()) == 8
