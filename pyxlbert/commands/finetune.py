"""`pyxlbert finetune TASK` and `pyxlbert predict`: training on files with labels, and what is predicted from files."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from pyxlbert.commands.embed import set_threads
from pyxlbert.files import shown
from pyxlbert.training.options import MOST, PRECISIONS, SCHEDULES, TrainingOptions

_DEFAULT = {f.name: f.default for f in fields(TrainingOptions)}

_DESCRIPTION = """\
Trains a model on a task and writes the one that scores best on the development data, with its curves and checkpoints,
to a new folder. It is read by `pyxlbert evaluate`, by `pyxlbert predict` and by transformers. Started by torchrun or
`accelerate launch` it is trained by several processes or machines, to the same steps."""

_HELP = {
    "text-classification": "classes, or numbers, of texts or pairs of texts",
    "token-classification": "tags of words, and the entities that they make",
    "question-answering": "answers that stand in a text, as SQuAD has them",
    "multiple-choice": "which of several texts goes with a text",
}


def add(commands: Any) -> None:
    """Adds the commands to argparse's subparsers."""
    parser = commands.add_parser("finetune", help="train a model on a task", description=_DESCRIPTION)
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, text in _HELP.items():
        task = tasks.add_parser(name, help=text, description=_DESCRIPTION)
        _files(task)
        _SETTINGS[name](task.add_argument_group("the task"))
        _training(task)
        task.set_defaults(run=_finetune, arguments={"output": "--out", "directory": "--model"})

    predict = commands.add_parser(
        "predict",
        help="a trained model over a file",
        description="Row i of the output is row i of the input. Entities have their text and their first and last "
        "character's places, counted from 0, the last one's plus one.",
    )
    predict.add_argument("file", metavar="FILE", help=".txt: a text a line (also -), .jsonl, SQuAD's .json, or a table")
    predict.add_argument("--model", required=True, metavar="DIR", help="what `pyxlbert finetune` has written")
    predict.add_argument("--out", required=True, metavar="X.jsonl|X.tsv|X.txt", help="where the predictions go")
    predict.add_argument("--text-column", metavar="C", help="the texts' column: its name, or its number from 1")
    predict.add_argument("--pair-column", metavar="C", help="the second texts' column")
    predict.add_argument("--question-column", metavar="C", help="the questions' column")
    predict.add_argument("--choices-column", metavar="K", help="the key of the list of choices")
    predict.add_argument("--header", action=argparse.BooleanOptionalAction, help="whether the first line names columns")
    predict.add_argument("--words", action="store_true", help="for taggers: a word a line, an empty line between texts")
    predict.add_argument(
        "--long-texts",
        choices=("cut", "windows"),
        help="of classes: read the beginning of a text that is too long, or average over windows (cut)",
    )
    _inference(predict)
    named = {"output": "--out", "source": "FILE", "directory": "--model"}
    predict.set_defaults(run=_predict, arguments=named)


def add_evaluations(tasks: Any) -> None:
    """Adds the trained tasks to those of `pyxlbert evaluate`."""
    for name, text in _HELP.items():
        task = tasks.add_parser(name, help=f"a trained model's scores: {text}")
        task.add_argument("--data", required=True, metavar="FILE", help="examples with labels, as for `finetune`")
        task.add_argument("--model", required=True, metavar="DIR", help="what `pyxlbert finetune` has written")
        _inference(task)


def evaluate(options: argparse.Namespace) -> int:
    """Prints a trained model's scores.

    Returns:
        The exit status.
    """
    from pyxlbert.text import DTYPES
    from pyxlbert.training.finetune import evaluate

    _threads(options)
    scores = evaluate(
        *(options.model, options.data),
        task=options.task,
        batch_size=options.batch_size,
        dtype=DTYPES[options.dtype],
        progress=options.progress,
        say=_say,
    )
    print(f"{options.task}: {options.data}")
    print(_table(scores))
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _table(scores: dict[str, float]) -> str:
    return "\n".join(f"  {name:<16}{value:.4f}" for name, value in scores.items())


def _inference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=_count, default=64, metavar="N", help="rows a pass (64)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model")
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads to use")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, help="a progress bar (on a terminal)")


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number from 1 to {MOST}")
    return value


def _threads(options: argparse.Namespace) -> None:
    if options.threads is not None:
        set_threads(options.threads)


def _files(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("files")
    group.add_argument("--model", required=True, metavar="DIR", help="the encoder's folder, or its name in the hub")
    group.add_argument("--fresh", action="store_true", help="new weights: the folder needs config.json and a tokenizer")
    group.add_argument("--train", required=True, metavar="FILE", help="examples to learn from")
    group.add_argument("--dev", metavar="FILE", help="examples to choose the best model by")
    group.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    group.add_argument("--resume", action="store_true", help="go on with the run in that folder, to the same bits")


def _text_settings(group: Any) -> None:
    group.add_argument("--text-column", default=1, metavar="C", help="the texts' column: name, or number from 1 (1)")
    group.add_argument("--pair-column", metavar="C", help="the second texts' column, for pairs")
    group.add_argument("--label-column", default=2, metavar="C", help="the labels' column (2)")
    group.add_argument("--no-header", dest="header", action="store_false", help="the first line is a row already")
    group.add_argument("--regression", action="store_true", help="labels are numbers: Pearson's and Spearman's r")
    group.add_argument(
        "--long-texts",
        choices=("cut", "windows"),
        default="cut",
        help="what is predicted for a text that is too long: what its beginning says, or the mean over windows (cut)",
    )


def _tag_settings(group: Any) -> None:
    group.add_argument(
        "--pieces",
        choices=("first", "x"),
        default="first",
        help="a word's further pieces count for nothing, or have the tag X (first)",
    )
    group.add_argument("--crf", action="store_true", help="a conditional random field over the tags")
    group.add_argument("--lstm", type=int, default=0, metavar="N", help="a BiLSTM of N a direction before the tags (0)")
    group.add_argument("--stride", type=int, default=32, metavar="N", help="pieces that two windows share (32)")


def _answer_settings(group: Any) -> None:
    group.add_argument("--stride", type=int, default=128, metavar="N", help="pieces that two rows share (128)")
    group.add_argument("--max-question", type=int, default=64, metavar="N", help="pieces of a question (64)")
    group.add_argument("--max-answer", type=int, default=30, metavar="N", help="pieces of an answer, at most (30)")
    group.add_argument("--nulls", action="store_true", help="a question may have no answer, as in SQuAD 2.0")
    group.add_argument(
        "--null-threshold",
        type=float,
        default=0.0,
        metavar="X",
        help="by how much no answer has to be more likely than the best one, in logits (0)",
    )


def _choice_settings(group: Any) -> None:
    group.add_argument("--text-column", default="text", metavar="K", help="the text's key (text)")
    group.add_argument("--choices-column", default="choices", metavar="K", help="the key of their list (choices)")
    group.add_argument("--label-column", default="label", metavar="K", help="the key of the right one, from 0 (label)")


_SETTINGS = {
    "text-classification": _text_settings,
    "token-classification": _tag_settings,
    "question-answering": _answer_settings,
    "multiple-choice": _choice_settings,
}


def _training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")

    def add(name: str, kind: type, text: str, metavar: str = "N") -> None:
        default = _DEFAULT[name]
        shown = f" ({default:g})" if isinstance(default, (int, float)) else ""
        option = "--" + name.replace("_", "-")
        group.add_argument(option, type=kind, default=default, metavar=metavar, help=text + shown)

    group.add_argument("--max-length", type=int, metavar="N", help="tokens of a row (what the folder says, or 512)")
    add("epochs", float, "passes over the examples", "X")
    add("max_steps", int, "steps of the optimiser, in place of --epochs")
    add("batch_size", int, "examples a step, all processes together")
    add("micro_batch_size", int, "examples a pass of one process (its whole share)")
    add("learning_rate", float, "the highest learning rate", "X")
    add("head_learning_rate", float, "of what is not the encoder (the same)", "X")
    add("layer_decay", float, "the rate of each layer, as a share of that of the layer above", "X")
    add("weight_decay", float, "of AdamW, on matrices", "X")
    add("warmup", float, "steps until the highest rate; below 1 a share of all", "X")
    group.add_argument("--schedule", choices=SCHEDULES, default="linear", help="how the rate falls (linear)")
    add("max_gradient_norm", float, "longer gradients are scaled down to it; 0: none is", "X")
    group.add_argument("--precision", choices=PRECISIONS, default="float32", help="of products (float32)")
    group.add_argument("--recompute", action="store_true", help="keep no activations: less memory, a third more time")
    add("seed", int, "the same seed gives the same run")
    add("evaluate_every", int, "steps between evaluations (an epoch's)")
    add("evaluation_batch_size", int, "rows a pass of an evaluation")
    add("patience", int, "evaluations without a better score until training ends (never)")
    add("checkpoint_every", int, "steps between checkpoints (those between evaluations)")
    add("keep_checkpoints", int, "how many of the last stay, beside the best")
    add("log_every", int, "steps between points of the curves")
    add("workers", int, "processes that make batches")
    group.add_argument("--threads", type=int, metavar="N", help="processor threads to use")
    group.add_argument("--progress", action=argparse.BooleanOptionalAction, help="a progress bar (on a terminal)")


def _finetune(options: argparse.Namespace) -> int:
    from pyxlbert.training.finetune import finetune
    from pyxlbert.training.loop import leave_group
    from pyxlbert.training.tasks import TASKS

    _threads(options)
    training = TrainingOptions(**{name: getattr(options, name) for name in _DEFAULT if hasattr(options, name)})
    scores = finetune(
        *(options.task, options.model, options.train, options.dev, options.out),
        settings={name: getattr(options, name) for name in TASKS[options.task].defaults if hasattr(options, name)},
        options=training,
        max_length=options.max_length,
        fresh=options.fresh,
        resume=options.resume,
        say=_say,
    )
    if scores:
        print(_table(scores))
    print(f"{options.task}: {options.out}", file=sys.stderr)
    leave_group()
    return 0


def _predict(options: argparse.Namespace) -> int:
    from pyxlbert.text import DTYPES
    from pyxlbert.training.prediction import output_path, predict_file

    output_path(options.out)
    if options.file != "-" and not Path(options.file).is_file():
        raise FileNotFoundError(f"FILE: got {shown(options.file)}, which is not there, or no file")
    _threads(options)
    named = ("text_column", "pair_column", "question_column", "choices_column", "header", "long_texts")
    count = predict_file(
        *(options.model, options.file, options.out),
        columns={name: getattr(options, name) for name in named if getattr(options, name) is not None},
        words=options.words,
        batch_size=options.batch_size,
        dtype=DTYPES[options.dtype],
        progress=options.progress,
        say=_say,
    )
    print(f"{count} rows: {options.out}", file=sys.stderr)
    return 0
