"""Few rows through all layers in one go: the bits of the modules, and only where nobody wants the modules called."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import pyxlbert
from pyxlbert.backends import native
from pyxlbert.models import BertConfig, BertModel
from pyxlbert.models.bert import BertEncoder
from pyxlbert.testing import compare

pytestmark = pytest.mark.skipif(
    native._C is None or native._C.level() == "portable", reason="few rows have no kernel here"
)
SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 3,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "vocab_size": 90,
}


def model(dtype: torch.dtype = torch.float32, **options: object) -> BertModel:
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**SIZES, **options))
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return bert.to(dtype).eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 90, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def runs(monkeypatch) -> list[bool]:
    """For each call of a model, whether the layers were run in one go."""
    found: list[bool] = []
    right = BertEncoder.few_rows

    def record(*arguments: object) -> object:
        done = right(*arguments)
        found.append(done is not None)
        return done

    monkeypatch.setattr(BertEncoder, "few_rows", record)
    return found


def by_modules(bert: BertModel, **inputs: torch.Tensor) -> torch.Tensor:
    """The same call, every module called."""
    handle = bert.encoder.layer[0].register_forward_hook(lambda *_: None)
    try:
        return bert(**inputs).last_hidden_state
    finally:
        handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"hidden_act": "gelu_new", "residual_in_fp32": False}], ids=["erf", "tanh"])
def test_it_has_the_bits_of_the_modules(dtype: torch.dtype, options: dict[str, object], runs: list[bool]) -> None:
    bert = model(dtype, **options)
    ragged = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    packed = {"cu_seqlens": torch.tensor([0, 3, 3, 8], dtype=torch.int32), "max_seqlen": 5}
    # Eight rows are few at every level.
    batches = (
        {"input_ids": ids(1, 7)},
        {"input_ids": ids(2, 5), "attention_mask": ragged},
        {"input_ids": ids(8), **packed},
    )
    with torch.inference_mode():
        for inputs in batches:
            compare.same_bits("few rows", bert(**inputs).last_hidden_state, by_modules(bert, **inputs))
    assert runs == [True, False] * 3


def test_only_where_the_modules_need_not_be_called(runs: list[bool]) -> None:
    bert, few = model(), ids(1, 6)
    bert(input_ids=few)
    with torch.no_grad():
        bert(input_ids=ids(9, 30))
        bert(input_ids=few, attention_mask=torch.ones(1, 6, 6))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            bert(input_ids=few)
        with pyxlbert.use_backend("torch"):
            bert(input_ids=few)
        with torch.profiler.profile() as profile:
            bert(input_ids=few)
        bert.train()(input_ids=few)
        bert.eval().encoder.layer[1].output.LayerNorm.train()
        bert(input_ids=few)
        model(hidden_act="relu")(input_ids=few)
        bert.eval().double()(input_ids=few)
    assert runs == [False] * 10
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


def _transposed(bert: BertModel) -> None:
    weight = bert.encoder.layer[0].attention.self.value.weight
    weight.data = weight.data.t()


def _no_bias(bert: BertModel) -> None:
    bert.encoder.layer[0].attention.self.value.bias = None


def _loaded(bert: BertModel) -> None:
    bert.load_state_dict({name: value + 1 for name, value in bert.state_dict().items()})


def _rounded(bert: BertModel) -> None:
    bert.half()


@pytest.mark.parametrize(
    "change",
    [
        *(_hook, _pre_hook, _adapter, _patched, _activation, _eps, _fewer_layers, _other_order),
        *(_parameter, _written, _data, _transposed, _no_bias, _loaded, _rounded),
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
        compare.same_bits("changed", after, by_modules(bert, **inputs))


def test_a_global_hook_sees_every_module() -> None:
    bert, seen = model(), []
    with torch.no_grad():
        bert(input_ids=ids(1, 7))
        handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
        try:
            bert(input_ids=ids(1, 7))
        finally:
            handle.remove()
    assert seen.count(pyxlbert.nn.Linear) == 2 * 5 + 1


def test_copies_find_their_own_parameters(runs: list[bool]) -> None:
    bert, inputs = model(), {"input_ids": ids(1, 7)}
    with torch.no_grad():
        wanted = bert(**inputs).last_hidden_state
        for other in (copy.deepcopy(bert), pickle.loads(pickle.dumps(bert))):
            compare.same_bits("copy", other(**inputs).last_hidden_state, wanted)
            other.encoder.layer[0].output.dense.weight.zero_()
            assert not torch.equal(other(**inputs).last_hidden_state, wanted)
            compare.same_bits("original", bert(**inputs).last_hidden_state, wanted)
    assert all(runs)


def test_a_max_seqlen_that_is_too_small_is_named() -> None:
    cu_seqlens = torch.tensor([0, 3, 9], dtype=torch.int32)
    with torch.no_grad(), pytest.raises(ValueError, match="max_seqlen: got 4, wanted at least 6"):
        model()(input_ids=ids(9), cu_seqlens=cu_seqlens, max_seqlen=4)
