"""Parity of whole models: ours, and transformers' own accelerated, beside transformers itself and float64."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyxlbert
from pyxlbert.commands.parity_inputs import build, call, given, tokens
from pyxlbert.testing import compare, runners
from pyxlbert.testing.parity.rows import Gathered, Row

OWN = {
    "albert": pyxlbert.models.AlbertModel,
    "bert": pyxlbert.models.BertModel,
    "roberta": pyxlbert.models.RobertaModel,
    "xlnet": pyxlbert.models.XLNetModel,
}
DTYPES = (torch.float32, torch.bfloat16)


def rows(names: list[str], dtypes: list[torch.dtype]) -> Iterator[Row]:
    """Rows of every model.

    Args:
        names: the backends to run on.
        dtypes: of float32 and bfloat16, those to run in.
    """
    from pyxlbert.integrations.drop_in import architectures

    here = [one for one in runners.runners() if one.partition("/")[0] in names and runners.best_level(one)]
    here = [one for one in here if one.partition("/")[0] not in runners.slow()]
    subjects = [(kind, False) for kind in OWN] + [(kind, True) for kind in sorted(architectures())]
    if importlib.util.find_spec("transformers") is None:
        yield Row("models", "", "", "", reason="transformers, which they are compared with, is not installed")
        return
    for kind, accelerated in subjects:
        name = f"{kind}, accelerated" if accelerated else kind
        for dtype in (one for one in DTYPES if one in dtypes):
            yield from _of(name, kind, accelerated, here, dtype)


def _own(kind: str, theirs: Any) -> torch.nn.Module:
    """Our model with the weights of a model of transformers."""
    ours = OWN[kind](OWN[kind].config_class.from_dict(theirs.config.to_dict())).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours


def _of(name: str, kind: str, accelerated: bool, here: list[str], dtype: torch.dtype) -> Iterator[Row]:
    label = str(dtype).removeprefix("torch.")
    try:
        plain = build(kind)
        truth = _results(copy.deepcopy(plain).double())
        wanted = _results(copy.deepcopy(plain).to(dtype))
    except Exception as error:  # transformers may have no such model, or fail in this dtype
        yield Row(name, "", label, "", reason=f"transformers: {type(error).__name__}: {error}")
        return
    for runner in here:
        found = {"forward": Gathered(), "backward": Gathered()}
        try:
            model = copy.deepcopy(plain) if accelerated else _own(kind, plain)
            model = model.to(dtype)
            with _quiet():
                model = pyxlbert.accelerate(model) if accelerated else model
            with runners.running(runner) as backend, pyxlbert.use_backend(backend):
                ours = _results(model)
            for direction, value in ours.items():
                errors = compare.errors(direction, value, wanted[direction], truth[direction])
                found[direction].add("last_hidden_state" if direction == "forward" else "all gradients", errors)
        except Exception as error:  # a model that raises is a row like one that is wrong
            refusal = f"backend {runner.partition('/')[0]!r} is unavailable: "
            lacks = isinstance(error, RuntimeError) and refusal in str(error)
            for one in found.values():
                if lacks:  # an op of the model
                    one.refused.append(str(error))
                else:
                    one.fail(type(error).__name__, str(error))
        for direction, one in found.items():
            yield one.row(name, runner, label, direction)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of what was replaced."""
    log = logging.getLogger("pyxlbert")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _results(model: Any) -> dict[str, Tensor]:
    """The last hidden states at tokens ``[total, E]``, and every gradient of a random functional of them, in a row."""
    arguments = given(model)
    generator = torch.Generator().manual_seed(2)
    model.zero_grad()
    rows = tokens(model, arguments, call(model, arguments).last_hidden_state)
    direction = torch.randn(rows.shape, generator=generator)
    (rows * direction.to(rows.dtype)).sum().backward()
    gradients = [p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return {"forward": rows.detach(), "backward": torch.cat(gradients)}


def layers(directory: Path, names: list[str], dtypes: list[torch.dtype]) -> Iterator[Row]:
    """A directory's own model: the rows after the embeddings and after each layer, where a difference would begin.

    Args:
        directory: as transformers loads it; it is accelerated.
        names, dtypes: as in `rows`.
    """
    import transformers

    plain = transformers.AutoModel.from_pretrained(directory, local_files_only=True).float().eval()
    here = [one for one in runners.runners() if one.partition("/")[0] in names and runners.best_level(one)]
    truth = _states(copy.deepcopy(plain).double())
    for dtype in (one for one in DTYPES if one in dtypes):
        wanted = _states(copy.deepcopy(plain).to(dtype))
        for runner in (one for one in here if one.partition("/")[0] not in runners.slow()):
            with _quiet():
                model = pyxlbert.accelerate(copy.deepcopy(plain).to(dtype))
            with runners.running(runner) as backend, pyxlbert.use_backend(backend):
                ours = _states(model)
            for number, states in enumerate(zip(ours, wanted, truth, strict=True)):
                found = Gathered()
                where = "embeddings" if number == 0 else f"layer {number}"
                try:
                    found.add(where, compare.errors(where, *states))
                except AssertionError as error:
                    found.fail(where, str(error))
                yield found.row(where, runner, str(dtype).removeprefix("torch."), "forward")


@torch.no_grad()
def _states(model: Any) -> list[Tensor]:
    """The hidden states at tokens ``[total, E]`` before the first and after each layer."""
    arguments = given(model)
    hidden = call(model, arguments, output_hidden_states=True).hidden_states
    return [tokens(model, arguments, one) for one in hidden]
