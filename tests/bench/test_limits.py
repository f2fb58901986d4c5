"""What the machine can do at most: which product is measured."""

from __future__ import annotations

import pytest
import torch
from pyxlbert.bench import limits

from pyxlbert.cpu import _onednn


@pytest.mark.parametrize(
    ("detour", "measured"),
    [(None, torch.bfloat16), ("products of bfloat16 are made in float32 and rounded", torch.float32)],
)
def test_a_dtype_that_the_processor_lacks_has_the_limit_of_float32(detour, measured, monkeypatch) -> None:
    """The vendors' reference code for it takes a minute for each product."""
    seen = []
    monkeypatch.setattr(limits, "_gemm_rate", lambda *asked: seen.append(asked) or 1e12)
    monkeypatch.setattr(_onednn, "detour", lambda dtype: None if dtype is torch.float32 else detour)
    assert limits.gemm_rate(torch.bfloat16) == limits.gemm_rate(torch.float32) == 1e12
    assert seen == [(measured, "cpu"), (torch.float32, "cpu")]
