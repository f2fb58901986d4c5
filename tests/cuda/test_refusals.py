"""What the CUDA kernels do not take is refused with a sentence, before anything is started."""

from __future__ import annotations

import pytest
import torch

import pyxlbert
from pyxlbert import backends

pytestmark = pytest.mark.skipif(backends.unavailable("cuda") is not None, reason=str(backends.unavailable("cuda")))
DEVICE = "cpu" if backends.cuda_is_emulated else "cuda"


def test_sizes_beyond_the_tiles_are_refused() -> None:
    q = torch.zeros(1, 3, 2, 129, dtype=torch.bfloat16, device=DEVICE)
    x, w = torch.zeros(2, 4097, device=DEVICE), torch.ones(4097, device=DEVICE)
    with pytest.raises(
        RuntimeError, match="backend 'cuda' is unavailable: it takes head sizes of at most 128, not 129"
    ):
        pyxlbert.attention(q, q, q, backend="cuda")
    with pytest.raises(RuntimeError, match="it takes rows of at most 4096 elements, not 4097"):
        pyxlbert.layer_norm(x, w, w, backend="cuda")
