"""XLNet's memories."""

from __future__ import annotations

import torch
from small_xlnet import FLOAT32, IDS, build

from pyxlbert.testing import compare


def test_two_halves_with_a_memory_are_the_whole() -> None:
    model = build(attn_type="uni", mem_len=None)
    whole = model(IDS)
    first = model(IDS[:, :4])
    second = model(IDS[:, 4:], mems=first.mems)
    compare.close("states", torch.cat([first[0], second[0]], dim=1), whole[0], FLOAT32)
    for a, b in zip(second.mems, whole.mems, strict=True):
        compare.close("memory", a, b, FLOAT32)


def test_memories_are_cut_and_carry_no_gradient() -> None:
    model = build(mem_len=5, reuse_len=3).train()
    first = model(IDS, use_mems=True)
    second = model(IDS, mems=first.mems, use_mems=True)
    assert [m.shape[0] for m in (*first.mems, *second.mems)] == [3, 3, 5, 5]
    assert not any(m.requires_grad for m in second.mems)
    assert model(IDS).mems is None and model.eval()(IDS).mems is not None
