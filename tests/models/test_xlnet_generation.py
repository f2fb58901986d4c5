"""XLNetLMHeadModel.generate: equal to transformers, and left to right with a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from pyxlbert.models import XLNetConfig, XLNetLMHeadModel
from pyxlbert.models.generation import LeftToRight, Sampling
from pyxlbert.testing import compare

FLOAT32 = compare.tolerances.MODEL_FLOAT32
SMALL = {
    "vocab_size": 53,
    "d_model": 24,
    "n_layer": 3,
    "n_head": 3,
    "d_inner": 40,
    "initializer_range": 0.4,
    "mem_len": None,
}
IDS = torch.randint(6, 53, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
MODES = [{"use_mems": False}, {"use_mems": True}, {"left_to_right": True}]


def build(**fields: Any) -> XLNetLMHeadModel:
    torch.manual_seed(1)
    return XLNetLMHeadModel(XLNetConfig(**SMALL | fields)).eval()


@pytest.mark.parametrize("use_mems", [False, True])
@pytest.mark.parametrize(
    "fields", [{}, {"mem_len": 6}, {"reuse_len": 4}, {"attn_type": "uni"}, {"bi_data": True}, {"clamp_len": 3}], ids=str
)
@pytest.mark.parametrize("length", [1, 2, 7])
def test_greedy_is_that_of_transformers(fields: dict[str, Any], use_mems: bool, length: int) -> None:
    ours = build(**fields)
    theirs = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**SMALL | fields)).eval()
    theirs.load_state_dict(ours.state_dict())
    if "attn_type" in fields:
        create_mask = theirs.transformer.create_mask
        # Its own has room for one sequence, and raises when the order of several is added.
        theirs.transformer.create_mask = lambda *lengths: _Columns(create_mask(*lengths))
    ids = IDS[:, :length]
    given = {"max_new_tokens": 12, "use_mems": use_mems}
    wanted = theirs.generate(ids, **given, do_sample=False, eos_token_id=None, pad_token_id=5)
    assert torch.equal(ours.generate(ids, **given, stop_token_ids=[]), wanted)


class _Columns:
    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.mask[index].repeat(1, 1, len(IDS), 1)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("fields", [{}, {"mem_len": 4}, {"attn_type": "uni"}], ids=str)
def test_a_padded_text_is_continued_as_if_it_were_alone(mode: dict[str, bool], fields: dict[str, Any]) -> None:
    model = build(**fields)
    given = {"max_new_tokens": 10, "stop_token_ids": [], **mode}
    together = model.generate(IDS, MASK, **given)
    assert torch.equal(together[:1, 3:], model.generate(IDS[:1, 3:], **given))
    assert torch.equal(together[1:], model.generate(IDS[1:], **given))


@pytest.mark.parametrize("fields", [{}, {"attn_type": "uni"}, {"bi_data": True}, {"clamp_len": 3}], ids=str)
@pytest.mark.parametrize("mask", [None, MASK])
def test_left_to_right_is_one_forward_pass(fields: dict[str, Any], mask: torch.Tensor | None) -> None:
    model = build(**fields)
    text = torch.randint(6, 53, (2, 15), generator=torch.Generator().manual_seed(2))
    text[:, :7] = IDS
    order = torch.arange(15).expand(2, 15).int()
    given = {"query_rank": order, "key_rank": order, "target_positions": order, "use_mems": False}
    if mask is not None:
        given["attention_mask"] = torch.nn.functional.pad(mask, (0, 8), value=1)
    with torch.no_grad():
        whole = model(text, **given).logits
        stepper = LeftToRight(model, None if mask is None else mask.bool(), 2, 7, 15)
        for length in range(7, 15):
            compare.close(f"step {length}", stepper.logits(text[:, :length]), whole[:, length], FLOAT32)


def test_a_step_left_to_right_computes_two_rows_whatever_the_length() -> None:
    model = build()
    rows = []
    for layer in model.transformer.layer:
        layer.ff.layer_1.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[1]))
    model.generate(IDS, max_new_tokens=6, stop_token_ids=[], left_to_right=True)
    assert rows == [8] * 3 + [2] * 15


def test_stop_tokens_end_a_text() -> None:
    model = build()
    free = model.generate(IDS, max_new_tokens=8, stop_token_ids=[])
    stop = int(free[0, 9])
    ended = model.generate(IDS, max_new_tokens=8, stop_token_ids=stop, pad_token_id=0)
    for row in range(2):
        new = free[row, 7:].tolist()
        kept = new[: new.index(stop) + 1] if stop in new else new
        assert ended[row, 7:].tolist() == kept + [0] * (ended.shape[1] - 7 - len(kept))
    alone = model.generate(IDS[:1], max_new_tokens=8, stop_token_ids=[stop])
    assert alone.shape[1] == 7 + free[0, 7:].tolist().index(stop) + 1


def test_drawing() -> None:
    model = build()
    given = {"max_new_tokens": 8, "do_sample": True, "stop_token_ids": []}
    draws = [model.generate(IDS, generator=torch.Generator().manual_seed(seed), **given) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    greedy = model.generate(IDS, max_new_tokens=8, stop_token_ids=[])
    assert torch.equal(model.generate(IDS, top_k=1, **given), greedy)
    assert torch.equal(model.generate(IDS, temperature=1e-4, **given), greedy)


def test_filters_are_those_of_transformers() -> None:
    logits = torch.randn(20, 40, generator=torch.Generator().manual_seed(5)) * 3
    for top_k, top_p in ((None, 0.3), (None, 0.9), (5, None), (100, None), (7, 0.6)):
        wanted = logits / 0.7
        wanted = wanted if top_k is None else TopKLogitsWarper(top_k)(None, wanted)
        wanted = wanted if top_p is None else TopPLogitsWarper(top_p)(None, wanted)
        ours = Sampling(True, 0.7, top_k, top_p).filtered(logits)
        assert torch.equal(ours, wanted)


def test_no_gradient_is_kept() -> None:
    model = build().train()
    assert not model.generate(IDS, max_new_tokens=2).requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_a_temperature_near_zero_takes_the_best() -> None:
    model = build()
    given = {"max_new_tokens": 4, "stop_token_ids": []}
    greedy = model.generate(IDS, **given)
    for temperature in (1e-38, 1e-45, 1e-300):
        assert torch.equal(model.generate(IDS, do_sample=True, temperature=temperature, **given), greedy)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_model_without_layers(mode: dict[str, bool]) -> None:
    model = build(n_layer=0)
    given = {"max_new_tokens": 4, "stop_token_ids": [], **mode}
    together = model.generate(IDS, MASK, **given)
    assert torch.equal(together[:1, 3:], model.generate(IDS[:1, 3:], **given))


DRAWN = {"do_sample": True}
BAD_VALUES = [
    ({"input_ids": IDS[0]}, "input_ids"),
    ({"input_ids": IDS[:, :0]}, "input_ids"),
    ({"input_ids": IDS + 40}, "input_ids"),
    ({"attention_mask": MASK.flip(1)}, "attention_mask"),
    ({"attention_mask": MASK[:, :3]}, "attention_mask"),
    ({"attention_mask": MASK * 2}, "attention_mask.*0 and 1"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    (DRAWN | {"temperature": 0.0}, "temperature"),
    (DRAWN | {"temperature": float("nan")}, "temperature"),
    (DRAWN | {"top_k": 0}, "top_k"),
    (DRAWN | {"top_p": 1.5}, "top_p"),
    ({"temperature": 0.7}, "temperature.*do_sample"),
    ({"top_k": 3}, "top_k.*do_sample"),
    ({"top_p": 0.9}, "top_p.*do_sample"),
    ({"use_mems": True, "left_to_right": True}, "use_mems.*left_to_right"),
    ({"pad_token_id": 53}, "pad_token_id.*53.*0 to 52"),
    ({"pad_token_id": -1}, "pad_token_id.*-1"),
    ({"stop_token_ids": [2, 53]}, "stop_token_ids.*53.*0 to 52"),
]
OF_ANOTHER_TYPE = [
    ({name: value}, name)
    for name, values in {
        "input_ids": (IDS.tolist(),),
        "attention_mask": (MASK.tolist(), "left"),
        "max_new_tokens": (True, 2.0, "2"),
        "pad_token_id": (True, 1.0, "1", torch.tensor(1)),
        "stop_token_ids": (True, 1.0, "1", torch.tensor(1), [1.0], ["1"], [True]),
        "use_mems": (1, "yes"),
        "left_to_right": (1, "yes"),
        "do_sample": (1, "yes"),
        "generator": (3,),
    }.items()
    for value in values
]
OF_ANOTHER_TYPE += [
    (DRAWN | {name: value}, name)
    for name in ("temperature", "top_k", "top_p")
    for value in (True, "1", torch.tensor(1))
]


@pytest.mark.parametrize("arguments, name", BAD_VALUES)
def test_bad_input_is_named(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{name}"):
        build().generate(**{"input_ids": IDS} | arguments)


@pytest.mark.parametrize("arguments, name", OF_ANOTHER_TYPE)
def test_arguments_of_another_type_are_named(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name}: got"):
        build().generate(**{"input_ids": IDS} | arguments)


def test_a_moving_window_has_no_cache() -> None:
    with pytest.raises(ValueError, match="left_to_right"):
        build(attn_type="uni", same_length=True).generate(IDS, left_to_right=True)
