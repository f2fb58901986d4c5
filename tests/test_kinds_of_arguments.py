"""What users call from Python says of an argument of another kind which it is, what came and what was wanted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import pyxlbert
from pyxlbert.testing.directories import tiny_bert
from pyxlbert.training.finetune import evaluate, finetune
from pyxlbert.training.options import TrainingOptions
from pyxlbert.training.prediction import predict_file
from pyxlbert.training.pretraining import PairOptions
from pyxlbert.training.pretraining.run import Pretraining, pretrain


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def tuned(model: Path, **given) -> None:
    usual = {"train": model / "config.json", "dev": None, "output": model.parent / "out"}
    finetune("text-classification", model, **usual | given)


def pretrained(model: Path, options=None, **given) -> None:
    usual = {"files": [model / "config.json"], "data": PairOptions()}
    options = TrainingOptions() if options is None else options
    pretrain(Pretraining(**usual | given), model.parent / "out", options=options)


CASES: dict[str, Callable[[Path], object]] = {
    "pool: got int, wanted what start_multi_process_pool gives": lambda model: pyxlbert.SentenceEncoder.from_pretrained(
        model
    ).encode("a", pool=3),
    "model: got str, wanted a BertModel": lambda model: pyxlbert.SentenceEncoder("x", "y"),
    "directory: got NoneType, wanted a folder": lambda model: pyxlbert.SentenceEncoder.from_pretrained(None),
    "directory: got int, wanted a folder": lambda model: pyxlbert.CrossEncoder.from_pretrained(3),
    "train: got NoneType, wanted a str or a Path": lambda model: tuned(model, train=None),
    "dev: got int, wanted a str or a Path": lambda model: tuned(model, dev=3),
    "output: got NoneType, wanted a str or a Path": lambda model: tuned(model, output=None),
    "options: got dict, wanted TrainingOptions": lambda model: tuned(model, options={"seed": 1}),
    "settings: got list, wanted a dict": lambda model: tuned(model, settings=["a"]),
    "max_length: got str, wanted int": lambda model: tuned(model, max_length="3"),
    "batch_size: got str, wanted int": lambda model: evaluate(model, "x.tsv", batch_size="3"),
    "batch_size: got float, wanted int": lambda model: predict_file(model, "x", model.parent / "x.tsv", batch_size=2.0),
    "columns: got list, wanted a dict": lambda model: predict_file(model, "x", model.parent / "x.tsv", columns=["a"]),
    "files: got str, wanted a list of files": lambda model: pretrained(model, files="x.txt"),
    "evaluate: got PosixPath, wanted a list of files": lambda model: pretrained(model, evaluate=Path("x.txt")),
    "data: got NoneType, wanted PairOptions": lambda model: pretrained(model, data=None),
    "options: got str, wanted TrainingOptions": lambda model: pretrained(model, options="fast"),
}


@pytest.mark.parametrize("words", CASES)
def test_the_argument_is_named(model: Path, words: str) -> None:
    before = sorted(model.parent.rglob("*"))
    with pytest.raises(TypeError, match=f"^{re.escape(words)}"):
        CASES[words](model)
    assert sorted(model.parent.rglob("*")) == before
