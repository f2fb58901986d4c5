"""What is ours in BertModel: padding that takes no time, edge cases, precision, refusals."""

from __future__ import annotations

import copy
import ctypes
import io
from typing import Any

import pytest
import torch
import transformers

import pyxlbert.cpu
import pyxlbert.nn.self_attention
from pyxlbert import models
from pyxlbert.backends.native import _C
from pyxlbert.cpu import _onednn
from pyxlbert.models import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from pyxlbert.ops import _encoder_layers
from pyxlbert.testing import compare

FLOAT32, GRADIENT = compare.tolerances.MODEL_FLOAT32, compare.tolerances.MODEL_GRADIENT_FLOAT32
SMALL = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IDS = torch.randint(1, 40, (5, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor(
    [[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]]
)
REAL = MASK.bool()


def build(head: type = BertModel, **fields: Any) -> torch.nn.Module:
    torch.manual_seed(5)
    return head(BertConfig(**SMALL | fields)).eval()


# Padding


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


@pytest.mark.skipif(_C is None or _C.level() == "portable", reason="few rows have no kernel here")
@pytest.mark.parametrize("packed", [False, True])
def test_no_kernel_gets_more_than_the_real_tokens(packed: bool, monkeypatch) -> None:
    """As above where the modules are not called: layers in one go, and products with packed weights."""
    model, size = build(BertForMaskedLM), 5 if packed else 1
    ids, mask = IDS.repeat(size, 1), MASK.repeat(size, 1)
    if packed:
        pyxlbert.pack(model)
        monkeypatch.setattr(_onednn, "torch_is_faster", lambda *_, **__: False)  # as for large ones
    monkeypatch.setattr(pyxlbert.cpu._few_rows, "most_rows", lambda *_: 32)
    with torch.no_grad():
        model(ids, mask)  # the first call tries the products out
    rows: list[int] = []
    pairs: list[int] = []

    class Counting:
        """The native module and its kernels, with a look at their sizes."""

        def __getattr__(self, name: str) -> Any:
            return getattr(_C, name) if hasattr(_C, name) else getattr(_C.cpu, name)

        @property
        def cpu(self) -> Counting:
            return self

        def linear_fwd(self, *arguments: Any) -> None:
            rows.append(arguments[4])
            _C.cpu.linear_fwd(*arguments)

        def AttentionInputs(self, *arguments: Any) -> Any:
            cu_seqlens = ctypes.cast(arguments[7], ctypes.POINTER(ctypes.c_int))
            lengths = [cu_seqlens[i + 1] - cu_seqlens[i] for i in range(arguments[12][0])]
            pairs.append(sum(length**2 for length in lengths))
            return _C.cpu.AttentionInputs(*arguments)

    real = _onednn.product

    def product(x: torch.Tensor, *arguments: Any) -> Any:
        rows.append(x.numel() // x.shape[-1])
        return real(x, *arguments)

    counting = Counting()
    for module in (_encoder_layers, pyxlbert.cpu._attention, pyxlbert.cpu._few_rows):
        monkeypatch.setattr(module, "_C", counting)
    monkeypatch.setattr(_onednn, "product", product)
    with torch.no_grad():
        model(ids, mask)
    tokens = int(mask.sum())
    # Query, key and value are one product of packed weights; after the layers two more, to the vocabulary.
    assert rows == [tokens] * (2 * (4 if packed else 6) + 2)
    assert set(pairs) == {int(mask.sum(1).square().sum())}


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


# Masks with three and four dimensions


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_a_training_step_are_those_that_it_used(dtype: torch.dtype) -> None:
    """With dropout too: the same seed drops the same weights, shown or not."""
    found = []
    for weights in (False, True):
        model = build(attention_probs_dropout_prob=0.4, hidden_dropout_prob=0.2).to(dtype).train()
        torch.manual_seed(3)
        output = model(IDS, MASK, output_attentions=weights)
        output[0].float().square().sum().backward()
        found.append((output[0].detach(), gradients(model)))
    dropped = output.attentions[0][0] == 0  # of a row without padding
    assert 0.2 < dropped.double().mean() < 0.6
    # Both in the same dtype, each with its own roundings.
    scale = float(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)
    compare.close("states", found[1][0], found[0][0], FLOAT32 * scale)
    compare.close("gradients", found[1][1], found[0][1], GRADIENT * scale)


# Precision


def peer(head: str = "BertModel") -> tuple[torch.nn.Module, torch.nn.Module]:
    fields = SMALL | {"num_hidden_layers": 4, "hidden_size": 48}
    theirs = getattr(transformers, head)(transformers.BertConfig(**fields, attn_implementation="eager")).eval()
    ours = getattr(models, head)(BertConfig(**fields)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
def test_low_precision_errs_no_more_than_transformers(how: str) -> None:
    torch.manual_seed(0)
    ours, theirs = peer()
    truth = copy.deepcopy(theirs).double()
    ids = torch.randint(1, 40, (4, 11))
    if how != "autocast":
        ours, theirs = ours.to(getattr(torch, how)), theirs.to(getattr(torch, how))
    direction = torch.randn(4, 11, 48)
    results = []
    for model in (ours, theirs, truth):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast" and model is not truth):
            output = model(ids, output_hidden_states=True)
        (output.last_hidden_state * direction.to(output.last_hidden_state.dtype)).sum().backward()
        results.append((output, gradients(model)))
    (mine, dmine), (plain, dplain), (exact, dexact) = results
    for name in ("last_hidden_state", "pooler_output"):
        assert mine[name].dtype == plain[name].dtype
        compare.within_budget(name, mine[name].detach(), plain[name].detach(), exact[name].detach())
    assert all(a.dtype == b.dtype for a, b in zip(mine.hidden_states, plain.hidden_states, strict=True))
    compare.within_budget("gradients", dmine, dplain, dexact)


def test_residual_in_float32_halves_the_error() -> None:
    """Of a model with weights of an ordinary size, where the stream's roundings are what adds up."""
    model = build(num_hidden_layers=12, hidden_size=48, intermediate_size=192, initializer_range=0.02)
    ids = torch.randint(1, 40, (8, 11), generator=torch.Generator().manual_seed(0))
    errors = {}
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(ids)[0]
        model.to(torch.bfloat16)
        for stream in (True, False):
            model.config.residual_in_fp32 = stream
            errors[stream] = float((model(ids)[0].double() - truth).norm())
    assert errors[True] < 0.5 * errors[False]


def test_float64() -> None:
    ours, theirs = peer()
    compare.close("states", ours.double()(IDS)[0], theirs.double()(IDS)[0], compare.tolerances.FLOAT64)


# Training


def test_checkpointing_changes_nothing_but_what_is_kept() -> None:
    model = build(num_hidden_layers=3, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3).train()

    def once() -> tuple[torch.Tensor, torch.Tensor, int]:
        model.zero_grad()
        torch.manual_seed(1)
        kept: list[int] = []

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            y = model(IDS, MASK).last_hidden_state
        y.square().sum().backward()
        return y, gradients(model), sum(kept)

    y, dy, kept = once()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    z, dz, less = once()
    compare.same_bits("states", y, z)
    compare.same_bits("gradients", dy, dz)
    assert less < kept / 2
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_dropout_follows_the_seed_and_stops_in_evaluation() -> None:
    model = build(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model(IDS, MASK)[0])
    compare.same_bits("same seed", draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    model.eval()
    compare.same_bits("evaluation", model(IDS, MASK)[0], model(IDS, MASK)[0])


def test_labels_on_padding_count_for_nothing() -> None:
    model = build(BertForTokenClassification, num_labels=4)
    labels = IDS % 4
    a = model(IDS, MASK, labels=labels)
    b = model(IDS, MASK, labels=labels.masked_fill(~REAL, -100))
    compare.same_bits("loss", a.loss, b.loss)
    assert not a.logits[~REAL].any()


def test_spans_never_end_on_padding() -> None:
    model = build(BertForQuestionAnswering)
    output = model(IDS, MASK, start_positions=torch.zeros(5).long(), end_positions=torch.full((5,), 99))
    assert not output.start_logits.softmax(-1)[:4][~REAL[:4]].any()
    assert output.loss.isnan()  # no end position counts, as in transformers
    output = model(
        IDS, MASK, start_positions=torch.tensor([0, 0, 3, 1, 2]), end_positions=torch.tensor([6, 1, 2, 4, 0])
    )
    assert output.loss.isfinite() and output.loss < 100


def test_dropout_of_the_classifier() -> None:
    for head in ("BertForSequenceClassification", "BertForTokenClassification", "BertForMultipleChoice"):
        for given in (None, 0.0, 0.4):
            fields = SMALL | {"hidden_dropout_prob": 0.3, "classifier_dropout": given}
            theirs = getattr(transformers, head)(transformers.BertConfig(**fields))
            ours = getattr(models, head)(BertConfig(**fields))
            assert ours.dropout.p == theirs.dropout.p == (0.3 if given is None else given)


def test_problem_types() -> None:
    one = build(BertForSequenceClassification, num_labels=1)
    compare.same_bits("shape", one(IDS, labels=torch.ones(5)).loss, one(IDS, labels=torch.ones(5, 1).long()).loss)
    many = build(BertForSequenceClassification, num_labels=3)
    logits = many(IDS).logits
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.ones(5, 3))
    compare.close("multi-label", many(IDS, labels=torch.ones(5, 3)).loss, wanted, FLOAT32)
    wanted = torch.nn.functional.cross_entropy(logits, torch.ones(5).long())
    compare.close("classes", many(IDS, labels=torch.ones(5, dtype=torch.int32)).loss, wanted, FLOAT32)
    assert many.config.problem_type is None


# Objects


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


def test_ties_survive_copies_conversions_and_new_embeddings() -> None:
    model = build(BertForMaskedLM)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(model).to(torch.bfloat16),
    ):
        assert other.cls.predictions.decoder.weight is other.bert.embeddings.word_embeddings.weight
        assert other.cls.predictions.decoder.bias is other.cls.predictions.bias
    table = torch.nn.Embedding(40, 24, padding_idx=0)
    model.set_input_embeddings(table)
    assert model.get_output_embeddings().weight is table.weight is model.get_input_embeddings().weight


def test_initial_values() -> None:
    model = build(BertForMaskedLM, initializer_range=0.02, hidden_size=192, intermediate_size=200)
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            assert 0.015 < parameter.std() < 0.025, name
    assert not model.bert.embeddings.word_embeddings.weight[0].any()


# Tracing


def test_compiles_into_one_graph(monkeypatch) -> None:
    model = build(BertForMaskedLM, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, columns in ((5, 7), (3, 5)):
        ids, mask, labels = IDS[:rows, :columns], MASK[:rows, :columns], IDS[:rows, :columns].clone()
        a, b = compiled(ids, mask, labels=labels), model(ids, mask, labels=labels)
        compare.close("logits", a.logits, b.logits, FLOAT32)
        compare.close("loss", a.loss, b.loss, FLOAT32)
        a.loss.backward()
        da = gradients(model)
        model.zero_grad()
        b.loss.backward()
        compare.close("gradients", da, gradients(model), GRADIENT)
        model.zero_grad()


def test_a_compiled_model_computes_the_whole_vocabulary() -> None:
    """Sparse prediction's sizes depend on the labels, which a graph cannot: the loss is the same, logits are whole."""
    model = build(BertForMaskedLM, num_hidden_layers=1, sparse_prediction=True)
    labels = IDS.masked_fill(IDS % 3 > 0, -100)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    a, b = compiled(IDS, MASK, labels=labels), model(IDS, MASK, labels=labels)
    compare.close("loss", a.loss, b.loss, FLOAT32)
    assert a.logits.shape == (5, 7, 40)
    compare.close("logits", a.logits[REAL & (labels != -100)], b.logits, FLOAT32)


def test_exports() -> None:
    model = build(num_hidden_layers=1)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=16)
    dynamic = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}}
    program = torch.export.export(model, (), {"input_ids": IDS, "attention_mask": MASK}, dynamic_shapes=dynamic)
    for rows, columns in ((5, 7), (3, 6)):
        given = {"input_ids": IDS[:rows, :columns], "attention_mask": MASK[:rows, :columns]}
        a, b = program.module()(**given), model(**given)
        compare.close("states", a.last_hidden_state, b.last_hidden_state, FLOAT32)
        compare.close("pooler", a.pooler_output, b.pooler_output, FLOAT32)


# Bad input

BAD = [
    ({}, "input_ids"),
    ({"input_ids": IDS, "inputs_embeds": torch.zeros(5, 7, 24)}, "inputs_embeds"),
    ({"input_ids": IDS[0]}, "input_ids"),
    ({"input_ids": IDS.float()}, "input_ids"),
    ({"input_ids": torch.full((1, 3), 40)}, "input_ids"),
    ({"input_ids": torch.full((1, 3), -1)}, "input_ids"),
    ({"input_ids": torch.zeros(1, 17, dtype=torch.long)}, "input_ids.*max_position_embeddings"),
    ({"input_ids": torch.zeros(17).long(), "cu_seqlens": torch.tensor([0, 17]).int()}, "input_ids.*max_position"),
    ({"inputs_embeds": torch.zeros(1, 17, 24)}, "inputs_embeds.*max_position_embeddings"),
    ({"inputs_embeds": torch.zeros(1, 3, 23)}, "inputs_embeds"),
    ({"inputs_embeds": torch.zeros(1, 3, 24, dtype=torch.long)}, "inputs_embeds"),
    ({"input_ids": IDS.to("meta")}, "input_ids"),
    ({"input_ids": IDS, "attention_mask": MASK.to("meta")}, "attention_mask"),
    ({"input_ids": IDS, "attention_mask": MASK[:, :6]}, "attention_mask"),
    ({"input_ids": IDS, "attention_mask": MASK[0]}, "attention_mask"),
    ({"input_ids": IDS, "attention_mask": MASK * 2}, "attention_mask"),
    ({"input_ids": IDS, "attention_mask": (MASK - 1) * 1e4}, "attention_mask"),
    ({"input_ids": IDS, "attention_mask": torch.ones(5, 7, 6)}, "attention_mask"),
    ({"input_ids": IDS, "attention_mask": torch.ones(5, 2, 7, 7)}, "attention_mask|bias"),
    ({"input_ids": IDS, "attention_mask": torch.ones(4, 1, 7, 7)}, "attention_mask"),
    ({"input_ids": IDS, "attention_mask": torch.full((5, 1, 7, 7), 2)}, "attention_mask.*0 and 1"),
    ({"input_ids": IDS, "attention_mask": torch.full((5, 7, 7), -1)}, "attention_mask.*0 and 1"),
    ({"input_ids": IDS, "attention_mask": MASK * 1j}, "attention_mask.*complex"),
    *(
        ({"input_ids": IDS, name: value}, f"^{name}: got {type(value).__name__}, wanted a tensor$")
        for name in ("attention_mask", "token_type_ids", "position_ids", "cu_seqlens")
        for value in ([[0]], IDS.numpy())
    ),
    ({"input_ids": IDS.tolist()}, "input_ids.*list"),
    ({"inputs_embeds": IDS.numpy()}, "inputs_embeds.*ndarray"),
    ({"input_ids": IDS, "token_type_ids": IDS}, "token_type_ids"),
    ({"input_ids": IDS, "token_type_ids": IDS[:, :3] * 0}, "token_type_ids"),
    ({"input_ids": IDS, "token_type_ids": IDS * 0.0}, "token_type_ids"),
    ({"input_ids": IDS, "position_ids": IDS * 0 + 16}, "position_ids"),
    ({"input_ids": IDS, "position_ids": IDS * 0 - 1}, "position_ids"),
    ({"input_ids": IDS, "position_ids": IDS[:2] * 0}, "position_ids"),
    ({"input_ids": IDS, "cu_seqlens": torch.tensor([0, 7]).int()}, "input_ids"),
    ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 7])}, "cu_seqlens"),
    ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 5, 3, 7]).int()}, "cu_seqlens"),
    ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 6]).int()}, "cu_seqlens"),
    ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 7]).int(), "attention_mask": MASK[:1]}, "attention_mask"),
    ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 7]).int(), "output_attentions": True}, "output_attentions"),
    ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 7]).int(), "max_seqlen": 6}, "max_seqlen"),
]


@pytest.mark.parametrize("arguments, name", BAD)
def test_bad_input_is_named(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        build()(**arguments)


@pytest.mark.parametrize(
    "head, fields, arguments, name",
    [
        (BertForMaskedLM, {}, {"labels": IDS[:, :3]}, "labels"),
        (BertForMaskedLM, {}, {"labels": IDS + 39}, "labels"),
        (BertForMaskedLM, {}, {"labels": IDS * 1.0}, "labels"),
        (BertForTokenClassification, {"num_labels": 3}, {"labels": IDS * 0 + 3}, "labels"),
        (BertForSequenceClassification, {"num_labels": 3}, {"labels": torch.full((5,), 3)}, "labels"),
        (BertForSequenceClassification, {"num_labels": 3}, {"labels": torch.ones(5)}, "labels"),
        (BertForSequenceClassification, {"num_labels": 1}, {"labels": torch.ones(4)}, "labels"),
        (BertForSequenceClassification, {"num_labels": 1}, {"labels": torch.ones(5) * 1j}, "labels.*complex"),
        (BertForSequenceClassification, {"num_labels": 3}, {"labels": [0] * 5}, "labels.*list"),
        *(
            (head, {}, {"labels": wrong}, message)
            for head in (BertForMaskedLM, BertForTokenClassification, BertForNextSentencePrediction)
            for wrong, message in ((IDS.to("meta"), "labels.*meta"), (IDS.tolist(), "labels.*list"))
        ),
        (BertForPreTraining, {}, {"next_sentence_label": 1}, "next_sentence_label.*int"),
        (BertForPreTraining, {}, {"labels": IDS, "next_sentence_label": torch.full((5,), 2)}, "next_sentence_label"),
        (
            BertForQuestionAnswering,
            {},
            {"start_positions": torch.zeros(4).long(), "end_positions": torch.zeros(5).long()},
            "start_positions",
        ),
    ],
)
def test_bad_labels_are_named(head: type, fields: dict, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        build(head, **fields)(IDS, **arguments)


CHOICES = IDS[:, None].repeat(1, 3, 1)


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"input_ids": IDS}, r"input_ids.*\[5, 7\].*\[B, C, T\]"),
        ({"inputs_embeds": torch.zeros(5, 7, 24)}, r"inputs_embeds.*\[B, C, T, E\]"),
        ({}, "input_ids.*inputs_embeds"),
        ({"input_ids": CHOICES, "inputs_embeds": torch.zeros(5, 3, 7, 24)}, "input_ids.*inputs_embeds"),
        ({"input_ids": CHOICES, "attention_mask": MASK}, r"attention_mask.*\[B, C, T\]"),
        ({"input_ids": CHOICES, "attention_mask": CHOICES[:, :2]}, r"attention_mask.*\[5, 2, 7\].*\[5, 3, 7\]"),
        ({"input_ids": CHOICES, "token_type_ids": CHOICES[..., :2]}, "token_type_ids"),
        ({"input_ids": CHOICES, "labels": IDS[:, 0].tolist()}, "labels.*list"),
        ({"input_ids": CHOICES, "labels": IDS[:4, 0]}, "labels"),
        ({"input_ids": CHOICES.tolist()}, "input_ids.*list"),
    ],
)
def test_multiple_choice_wants_choices(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        build(BertForMultipleChoice)(**arguments)


@pytest.mark.parametrize(
    "value, error",
    [(torch.nn.Embedding(41, 24), ValueError), (torch.nn.Embedding(40, 23), ValueError), (torch.eye(40), TypeError)],
)
def test_embeddings_that_do_not_fit_are_refused(value: Any, error: type[Exception]) -> None:
    model = build(BertForMaskedLM)
    before = model.get_input_embeddings()
    with pytest.raises(error, match="value"):
        model.set_input_embeddings(value)
    assert model.get_input_embeddings() is before


def test_options_of_checkpointing_are_known_before_a_step() -> None:
    model = build()
    with pytest.raises(TypeError, match="use_reentrent"):
        model.gradient_checkpointing_enable({"use_reentrent": True})
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable({"use_reentrant": True, "preserve_rng_state": False})
    assert model.is_gradient_checkpointing


def test_the_configuration_must_be_ours() -> None:
    with pytest.raises(TypeError, match="config"):
        BertModel(transformers.BertConfig())
