"""A thousand calls under LeakSanitizer: memory that nobody points to any more is named with where it came from.

    python tests/cpu/leaked.py [planted]

With `planted` each call loses some bytes besides, which must be seen.  What Python and torch lose while they start is
not looked at.  Calls are of every op, right ones and refused ones, and of models with packed weights.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable, Iterator

PROCESS = ctypes.CDLL(None)
PROCESS.__lsan_disable()

import torch  # noqa: E402

import pyxlbert  # noqa: E402
from pyxlbert import models  # noqa: E402
from pyxlbert.testing import runners  # noqa: E402
from pyxlbert.testing.specs import SPECS  # noqa: E402
from pyxlbert.testing.specs._spec import Spec  # noqa: E402

CALLS = 1000
LOST = 77


def ops(spec: Spec, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """Calls of an op, forward and backward, each followed by one that is refused."""
    refused = itertools.cycle(spec.bad)
    for case in [case for case in spec.suite if case.small][:6]:
        arguments = runners.arguments_of(spec, case, dtype)
        yield lambda case=case, arguments=arguments: runners.run(
            lambda **a: spec.function(**a, backend="cpu"), spec, arguments, case.gradients
        )
        bad = next(refused)
        yield lambda bad=bad: refuse(spec, bad.change, bad.error)


def refuse(spec: Spec, change: Callable[[dict], dict], error: type[Exception]) -> None:
    arguments = {"backend": "cpu"} | change(runners.arguments_of(spec, spec.suite[0], torch.float32))
    try:
        spec.function(**arguments)
    except error:
        return
    raise AssertionError(f"{spec.name}: a bad call was not refused")


def packed(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """Calls of models with packed weights."""
    small = {"vocab_size": 60, "num_hidden_layers": 2}
    bert = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 64}
    xlnet = {"vocab_size": 60, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}
    for model in (models.BertModel(models.BertConfig(**small, **bert)), models.XLNetModel(models.XLNetConfig(**xlnet))):
        model = pyxlbert.pack(model.to(dtype).eval())
        texts = [torch.randint(1, 60, (rows, length)) for rows, length in ((1, 3), (2, 17), (3, 40))]
        yield from (lambda model=model, text=text: inferred(model, text) for text in texts)


def inferred(model: torch.nn.Module, text: torch.Tensor) -> None:
    with torch.inference_mode():
        model(text)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    calls = [call for dtype in (torch.float32, torch.bfloat16) for call in packed(dtype)]
    calls += [call for spec in SPECS.values() for dtype in (torch.float32, torch.bfloat16) for call in ops(spec, dtype)]
    for call in calls:
        call()
    planted = "planted" in sys.argv[1:]
    PROCESS.malloc.argtypes = (ctypes.c_size_t,)
    PROCESS.__lsan_enable()
    for call in itertools.islice(itertools.cycle(calls), CALLS):
        call()
        if planted:
            PROCESS.malloc(LOST)
    found = PROCESS.__lsan_do_recoverable_leak_check()
    print(f"{CALLS} calls on level {pyxlbert._C.level()}, {'some' if found else 'no'} memory lost", flush=True)


if __name__ == "__main__":
    main()
