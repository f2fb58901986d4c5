"""What worker processes run in the test of fork and spawn; it must be importable by name there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import zoo

# Set before a fork, and by `start` where a process is spawned.
MODEL: Any = None


def start(model: Any) -> None:
    """In a new process: its model, unless it was forked with one, and threads as many as tests have."""
    global MODEL
    torch.set_num_threads(1)
    if model is not None:
        MODEL = model


def states(model: Any) -> np.ndarray:
    """What a model gives at the tokens of a padded batch."""
    with torch.no_grad():
        return model(**zoo.batch(model))[0][zoo.MASK.bool()].numpy()


def run(_: int) -> np.ndarray:
    """One task."""
    return states(MODEL)
