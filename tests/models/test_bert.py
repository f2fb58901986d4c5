"""What is ours in BertModel: padding that takes no time, packed input, masks, empty batches."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from small_bert import FLOAT32, GRADIENT, IDS, MASK, REAL, build, gradients

import pyxlbert.cpu._packed
import pyxlbert.cpu.encoder_layer
import pyxlbert.nn.self_attention
from pyxlbert import models
from pyxlbert.backends.native import _C
from pyxlbert.models import (
    BertForMaskedLM,
    BertForPreTraining,
)
from pyxlbert.testing import compare


def test_each_row_is_as_if_it_were_alone() -> None:
    model = build()
    together = model(IDS, MASK, output_hidden_states=True)
    for row, real in enumerate(REAL):
        places = real.nonzero().squeeze(1)[None]
        alone = model(IDS[row][places], position_ids=places, output_hidden_states=True)
        for a, b in zip(together.hidden_states, alone.hidden_states, strict=True):
            compare.close("hidden state", a[row][real], b[0], FLOAT32)
            assert not a[row][~real].any()
        if real.any():
            compare.close("pooler", together.pooler_output[row], alone.pooler_output[0], FLOAT32)


def test_a_row_without_tokens_is_zeros() -> None:
    model = build()
    output = model(IDS, MASK)
    assert not output.last_hidden_state[4].any()
    compare.same_bits("pooler", output.pooler_output[4], torch.tanh(model.pooler.dense.bias))
    assert not model(IDS, torch.zeros_like(MASK)).last_hidden_state.any()


def test_padding_gets_no_gradient_and_may_hold_anything() -> None:
    model = build()
    vectors = torch.randn(5, 7, 24)
    vectors[~REAL] = float("nan")
    vectors.requires_grad_()
    output = model(inputs_embeds=vectors, attention_mask=MASK)
    assert output.last_hidden_state.isfinite().all()
    (output.last_hidden_state.square().sum() + output.pooler_output.sum()).backward()
    assert not vectors.grad[~REAL].any()
    assert vectors.grad[REAL].isfinite().all() and vectors.grad[REAL].any()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_any_dtype_of_mask(dtype: torch.dtype) -> None:
    model = build()
    compare.same_bits("states", model(IDS, MASK.to(dtype))[0], model(IDS, MASK)[0])


class Counter:
    """Counts the rows that enter each linear layer and the (query, key) pairs that attention computes."""

    def __init__(self, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[str, int] = {}
        self.pairs: list[int] = []
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(self._counting(name))
        real = pyxlbert.nn.self_attention.attention

        def counting(query, key, value, **options):
            if options["cu_seqlens"] is None:
                self.pairs.append(query.shape[0] * query.shape[1] * key.shape[1])
            else:
                self.pairs.append(int(options["cu_seqlens"].diff().square().sum()))
            return real(query, key, value, **options)

        monkeypatch.setattr(pyxlbert.nn.self_attention, "attention", counting)

    def _counting(self, name: str):
        def hook(module, inputs):
            assert name not in self.rows
            self.rows[name] = inputs[0].numel() // module.in_features

        return hook


@pytest.mark.skipif(_C is None or _C.level() == "portable", reason="nothing is packed without AVX2")
def test_packed_layers_get_the_real_tokens_only(monkeypatch) -> None:
    """As above where the modules are not called: layers in one call, and the products behind them."""
    model = pyxlbert.pack(build(BertForMaskedLM))
    rows: list[int] = []
    pairs: list[int] = []
    products: list[int] = []

    class Counting:
        """The native module and its kernels, with a look at their sizes."""

        def __getattr__(self, name: str) -> Any:
            return getattr(_C, name) if hasattr(_C, name) else getattr(_C.cpu, name)

        @property
        def cpu(self) -> Counting:
            return self

        def encoder_layers_fwd(self, *arguments: Any) -> None:
            rows.append(arguments[7])
            _C.cpu.encoder_layers_fwd(*arguments)

        def packed_linear_fwd(self, *arguments: Any) -> None:
            products.append(arguments[3])
            _C.cpu.packed_linear_fwd(*arguments)

        def AttentionCall(self, *arguments: Any) -> Any:
            cu_seqlens = ctypes.cast(arguments[7], ctypes.POINTER(ctypes.c_int))
            lengths = [cu_seqlens[i + 1] - cu_seqlens[i] for i in range(arguments[12][0])]
            pairs.append(sum(length**2 for length in lengths))
            return _C.cpu.AttentionCall(*arguments)

    counting = Counting()
    for module in (pyxlbert.cpu.encoder_layer, pyxlbert.cpu._packed):
        monkeypatch.setattr(module, "_C", counting)
    with torch.no_grad():
        model(IDS, MASK)
    tokens = int(MASK.sum())
    # After the layers two more, to the vocabulary.
    assert rows == [tokens] and products == [tokens] * 2
    assert pairs == [int(MASK.sum(1).square().sum())]


@pytest.mark.parametrize("mask", [None, MASK, torch.zeros_like(MASK)])
def test_only_real_tokens_are_computed(mask: torch.Tensor | None, monkeypatch) -> None:
    model = build(BertForPreTraining)
    counter = Counter(model, monkeypatch)
    model(IDS, mask)
    lengths = torch.full((5,), 7) if mask is None else mask.sum(1)
    once = {"bert.pooler.dense", "cls.seq_relationship"}
    assert {rows for name, rows in counter.rows.items() if name not in once} == {int(lengths.sum())}
    assert {counter.rows[name] for name in once} == {5}
    assert len(counter.rows) == 2 * 6 + 4
    assert counter.pairs == [int(lengths.square().sum())] * 2


def test_sparse_prediction_computes_labelled_rows_only(monkeypatch) -> None:
    labels = torch.where((IDS % 3 == 0), IDS, -100)
    full = build(BertForMaskedLM)
    sparse = build(BertForMaskedLM, sparse_prediction=True)
    a = full(IDS, MASK, labels=labels)
    counter = Counter(sparse, monkeypatch)
    b = sparse(IDS, MASK, labels=labels)
    labelled = REAL & (labels != -100)
    assert counter.rows["cls.predictions.decoder"] == int(labelled.sum())
    assert b.logits.shape == (int(labelled.sum()), 40)
    compare.close("logits", b.logits, a.logits[labelled], FLOAT32)
    compare.close("loss", b.loss, a.loss, FLOAT32)
    a.loss.backward()
    b.loss.backward()
    for (name, p), q in zip(full.named_parameters(), sparse.parameters(), strict=True):
        if name.endswith("self.key.bias"):
            # It moves all scores of a row alike, which softmax does not see: nothing but rounding.
            assert max(float(x.grad.abs().max()) for x in (p, q)) <= compare.tolerances.ZERO_GRADIENT_FLOAT32
            continue
        compare.close(name, q.grad, p.grad, GRADIENT)
    assert build(BertForMaskedLM, sparse_prediction=True)(IDS, MASK).logits.shape == (5, 7, 40)


def test_packed_input_is_the_padded_one_without_the_padding() -> None:
    model = build()
    padded = model(IDS, MASK, output_hidden_states=True)
    places = (MASK.cumsum(1) - 1)[REAL]
    lengths = MASK.sum(1)
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    where = torch.arange(7).expand(5, 7)[REAL]
    packed = model(IDS[REAL], position_ids=where, cu_seqlens=cu_seqlens, max_seqlen=7, output_hidden_states=True)
    for a, b in zip(packed.hidden_states, padded.hidden_states, strict=True):
        compare.same_bits("hidden state", a, b[REAL])
    compare.same_bits("pooler", packed.pooler_output, padded.pooler_output)
    counted = model(IDS[REAL], cu_seqlens=cu_seqlens)
    compare.same_bits("positions", counted[0], model(IDS[REAL], position_ids=places, cu_seqlens=cu_seqlens)[0])


@pytest.mark.parametrize("batch, length", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("mask", [None, 0, 1])
@pytest.mark.parametrize("head", [n for n in models.__all__ if n.startswith("BertFor")] + ["BertModel"])
def test_empty_batches(head: str, batch: int, length: int, mask: int | None) -> None:
    model = build(getattr(models, head))
    shape = (batch, 2, length) if head == "BertForMultipleChoice" else (batch, length)
    given = None if mask is None else torch.full(shape, mask)
    output = model(torch.zeros(shape, dtype=torch.long), given, output_hidden_states=True)
    assert all(value.isfinite().all() for value in output.values() if isinstance(value, torch.Tensor))
    assert output.hidden_states[0].shape[-2:] == (length, 24)


def test_dense_masks_agree() -> None:
    model = build()
    allowed = (torch.rand(5, 7, 7) < 0.6) | torch.eye(7, dtype=torch.bool)
    wanted = model(IDS, allowed)[0]
    added = torch.zeros(5, 1, 7, 7).masked_fill(~allowed[:, None], -torch.inf)
    for mask in (
        allowed.long(),
        allowed.float(),
        allowed[:, None],
        allowed[:, None].int(),
        added,
        added.double(),
        added.bfloat16(),
    ):
        compare.close("states", model(IDS, mask)[0], wanted, FLOAT32)
    half = build().to(torch.bfloat16)
    compare.same_bits("half", half(IDS, added)[0], half(IDS, added.bfloat16())[0])
    keys = torch.ones(1, 1, 1, 7, dtype=torch.bool)
    compare.close("states", model(IDS, keys)[0], model(IDS)[0], FLOAT32)


def test_a_row_that_may_attend_nothing_is_finite() -> None:
    model = build()
    allowed = torch.ones(5, 7, 7, dtype=torch.bool)
    allowed[1, 2] = False
    added = torch.zeros(5, 1, 7, 7).masked_fill(~allowed[:, None], -torch.inf)
    for mask in (allowed, added):
        found = []
        for weights in (False, True):
            model.zero_grad()
            output = model(IDS, mask, output_attentions=weights)
            output[0].square().sum().backward()
            assert output[0].isfinite().all()
            found.append((output[0].detach(), gradients(model)))
        assert not output.attentions[0][1, :, 2].any() and output.attentions[0].isfinite().all()
        compare.close("states", found[1][0], found[0][0], FLOAT32)
        compare.close("gradients", found[1][1], found[0][1], GRADIENT)


def test_outputs_by_name_index_and_key() -> None:
    model = build(BertForMaskedLM)
    output = model(IDS, labels=IDS)
    assert list(output) == ["loss", "logits"] and len(output) == 2
    assert output[0] is output.loss is output["loss"] and output[:2] == (output.loss, output.logits)
    assert output.to_tuple()[1] is output.logits and dict(**output)["logits"] is output.logits
    assert "attentions" not in output and output.attentions is None and output.get("attentions") is None
    with pytest.raises(KeyError):
        output["attentions"]
    plain = model(IDS, labels=IDS, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == 2
    leaves, spec = torch.utils._pytree.tree_flatten(output)
    assert len(leaves) == 2 and torch.utils._pytree.tree_unflatten(leaves, spec).logits is output.logits
