"""The modules: parameters under the usual names, one op call each, the same numbers as torch.nn."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pyxlbert import nn
from pyxlbert.nn.packing import pack
from pyxlbert.testing import compare

pytestmark = pytest.mark.quick

FLOAT32 = compare.tolerances.MODEL_FLOAT32


def test_linear_and_layer_norm_are_the_torch_modules() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 12)
    ours, theirs = nn.Linear(12, 7), torch.nn.Linear(12, 7)
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(ours, torch.nn.Linear)
    compare.close("linear", ours(x), theirs(x), FLOAT32)
    ours, theirs = nn.LayerNorm(12, eps=1e-5), torch.nn.LayerNorm(12, eps=1e-5)
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(ours, torch.nn.LayerNorm)
    compare.close("layer_norm", ours(x), theirs(x), FLOAT32)


@pytest.mark.parametrize("name", sorted(nn.ACTIVATIONS))
def test_activations(name: str) -> None:
    torch.manual_seed(0)
    module = nn.LinearActivation(12, 7, name)
    x = torch.randn(9, 12) * 3
    kind = nn.activation_kind(name)
    plain = {
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "relu": F.relu,
        "silu": F.silu,
    }[kind]
    compare.close(name, module(x), plain(F.linear(x, module.weight, module.bias)), FLOAT32)
    assert kind in repr(module)


@pytest.mark.parametrize("name", ["tanhh", "", None, 3])
def test_an_unknown_activation_is_named(name: object) -> None:
    with pytest.raises(ValueError, match="activation"):
        nn.LinearActivation(2, 2, name)


def test_dropout_add_layer_norm() -> None:
    torch.manual_seed(0)
    module = nn.DropoutAddLayerNorm(12, eps=1e-5, dropout_p=1.0)
    x, residual = torch.randn(4, 12), torch.randn(4, 12)
    compare.close("training", module(x, residual), F.layer_norm(residual, (12,), eps=1e-5), FLOAT32)
    wanted = F.layer_norm(residual + x, (12,), eps=1e-5)
    compare.close("evaluation", module.eval()(x, residual), wanted, FLOAT32)
    y, copy = module(x, residual, torch.bfloat16)
    assert y.dtype == torch.float32 and copy.dtype == torch.bfloat16
    compare.same_bits("copy", copy, y.to(torch.bfloat16))


def test_self_attention() -> None:
    torch.manual_seed(0)
    module = nn.SelfAttention(24, 3)
    theirs = torch.nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        parts = (module.query, module.key, module.value)
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
        theirs.out_proj.weight.copy_(torch.eye(24))
        theirs.out_proj.bias.zero_()
    x = torch.randn(4, 3, 24)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]])
    layout = nn.TokenLayout.from_mask(mask, 4, 3)
    wanted, weights = theirs(x, x, x, key_padding_mask=mask == 0, average_attn_weights=False)
    for output_attentions in (False, True):
        mixed, found = module(layout.take(x), layout, output_attentions)
        compare.close("mixed", layout.restore(mixed), wanted * mask[..., None], FLOAT32)
    compare.close("weights", found, weights * mask[:, None, :, None], FLOAT32)
    with pytest.raises(ValueError, match="num_attention_heads"):
        nn.SelfAttention(24, 5)


def test_packed_weights_give_one_buffer() -> None:
    torch.manual_seed(0)
    module = nn.SelfAttention(384, 12).eval()
    x, layout = torch.randn(4, 64, 384), nn.TokenLayout.from_mask(None, 4, 64)
    names = set(module.state_dict())
    with torch.no_grad():
        apart = module(x, layout)[0]
        pack(module)
        if module.packed_product(x) is None:
            pytest.skip("this processor has nothing to gain from packed weights")
        query, key, value = module.project(x)
        compare.close("packed", module(x, layout)[0], apart, FLOAT32)
    assert query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    assert module.query.packed is None, "covered by the common product"
    assert set(module.state_dict()) == names
    with torch.enable_grad():
        assert module(x, layout)[0].requires_grad


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_packed_feed_forward(activation: str) -> None:
    torch.manual_seed(0)
    module = nn.LinearActivation(384, 512, activation).eval()
    x = torch.randn(4, 64, 384)
    with torch.no_grad():
        apart = module(x)
        compare.close(activation, pack(module)(x), apart, FLOAT32)


def test_embeddings() -> None:
    torch.manual_seed(0)
    module = nn.Embeddings(11, 12, 6, 2, padding_idx=0, eps=1e-5, dropout_p=0.5).eval()
    ids, types = torch.randint(11, (3, 4)), torch.randint(2, (3, 4))
    tables = (module.word_embeddings.weight, module.token_type_embeddings.weight, module.position_embeddings.weight)
    wanted = F.layer_norm(tables[0][ids] + tables[1][types] + tables[2][:4], (12,), eps=1e-5)
    compare.close("padded", module(ids, types), wanted, FLOAT32)
    where = torch.tensor([3, 0, 2])
    packed = module(ids.flatten()[:3], types.flatten()[:3], where)
    wanted = F.layer_norm(
        tables[0][ids.flatten()[:3]] + tables[1][types.flatten()[:3]] + tables[2][where], (12,), eps=1e-5
    )
    compare.close("packed", packed, wanted, FLOAT32)
    vectors = torch.randn(5, 12)
    given = module(torch.tensor([4, 1]), position_ids=torch.arange(2), word_table=vectors)
    wanted = F.layer_norm(vectors[[4, 1]] + tables[1][0] + tables[2][:2], (12,), eps=1e-5)
    compare.close("vectors", given, wanted, FLOAT32)
    y, copy = module(ids, out_dtype=torch.float32, copy_dtype=torch.bfloat16)
    assert (y.dtype, copy.dtype) == (torch.float32, torch.bfloat16)
