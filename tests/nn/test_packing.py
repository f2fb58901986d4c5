"""pack: when the copies are used, what drops them, and that they are never stale."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch

import pyxlbert
from pyxlbert.backends.native import _C
from pyxlbert.nn.packing import Packable
from pyxlbert.ops import _packed
from pyxlbert.testing import compare, tolerances


class Linear(Packable, torch.nn.Linear):
    """As a module uses it: the packed product, or the op where there is none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.packed_product(x)
        return pyxlbert.linear(x, self.weight, self.bias) if y is None else y

    fuses = forward


class LinearGelu(Packable, torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.packed_product(x, "gelu_tanh")
        return pyxlbert.linear_gelu(x, self.weight, self.bias, approximate="tanh") if y is None else y


class Projections(Packable):
    """Query, key and value as one product."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (Linear(64, 64) for _ in range(3))

    def packed_layers(self, product: str = "") -> tuple[torch.nn.Linear, ...]:
        return self.query, self.key, self.value

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.packed_product(x)
        return tuple(layer(x) for layer in (self.query, self.key, self.value)) if y is None else y.chunk(3, -1)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Projections()
        self.up = LinearGelu(64, 96)
        self.down = Linear(96, 64)
        self.out = Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.down(self.up(sum(self.attention(x)))))


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The columns of every product that ran with a packed weight."""
    columns: list[int] = []
    right = _packed.product

    def record(x: torch.Tensor, packed: object, activation: str) -> torch.Tensor:
        columns.append(packed.columns)
        return right(x, packed, activation)

    monkeypatch.setattr(_packed, "product", record)
    return columns


def close(what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Another product with other sums."""
    compare.close(what, found.float(), wanted.float(), tolerances.PACKED[wanted.dtype])


ALL = [3 * 64, 96, 64, 5]


def model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype).eval()


def rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


def packed_modules(module: torch.nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, Packable) and part.packed is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_packed_model_computes_the_same(dtype: torch.dtype, calls: list[int]) -> None:
    plain, x = model(dtype), rows(dtype)
    packed = pyxlbert.pack(copy.deepcopy(plain))
    assert packed_modules(packed) == ["attention", "up", "down", "out"]
    with torch.no_grad():
        wanted = plain(x)
        assert not calls
        close("packed", packed(x), wanted)
        assert calls == ALL
        pyxlbert.unpack(packed)
        assert packed_modules(packed) == []
        compare.same_bits("unpacked", packed(x), wanted)
        assert calls == ALL


def test_query_key_and_value_are_slices_of_one_buffer(calls: list[int]) -> None:
    attention = pyxlbert.pack(model()).attention
    with torch.inference_mode():
        parts = attention(rows())
    assert calls == [3 * 64]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert [part.storage_offset() for part in parts] == [0, 64, 128]


def test_used_only_for_inference(calls: list[int]) -> None:
    packed, x = pyxlbert.pack(model()), rows()
    packed(x)
    with torch.no_grad():
        with torch.enable_grad():
            packed(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert packed(x).dtype is torch.bfloat16
        with pyxlbert.use_backend("torch"):
            packed(x)
        torch.compile(packed, fullgraph=True, backend="aot_eager")(x)
        torch.export.export(packed, (x,))
        assert not calls
        with pytest.raises(ValueError, match="linear: weight"):
            packed.out(torch.randn(3, 63))
        with pytest.raises(TypeError, match="linear: x"):
            packed.out([1.0])
        assert packed(x[:0]).shape == (0, 7, 5)
        assert not calls
        packed(x)
    assert calls == ALL


def test_nothing_of_it_is_in_parameters_or_state_dict() -> None:
    plain, packed = model(), pyxlbert.pack(model())
    assert list(packed.state_dict()) == list(plain.state_dict())
    assert len(list(packed.parameters())) == len(list(plain.parameters()))
    assert not list(packed.buffers())


@pytest.mark.parametrize(
    "drop",
    [
        lambda m: m.train().eval(),
        lambda m: m.load_state_dict(m.state_dict()),
        lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
        lambda m: m.bfloat16().float(),
        lambda m: m.to(torch.float64).float(),
        lambda m: m.requires_grad_(False).double().float(),
    ],
    ids=["train", "load_state_dict", "load_state_dict_assign", "bfloat16", "to", "double"],
)
def test_what_drops_it(drop) -> None:
    packed = pyxlbert.pack(model())
    drop(packed)
    assert packed_modules(packed) == []


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_start_without(how, calls: list[int]) -> None:
    packed = pyxlbert.pack(model())
    other = how(packed.out)
    assert other.packed is None and packed.out.packed is not None
    with torch.no_grad():
        close("copy", other(rows()), packed.out(rows()))
    buffer = io.BytesIO()
    torch.save(how(packed), buffer)
    buffer.seek(0)
    assert packed_modules(torch.load(buffer, weights_only=False)) == []


def _data(parameter: torch.nn.Parameter) -> None:
    parameter.data = parameter.data * 2


def _copied(parameter: torch.nn.Parameter) -> None:
    parameter.copy_(parameter * 2)


def _in_inference_mode(parameter: torch.nn.Parameter) -> None:
    with torch.inference_mode():
        parameter.mul_(2)


def _same_address(parameter: torch.nn.Parameter) -> None:
    """Freed and allocated again: the new values may lie where the old ones were."""
    values, parameter.data = parameter.data * 2, torch.empty(0)
    parameter.data = values


def _transposed_view(parameter: torch.nn.Parameter) -> None:
    if parameter.dim() == 2 and parameter.shape[0] == parameter.shape[1]:
        parameter.data = parameter.data.t()
    else:
        parameter.data = parameter.data.flip(0)


def _past_autograd(parameter: torch.nn.Parameter) -> None:
    parameter.data.add_(0.1)


def _through_numpy(parameter: torch.nn.Parameter) -> None:
    """An eighth of its memory, or an element of a bias."""
    values = parameter.detach().numpy().reshape(-1)
    part = values[values.size // 2 :][: values.size // 8] if parameter.dim() > 1 else values[-1:]
    part *= -1


@pytest.mark.parametrize(
    "change",
    [
        *(_copied, torch.Tensor.zero_, _data, _in_inference_mode, _same_address, _transposed_view),
        *(_past_autograd, _through_numpy),
    ],
)
@pytest.mark.parametrize(
    "name", ["attention.key.weight", "attention.value.bias", "up.weight", "down.bias", "out.weight"]
)
def test_a_changed_parameter_is_packed_again(change, name: str, calls: list[int]) -> None:
    packed, x = pyxlbert.pack(model()), rows()
    with torch.no_grad():
        before = packed(x)
        change(packed.get_parameter(name))
        after = packed(x)
        assert calls == ALL * 2
        assert not torch.equal(before, after)
        close("after the change", after, pyxlbert.unpack(packed)(x))


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_single_element_past_autograd_is_followed_by_repack(dtype: str | None) -> None:
    """It lies in none of the lines that are looked at, so whoever writes it says so; the copies stay what they are."""
    from pyxlbert.models import BertConfig, BertModel

    config = BertConfig(vocab_size=20, hidden_size=64, num_attention_heads=2, num_hidden_layers=1)
    bert, ids = pyxlbert.pack(BertModel(config).eval(), dtype), torch.tensor([[5, 6]])
    weight = bert.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        before = bert(ids).last_hidden_state
        for place in range(0, weight.numel(), 16):  # until one is found that is not seen at once
            weight.detach().numpy().reshape(-1)[place] += 1.0
            if torch.equal(bert(ids).last_hidden_state, before):
                break
            before = bert(ids).last_hidden_state
        after = pyxlbert.repack(bert)(ids).last_hidden_state
        assert not torch.equal(after, before)
        assert torch.equal(after, pyxlbert.pack(bert, dtype)(ids).last_hidden_state)
    assert pyxlbert.repack(torch.nn.Linear(2, 2)) is not None
    with pytest.raises(TypeError, match=r"repack: model: got int, wanted a torch.nn.Module"):
        pyxlbert.repack(3)


def test_a_part_of_shared_memory_is_followed() -> None:
    """A weight that is columns of a wider one; writes beside it do not count."""
    one, x = model().down, torch.randn(3, 96)
    wide = torch.randn(64, 200)
    one.weight.data = wide[:, 50:146]
    pyxlbert.pack(one)
    with torch.no_grad():
        before = one(x)
        kept = one.packed[""]._copy
        wide.numpy()[:, :50] = 0
        assert torch.equal(one(x), before) and one.packed[""]._copy is kept
        wide.numpy()[:, 50:146] *= 2
        close("written", one(x), torch.nn.functional.linear(x, one.weight, one.bias))
        assert not torch.equal(one(x), before)


def test_a_replaced_parameter_is_packed_again(calls: list[int]) -> None:
    packed, x = pyxlbert.pack(model()), rows()
    with torch.no_grad():
        packed.up.weight = torch.nn.Parameter(packed.up.weight * 2)
        packed.attention.query = copy.deepcopy(packed.attention.key).eval()
        close("replaced", packed(x), pyxlbert.unpack(packed)(x))
    assert calls == ALL


def test_a_training_step_is_seen(calls: list[int]) -> None:
    """Fine-tuning the layer in eval mode, as with dropout off, and looking at it in between."""
    packed, x = pyxlbert.pack(model()), rows()
    optimizer = torch.optim.SGD(packed.parameters(), lr=0.5)
    for _ in range(2):
        packed(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            close("step", packed(x), copy.deepcopy(packed)(x))
    assert calls == ALL * 2


def test_another_layer_in_the_attention_is_called(calls: list[int]) -> None:
    """An adapter in place of the key projection, or a hook on it, is not passed over."""

    class Adapter(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + 1

    packed, x = pyxlbert.pack(model()), rows()
    with torch.no_grad():
        key = packed.attention(x)[1]
        packed.attention.key = Adapter(packed.attention.key)
        close("adapter", packed.attention(x)[1], key + 1)
    packed, seen = pyxlbert.pack(model()), []
    packed.attention.key.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        packed(x)
    assert seen == [1] and calls == [3 * 64, 96, 64, 5]


def test_parametrized_and_inference_weights_are_left_alone(calls: list[int]) -> None:
    class Doubled(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    odd = model()
    torch.nn.utils.parametrize.register_parametrization(odd.up, "weight", Doubled())
    with torch.inference_mode():
        odd.out.weight = torch.nn.Parameter(odd.out.weight * 2, requires_grad=False)
    pyxlbert.pack(odd)
    assert packed_modules(odd) == ["attention", "down"]
    with torch.no_grad():
        close("odd", odd(rows()), pyxlbert.unpack(odd)(rows()))


def test_threads_share_a_packed_model() -> None:
    """Also when the first thing they meet is a change."""
    packed, x = pyxlbert.pack(model()), rows()
    with torch.no_grad():
        packed.up.weight.mul_(2)
        packed.attention.query.bias.add_(1)
        wanted = pyxlbert.pack(copy.deepcopy(packed))(x)
    found: list[torch.Tensor] = []

    def work() -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            found.extend(packed(x) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 160
    for one in found:
        compare.same_bits("thread", one, wanted)


def test_where_nothing_is_to_be_gained_the_model_stays_as_it_is(calls: list[int]) -> None:
    assert packed_modules(pyxlbert.pack(model(torch.float64))) == []
    before = _C.level()
    _C.set_level("portable")
    try:
        assert packed_modules(pyxlbert.pack(model())) == []
    finally:
        _C.set_level(before)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_instruction_set_packs_again(dtype: torch.dtype, calls: list[int]) -> None:
    """A weight is in the order of one level, and no other reads it."""
    before, x, found = _C.level(), rows(dtype), {}
    packed = pyxlbert.pack(model(dtype))
    try:
        for level in _C.levels()[1:]:
            _C.set_level(level)
            with torch.no_grad():
                found[level] = packed(x)
    finally:
        _C.set_level(before)
    for level, one in found.items():
        close(level, one, pyxlbert.unpack(packed)(x).detach())
    assert calls == ALL * len(found)


def test_bad_input() -> None:
    for function in (pyxlbert.pack, pyxlbert.unpack):
        with pytest.raises(TypeError, match=rf"{function.__name__}: model: got str, wanted a torch.nn.Module"):
            function("model")
    with pytest.raises(ValueError, match=r"pack: model: got a model in training mode.*eval"):
        pyxlbert.pack(Model())
    with pytest.raises(ValueError, match=r"pack: dtype: got 'int4', wanted None or 'int8'"):
        pyxlbert.pack(model(), dtype="int4")


def small_xlnet() -> torch.nn.Module:
    from pyxlbert.models import XLNetConfig, XLNetModel

    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=97, d_model=64, n_layer=2, n_head=4, d_inner=96, dropout=0.0)
    return XLNetModel(config).eval()


# Columns of a layer's products: key and value, the table, query, then what follows attention.
CONTENT = [128, 64, 64, 64, 96, 64]
BOTH = [128, 64, 64, 64, 64, 64, 96, 64, 96, 64]  # two queries, two results and a feed-forward network for either


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [False, True])
def test_a_packed_xlnet_computes_the_same(dtype: torch.dtype, targets: bool, calls: list[int]) -> None:
    model = small_xlnet().to(dtype)
    ids = torch.randint(0, 97, (2, 19), generator=torch.Generator().manual_seed(1))
    given = {"target_positions": torch.tensor([[0, 3], [5, 18]])} if targets else {}
    given["mems"] = [0.1 * torch.ones(5, 2, 64, dtype=dtype)] * 2
    with torch.no_grad():
        wanted = model(ids, **given).last_hidden_state
        calls.clear()
        pyxlbert.pack(model)
        found = model(ids, **given).last_hidden_state
    assert "layer.0.rel_attn" in packed_modules(model)
    assert calls[:6] == (BOTH if targets else CONTENT)[:6]
    compare.close("packed", found.float(), wanted.float(), tolerances.PACKED[dtype])


def test_a_packed_xlnet_follows_its_weights() -> None:
    model = pyxlbert.pack(small_xlnet())
    ids = torch.randint(0, 97, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).last_hidden_state
        for name in ("q", "k", "v", "o", "r"):
            getattr(model.layer[0].rel_attn, name).mul_(1.5)
        after = model(ids).last_hidden_state
        plain = pyxlbert.unpack(model)(ids).last_hidden_state
    assert not torch.equal(before, after)
    compare.close("packed again", after, plain, tolerances.PACKED[torch.float32])
    pyxlbert.pack(model).train()
    assert not packed_modules(model)
