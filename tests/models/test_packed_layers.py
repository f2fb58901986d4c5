"""Packed layers in one call: as right as the modules, the same bits in any company, and only where nobody wants the
modules called."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import threading
import weakref

import pytest
import torch
from torch import Tensor

import pyxlbert
from pyxlbert.backends import native
from pyxlbert.models import BertConfig, BertModel, XLNetConfig, XLNetModel
from pyxlbert.models.pretrained import PretrainedModel
from pyxlbert.nn.encoder_layers import PackedLayers
from pyxlbert.testing import compare, tolerances

pytestmark = pytest.mark.skipif(
    native._C is None or native._C.level() == "portable", reason="nothing is packed without AVX2"
)
SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 3,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "vocab_size": 90,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _shaken(model: PretrainedModel, dtype: torch.dtype) -> PretrainedModel:
    """No parameter is zero or one, so that none can be left out unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def model(dtype: torch.dtype = torch.float32, **options: object) -> BertModel:
    torch.manual_seed(0)
    return pyxlbert.pack(_shaken(BertModel(BertConfig(**SIZES, **options)), dtype))


def xlnet(dtype: torch.dtype = torch.float32, **options: object) -> XLNetModel:
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=90, d_model=48, n_layer=2, n_head=3, d_inner=100, dropout=0.0, **options)
    return pyxlbert.pack(_shaken(XLNetModel(config), dtype))


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 90, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def runs(monkeypatch) -> list[bool]:
    """For each time that layers were to run, whether they did so in one call."""
    found: list[bool] = []
    right = PackedLayers.run

    def record(*arguments: object) -> object:
        done = right(*arguments)
        found.append(done is not None)
        return done

    monkeypatch.setattr(PackedLayers, "run", record)
    return found


@pytest.fixture
def poisoned():
    """Scratch memory is full of NaN each time that a kernel takes it."""
    native._C.poison_workspaces(True)
    yield
    native._C.poison_workspaces(False)


def by_modules(one: PretrainedModel, **inputs: object) -> Tensor:
    """The same call, every module called, with weights that are not packed."""
    alone = copy.deepcopy(one)
    with torch.no_grad():
        return alone(**inputs).last_hidden_state


def error(found: Tensor, truth: Tensor) -> float:
    """By the norm of the difference."""
    return float((found.double() - truth).norm() / truth.norm())


RAGGED = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
SEEN = torch.rand(3, 7, 7, generator=torch.Generator().manual_seed(3)) > 0.4
BERT_INPUTS = {
    "alone": {"input_ids": ids(1, 7)},
    "one token": {"input_ids": ids(1, 1)},
    "padded": {"input_ids": ids(3, 7), "attention_mask": RAGGED},
    "packed": {"input_ids": ids(8), "cu_seqlens": torch.tensor([0, 3, 3, 8], dtype=torch.int32), "max_seqlen": 5},
    "long": {"input_ids": ids(2, 130)},
    "mask": {"input_ids": ids(3, 7), "attention_mask": SEEN.long()},
    "bias": {"input_ids": ids(3, 7), "attention_mask": torch.randn(3, 1, 7, 7)},
    "states": {"input_ids": ids(3, 7), "output_hidden_states": True},
}
RANK = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(i)) for i in range(3)]).int()
XLNET_INPUTS = {
    "alone": {"input_ids": ids(1, 7)},
    "padded": {"input_ids": ids(3, 7), "attention_mask": RAGGED, "use_mems": False},
    "types": {"input_ids": ids(3, 7), "token_type_ids": torch.arange(21).view(3, 7) % 3},
    "perm_mask": {"input_ids": ids(3, 7), "perm_mask": SEEN.float()},
    "ranks": {"input_ids": ids(3, 7), "query_rank": RANK, "key_rank": RANK.flip(0)},
    "packed": {"input_ids": ids(8), "cu_seqlens": torch.tensor([0, 3, 3, 8], dtype=torch.int32), "max_seqlen": 5},
    "states": {"input_ids": ids(3, 7), "output_hidden_states": True},
    "long": {"input_ids": ids(2, 130), "use_mems": False},
}
CASES = [(model, name, inputs) for name, inputs in BERT_INPUTS.items()]
CASES += [(xlnet, name, inputs) for name, inputs in XLNET_INPUTS.items()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("build", "name", "inputs"), CASES)
def test_it_is_as_right_as_the_modules(
    build, name: str, inputs: dict[str, object], dtype: torch.dtype, runs: list[bool], poisoned: None
) -> None:
    """Against float64, by the error of the modules in the same dtype; in every state if they are asked for."""
    packed = build(dtype)
    exact = copy.deepcopy(packed).double()
    if "attention_mask" in inputs and inputs["attention_mask"].is_floating_point():
        inputs = inputs | {"attention_mask": inputs["attention_mask"].to(torch.float32)}
    plain = copy.deepcopy(packed)
    with torch.inference_mode():
        found = packed(**inputs)
        assert runs and all(runs)
        truth, modules = exact(**inputs), plain(**inputs)
    states = zip(*((one.hidden_states or (one.last_hidden_state,)) for one in (found, modules, truth)), strict=True)
    for ours, theirs, wanted in states:
        assert error(ours, wanted) <= tolerances.FACTOR * error(theirs, wanted) + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("build", [model, xlnet])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bit_integers_are_near(build, dtype: torch.dtype, runs: list[bool]) -> None:
    packed = build(dtype)
    exact = copy.deepcopy(packed).double()
    pyxlbert.pack(packed, dtype="int8")
    with torch.inference_mode():
        found, truth = packed(ids(3, 40)).last_hidden_state, exact(ids(3, 40)).last_hidden_state
        far = error(found, truth)
    assert runs and runs[0]
    assert far < tolerances.INT8
    if dtype is torch.float32:
        assert far > tolerances.MODEL_FLOAT32, "it is not in integers"


OPTIONS = [{"hidden_act": "gelu_new", "residual_in_fp32": False}, {"hidden_act": "relu"}, {"hidden_act": "silu"}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda one: one["hidden_act"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options(options: dict[str, object], dtype: torch.dtype, runs: list[bool]) -> None:
    packed = model(dtype, **options)
    exact = copy.deepcopy(packed).double()
    with torch.inference_mode():
        found, truth = packed(ids(2, 9)).last_hidden_state, exact(ids(2, 9)).last_hidden_state
    assert runs[0]
    assert error(found, truth) < 8 * torch.finfo(dtype).eps


LENGTHS = ([5, 1, 7, 130, 2], [16, 33, 64], [90, 3, 300, 1, 1, 1, 40])


@pytest.mark.parametrize("build", [model, xlnet])
@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8")])
@pytest.mark.parametrize("level", native._C.levels()[1:] if native._C else [])
def test_the_same_bits_in_any_company(build, dtype: torch.dtype, kept: str | None, level: str) -> None:
    """A text alone, in any batch, packed or padded, on any number of threads, after any other call."""
    before, threads = native._C.level(), torch.get_num_threads()
    native._C.set_level(level)
    try:
        packed = pyxlbert.pack(build(dtype), dtype=kept)
        generator = torch.Generator().manual_seed(5)
        for number, lengths in enumerate(LENGTHS):
            texts = [torch.randint(0, 90, (length,), generator=generator) for length in lengths]
            offsets = torch.tensor([0, *lengths]).cumsum(0).int()
            longest = max(lengths)
            padded = torch.zeros(len(texts), longest, dtype=torch.long)
            mask = torch.zeros_like(padded)
            for row, text in enumerate(texts):
                padded[row, : len(text)], mask[row, : len(text)] = text, 1
            options = {} if build is model else {"use_mems": False}
            with torch.inference_mode():
                torch.set_num_threads(1 + number)
                whole = packed(torch.cat(texts), cu_seqlens=offsets, max_seqlen=longest).last_hidden_state
                torch.set_num_threads(3 - number)
                rows = packed(padded, mask, **options).last_hidden_state
                for row, text in enumerate(texts):
                    alone = packed(text[None], **options).last_hidden_state[0]
                    compare.same_bits("packed", whole[offsets[row] : offsets[row + 1]], alone)
                    compare.same_bits("padded", rows[row, : len(text)], alone)
    finally:
        native._C.set_level(before)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("build", [model, xlnet])
def test_large_batches_go_in_slices(build) -> None:
    """Of some thousand rows; a sequence alone has the same bits, and the workspace does not grow with the batch."""
    packed, generator = build(torch.bfloat16), torch.Generator().manual_seed(4)
    lengths = [int(n) for n in torch.randint(1, 900, (40,), generator=generator)] + [5000, 1, 1]
    texts = [torch.randint(0, 90, (length,), generator=generator) for length in lengths]
    if build is model:
        texts = [text[:512] for text in texts]
    offsets = torch.tensor([0, *map(len, texts)]).cumsum(0).int()
    with torch.inference_mode():
        whole = packed(torch.cat(texts), cu_seqlens=offsets, max_seqlen=max(map(len, texts))).last_hidden_state
        options = {} if build is model else {"use_mems": False}
        for row, text in enumerate(texts):
            alone = packed(text[None], **options).last_hidden_state[0]
            compare.same_bits("packed", whole[offsets[row] : offsets[row + 1]], alone)
        native._C.release_workspace()
        same = ids(40, 300)
        mask = torch.rand(40, 1, 1, 300, generator=generator) > 0.3
        together = packed(same, mask.long() if build is model else None, **options).last_hidden_state
        for row in (0, 7, 39):
            given = (mask[row : row + 1].long(),) if build is model else ()
            alone = packed(same[row : row + 1], *given, **options).last_hidden_state[0]
            compare.same_bits("padded", together[row], alone)
    assert native._C.workspace_bytes() < 20e6


def test_threads_share_a_model() -> None:
    packed = model()
    texts = [ids(1, n) for n in (3, 40, 7, 130)]
    with torch.inference_mode():
        wanted = [packed(text).last_hidden_state for text in texts]
    wrong: list[str] = []

    def work() -> None:
        with torch.inference_mode():
            for _ in range(10):
                for text, right in zip(texts, wanted, strict=True):
                    if not torch.equal(packed(text).last_hidden_state, right):
                        wrong.append(str(text.shape))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_step_of_training_is_seen() -> None:
    packed = model()
    optimizer = torch.optim.SGD(packed.parameters(), lr=0.5)
    for _ in range(2):
        packed(ids(2, 9)).last_hidden_state.square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            found, wanted = packed(ids(2, 9)).last_hidden_state, by_modules(packed, input_ids=ids(2, 9))
        compare.close("after a step", found, wanted, tolerances.PACKED[torch.float32])


def test_only_where_the_modules_need_not_be_called(runs: list[bool]) -> None:
    bert, few = model(), ids(1, 6)
    bert(input_ids=few)
    with torch.no_grad():
        bert(input_ids=few, output_attentions=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            bert(input_ids=few)
        with pyxlbert.use_backend("torch"):
            bert(input_ids=few)
        with torch.profiler.profile() as profile:
            bert(input_ids=few)
        bert.train()(input_ids=few)
        pyxlbert.pack(bert.eval()).encoder.layer[1].output.LayerNorm.train()
        bert(input_ids=few)
        pyxlbert.unpack(bert.eval())(input_ids=few)
        bert.eval().double()(input_ids=few)
    assert not any(runs)
    assert "pyxlbert::attention_fwd" in {event.key for event in profile.key_averages()}


def _hook(bert: BertModel) -> None:
    bert.encoder.layer[1].attention.self.key.register_forward_hook(lambda module, inputs, y: y + 1)


def _pre_hook(bert: BertModel) -> None:
    bert.encoder.layer[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1, *inputs[1:]))


def _adapter(bert: BertModel) -> None:
    class Adapter(pyxlbert.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    bert.encoder.layer[0].attention.output.dense = Adapter(48, 48)


def _patched(bert: BertModel) -> None:
    dense = bert.encoder.layer[1].output.dense
    dense.forward = lambda x: torch.nn.functional.linear(x, dense.weight) + 1


def _activation(bert: BertModel) -> None:
    bert.encoder.layer[0].intermediate.dense.activation = "gelu_tanh"


def _eps(bert: BertModel) -> None:
    bert.encoder.layer[0].output.LayerNorm.eps = 0.5


def _fewer_layers(bert: BertModel) -> None:
    del bert.encoder.layer[1]


def _other_order(bert: BertModel) -> None:
    bert.encoder.layer = torch.nn.ModuleList(reversed(bert.encoder.layer))


def _parameter(bert: BertModel) -> None:
    bert.encoder.layer[0].attention.self.query.weight = torch.nn.Parameter(torch.eye(48))


def _written(bert: BertModel) -> None:
    bert.encoder.layer[1].intermediate.dense.bias.zero_()


def _data(bert: BertModel) -> None:
    bert.encoder.layer[1].output.dense.weight.data = torch.ones(48, 100)


def _added_past_autograd(bert: BertModel) -> None:
    bert.encoder.layer[1].attention.self.key.weight.data.add_(torch.randn(48, 48))


def _copied_past_autograd(bert: BertModel) -> None:
    weight = bert.encoder.layer[0].output.dense.weight
    weight.data.copy_(weight * 1.001)


def _signs_past_autograd(bert: BertModel) -> None:
    """In a digest of sums they would cancel each other."""
    bert.encoder.layer[0].output.dense.weight.data.neg_()


def _one_head_through_numpy(bert: BertModel) -> None:
    bert.encoder.layer[0].attention.self.query.weight.detach().numpy()[12:24] *= 2


def _one_of_a_bias_through_numpy(bert: BertModel) -> None:
    bert.encoder.layer[1].intermediate.dense.bias.detach().numpy()[99] += 1


def _one_of_a_norm_through_numpy(bert: BertModel) -> None:
    bert.encoder.layer[1].attention.output.LayerNorm.weight.detach().numpy()[5] += 1


def _transposed(bert: BertModel) -> None:
    weight = bert.encoder.layer[0].attention.self.value.weight
    weight.data = weight.data.t()


def _no_bias(bert: BertModel) -> None:
    bert.encoder.layer[0].attention.self.value.bias = None


def _norm_at_the_same_address(bert: BertModel) -> None:
    """Freed and allocated again: the new values may lie where the old ones were."""
    weight = bert.encoder.layer[1].output.LayerNorm.weight
    weight.data = torch.empty(0)
    weight.data = torch.full((48,), 1.5)


def _shorter_view(bert: BertModel) -> None:
    """The modules refuse it, and so must the layers together."""
    bias = bert.encoder.layer[1].output.dense.bias
    bias.data = bias.data[:1].expand(48)


class _Wrapped(torch.nn.Module):
    """An adapter that is no linear layer and has no weight."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


class _Adapted(pyxlbert.nn.Linear):
    """Three of one class are not three linear layers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def _wrapped_query(bert: BertModel) -> None:
    own = bert.encoder.layer[0].attention.self
    own.query = _Wrapped(own.query)


def _three_adapters(bert: BertModel) -> None:
    own = bert.encoder.layer[0].attention.self
    for name in ("query", "key", "value"):
        adapted = _Adapted(48, 48)
        adapted.load_state_dict(getattr(own, name).state_dict())
        setattr(own, name, adapted.eval())


def _patched_query(bert: BertModel) -> None:
    query = bert.encoder.layer[0].attention.self.query
    query.forward = lambda x: torch.nn.functional.linear(x, query.weight) + 1


def _another_class(bert: BertModel) -> None:
    bert.encoder.layer[1].output.dense.__class__ = _Adapted


def _negated(bert: BertModel) -> None:
    imaginary = torch.randn(48, 100, dtype=torch.complex64).conj().imag
    bert.encoder.layer[1].output.dense.weight = torch.nn.Parameter(imaginary)
    assert bert.encoder.layer[1].output.dense.weight.is_neg()


def _fused_step(bert: BertModel) -> None:
    """A fused step writes without raising a version."""
    optimizer = torch.optim.AdamW(bert.parameters(), lr=0.05, fused=True)
    with torch.enable_grad():
        bert(input_ids=ids(1, 7)).last_hidden_state.square().mean().backward()
    optimizer.step()


def _loaded(bert: BertModel) -> None:
    bert.load_state_dict({name: value + 1 for name, value in bert.state_dict().items()})


def _rounded(bert: BertModel) -> None:
    bert.half()


@pytest.mark.parametrize(
    "change",
    [
        *(_hook, _pre_hook, _adapter, _patched, _activation, _eps, _fewer_layers, _other_order),
        *(_parameter, _written, _data, _transposed, _no_bias, _loaded, _rounded),
        *(_norm_at_the_same_address, _shorter_view, _wrapped_query, _three_adapters, _patched_query),
        *(_another_class, _negated, _fused_step),
        *(_added_past_autograd, _copied_past_autograd, _signs_past_autograd, _one_head_through_numpy),
        *(_one_of_a_bias_through_numpy, _one_of_a_norm_through_numpy),
    ],
    ids=lambda change: change.__name__.strip("_"),
)
def test_a_changed_model_computes_what_it_says(change) -> None:
    """Whatever was changed after the first use, the next call computes what the modules compute."""
    bert, inputs = model(), {"input_ids": ids(1, 7)}
    with torch.no_grad():
        before = bert(**inputs).last_hidden_state
        change(bert)
        after = bert(**inputs).last_hidden_state
        assert not torch.equal(after, before)
        tolerance = 1e-3 if after.dtype is torch.float16 else tolerances.PACKED[torch.float32]
        compare.close("changed", after.float(), by_modules(bert, **inputs).float(), tolerance)


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("build", [model, xlnet])
def test_memory_that_is_given_back_is_an_error(build, kind: str | None) -> None:
    """As FSDP gives that of its parameters back between calls, and fills it again: whose copy is gone is not read."""
    one = pyxlbert.pack(build(), kind)
    with torch.no_grad():
        before, unread = one(ids(2, 7)).last_hidden_state, set()
        for name, parameter in one.named_parameters():
            kept, storage = parameter.detach().clone(), parameter.untyped_storage()
            size = storage.nbytes()
            storage.resize_(0)
            try:
                one(ids(2, 7))
            except (ValueError, RuntimeError) as error:  # the second is torch's own of an embedding
                assert re.search("storage holds 0 bytes, wanted at least|for storage of size 0", str(error)), name
            else:
                unread.add(name)
            storage.resize_(size)
            parameter.data.copy_(kept)
        # The embedding of what is masked, which this call has not.
        assert unread <= {"mask_emb"}
        compare.same_bits("filled again", one(ids(2, 7)).last_hidden_state, before)


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("build", [model, xlnet])
def test_memory_that_shrinks_in_its_place_is_an_error(build, kind: str | None) -> None:
    """The allocator may give a shrunk storage the address of the whole one, by which alone nothing would be seen."""
    one = pyxlbert.pack(build(), kind)
    with torch.no_grad():
        before, in_place = one(ids(2, 7)).last_hidden_state, 0
        for name, parameter in one.named_parameters():
            if name in ("mask_emb", "word_embedding.weight"):  # of which torch reads the rows that it is asked for
                continue
            kept, storage, address = parameter.detach().clone(), parameter.untyped_storage(), parameter.data_ptr()
            size = storage.nbytes()
            for cut in range(1, 25):
                storage.resize_(size - 4 * (1 + cut % 3))
                if parameter.data_ptr() == address:
                    in_place += 1
                    break
            with pytest.raises(ValueError, match=r"storage holds \d+ bytes, wanted at least"):
                one(ids(2, 7))
            storage.resize_(size)
            parameter.data.copy_(kept)
        assert in_place
        compare.same_bits("filled again", one(ids(2, 7)).last_hidden_state, before)


def test_a_global_hook_sees_every_module() -> None:
    bert, seen = model(), []
    with torch.no_grad():
        bert(input_ids=ids(1, 7))
        handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
        try:
            bert(input_ids=ids(1, 7))
        finally:
            handle.remove()
    assert seen.count(pyxlbert.nn.Linear) == 5 * 2 + 1 and seen.count(pyxlbert.nn.LinearActivation) == 2


@pytest.mark.parametrize("build", [pyxlbert.models.BertModel, pyxlbert.models.XLNetModel])
def test_memory_goes_with_the_last_reference(build) -> None:
    """Copies are large and the objects around them few: the collector of cycles would come late."""
    one = build(build.config_class(**TINY[build])).eval()
    pyxlbert.pack(one)
    with torch.no_grad():
        one(torch.tensor([[5, 6, 7]]))
    assert next(part for part in one.modules() if getattr(part, "together", None) is not None)
    gc.collect()
    gc.disable()
    try:
        gone = [weakref.ref(part) for part in (one, *one.parameters())]
        del one
        assert not any(part() is not None for part in gone)
    finally:
        gc.enable()


TINY = {
    pyxlbert.models.BertModel: {"vocab_size": 20, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2},
    pyxlbert.models.XLNetModel: {"vocab_size": 20, "d_model": 16, "n_head": 2, "n_layer": 2, "d_inner": 20},
}


def test_copies_find_their_own_parameters(runs: list[bool]) -> None:
    bert, inputs = model(), {"input_ids": ids(1, 7)}
    with torch.no_grad():
        wanted = bert(**inputs).last_hidden_state
        for other in (copy.deepcopy(bert), pickle.loads(pickle.dumps(bert))):
            pyxlbert.pack(other)
            compare.same_bits("copy", other(**inputs).last_hidden_state, wanted)
            other.encoder.layer[0].output.dense.weight.zero_()
            assert not torch.equal(other(**inputs).last_hidden_state, wanted)
            compare.same_bits("original", bert(**inputs).last_hidden_state, wanted)
    assert all(runs)


def test_a_max_seqlen_that_is_too_small_is_named() -> None:
    cu_seqlens = torch.tensor([0, 3, 9], dtype=torch.int32)
    with torch.no_grad(), pytest.raises(ValueError, match="max_seqlen: got 4, wanted at least 6"):
        model()(input_ids=ids(9), cu_seqlens=cu_seqlens, max_seqlen=4)


def _packed(one: PretrainedModel) -> bool:
    return one.encoder.layer[0].attention.self.packed is not None


@pytest.fixture
def directory(tmp_path):
    pyxlbert.unpack(model()).save_pretrained(tmp_path)
    return tmp_path


def test_a_loaded_model_packs_itself(directory, runs: list[bool], caplog) -> None:
    loaded = BertModel.from_pretrained(directory)
    assert not _packed(loaded)
    loaded(ids(1, 5))
    assert not _packed(loaded) and not any(runs)
    with caplog.at_level("INFO", "pyxlbert"), torch.inference_mode():
        loaded(ids(1, 5))
    assert _packed(loaded) and runs[-1]
    assert [record.message for record in caplog.records if "packed" in record.message]
    for drop in (lambda: loaded.train().eval(), lambda: loaded.load_state_dict(loaded.state_dict()), loaded.bfloat16):
        drop()
        assert not _packed(loaded)
        with torch.no_grad():
            loaded(ids(1, 5))
        assert _packed(loaded) and runs[-1]
    pyxlbert.unpack(loaded)
    with torch.no_grad():
        loaded(ids(1, 5))
    assert not _packed(loaded)


def test_a_loaded_model_stays_in_integers(directory) -> None:
    loaded = pyxlbert.pack(BertModel.from_pretrained(directory), dtype="int8")
    with torch.no_grad():
        before = loaded(ids(1, 5)).last_hidden_state
        loaded.train().eval()
        compare.same_bits("again", loaded(ids(1, 5)).last_hidden_state, before)
        plain = BertModel.from_pretrained(directory)(ids(1, 5)).last_hidden_state
    assert not torch.equal(plain, before)


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_loaded_model_need_not_pack_itself(directory, how: str, monkeypatch) -> None:
    if how == "environment":
        monkeypatch.setenv("PYXLBERT_PACK", "0")
    loaded = BertModel.from_pretrained(directory, **{"pack": False} if how == "argument" else {})
    with torch.no_grad():
        loaded(ids(1, 5))
    assert not _packed(loaded)
    assert BertModel.from_pretrained(directory, pack=True).packs == "own"


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("build", [model, xlnet])
def test_memory_stays_flat_over_new_lengths(build, kind: str) -> None:
    """A library keeps something for each number of rows that it meets; a workspace has the largest size there was."""
    packed = pyxlbert.pack(build(), kind) if kind == "int8" else build(getattr(torch, kind))
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 400, (600,), generator=generator).tolist()

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    with torch.inference_mode():
        packed(ids(3, 400))
        for length in lengths[:100]:
            packed(ids(1, length))
        before = resident()
        for length in lengths[100:]:
            packed(ids(1, length))
    assert resident() < 1.05 * before


@pytest.mark.parametrize("build", [model, xlnet])
def test_a_patched_class_is_called(build, monkeypatch) -> None:
    packed, kind = build(), type(next(m for m in build().modules() if type(m) is pyxlbert.nn.Linear))
    with torch.no_grad():
        before = packed(ids(1, 7)).last_hidden_state
        right = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x: right(self, x) + 1)
        other = build()
        for name, one in (("warm", packed), ("first", other)):
            found, wanted = one(ids(1, 7)).last_hidden_state, by_modules(one, input_ids=ids(1, 7))
            compare.close(name, found, wanted, tolerances.PACKED[torch.float32])
        assert not torch.equal(other(ids(1, 7)).last_hidden_state, before)


def test_an_odd_feed_forward_network_reads_nothing_undefined(poisoned: None) -> None:
    for options in ({"intermediate_size": 101}, {"hidden_size": 45}):
        torch.manual_seed(0)
        packed = pyxlbert.pack(BertModel(BertConfig(**SIZES | options)).to(torch.bfloat16).eval())
        with torch.no_grad():
            found = packed(ids(2, 7)).last_hidden_state
            exact = copy.deepcopy(packed).double()(ids(2, 7)).last_hidden_state
        assert error(found, exact) < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("which", ["dense", "LayerNorm"])
def test_parameters_of_several_dtypes_are_for_the_modules(which: str, runs: list[bool]) -> None:
    bert = pyxlbert.unpack(model(torch.bfloat16))
    getattr(bert.encoder.layer[1].output, which).float()
    pyxlbert.pack(bert)
    with torch.no_grad():
        found = bert(ids(1, 7)).last_hidden_state
        exact = copy.deepcopy(bert).double()(ids(1, 7)).last_hidden_state
    assert error(found, exact) < 4 * torch.finfo(torch.bfloat16).eps
    assert runs[0] is (which == "LayerNorm"), "LayerNorm may be float32"


def test_parameters_that_do_not_fit_are_the_modules_to_refuse() -> None:
    wrong_mask = {"attention_mask": torch.zeros(3, 2, 7, 7)}
    with torch.no_grad(), pytest.raises(ValueError, match=r"bias: got shape \[3, 2, 7, 7\], wanted"):
        model()(ids(3, 7), **wrong_mask)
    bert = model()
    bert.encoder.layer[0].output.dense.bias = torch.nn.Parameter(torch.randn(3))
    with torch.no_grad(), pytest.raises(ValueError, match="bias: got shape"):
        bert(ids(1, 7))
    other = xlnet()
    other.layer[0].rel_attn.r_w_bias = torch.nn.Parameter(torch.randn(1, 16))
    with torch.no_grad(), pytest.raises(ValueError, match="content_bias: got shape"):
        other(ids(1, 7))


def test_a_negated_bias_is_read_as_it_is(runs: list[bool]) -> None:
    bert, bias = model(), torch._neg_view(torch.randn(3, 1, 7, 7))
    with torch.no_grad():
        found = bert(ids(3, 7), attention_mask=bias).last_hidden_state
        wanted = bert(ids(3, 7), attention_mask=bias.resolve_neg().clone()).last_hidden_state
    assert all(runs)
    compare.same_bits("negated", found, wanted)


def test_what_is_unpacked_is_freed() -> None:
    for drop in (pyxlbert.unpack, lambda m: m.train(), lambda m: m.bfloat16()):
        bert = model()
        with torch.no_grad():
            bert(ids(1, 7))
        found = weakref.ref(bert.encoder.together._found)
        assert found() is not None
        drop(bert)
        gc.collect()
        assert found() is None


def test_a_copy_packs_as_its_original(directory) -> None:
    loaded = pyxlbert.pack(BertModel.from_pretrained(directory), dtype="int8")
    with torch.no_grad():
        wanted = loaded(ids(1, 7)).last_hidden_state
        for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
            compare.same_bits("copy", other(ids(1, 7)).last_hidden_state, wanted)
        loaded.encoder.layer[0].output.train().eval()
        compare.same_bits("a part", loaded(ids(1, 7)).last_hidden_state, wanted)


def test_a_level_may_change_between_calls(runs: list[bool]) -> None:
    before, bert = native._C.level(), model()
    with torch.no_grad():
        wanted = bert(ids(2, 9)).last_hidden_state
        try:
            for level in native._C.levels()[1:]:
                native._C.set_level(level)
                compare.close(level, bert(ids(2, 9)).last_hidden_state, wanted, tolerances.PACKED[torch.float32])
        finally:
            native._C.set_level(before)
    assert all(runs)


def test_something_unusual_is_not_looked_for_again(monkeypatch, runs: list[bool]) -> None:
    bert, looks = model(), []
    right = type(bert.encoder)._parts
    monkeypatch.setattr(type(bert.encoder), "_parts", lambda self, watch: looks.append(1) or right(self, watch))
    handle = bert.encoder.layer[1].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        for _ in range(4):
            bert(ids(1, 7), output_hidden_states=True)
        assert len(looks) == 1 and not any(runs)
        handle.remove()
        bert(ids(1, 7))
    assert len(looks) == 2 and runs[-1]


def test_tracers_get_a_model_that_does_not_pack(directory) -> None:
    inputs, loaded = ids(1, 7), BertModel.from_pretrained(directory).requires_grad_(False)
    with torch.no_grad():
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            assert type(loaded(inputs).last_hidden_state) is not Tensor
        with pyxlbert.use_backend("torch"):
            loaded(inputs)
        assert not _packed(loaded)
        # Its check runs the model twice more, traced and not.
        traced = torch.jit.trace(lambda x: loaded(x).last_hidden_state, inputs)
        wanted = BertModel.from_pretrained(directory, pack=False)(inputs).last_hidden_state
        compare.same_bits("traced", traced(inputs), wanted)


@pytest.mark.parametrize("word", ["no", "", "false", "2"])
def test_a_word_that_means_nothing_is_refused(directory, word: str, monkeypatch) -> None:
    monkeypatch.setenv("PYXLBERT_PACK", word)
    with pytest.raises(ValueError, match=rf"PYXLBERT_PACK: got '{word}', wanted 0 or 1"):
        BertModel.from_pretrained(directory)
    with pytest.raises(TypeError, match="pack: got 'int8', wanted True, False or None"):
        BertModel.from_pretrained(directory, pack="int8")
    with pytest.raises(ValueError, match="dtype: got 'int8' for a model without layers"):
        pyxlbert.pack(model().double(), dtype="int8")
