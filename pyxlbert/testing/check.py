"""`check_op`: a function of one's own through everything that the kernels of this package go through."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from pyxlbert import backends
from pyxlbert.backends import OPS
from pyxlbert.testing import compare, runners
from pyxlbert.testing.parity import ops, report
from pyxlbert.testing.parity.rows import Gathered, Row
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Arguments, Case, Spec


def check_op(
    name: str,
    implementation: Callable[..., Any] | str,
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | str = "cpu",
    gradients: bool = True,
    bad_input: bool = True,
    quick: bool = False,
) -> list[Row]:
    """Puts a function in the place of an op, through the inputs, budget and bad inputs of the op's own kernels.

    Every case of the op's spec runs in memory full of NaN and is compared with float64, beside plain PyTorch in the
    same dtype: at most twice its error is allowed, by the largest element and by the norm.  A second run must give the
    same bits, and no argument may be written to.

    Args:
        name: an op, such as "layer_norm".
        implementation: takes the arguments of `pyxlbert.<name>` less `backend`, by name, and returns the same; or a
            backend's name, one of another package too: inputs that it refuses are then left out.
        dtypes: of float32, bfloat16 and float16, those that it takes; None: all that the op takes.
        device: where the arguments are.
        gradients: whether it can be differentiated by autograd.
        bad_input: whether it must raise, for the op's bad inputs, the same type of exception with a text that names the
            argument, what came and what was wanted.
        quick: a few small cases.

    Returns:
        a row a dtype and direction, as in `pyxlbert parity`.

    Raises:
        AssertionError: something is wrong; the text says what, for every row.
        ValueError: there is no such op, or it takes none of the dtypes, or there is no backend of this name.
        RuntimeError: the backend cannot run here, or lacks the op.
    """
    if name not in SPECS:
        raise ValueError(f"check_op: name: got {name!r}, wanted one of {', '.join(sorted(SPECS))}")
    spec = SPECS[name]
    wanted = [dtype for dtype in spec.dtypes if dtypes is None or dtype in dtypes]
    if not wanted:
        raise ValueError(f"check_op: dtypes: got {dtypes}, wanted some of {', '.join(map(str, spec.dtypes))}")
    backend = None
    if isinstance(implementation, str):
        backend = label = implementation
        _require(name, backend)
        implementation = functools.partial(spec.function, backend=backend)
    else:
        label = getattr(implementation, "__name__", type(implementation).__name__)
    rows: list[Row] = []
    for dtype in wanted:
        found = {direction: Gathered() for direction in ops.DIRECTIONS.values()}
        for case in ops.cases(spec, quick):
            arguments = runners.arguments_of(spec, case, dtype, torch.device(device))
            refusal = backend and OPS[name].refusal(backend, runners.deciding(arguments))
            if refusal:
                for one in found.values():
                    one.refused.append(refusal)
                continue
            _check(spec, _without(case, gradients), arguments, implementation, found)
        for direction, one in found.items():
            if direction == "forward" or gradients:
                rows.append(one.row(name, label, str(dtype).removeprefix("torch."), direction))
    if bad_input:
        rows.append(_bad_inputs(spec, implementation, label, torch.device(device)))
    if not report.good(rows):
        raise AssertionError(f"check_op: {report.summary(rows)}")
    return rows


def _require(name: str, backend: str) -> None:
    """The backend is here and has the op."""
    reason = backends.unavailable(backend)
    if reason is None and backend not in OPS[name].backends:
        reason = f"{name} has no {backend} kernel"
    if reason is not None:
        raise RuntimeError(f"check_op: backend {backend!r} is unavailable: {reason}")


def _without(case: Case, gradients: bool) -> Case:
    return case if gradients else replace(case, gradients=False)


def _check(
    spec: Spec,
    case: Case,
    arguments: Arguments,
    implementation: Callable[..., Any],
    found: dict[str, Gathered],
) -> None:
    """One case: its error, the same bits twice, and arguments as they were."""
    before = {name: one.clone() for name, one in arguments.items() if isinstance(one, torch.Tensor)}
    first = ops.run(spec, case, arguments, implementation, found)
    if first is None:
        return
    forward = found["forward"]
    for name, one in before.items():
        if not torch.equal(_bits(one), _bits(arguments[name])):
            forward.fail(case.id, f"it has written to {name}")
            return
    again = runners.run(implementation, spec, arguments, case.gradients)
    for name, one in first.items():
        try:
            compare.same_bits(name, again[name], one)
        except AssertionError as error:
            found[ops.DIRECTIONS[name.partition(" ")[0]]].fail(case.id, f"a second run differs: {error}")


def _bits(x: torch.Tensor) -> torch.Tensor:
    """NaN equals itself."""
    return torch.nan_to_num(x, nan=12345.0) if x.is_floating_point() else x


def _bad_inputs(spec: Spec, implementation: Callable[..., Any], label: str, device: torch.device) -> Row:
    found, caught = Gathered(), 0
    good: Arguments = runners.arguments_of(spec, spec.suite[0], torch.float32, device)
    for bad in spec.bad:
        given = bad.change(good)
        if "backend" in given:
            continue  # the function is one
        try:
            implementation(**given)
        except bad.error as error:
            text = str(error)
            missing = [word for word in bad.words if word not in text]
            if missing:
                found.fail(bad.id, f"its {type(error).__name__} says {text!r}, in which {missing[0]!r} is missing")
            caught += 1
        except Exception as error:  # another exception than the op's
            found.fail(bad.id, f"got {type(error).__name__}: {error}, wanted {bad.error.__name__}")
        else:
            found.fail(bad.id, f"got no exception, wanted {bad.error.__name__}")
    found.compared, found.worst = caught, compare.Errors()
    return found.row(spec.name, label, "", "bad input")
