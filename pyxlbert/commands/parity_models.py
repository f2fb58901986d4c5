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
from pyxlbert.testing import compare, runners
from pyxlbert.testing.models import randomize
from pyxlbert.testing.parity.rows import Gathered, Row

OWN = {
    "bert": pyxlbert.models.BertModel,
    "roberta": pyxlbert.models.RobertaModel,
    "xlnet": pyxlbert.models.XLNetModel,
}
SMALL = {
    **{"vocab_size": 60, "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 80},
    **{"max_position_embeddings": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
# Where a configuration has other names, or needs more than those.
_FIELDS: dict[str, dict[str, Any]] = {
    "distilbert": {
        **{"dim": 48, "n_heads": 4, "n_layers": 3, "hidden_dim": 80, "dropout": 0.0, "attention_dropout": 0.0},
        **{"vocab_size": 60, "max_position_embeddings": 40},
    },
    "albert": SMALL | {"embedding_size": 16},
    "electra": SMALL | {"embedding_size": 16},
    "xlnet": {"vocab_size": 60, "d_model": 48, "n_layer": 3, "n_head": 4, "d_inner": 80, "dropout": 0.0},
}
LENGTHS = (12, 7, 1, 9)
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


def _build(kind: str) -> Any:
    """A random model of transformers."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **_FIELDS.get(kind, SMALL))
    model = transformers.AutoModel.from_config(config).eval()
    randomize(model, torch.Generator().manual_seed(0))
    return model


def _own(kind: str, theirs: Any) -> torch.nn.Module:
    """Our model with the weights of a model of transformers."""
    ours = OWN[kind](OWN[kind].config_class.from_dict(theirs.config.to_dict())).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours


def _of(name: str, kind: str, accelerated: bool, here: list[str], dtype: torch.dtype) -> Iterator[Row]:
    label = str(dtype).removeprefix("torch.")
    try:
        plain = _build(kind)
        if plain.main_input_name != "input_ids":
            reason = f"its input is {plain.main_input_name}, and only ids are drawn here"
            yield Row(name, "", label, "", reason=reason)
            return
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
            for one in found.values():
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


def _inputs(model: Any) -> tuple[Tensor, Tensor]:
    """Random ids and a mask ``[B, T]``, True where a token is."""
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(5, model.config.vocab_size, mask.shape, generator=torch.Generator().manual_seed(1))
    padding = model.config.pad_token_id
    return (ids if padding is None else torch.where(mask, ids, padding)), mask


def _results(model: Any) -> dict[str, Tensor]:
    """The last hidden states at tokens ``[total, E]``, and every gradient of a random functional of them, in a row."""
    ids, mask = _inputs(model)
    generator = torch.Generator().manual_seed(2)
    model.zero_grad()
    rows = model(ids, mask.long()).last_hidden_state[mask]
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
    ids, mask = _inputs(model)
    return [one[mask] for one in model(ids, mask.long(), output_hidden_states=True).hidden_states]
