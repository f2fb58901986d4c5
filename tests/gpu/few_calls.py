"""Forward and backward of every op on a few small inputs of the common suite, on every backend of kernels for a GPU.

For compute-sanitizer, which makes a call a hundred times slower: no pytest, few cases, and results compared with plain
PyTorch's.  In Triton's interpreter (TRITON_INTERPRET=1) it runs on the CPU.
"""

from __future__ import annotations

import sys

import torch

import pyxlbert  # noqa: F401
from pyxlbert import backends
from pyxlbert.backends import OPS
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import as_tuple, to_float64

# In the interpreter a call takes seconds.
CASES = 2 if torch.cuda.is_available() else 1


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ran = 0
    for backend in ("triton", "cuda"):
        if backends.unavailable(backend) is not None:
            print(f"{backend}: {backends.unavailable(backend)}")
            continue
        for name, spec in SPECS.items():
            if backend not in OPS[name].backends:
                continue
            cases = [case for case in spec.suite if case.small and case.gradients][:CASES]
            # In CUDA C++ 16-bit products are other instructions.
            dtypes = (torch.float32, torch.bfloat16) if backend == "cuda" else (torch.float32,)
            for case, dtype in ((case, dtype) for case in cases for dtype in dtypes):
                arguments = spec.arguments(case, torch.Generator().manual_seed(1), dtype, device)
                names = spec.leaves(arguments)
                for n in names:
                    arguments[n] = arguments[n].detach().requires_grad_()
                outputs = as_tuple(spec.function(**arguments, backend=backend))
                torch.autograd.grad([o.sum() for o in outputs], [arguments[n] for n in names], allow_unused=True)
                truth = as_tuple(spec.plain(**to_float64(arguments)))
                for ours, wanted in zip(outputs, truth, strict=True):
                    bound = tolerances.MODEL_FLOAT32 if dtype is torch.float32 else tolerances.MODEL_BFLOAT16
                    compare.close(f"{name} {case.id}", ours, wanted.to(ours.dtype), bound)
                ran += 1
                print(f"{backend} {name} {case.id}", flush=True)
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
