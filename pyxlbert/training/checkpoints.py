"""Checkpoints of a run: everything that the next step depends on, in folders that appear whole or not at all."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pyxlbert.files import whole_directory

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})")
_STATE = "state.pt"
# What every checkpoint has, whatever is trained.
_FIELDS = {"model": dict, "optimiser": dict, "progress": dict, "chance": list}


def folder(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return directory / FOLDER / f"step-{step:08d}"


def steps(directory: Path) -> list[int]:
    """The steps of a run's checkpoints, ascending."""
    place = directory / FOLDER
    if not place.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in place.iterdir() if (path / _STATE).is_file())
    return sorted(int(match[1]) for match in found if match)


def chance() -> dict[str, Any]:
    """The state of every source of chance of this process."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    name, keys, *rest = np.random.get_state()
    state["numpy"] = [name, keys.tolist(), *rest]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_chance(state: dict[str, Any]) -> None:
    """Puts every source of chance back."""
    torch.set_rng_state(state["torch"])
    version, values, last = state["python"]
    random.setstate((version, tuple(values), last))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_chance(seed: int) -> None:
    """Starts every source of chance of this process anew."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _options(strict: bool = True) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True, strict=strict)


def gather(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state of model and optimiser by the parameters' names, however they lie on processes.

    All processes call it; where parameters are sharded only the first one gets the result.
    """
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimiser, options=_options())
    return {"model": weights, "optimiser": moments}


def scatter(state: dict[str, Any], model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Gives model and optimiser what `gather` has found. All processes call it with the same state."""
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

    set_model_state_dict(model, state["model"], options=_options())
    # A parameter that no loss reaches has no moments, as an XLNet's vector of hidden words where it classifies.
    set_optimizer_state_dict(model, optimiser, optim_state_dict=state["optimiser"], options=_options(strict=False))


def write(directory: Path, step: int, state: dict[str, Any], keep: int, best: int | None) -> None:
    """Writes a checkpoint and removes older ones.

    Args:
        directory: of the run.
        step: how many steps are done.
        state: tensors, numbers, strings, lists and dicts.
        keep: how many of the last stay.
        best: a step whose checkpoint stays too.

    Raises:
        OSError: the disk is full, say: what was there before stays.
    """
    path = folder(directory, step)
    path.parent.mkdir(exist_ok=True)
    with whole_directory(path) as temporary:
        try:
            torch.save(state, temporary / _STATE)
        except RuntimeError as error:  # torch's writer says so when the disk is full
            raise OSError(f"{path}: cannot be written: {error}") from error
    there = steps(directory)
    for old in there[:-keep]:
        if old != best:
            shutil.rmtree(folder(directory, old))


def read(directory: Path, step: int) -> dict[str, Any]:
    """The state of a checkpoint.

    Raises:
        ValueError: the file is not whole, or is something else.
    """
    path = folder(directory, step) / _STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can raise whatever unpickling meets on its way
        raise ValueError(f"{path} is not a whole checkpoint: {(str(error).splitlines() or [error])[0]}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a whole checkpoint: it holds {type(state).__name__}, wanted a dict")
    for name, kind in _FIELDS.items():
        value = state.get(name)
        if not isinstance(value, kind) or not value:  # nothing would be put back of an empty one, without a word
            got = "missing" if name not in state else f"a {type(value).__name__}" if value else "empty"
            raise ValueError(f"{path} is not a whole checkpoint: {name} is {got}, wanted a {kind.__name__}")
    return state


def last_whole(directory: Path) -> tuple[dict[str, Any] | None, dict[int, str]]:
    """The state of the last checkpoint that can be read, None where there is none; and what is wrong with later ones.

    Raises:
        ValueError: there are some, and none can be read.
    """
    broken: dict[int, str] = {}
    there = steps(directory)
    for step in reversed(there):
        try:
            return read(directory, step), broken
        except ValueError as error:
            broken[step] = str(error)
            if len(broken) == len(there):
                raise
    return None, broken


def clean(directory: Path) -> None:
    """Removes what a killed run has left half-written or half-removed in its folder, and in the folders there."""
    for path in (*directory.glob(".*"), *directory.glob("*/.*")):
        if path.name.endswith((".part", ".old")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    for path in (directory / FOLDER).glob("step-*"):
        if _NAME.fullmatch(path.name) and path.is_dir() and not any(path.iterdir()):
            path.rmdir()
