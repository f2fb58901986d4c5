"""What of the extra "train" is missing is said before data is read, or anything is trained or written."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
from small_task import STILL, bert, options, table, tagged

from pyxlbert.training.finetune import evaluate, finetune
from pyxlbert.training.packages import require
from pyxlbert.training.prediction import predict_file
from pyxlbert.training.pretraining.pairs import PairOptions
from pyxlbert.training.pretraining.run import Pretraining, pretrain
from pyxlbert.training.tasks import TASKS, Tagging, TextClassification


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    """Makes a package one that is not installed."""

    def hide(name: str) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda wanted, *a: None if wanted == name else find(wanted, *a)
        )
        monkeypatch.setitem(sys.modules, name, None)

    return hide


def test_tasks_name_the_packages_that_they_import() -> None:
    for task in TASKS.values():
        settings = [{}, {"regression": True}] if task is TextClassification else [{}]
        said = {name for one in settings for name in (*task(one).packages, *task.row_packages)}
        imported = set()
        for node in ast.walk(ast.parse(inspect.getsource(sys.modules[task.__module__]))):
            if isinstance(node, ast.FunctionDef):
                found = [one for one in ast.walk(node) if isinstance(one, ast.Import | ast.ImportFrom)]
                imported |= {
                    one.module or "" if isinstance(one, ast.ImportFrom) else one.names[0].name for one in found
                }
        assert {name.partition(".")[0] for name in imported} - {"pyxlbert"} == said, task.name


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one with data in the working directory, which is on the path of `python -m pyxlbert`."""
    (tmp_path / "some_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("some_package") is not None
    with pytest.raises(ImportError, match=r"^training: needs some_package: "):
        require("training", "some_package")
    monkeypatch.setitem(sys.modules, "some_package", ModuleType("some_package"))  # which has no specification
    require("training", "some_package")


@pytest.mark.parametrize("name", ["accelerate", "matplotlib"])
def test_no_run_begins(without, name: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello world\n")
    without(name)
    with pytest.raises(ImportError, match=rf"^training: needs {name}: pip install 'pyxlbert\[train\]'$"):
        finetune("text-classification", "none", "none", None, tmp_path / "out")
    with pytest.raises(ImportError, match=rf"^training: needs {name}: "):
        pretrain(Pretraining(files=[tmp_path / "text.txt"], data=PairOptions()), tmp_path / "out", options=options())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "settings", "package", "name"),
    [
        ("text-classification", {}, "sklearn", "scikit-learn"),
        ("text-classification", {"regression": True}, "scipy", "scipy"),
        ("token-classification", {}, "seqeval", "seqeval"),
    ],
)
def test_a_run_with_data_to_evaluate_on(
    without, task: str, settings: dict, package: str, name: str, tmp_path: Path
) -> None:
    without(package)
    with pytest.raises(ImportError, match=rf"^dev: needs {name}: pip install 'pyxlbert\[train\]'$"):
        finetune(task, "none", "none", "none", tmp_path / "out", settings=settings)
    # Without such data nothing is scored, and the next check is met.
    with pytest.raises(FileNotFoundError, match="train: got 'none'"):
        finetune(task, "none", "none", None, tmp_path / "out", settings=settings)
    assert not (tmp_path / "out").exists()


def test_a_trained_model(without, tmp_path: Path) -> None:
    """Tags are predicted with what they are scored with, classes are not."""
    model = bert(tmp_path / "bert", **STILL)
    files = {TextClassification.name: table(tmp_path / "a.tsv", 8), Tagging.name: tagged(tmp_path / "a.txt", 8)}
    for task, file in files.items():
        finetune(task, model, file, None, tmp_path / task, options=options(epochs=1))
    (tmp_path / "texts.txt").write_text("hello world\n")
    without("sklearn")
    with pytest.raises(ImportError, match=r"^evaluate: needs scikit-learn: "):
        evaluate(tmp_path / TextClassification.name, tmp_path / "none")
    assert predict_file(tmp_path / TextClassification.name, tmp_path / "texts.txt", tmp_path / "classes.txt") == 1
    without("seqeval")
    with pytest.raises(ImportError, match=r"^evaluate: needs seqeval: "):
        evaluate(tmp_path / Tagging.name, tmp_path / "none")
    with pytest.raises(ImportError, match=r"^predict: needs seqeval: "):
        predict_file(tmp_path / Tagging.name, tmp_path / "texts.txt", tmp_path / "tags.txt")
    assert not (tmp_path / "tags.txt").exists()
