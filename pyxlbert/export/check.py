"""An exported graph against the model it was made of, in ONNX Runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyxlbert.testing import tolerances


def runtime_is_here() -> bool:
    """Whether `onnxruntime` is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def batches(
    shape: Callable[[int, int], tuple[int, ...]], least: int, most: int, below: tuple[int, int], empty: bool = True
) -> list[list[Tensor]]:
    """Ids, masks and types of batches of several sizes and lengths, with padding on either side.

    Args:
        shape: of a batch of B rows of T places.
        least, most: the lengths that the graph takes; rows have at least the least number of tokens.
        below: what ids and what types are less than.
        empty: whether a row has no token at all.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for rows, length in ((1, least), (3, min(most, max(least, 11))), (4, min(most, max(least, 40)))):
        sizes = shape(rows, length)
        ids = torch.randint(0, below[0], sizes, generator=generator)
        types = torch.randint(0, below[1], sizes, generator=generator)
        places = torch.arange(length)
        mask = torch.ones(sizes, dtype=torch.int64)
        if rows > 1:
            mask[0] = places < max(least, length // 2)
            mask[1] = places >= min(length - least, length // 3)
            if empty and rows > 3:
                mask[-1] = 0
        made.append([ids, mask, types])
    return made


def largest_difference(path: Path, model: torch.nn.Module, names: tuple[str, ...], inputs: list[list[Tensor]]) -> float:
    """The largest difference of any output, relative to its largest element, or to 1 where that is less.

    Args:
        path: of the graph.
        model: called with the tensors of a batch; returns a tuple.
        names: of the graph's inputs, and so of a batch's tensors.
        inputs: the batches.

    Raises:
        ValueError: an output has another shape, or is not finite where the model's is; the message names it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    worst = 0.0
    for batch in inputs:
        with torch.no_grad():
            wanted = [tensor.numpy() for tensor in model(*batch)]
        got = session.run(outputs, {name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)})
        for name, a, b in zip(outputs, got, wanted, strict=True):
            worst = max(worst, _difference(name, a, b))
    return worst


def _difference(name: str, got: np.ndarray, wanted: np.ndarray) -> float:
    if got.shape != wanted.shape:
        raise ValueError(f"{name}: the graph gives shape {list(got.shape)}, the model {list(wanted.shape)}")
    # The logits of padding are the lowest number: where both have it, they are equal.
    lowest = np.finfo(np.float32).min
    told = wanted != lowest
    if not np.isfinite(got).all() or not np.array_equal(told, got != lowest):
        raise ValueError(f"{name}: the graph gives other numbers than the model at padding, or none that are finite")
    got, wanted = got[told].astype(np.float64), wanted[told].astype(np.float64)
    return float(np.abs(got - wanted).max(initial=0) / max(1.0, np.abs(wanted).max(initial=0)))


def limit() -> float:
    """What `largest_difference` may be."""
    return tolerances.ONNX
