"""Fine-tuning: from files with labels to a trained model's directory, and its scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyxlbert.files import file_digest, named_path, shown
from pyxlbert.models.checkpoints import weights_digest
from pyxlbert.text.batches import check_count
from pyxlbert.training import checkpoints
from pyxlbert.training.evaluation import TaskModel, predict
from pyxlbert.training.loop import Job, Loop, accelerator, check_identity, check_run, known, started_run
from pyxlbert.training.options import TrainingOptions
from pyxlbert.training.packages import require
from pyxlbert.training.saved import Trained, open_new, open_trained, write
from pyxlbert.training.steps import ShuffledSteps
from pyxlbert.training.tasks import TASKS


def finetune(
    task: str,
    model: str | Path,
    train: str | Path,
    dev: str | Path | None,
    output: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    options: TrainingOptions | None = None,
    max_length: int | None = None,
    fresh: bool = False,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Trains a model on a task.

    Args:
        task: a name of `pyxlbert.training.tasks.TASKS`.
        model: the directory of an encoder, or its name in the hub.
        train: the examples to learn from.
        dev: those to choose the best model by; None: the last model is kept.
        output: the directory to make: the best model so far, its curves, its checkpoints.
        settings: the task's.
        options: how to train.
        max_length: the most tokens of a row; None: as the model's directory says, 512 where it does not.
        fresh: begin with new weights: the directory of `model` needs a configuration and a tokenizer alone.
        resume: go on with the run in `output`; it begins where there is none.
        say: takes a line for the person who waits.

    Returns:
        The scores of the best model on `dev`; none without it.

    Raises:
        OSError: a file cannot be read or written; `output` holds something already.
        ValueError: a line, a setting or an option is not what it should be; a loss is not finite.
        ImportError: a package of the extra "train" is missing.
    """
    options = TrainingOptions() if options is None else options
    if not isinstance(options, TrainingOptions):
        raise TypeError(f"options: got {type(options).__name__}, wanted TrainingOptions")
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, wanted one of {', '.join(TASKS)}")
    work = accelerator()
    tell = say if work.is_main_process else lambda line: None
    folder = named_path("output", output)
    if work.is_main_process:
        check_run(folder, resume)
    chosen = TASKS[task](settings)
    if dev is not None:
        require("dev", *chosen.packages)
    if max_length is not None:
        check_count("max_length", max_length)
    for name, path in (("train", train), *([] if dev is None else [("dev", dev)])):
        if not named_path(name, path).is_file():
            raise FileNotFoundError(f"{name}: got {shown(path)}, which is not there, or no file")
    examples = chosen.read(train, training=True)
    dev_examples = None if dev is None else chosen.read(dev)
    unread = open_new(chosen, model, max_length)
    tokenizer = unread.tokenizer
    identity = {
        "task": task,
        "fresh": fresh,
        "model": known(model, unread.digest()),
        "max_length": tokenizer.max_length,
        "train": known(train, file_digest(train)),
        "dev": None if dev is None else known(dev, file_digest(dev)),
        **chosen.settings,
        **options.decisive(),
    }
    if work.is_main_process:
        check_identity(folder, identity)
    rows = chosen.features(tokenizer, examples, training=True)
    tokenizer.tell_of_cuts(tell, train)
    tell(f"{len(examples)} examples, {len(rows)} rows of at most {tokenizer.max_length} tokens")
    dev_rows = None if dev_examples is None else chosen.features(tokenizer, dev_examples)
    tokenizer.tell_of_cuts(tell, dev)
    checkpoints.seed_chance(options.seed)  # of the weights that are new
    trained, new = unread.new(fresh)
    if fresh or new:
        tell(f"new: {'all weights' if fresh else ', '.join(new)}")

    def collate(features: Any) -> dict[str, torch.Tensor]:
        return chosen.collate(tokenizer, features)

    def evaluate(module: nn.Module, work: Any) -> dict[str, float]:
        with torch.autocast(work.device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
            found = predict(
                *(module, chosen, tokenizer, dev_examples, dev_rows),
                batch_size=options.evaluation_batch_size,
                accelerator=work,
                progress=options.progress,
            )
        return chosen.score(dev_examples, found)

    job = Job(
        module=TaskModel(chosen, trained.model),
        source=ShuffledSteps(rows, collate, options.batch_size, options.micro_batch_size, options.seed),
        counts=chosen.counts,
        metric=(chosen.metric, True),
        evaluate=None if dev_examples is None else evaluate,
        save=lambda state: write(trained, unread.folder, folder, state),
        title=f"{task}: {Path(train).name}",
    )
    if work.is_main_process:
        identity["model"]["weights"] = None if fresh else weights_digest(unread.folder)
    with started_run(folder, identity, resume) if work.is_main_process else nullcontext():
        work.wait_for_everyone()
        return Loop(job, options, folder, work, tell).run()


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    task: str | None = None,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
    progress: bool | None = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """The scores of a trained model on labelled examples.

    Args:
        model: the directory that `finetune` has written.
        data: examples as those of the training.
        task: the task that the model must have; None: any.
        batch_size: rows a pass.
        dtype: of the model.
        progress: whether there is a bar; None: on a terminal.
        say: takes a line for the person who waits.

    Raises:
        OSError: a file is missing.
        ValueError: a file or a line is not what it should be, or the model has another task.
        ImportError: a package that the scores need is missing.
    """
    check_count("batch_size", batch_size)
    saved = open_trained(model)
    if task is not None and saved.task.name != task:
        raise ValueError(f"model: {str(model)!r} is trained for {saved.task.name}, wanted {task}")
    require("evaluate", *saved.task.packages)
    examples = saved.task.read(data)
    trained = saved.trained(dtype)
    scores = trained.task.score(examples, predictions(trained, examples, batch_size, progress))
    trained.tokenizer.tell_of_cuts(say, data)
    return scores


def predictions(trained: Trained, examples: list[Any], batch_size: int, progress: bool | None = False) -> list[Any]:
    """A trained model's predictions, one for each example."""
    rows = trained.task.features(trained.tokenizer, examples)
    module = TaskModel(trained.task, trained.model)
    return predict(*(module, trained.task, trained.tokenizer, examples, rows), batch_size=batch_size, progress=progress)
