"""Times calls of one revision: a process that `revision.py` starts by this file's path, with that revision's package.

It takes nothing of `pyxlbert.bench`, which another revision may not have; requests and answers are lines of JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _call(request: dict[str, Any]) -> Callable[[], Any]:
    """The call of a case: forward, or forward and backward."""
    import torch

    from pyxlbert.testing.specs import SPECS
    from pyxlbert.testing.specs._spec import Draw, as_tuple

    spec = SPECS[request["op"]]
    case = next(case for case in spec.cases if case.id == request["case"] and case.gradients == request["gradients"])
    if request["size"] is not None:
        found = importlib.util.spec_from_file_location("shapes", Path(__file__).with_name("shapes.py"))
        shapes = importlib.util.module_from_spec(found)
        found.loader.exec_module(shapes)
        case = shapes.sized(case, *request["size"])
    generator = torch.Generator().manual_seed(0)
    draw = Draw(generator, getattr(torch, request["dtype"]), torch.device("cpu"))
    arguments = spec.make(case.inputs, draw)
    if arguments.get("dropout_p"):
        arguments["seed"] = torch.tensor([20], dtype=torch.int64)
    if not case.gradients:
        return lambda: as_tuple(spec.function(**arguments))
    names = spec.leaves(arguments)
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    given = arguments | leaves
    cotangents = [draw.normal(*out.shape).to(out.dtype) for out in as_tuple(spec.function(**given))]

    def call() -> tuple[Any, ...]:
        outputs = as_tuple(spec.function(**given))
        gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
        return (*(out.detach() for out in outputs), *(one for one in gradients if one is not None))

    return call


def _taken() -> int:
    """How often the system has taken a processor from this process for another one."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def main() -> None:
    """Answers until nobody asks any more."""
    # What a library prints is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    call: Callable[[], Any] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            import torch

            import pyxlbert

            answer: dict[str, Any] = {}
            if request["do"] == "begin":
                torch.set_num_threads(request["threads"])
                answer = {"package": str(Path(pyxlbert.__file__).parent)}
            elif request["do"] == "make":
                call = _call(request)
                torch.save([one.detach() for one in call()], request["file"])
            else:
                call()
                before, start = _taken(), time.perf_counter()
                for _ in range(request["repeats"]):
                    call()
                seconds = (time.perf_counter() - start) / request["repeats"]
                answer = {"seconds": seconds, "taken": _taken() - before}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:240]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
