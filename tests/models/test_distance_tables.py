"""Products of the distances' embeddings that packed XLNet layers keep from call to call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import pyxlbert
from pyxlbert.backends import native
from pyxlbert.models import XLNetConfig, XLNetModel
from pyxlbert.testing import compare

pytestmark = pytest.mark.skipif(
    native._C is None or native._C.level() == "portable", reason="nothing is packed without AVX2"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def xlnet(dtype: torch.dtype, **options: object) -> XLNetModel:
    """With parameters none of which is zero or one."""
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=90, d_model=48, n_layer=2, n_head=3, d_inner=100, dropout=0.0, **options)
    model = XLNetModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 90, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def poisoned():
    """Scratch memory is full of NaN each time that a kernel takes it."""
    native._C.poison_workspaces(True)
    yield
    native._C.poison_workspaces(False)


# Options of the model, lengths that one model meets in turn, and at how many of them it multiplies its distances.
DISTANCES = {
    "longer and shorter": ({}, (9, 40, 9, 40, 23, 41, 41), 3),
    "clamped": ({"clamp_len": 5}, (40, 9, 3), 1),
    "earlier keys only": ({"attn_type": "uni"}, (40, 1, 9), 1),
    "too long to keep": ({}, (1025, 9, 1025, 1024, 1025, 9), 5),
    "backwards too": ({"bi_data": True}, (8, 8), 2),
}


@pytest.mark.parametrize("case", DISTANCES)
@pytest.mark.parametrize(("dtype", "kept"), [*((one, None) for one in DTYPES), (torch.bfloat16, "int8")])
def test_distances_are_multiplied_once(case: str, dtype: torch.dtype, kept: str | None, poisoned: None) -> None:
    """And what is kept of longer texts gives a shorter one the bits that it has in a model that met no other."""
    options, lengths, multiplied = DISTANCES[case]
    packed = pyxlbert.pack(xlnet(dtype, **options), dtype=kept)
    with torch.no_grad():
        for length in lengths:
            inputs = {"input_ids": ids(2, length), "use_mems": False}
            found = packed(**inputs).last_hidden_state
            alone = pyxlbert.pack(copy.deepcopy(packed), dtype=kept)
            compare.same_bits(str(length), found, alone(**inputs).last_hidden_state)
            assert alone.together._found.stack._native.multiplied == 1
        assert packed.together._found.stack._native.multiplied == multiplied
        # Weights that have changed are multiplied again.
        inputs["output_hidden_states"] = True
        before = packed(**inputs).last_hidden_state
        packed.layer[1].rel_attn.r.data.mul_(-2.0)
        alone = pyxlbert.pack(copy.deepcopy(packed), dtype=kept)
        after, wanted = (one(**inputs).last_hidden_state for one in (packed, alone))
    assert not torch.equal(before, after)
    compare.same_bits("changed", after, wanted)
