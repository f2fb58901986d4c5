"""Tasks: what is read, what a row is, what counts, and what is predicted."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_task import STILL, bert, options, sentences, table, tagged, xlnet

from pyxlbert import cli
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.directories import tiny_bert
from pyxlbert.training.data.table import Place, read_table
from pyxlbert.training.data.tags import split_words
from pyxlbert.training.encoding import TaskTokenizer, windows
from pyxlbert.training.evaluation import TaskModel
from pyxlbert.training.evaluation import predict as run
from pyxlbert.training.finetune import evaluate, finetune, predictions
from pyxlbert.training.saved import open_new, open_trained
from pyxlbert.training.tasks import TASKS, Tagging, TextClassification
from pyxlbert.training.tasks.base import IGNORED


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from pyxlbert.models import RobertaConfig, RobertaModel

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    pairs.train_from_iterator([" ".join(words) for words in sentences(50)], trainer)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    size = pairs.get_vocab_size()
    fields = {"vocab_size": size, "max_position_embeddings": 66, "type_vocab_size": 1, "initializer_range": 0.2}
    RobertaModel(RobertaConfig(**sizes, **fields, **STILL)).save_pretrained(folder / "roberta")
    pairs.model.save(str(folder / "roberta"))
    (folder / "roberta" / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return {"bert": bert(folder / "bert", **STILL), "roberta": folder / "roberta", "xlnet": xlnet(folder / "xlnet")}


# Readers


def test_columns_that_are_called_like_numbers(tmp_path: Path) -> None:
    """As tables are that nobody gave names to: a number is a place, a text is a name first."""
    (tmp_path / "a.tsv").write_text("0\t1\nx\ty\n")
    (row,) = read_table(tmp_path / "a.tsv", {"text": 1, "label": "1"})
    assert row.values == {"text": "x", "label": "y"}
    TextClassification({"text_column": 1, "label_column": "1"})


def test_a_prediction_asks_for_no_label(encoders: dict[str, Path], tmp_path: Path) -> None:
    """So that its texts may stand where the training had labels."""
    table(tmp_path / "train.tsv")
    finetune(
        "text-classification",
        encoders["bert"],
        tmp_path / "train.tsv",
        None,
        tmp_path / "out",
        options=options(max_steps=1),
    )
    (tmp_path / "in.tsv").write_text("id\ttext\n1\tthe\n")
    assert (
        cli.main(f"predict {tmp_path}/in.tsv --model {tmp_path}/out --out {tmp_path}/x.txt --text-column 2".split())
        == 0
    )


@pytest.mark.parametrize(
    ("name", "text", "columns", "header", "message"),
    [
        ("a.tsv", "a\ta\tb\nx\ty\tz\n", {"text": "a"}, True, r"a\.tsv: its header names 2 columns 'a'; wanted one, or"),
        ("a.tsv", "a\tb\nx\ty\n", {"text": 2, "label": "b"}, True, r"label_column 'b' and text_column 2 are the same"),
        ("a.tsv", "x\ty\n", {"text": 2, "label": "2"}, False, r"label_column '2' and text_column 2 are the same"),
        ("a.jsonl", '{"text": "a"}', {"text": 1, "label": "text"}, True, r"label_column 'text' and text_column 1 are"),
        ("a.tsv", "text\tlabel\na\tb\nc\n", {"text": 1}, True, r"a\.tsv: line 3 has 1 columns, wanted 2, as"),
        ("a.tsv", "text\tlabel\na\tb\tc\n", {"text": 1}, True, "line 2 has 3 columns, wanted 2"),
        ("a.tsv", "a\tb\nc\n", {"label": 2}, False, "line 2 has 1 columns, wanted at least 2"),
        ("a.tsv", "text\tlabel\na\tb\n", {"label": "kind"}, True, "no column 'kind'; its header has 'text', 'label'"),
        ("a.tsv", "text\tlabel\n", {"text": 1}, True, "holds no rows"),
        ("a.tsv", "text\n", {"text": 2}, True, "has 1 columns, wanted a column 2"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', {"text": 1}, True, r"a\.jsonl: line 2 is not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n[]\n', {"text": 1}, True, "line 2 is a JSON list, wanted an object"),
        ("a.jsonl", '{"text": "a"}\n', {"label": 2}, True, "line 1 has no 'label'; it has 'text'"),
        ("a.txt", "a\n", {"label": 2}, True, "plain text has one column"),
    ],
)
def test_a_table_that_is_wrong(tmp_path: Path, name: str, text: str, columns: dict, header: bool, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name, columns, header)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a O\nb X O\n", r"a\.bio: line 2 has 3 columns, wanted 2"),
        ("a\n", "line 1 has 1 columns, wanted a word and its tag"),
        ("a O\nb PER\n", "line 2: the tag is 'PER', wanted O, or B-"),
        ("\n\n", "holds no words with tags"),
        ("a O\n", "all words have the tag O"),
    ],
)
def test_a_tag_file_that_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.bio").write_text(text)
    with pytest.raises(ValueError, match=message):
        Tagging().read(tmp_path / "a.bio", training=True)


def test_labels_that_are_not_known(tmp_path: Path) -> None:
    (tmp_path / "a.bio").write_text("-DOCSTART- O\n\na B-PER\nb O\n")
    (tmp_path / "b.bio").write_text("a O\n\nb B-LOC\n")
    task = Tagging()
    task.read(tmp_path / "a.bio", training=True)
    assert task.labels == ["O", "B-PER"]
    with pytest.raises(ValueError, match=r"b\.bio: line 3: the tag is 'B-LOC', which the model does not know"):
        task.read(tmp_path / "b.bio")
    (tmp_path / "a.tsv").write_text("text\tlabel\na\t10\nb\t9\n")
    (tmp_path / "b.tsv").write_text("text\tlabel\na\t10\nb\t8\n")
    texts = TextClassification()
    texts.read(tmp_path / "a.tsv", training=True)
    assert texts.labels == ["9", "10"]
    with pytest.raises(ValueError, match=r"b\.tsv: line 3: the label is '8', wanted one of 9, 10"):
        texts.read(tmp_path / "b.tsv")
    with pytest.raises(ValueError, match=r"a\.tsv: line 2: the label is 'nan', wanted a finite number"):
        (tmp_path / "a.tsv").write_text("text\tlabel\na\tnan\n")
        TextClassification({"regression": True}).read(tmp_path / "a.tsv", training=True)
    with pytest.raises(ValueError, match="settings: got crf"):
        TextClassification({"crf": True})


# Rows


def test_windows_cover_all_and_own_each_piece_once() -> None:
    for length in range(0, 40):
        for room, stride in ((1, 0), (5, 0), (5, 2), (7, 6), (50, 3)):
            cuts = windows(length, room, stride)
            owned = [piece for cut in cuts for piece in range(cut.own_begin, cut.own_end)]
            assert owned == list(range(length))
            assert all(c.begin <= c.own_begin <= c.own_end <= c.end <= c.begin + room for c in cuts)
            for one, other in itertools.pairwise(cuts):
                assert one.end - other.begin == stride
    with pytest.raises(ValueError, match="stride: got 5, wanted 0 to 4"):
        windows(9, 5, 5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlnet"])
@pytest.mark.parametrize("pieces", ["first", "x"])
def test_every_word_has_its_own_label(encoders: dict[str, Path], tmp_path: Path, kind: str, pieces: str) -> None:
    """A word that the tokenizer drops keeps its place, windows cover what is long, padding counts for nothing."""
    words = ["hello", "\u200b" if kind == "bert" else "", "unbelievable", "world", "trains", "the"] * 12
    tags = ["B-A", "B-B", "B-C", "I-C", "B-D", "O"] * 12
    (tmp_path / "a.bio").write_text("\n".join(f"{w}\t{t}" for w, t in zip(words, tags, strict=True)) + "\n\nthe\tO\n")
    task = Tagging({"pieces": pieces, "stride": 4})
    examples = task.read(tmp_path / "a.bio", training=True)
    assert examples[0].words == words
    trained, _ = open_new(task, encoders[kind], 24).new()
    tokenizer = trained.tokenizer
    rows = task.features(tokenizer, examples)
    assert len(rows) > 3 and max(len(row.window.ids) for row in rows) == 24
    seen: dict[int, list[str]] = {}
    for row in rows[:-1]:
        for place in np.flatnonzero(row.words >= 0):
            seen.setdefault(int(row.words[place]), []).append(task.labels[row.labels[place]])
    assert all(seen[word] == [tags[word]] for word in seen)
    assert sorted(seen) == [word for word in range(len(words)) if word % 6 != 1]
    batch = task.collate(tokenizer, rows)
    real = batch["attention_mask"].bool()
    assert (batch["labels"][~real] == IGNORED).all() and not (batch["first"] | batch["continued"])[~real].any()
    # The short row is padded on the side that is the model's.
    last = batch["attention_mask"][-1].tolist()
    assert last == sorted(last, reverse=kind != "xlnet")
    total = len(tokenizer.words([words])[0].ids) + len(tokenizer.words([["the"]])[0].ids)
    assert task.counts(batch)["loss"] == (total if pieces == "x" else 61)
    # A loss is the sum over labels, with and without the padding of others.
    trained.model.eval()
    whole = task.losses(trained.model, batch)["loss"]
    parts = sum(task.losses(trained.model, task.collate(tokenizer, [row]))["loss"] for row in rows)
    compare.close("the sum", parts, whole, tolerances.MODEL_FLOAT32)
    found = predictions(trained, examples, 3)
    assert [len(tags) for tags, _ in found] == [72, 1]
    assert all(found[0][0][word] == "O" for word in range(1, 72, 6))
    assert "X" not in found[0][0]


class _Right(TaskModel):
    """Predicts what the labels say: what is then scored is the way from labels to rows and back."""

    def forward(self, batch: dict[str, torch.Tensor], labelled: bool) -> dict[str, torch.Tensor]:
        labels = batch["labels"].clamp(min=0)
        return {"tags": labels, "probability": torch.ones(labels.shape)}


def test_words_that_are_dropped_count_as_missed(encoders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.bio").write_text("hello\tB-A\n\u200b\tB-A\nworld\tO\n\n\u200b\tB-A\n")
    task = Tagging()
    examples = task.read(tmp_path / "a.bio", training=True)
    trained, _ = open_new(task, encoders["bert"], None).new()
    rows = task.features(trained.tokenizer, examples)
    found = run(_Right(task, trained.model), task, trained.tokenizer, examples, rows, batch_size=2)
    assert [tags for tags, _ in found] == [["B-A", "O", "O"], ["O"]]
    scores = task.score(examples, found)
    assert scores["precision"] == 1.0 and scores["recall"] == pytest.approx(1 / 3, rel=tolerances.FLOAT64)
    # Nothing is learned from a row without labels.
    assert len(task.features(trained.tokenizer, examples, training=True)) == 1


def test_a_pair_loses_the_longer_text_first(encoders: dict[str, Path]) -> None:
    tokenizer = TaskTokenizer(encoders["bert"], 64, 13)
    short, long = tokenizer.texts(["the hello", "a b c a b c a b c a b c"])
    assert len(tokenizer.pair(short, long).ids) == len(tokenizer.pair(long, short).ids) == 13
    assert tokenizer.pair(short, long).count == 8 and tokenizer.pair(long, short).count == 2
    assert tokenizer.pair(long, long).count == 5
    assert tokenizer.pair(short, short).types.tolist() == [0, 0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="max_length: got 65, wanted at most 64"):
        TaskTokenizer(encoders["bert"], 64, 65)
    with pytest.raises(ValueError, match="max_length: got 4, wanted more than 4"):
        TaskTokenizer(encoders["bert"], 64, 4)


# Scores and models


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlnet"])
def test_it_learns_and_is_read_back(encoders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    data = table(tmp_path / "train.tsv")
    given = {"epochs": 12, "learning_rate": 3e-3, "weight_decay": 0.0}
    scores = finetune(
        "text-classification", encoders[kind], data, data, tmp_path / "out", options=options(**given, log_every=5)
    )
    best = evaluate(tmp_path / "out", data)
    assert best["accuracy"] >= max(scores["accuracy"], 0.9)
    trained = open_trained(tmp_path / "out").trained()
    assert type(trained.model).__name__.lower().startswith(kind)
    # transformers reads it and says the same.
    import transformers

    peer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    task, tokenizer = trained.task, trained.tokenizer
    examples = task.read(data)[:6]
    batch = task.collate(tokenizer, task.features(tokenizer, examples))
    batch.pop("labels")
    with torch.no_grad():
        theirs = torch.softmax(peer(**batch).logits, -1)
    ours = torch.from_numpy(np.stack(predictions(trained, examples, 8)))
    compare.close("probabilities", ours, theirs, tolerances.MODEL_GRADIENT_FLOAT32)


@pytest.mark.parametrize(
    "settings", [{}, {"crf": True, "lstm": 8}, {"pieces": "x", "crf": True}], ids=["plain", "lstm and crf", "x and crf"]
)
def test_a_tagger_learns_and_its_entities_have_their_places(
    encoders: dict[str, Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    data = tagged(tmp_path / "train.bio", 80)
    given = {"epochs": 15, "learning_rate": 5e-3, "weight_decay": 0.0, "log_every": 50, "evaluate_every": 150}
    scores = finetune(
        *("token-classification", encoders["bert"], data, data, tmp_path / "out"),
        settings=settings,
        options=options(**given),
    )
    assert scores["f1"] >= 0.9 and set(scores) == {"precision", "recall", "f1", "f1_macro", "f1_PER"}
    assert evaluate(tmp_path / "out", data) == pytest.approx(scores, abs=tolerances.FLOAT64)
    (tmp_path / "in.txt").write_text("a a hello  world\n\n a b c!\n", encoding="utf-8")
    arguments = ["predict", str(tmp_path / "in.txt"), "--model", str(tmp_path / "out"), "--out"]
    assert cli.main([*arguments, str(tmp_path / "x.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == ["a a hello  world", "", " a b c!"]
    (entity,) = rows[0]["entities"]
    assert (entity["type"], entity["text"], entity["start"], entity["end"]) == ("PER", "hello  world", 4, 16)
    assert 0 < entity["probability"] <= 1 and rows[1]["entities"] == rows[2]["entities"] == []
    assert cli.main([*arguments, str(tmp_path / "x.tsv")]) == 0
    lines = (tmp_path / "x.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "entities\ttags" and len(lines) == 4
    assert json.loads(lines[1].split("\t")[0]) == rows[0]["entities"]
    assert cli.main([*arguments, str(tmp_path / "x.txt")]) == 0
    assert (tmp_path / "x.txt").read_text(encoding="utf-8") == "hello  world/PER\n\n\n"
    (tmp_path / "in.bio").write_text("the O\nhello O\n\na O\n", encoding="utf-8")
    words = ["predict", str(tmp_path / "in.bio"), "--words", "--model", str(tmp_path / "out")]
    assert cli.main([*words, "--out", str(tmp_path / "y.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "y.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["words"] for row in rows] == [["the", "hello"], ["a"]] and rows[0]["tags"] == ["O", "B-PER"]


def test_words_of_a_text() -> None:
    found = split_words(Place("x", 1), "Dr. Ångström's 东京 café\u3000x")
    assert found.words == ["Dr", ".", "Ångström", "'", "s", "东", "京", "café", "x"]
    assert [found.text[a:b] for a, b in found.offsets] == found.words
    assert split_words(Place("x", 1), " \t").words == []


def test_numbers_and_pairs_from_the_command_line(
    encoders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(" ".join(a), " ".join(b), float(len(a))) for a, b in zip(sentences(40), sentences(40, 1), strict=True)]
    data = tmp_path / "pairs.tsv"
    data.write_text("".join(f"{score}\t{a}\t{b}\n" for a, b, score in rows))
    out, model = tmp_path / "out", str(encoders["bert"])
    command = ["finetune", "text-classification", "--model", model, "--train", str(data), "--dev", str(data)]
    command += ["--out", str(out), "--regression", "--no-header", "--label-column", "1", "--text-column", "2"]
    command += ["--pair-column", "3", "--epochs", "20", "--learning-rate", "3e-3", "--evaluate-every", "200"]
    assert cli.main([*command, "--no-progress"]) == 0
    printed = capsys.readouterr().out
    scores = dict(line.split() for line in printed.splitlines())
    assert float(scores["spearman"]) > 0.6 and set(scores) == {"pearson", "spearman"}
    assert cli.main(["evaluate", "text-classification", "--model", str(out), "--data", str(data)]) == 0
    assert printed in capsys.readouterr().out
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": a, "pair": b}) + "\n" for a, b, _ in rows[:3]))
    predict = ["predict", str(tmp_path / "in.jsonl"), "--model", str(out), "--out"]
    assert cli.main([*predict, str(tmp_path / "x.tsv")]) == 0
    lines = (tmp_path / "x.tsv").read_text().splitlines()
    assert lines[0] == "value" and len(lines) == 4 and all(float(line) for line in lines[1:])
    # A task that the model does not have, and one text where two are wanted.
    assert cli.main(["evaluate", "token-classification", "--model", str(out), "--data", str(data)]) == 1
    assert "is trained for text-classification" in capsys.readouterr().err
    (tmp_path / "in.txt").write_text("hello\n")
    assert cli.main(["predict", str(tmp_path / "in.txt"), "--model", str(out), "--out", str(tmp_path / "y.txt")]) == 1
    assert "wanted a table for the pair" in capsys.readouterr().err and not (tmp_path / "y.txt").exists()


def test_long_texts_are_read_in_windows(encoders: dict[str, Path]) -> None:
    task = TextClassification({"long_texts": "windows", "stride": 2})
    task.labels = ["no", "yes"]
    trained, _ = open_new(task, encoders["bert"], 10).new()
    texts = ["the hello world a b c a b c a b c", "the", ""]
    examples = task.inputs([{"text": text} for text in texts], [Place("x", n) for n in range(3)])
    rows = task.features(trained.tokenizer, examples)
    assert [row.example for row in rows] == [0, 0, 1, 2]
    found = predictions(trained, examples, 2)
    parts = [predictions(trained, task.inputs([{"text": text}], [Place("x", 0)]), 1)[0] for text in texts[1:]]
    together, alone = (torch.from_numpy(np.stack(some)) for some in (found[1:], parts))
    compare.close("probabilities", together, alone, tolerances.MODEL_FLOAT32)
    assert all(p.sum() == pytest.approx(1, rel=tolerances.MODEL_FLOAT32) for p in found)
    assert len(task.features(trained.tokenizer, examples, training=True)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--train": "nowhere.tsv"}, "nowhere.tsv"),
        ({"--model": "nowhere"}, "nowhere"),
        ({"--max-length": "3"}, "--max-length: got 3"),
        ({"--epochs": "0"}, "--epochs: got 0"),
        ({"--label-column": "9"}, "has 2 columns, wanted a column 9"),
        ({"--out": "no/out"}, "does not exist"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_made(
    encoders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, message: str
) -> None:
    table(tmp_path / "train.tsv", 5)
    given = {"--model": encoders["bert"], "--train": "train.tsv", "--out": "out", **change}
    for name in ("--train", "--out"):
        given[name] = tmp_path / given[name]
    pairs = [str(part) for pair in given.items() for part in pair]
    assert cli.main(["finetune", "text-classification", *pairs]) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["train.tsv"]


def test_every_task_has_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for name in TASKS:
        for command in ("finetune", "evaluate"):
            with pytest.raises(SystemExit) as end:
                cli.main([command, name, "--help"])
            assert end.value.code == 0 and "--model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "settings", "words"),
    [
        ("text-classification", {"regression": "yes"}, "regression: got 'yes', wanted True or False"),
        ("text-classification", {"header": 1}, "header: got 1, wanted True or False"),
        ("text-classification", {"text_column": 0}, "text_column: got 0, wanted a column's name or its number from 1"),
        ("text-classification", {"text_column": ""}, "text_column: got ''"),
        ("text-classification", {"text_column": None}, "text_column: got None"),
        ("text-classification", {"pair_column": []}, "pair_column: got []"),
        ("text-classification", {"stride": -1}, "stride: got -1, wanted a whole number from 0 to"),
        ("token-classification", {"stride": True}, "stride: got True, wanted a whole number from 0 to"),
        ("token-classification", {"pieces": 3}, "pieces: got 3, wanted a string"),
        ("text-classification", {"long_texts": "window"}, "long_texts: got 'window', wanted cut or windows"),
        ("token-classification", {"lstm": 10**6}, "lstm: got 1000000, wanted a width of at most 65536"),
        ("token-classification", {"crf": None}, "crf: got None, wanted True or False"),
        ("question-answering", {"null_threshold": float("nan")}, "null_threshold: got nan, wanted a number from"),
        ("question-answering", {"null_threshold": "0"}, "null_threshold: got '0', wanted a number from"),
        ("question-answering", {"max_answer": 0}, "max_answer: got 0, wanted a whole number of at least 1"),
        ("question-answering", {"max_question": 10**30}, "max_question: got 1000"),
        ("multiple-choice", {"choices_column": {}}, "choices_column: got {}"),
    ],
)
def test_a_setting_is_of_its_kind(task: str, settings: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        TASKS[task](settings)
    assert str(caught.value).startswith(words)
    given_later = TASKS[task]()
    given_later.settings.update(settings)
    with pytest.raises(ValueError) as caught:
        given_later.check_settings()
    assert str(caught.value).startswith(words)
    tiny_bert(tmp_path)
    (tmp_path / "task.json").write_text(json.dumps({"task": task, "settings": settings}))
    with pytest.raises(ValueError) as caught:
        open_trained(tmp_path).trained()
    assert str(caught.value).startswith(f"{tmp_path / 'task.json'}: {words}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "is not JSON that can be read: it is nested too deep"),
        ('{"text": ' + "9" * 5000 + "}", "is not valid JSON: Exceeds the limit"),
    ],
    ids=["deep", "digits"],
)
def test_a_line_that_no_reader_of_json_takes(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(ValueError) as caught:
        read_table(tmp_path / "a.jsonl", {"text": "text"})
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}: line 2 {words}")


@pytest.mark.parametrize(
    "changes",
    [
        *({"task": wrong} for wrong in ({}, [], 3, None, "sums")),
        *({"settings": wrong} for wrong in (3, [], "labels", None)),
        *({"max_length": wrong} for wrong in ("8", -1, 0, [], True, 1.5, float("nan"))),
    ],
    ids=str,
)
def test_a_saved_task_that_is_wrong_is_named(tmp_path: Path, changes: dict) -> None:
    tiny_bert(tmp_path)
    whole = {"task": "text-classification", "settings": {"labels": ["a", "b"]}, "max_length": 8}
    (tmp_path / "task.json").write_text(json.dumps(whole | changes))
    with pytest.raises(ValueError) as caught:
        open_trained(tmp_path).trained()
    assert str(tmp_path) in str(caught.value) and f"{next(iter(changes))} is" in str(caught.value)
