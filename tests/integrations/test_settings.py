"""Whatever is set on a module of an accelerated model is what it computes with, as in the model untouched."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import conformers
import pytest
import torch
import transformers
import zoo

import pyxlbert
from pyxlbert.testing import compare, models, tolerances

PATCHED = object()  # in the place of an attribute's value: a method of the module's own, on the instance
WORDS = {"bi": "uni", "none": "tanh", "relative": "rotary", "first_only": "all"}
IDS = torch.tensor([[3, 9, 8, 5, 7, 6, 2], [4, 4, 11, 3, 2, 0, 0]])
SEEN = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])

Run = Callable[[torch.nn.Module], torch.Tensor]


def _text(kind: str) -> tuple[torch.nn.Module, Run]:
    model = zoo.build(kind, num_hidden_layers=2, hidden_act="gelu").eval()
    return model, lambda model: model(**zoo.batch(model))[0][zoo.MASK.bool()]


def _xlnet(kind: str) -> tuple[torch.nn.Module, Run]:
    fields = {"vocab_size": 50, "d_model": 24, "n_layer": 2, "n_head": 3, "d_inner": 20, "use_mems_eval": False}
    model = transformers.XLNetModel(transformers.XLNetConfig(**fields)).eval()
    models.randomize(model, torch.Generator().manual_seed(0))
    return model, lambda model: model(IDS, attention_mask=SEEN)[0][SEEN.bool()]


def _funnel(kind: str) -> tuple[torch.nn.Module, Run]:
    fields = {"vocab_size": 50, "d_model": 24, "n_head": 3, "d_head": 8, "d_inner": 20, "block_sizes": [1, 1]}
    model = transformers.FunnelBaseModel(transformers.FunnelConfig(**fields)).eval()
    models.randomize(model, torch.Generator().manual_seed(0))
    return model, lambda model: model(IDS, attention_mask=SEEN)[0][:, :2]


def _conformer(kind: str) -> tuple[torch.nn.Module, Run]:
    name = conformers.MODELS[kind]
    model = conformers.build(name).eval()
    return model, lambda model: next(iter(conformers.tensors(model(**conformers.arguments(name, model))).values()))


MAKE = {kind: _text for kind in zoo.ZOO} | {"xlnet": _xlnet, "funnel": _funnel}
MAKE |= dict.fromkeys(conformers.MODELS, _conformer)


def _another(value: Any) -> Any:
    """Of an attribute, or None where there is nothing to try."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 2
    if isinstance(value, float):
        return value * 2 + 0.25
    if isinstance(value, str):
        return WORDS.get(value)
    return torch.tanh if callable(value) and not isinstance(value, torch.nn.Module) else None


def _changes(model: torch.nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Every attribute of every module, once for modules of a class in one place of a layer, with another value.

    Of the configuration, which all modules share, the fields that the library's code reads of it; of classes, methods.
    """
    done = set()
    for name in sorted(set(re.findall(r"self\.config\.(\w+)", inspect.getsource(inspect.getmodule(type(model)))))):
        another = _another(vars(model.config).get(name))
        if another is not None and name != "vocab_size":  # of which these batches are made
            yield "", f"config.{name}", another
    internal = set(vars(torch.nn.Module()))
    for path, module in model.named_modules():
        place = ".".join("*" if name.isdigit() else name for name in path.split("."))
        for name, value in vars(module).items():
            if name in internal or name.startswith("_") or (place, name) in done:
                continue
            done.add((place, name))
            another = _another(value)
            if another is not None:
                yield path, name, another
        for name in ("position_ids", "token_type_ids"):
            if name in module._buffers:
                yield path, name, (module._buffers[name] + 1) % 2
        for kind in type(module).__mro__:
            if not kind.__module__.startswith(("transformers.models.", "transformers.activations")):
                continue
            for name, method in vars(kind).items():
                # What Funnel's `init_attention_inputs` returns is in a form of ours.
                known = name.startswith("__") or (place, name) in done or name == "init_attention_inputs"
                if known or not callable(method):
                    continue
                done.add((place, name))
                yield path, name, PATCHED
                yield path, f"{kind.__name__}.{name}", PATCHED


def _scaled(output: Any) -> Any:
    """Of a patched method: visibly another one."""
    if isinstance(output, torch.Tensor):
        return output * 1.5 if output.is_floating_point() else output
    if isinstance(output, tuple):
        return tuple(_scaled(one) for one in output)
    return output


def _tried(model: torch.nn.Module, run: Run, change: tuple[str, str, Any]) -> torch.Tensor | type[Exception]:
    """What a model computes with an attribute changed, or how it fails; the attribute is put back."""
    path, name, value = change
    module = model.get_submodule(path)
    owner, _, name = name.rpartition(".")
    if owner not in ("", "config"):
        kinds = [one for one in type(module).__mro__ if one.__name__ == owner and name in vars(one)]
        return _patched(model, run, kinds[-1], name)  # the library's own, behind what has its name
    where = vars(module.config) if owner else module._buffers if name in module._buffers else vars(module)
    missing = object()
    before = where.get(name, missing)
    if value is PATCHED:
        method = getattr(module, name)
        value = lambda *args, **kwargs: _scaled(method(*args, **kwargs))  # noqa: E731
    where[name] = value
    try:
        with torch.no_grad():
            return run(model)
    except Exception as error:  # as it comes, from the library's own code
        return type(error)
    finally:
        if before is missing:
            del where[name]
        else:
            where[name] = before


def _patched(model: torch.nn.Module, run: Run, kind: type, name: str) -> torch.Tensor | type[Exception]:
    """The same of a method of a class, which is put back."""
    given = vars(kind)[name]
    method = getattr(given, "__func__", given)
    changed = functools.wraps(method)(lambda *args, **kwargs: _scaled(method(*args, **kwargs)))
    setattr(kind, name, type(given)(changed) if isinstance(given, staticmethod | classmethod) else changed)
    try:
        with torch.no_grad():
            return run(model)
    except Exception as error:  # as it comes, from the library's own code
        return type(error)
    finally:
        setattr(kind, name, given)


@pytest.mark.parametrize("kind", MAKE)
def test_an_attribute_set_later_is_honoured(kind: str) -> None:
    plain, run = MAKE[kind](kind)
    with torch.no_grad():
        untouched = run(plain)
    ours = pyxlbert.accelerate(copy.deepcopy(plain))
    packed = pyxlbert.pack(pyxlbert.accelerate(copy.deepcopy(plain)))
    told, wrong = 0, []
    with torch.no_grad():
        first = {"accelerated": run(ours), "packed": run(packed)}
    for change in list(_changes(plain)):
        wanted = _tried(plain, run, change)
        told += not (isinstance(wanted, torch.Tensor) and wanted.shape == untouched.shape and wanted.equal(untouched))
        for which, model in (("accelerated", ours), ("packed", packed)):
            got = _tried(model, run, change)
            if isinstance(got, torch.Tensor) and isinstance(wanted, torch.Tensor):
                try:
                    compare.close(kind, got, wanted, tolerances.MODEL_FLOAT32 * 4)
                except (AssertionError, ValueError) as error:
                    wrong.append(f"{which}: {change[0]}.{change[1]}: {error}")
            elif change[1].startswith("config.") and isinstance(got, torch.Tensor) and torch.equal(got, first[which]):
                continue  # a number that does not fit the weights, and that is not read
            elif got is not wanted:
                names = ["a tensor" if isinstance(one, torch.Tensor) else one.__name__ for one in (got, wanted)]
                wrong.append(f"{which}: {change[0]}.{change[1]}: got {names[0]}, wanted {names[1]}")
    assert not wrong, "\n".join(wrong)
    assert told > 3
    # And back again, but for what a model keeps of a call, as tables of distances.
    with torch.no_grad():
        untouched = run(plain)
        for model in (ours, packed):
            compare.close(kind, run(model), untouched, tolerances.MODEL_FLOAT32 * 4)
