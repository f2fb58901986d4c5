"""Eight threads of Python on the same models, ops and results, for a build that ThreadSanitizer watches.

    python tests/cpu/shared_by_threads.py [result]

With `result` they also write to the same one, which is the fault that must be seen.  Each has one thread of OpenMP,
whose runtime ThreadSanitizer does not understand, so that what is shared is shared by Python's threads.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import torch

import pyxlbert
from pyxlbert import models
from pyxlbert.testing import runners
from pyxlbert.testing.specs import SPECS

THREADS = 8
SMALL = {"vocab_size": 60, "num_hidden_layers": 2, "initializer_range": 0.3}
BERT = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 64}
XLNET = {"vocab_size": 60, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}


def together(work: Callable[[int], None]) -> None:
    """Runs it in eight threads at once; the first error of one is raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(THREADS)

    def one(number: int) -> None:
        torch.set_num_threads(1)
        start.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def on_a_model(model: torch.nn.Module) -> None:
    """Its first calls too, in which weights are packed; and backward."""
    texts = [torch.randint(1, 60, (rows, length)) for rows, length in ((1, 3), (2, 17), (3, 40))]

    def work(number: int) -> None:
        with torch.inference_mode():
            for text in texts[number % 3 :] + texts:
                model(text)
        hidden = model(texts[number % 3]).last_hidden_state
        torch.autograd.grad(
            hidden.float().square().mean(), [p for p in model.parameters() if p.requires_grad][:3], allow_unused=True
        )

    together(work)


def on_ops() -> None:
    for spec in SPECS.values():
        case = next(case for case in spec.suite if case.small)
        given = runners.arguments_of(spec, case, torch.bfloat16)
        together(lambda _, spec=spec, case=case, given=given: runners.run(spec.function, spec, given, case.gradients))


def on_one_result() -> None:
    """Kernels long enough to meet each other: what ends before another begins is in order by Python's own lock."""
    count, width = 4096, 512
    x, y, w = torch.ones(count, width), torch.empty(count, width), torch.ones(width)
    mean, rstd = torch.empty(count), torch.empty(count)
    rows = [one.data_ptr() for one in (x, x, w, mean, rstd, y)]

    def work(_: int) -> None:
        for _ in range(10):
            pyxlbert._C.cpu.layer_norm_bwd(*rows, 0, 0, count, width, width, width, 0, 0, 0, 1)

    together(work)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if "result" in sys.argv[1:]:
        on_one_result()
    for dtype in (torch.float32, torch.bfloat16):
        on_a_model(models.BertModel(models.BertConfig(**SMALL, **BERT)).to(dtype).eval())
        on_a_model(models.XLNetModel(models.XLNetConfig(**XLNET)).to(dtype).eval())
    on_ops()
    print("ended", pyxlbert._C.__file__)


if __name__ == "__main__":
    main()
