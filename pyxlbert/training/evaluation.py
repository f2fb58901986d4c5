"""A model's predictions for examples, by one process or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from pyxlbert.text.batches import BAR_DELAY
from pyxlbert.training.encoding import TaskTokenizer
from pyxlbert.training.tasks.base import Batch, Task


class TaskModel(nn.Module):
    """A model and what its task makes of it, as one module, which is what processes share.

    Args:
        task: whose losses and outputs.
        model: a `PretrainedModel`.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Batch, labelled: bool) -> dict[str, torch.Tensor]:
        """The sums of the losses of a labelled batch, or the outputs of any."""
        return (self.task.losses if labelled else self.task.outputs)(self.model, batch)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch there."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def predict(
    module: nn.Module,
    task: Task,
    tokenizer: TaskTokenizer,
    examples: Sequence[Any],
    features: Sequence[Any],
    *,
    batch_size: int,
    accelerator: Any = None,
    progress: bool | None = False,
) -> list[Any]:
    """A prediction for each example.

    Args:
        module: a `TaskModel`, or what a process has of it.
        task, tokenizer: what rows are read and written by.
        examples: all.
        features: their rows; rows run longest first, so that memory is at its largest at once.
        batch_size: rows a pass of one process.
        accelerator: of several processes, each of which takes its share and gets all predictions.
        progress: whether there is a bar; None: on a terminal, after a moment.
    """
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    device = next(module.parameters()).device
    order = sorted(range(len(features)), key=lambda row: -len(features[row].window.ids))
    size = batch_size * processes
    was_training = module.training
    module.eval()
    found: list[tuple[int, dict[str, np.ndarray]]] = []
    silent = True if progress is False or rank else None if progress is None else False
    bar = tqdm(total=len(features), unit="row", delay=BAR_DELAY if progress is None else 0, disable=silent, leave=False)
    with torch.inference_mode(), bar:
        for start in range(0, len(order), size):
            rows = order[start : start + size][rank::processes]
            # Where parameters are sharded all processes have to take part.
            batch = task.collate(tokenizer, [features[row] for row in rows or order[start : start + 1]])
            outputs = {name: value.cpu().numpy() for name, value in module(on_device(batch, device), False).items()}
            found += [(row, {name: value[at] for name, value in outputs.items()}) for at, row in enumerate(rows)]
            bar.update(len(order[start : start + size]))
    module.train(was_training)
    if processes > 1:
        from accelerate.utils import gather_object

        found = gather_object(found)
    outputs = [output for _, output in sorted(found, key=lambda pair: pair[0])]
    return task.predict(tokenizer, examples, features, outputs)
