"""Questions about texts, and choices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_task import STILL, bert, choices, options, squad, xlnet

from pyxlbert import cli
from pyxlbert.testing import compare, tolerances
from pyxlbert.training.data.squad import Question, read_squad
from pyxlbert.training.data.table import Place
from pyxlbert.training.evaluation import TaskModel
from pyxlbert.training.evaluation import predict as run
from pyxlbert.training.finetune import evaluate, finetune, predictions
from pyxlbert.training.saved import open_new
from pyxlbert.training.tasks import Answers, MultipleChoice
from pyxlbert.training.tasks.answers import overlap, plain


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    return {"bert": bert(folder / "bert", **STILL), "xlnet": xlnet(folder / "xlnet")}


def written(path: Path, **changes: object) -> Path:
    asked = {"id": "q7", "question": "who", "answers": [{"text": "b", "answer_start": 2}], **changes}
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "a b c", "qas": [asked]}]}]}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": None}, r"q\.json: question q7: answers is None, wanted a list"),
        ({"answers": []}, "question q7 has no answer; with the setting nulls"),
        ({"answers": [{"text": "b", "answer_start": 1}]}, "question q7: the answer 'b' does not stand at character 1"),
        ({"answers": [{"text": "b"}]}, "question q7: answers: answer_start is None, wanted a int"),
        ({"question": 3}, r"data\[0\]\.paragraphs\[0\]\.qas\[0\]: question is 3, wanted a string"),
        ({"is_impossible": "no"}, "question q7: is_impossible is 'no'"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_squad(written(tmp_path / "q.json", **changes), nulls=False)


def test_files_that_are_no_questions(tmp_path: Path) -> None:
    for text, message in (("{", "is not valid JSON"), ("{}", "data is None"), ('{"data": []}', "holds no questions")):
        (tmp_path / "q.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_squad(tmp_path / "q.json", nulls=True)


class _Right(TaskModel):
    """Finds the labels."""

    def forward(self, batch: dict[str, torch.Tensor], labelled: bool) -> dict[str, torch.Tensor]:
        length = batch["input_ids"].shape[1]
        found = {name: torch.nn.functional.one_hot(batch[name], length).float() * 9 for name in ("start", "end")}
        return {name: value.masked_fill(batch["attention_mask"] == 0, -1e4) for name, value in found.items()}


@pytest.mark.parametrize("kind", ["bert", "xlnet"])
def test_rows_cover_a_long_text_and_lead_back_to_the_answer(
    encoders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    words = ["the", "world", "naive", "trains", "a", "b"] * 12
    text = " ".join([*words[:40], "unbelievable", *words[40:]])
    at = text.index("unbelievable")
    asked = [
        {"id": "1", "question": "hello", "answers": [{"text": "unbelievable", "answer_start": at}]},
        {"id": "2", "question": "hello", "answers": [{"text": text[:3], "answer_start": 0}]},
        {"id": "3", "question": "hello the world", "answers": [{"text": text[-1:], "answer_start": len(text) - 1}]},
        {"id": "4", "question": "hello", "answers": [], "is_impossible": True},
    ]
    short = {"context": "", "qas": [{"id": "5", "question": "hello", "answers": []}]}
    data = tmp_path / "q.json"
    data.write_text(json.dumps({"data": [{"paragraphs": [{"context": text, "qas": asked}, short]}]}))
    task = Answers({"nulls": True, "stride": 8})
    examples = task.read(data)
    trained, _ = open_new(task, encoders[kind], 32).new()
    rows = task.features(trained.tokenizer, examples)
    assert max(len(row.window.ids) for row in rows) == 32 and len(rows) > 12
    found = run(_Right(task, trained.model), task, trained.tokenizer, examples, rows, batch_size=3)
    assert [one.text for one in found] == ["unbelievable", text[:3], text[-1:], "", ""]
    assert (found[0].start, found[0].end, found[3].start) == (at, at + 12, None)
    assert task.score(examples, found) == {"f1": 1.0, "exact": 1.0, "f1_answered": 1.0, "f1_unanswered": 1.0}
    # Without nulls there is always an answer, but in a text without pieces.
    sure = Answers({"stride": 8})
    other = run(_Right(sure, trained.model), sure, trained.tokenizer, examples, rows, batch_size=3)
    assert other[3].text and not other[4].text
    # The loss of rows with the padding of others is the sum of theirs.
    trained.model.eval()
    batch = task.collate(trained.tokenizer, rows)
    parts = [task.losses(trained.model, task.collate(trained.tokenizer, [row]))["loss"] for row in rows]
    whole = task.losses(trained.model, batch)["loss"]
    compare.close("the sum", sum(parts), whole, tolerances.MODEL_FLOAT32)


def test_words_are_compared_as_squad_does() -> None:
    assert plain("The  Cat, an  apple!") == "cat apple"
    assert overlap("the cat sat", "A cat") == pytest.approx(2 / 3, rel=tolerances.FLOAT64)
    assert overlap("", "") == 1.0 and overlap("", "cat") == 0.0 and overlap("a dog", "cat") == 0.0


@pytest.mark.parametrize("kind", ["bert", "xlnet"])
def test_answers_are_learned(encoders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    data = squad(tmp_path / "q.json")
    given = {"epochs": 40, "learning_rate": 5e-3, "weight_decay": 0.0, "log_every": 60, "evaluate_every": 40}
    finetune(
        *("question-answering", encoders[kind], data, data, tmp_path / "out"),
        settings={"nulls": True, "stride": 4},
        options=options(**given),
        max_length=40,
    )
    assert evaluate(tmp_path / "out", data)["f1"] >= 0.75
    for source in (data, tmp_path / "q.tsv"):
        (tmp_path / "q.tsv").write_text("question\ttext\nwhat hello\tthe hello a b\n")
        out = tmp_path / "x.jsonl"
        assert cli.main(["predict", str(source), "--model", str(tmp_path / "out"), "--out", str(out)]) == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert all(row["text"][row["start"] : row["end"]] == row["answer"] for row in rows if row["start"] is not None)
    assert len(rows) == 1 and [row["answer"] for row in rows] == [row["answer"].strip() for row in rows]


@pytest.mark.parametrize("kind", ["bert", "xlnet"])
def test_choices_are_learned(encoders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    data = choices(tmp_path / "c.jsonl")
    given = {"epochs": 15, "learning_rate": 3e-3, "weight_decay": 0.0, "log_every": 60, "evaluate_every": 30}
    finetune("multiple-choice", encoders[kind], data, data, tmp_path / "out", options=options(**given))
    assert evaluate(tmp_path / "out", data)["accuracy"] >= 0.8
    assert cli.main(["predict", str(data), "--model", str(tmp_path / "out"), "--out", str(tmp_path / "x.tsv")]) == 0
    lines = (tmp_path / "x.tsv").read_text().splitlines()
    assert lines[0] == "label\tchoice\tprobabilities" and len(lines) == 31
    # Who has fewer choices is not changed by his neighbours.
    task = MultipleChoice()
    trained, _ = open_new(task, encoders[kind], None).new()
    examples = task.read(data)[:4]
    together = predictions(trained, examples, 4)
    assert [len(p) for p in together] == [2, 3, 2, 3]
    for example, p in zip(examples, together, strict=True):
        alone = torch.from_numpy(predictions(trained, [example], 1)[0])
        compare.close("probabilities", alone, torch.from_numpy(p), tolerances.MODEL_FLOAT32)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "choices": ["b"], "label": 0}, r"c\.jsonl: line 1: the choices are \['b'\]"),
        ({"text": "a", "choices": ["b", "c"], "label": 2}, "line 1: the label is 2, wanted a whole number from 0 to 1"),
        ({"text": 1, "choices": ["b", "c"], "label": 0}, "line 1: the text is 1"),
    ],
)
def test_choices_that_are_wrong(tmp_path: Path, row: dict, message: str) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        MultipleChoice().read(tmp_path / "c.jsonl")


def test_settings_of_answers(encoders: dict[str, Path]) -> None:
    task = Answers({"max_question": 40})
    trained, _ = open_new(task, encoders["bert"], 24).new()
    for question, message in (("hello " * 30, "max_question: got 40, wanted at most 20"), ("hello", "stride: got 128")):
        with pytest.raises(ValueError, match=message):
            task.features(trained.tokenizer, [Question(Place("x", 1), question, "hello " * 30)])
    with pytest.raises(ValueError, match="max_answer: got 0"):
        Answers({"max_answer": 0})
    with pytest.raises(ValueError, match="the question is 3"):
        Answers().inputs([{"question": 3, "text": ""}], [Place("x", 1)])
    assert Question(Place("x", 1), "a", "b").answers is None
