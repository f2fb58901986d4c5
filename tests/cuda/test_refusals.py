"""What the CUDA kernels do not take is refused with a sentence, before anything is started."""

from __future__ import annotations

import pytest
import torch

import pyxlbert
from pyxlbert import backends
from pyxlbert.backends import OPS

pytestmark = pytest.mark.skipif(backends.unavailable("cuda") is not None, reason=str(backends.unavailable("cuda")))
DEVICE = "cpu" if backends.cuda_is_emulated else "cuda"


def query(head_size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(1, 3, 2, head_size, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("op", ["relative_attention", "two_stream_attention"])
def test_a_device_with_little_shared_memory_takes_small_tiles(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyxlbert.cuda import _relative

    assert OPS[op].refusal("cuda", query(128)) is None
    monkeypatch.setattr(_relative, "shared_memory", lambda device: 99 * 1024)
    assert OPS[op].refusal("cuda", query(64)) is None
    for refused in (query(65), query(64, torch.float32)):
        assert "this device has 99 KiB of shared memory" in OPS[op].refusal("cuda", refused)


def test_sizes_beyond_the_tiles_are_refused() -> None:
    q, x, w = query(129), torch.zeros(2, 4097, device=DEVICE), torch.ones(4097, device=DEVICE)
    with pytest.raises(
        RuntimeError, match="backend 'cuda' is unavailable: it takes head sizes of at most 128, not 129"
    ):
        pyxlbert.attention(q, q, q, backend="cuda")
    with pytest.raises(RuntimeError, match="it takes rows of at most 4096 elements, not 4097"):
        pyxlbert.layer_norm(x, w, w, backend="cuda")
