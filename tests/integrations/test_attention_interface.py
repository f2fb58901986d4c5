"""``attn_implementation="pyxlbert"`` in models of transformers that have no table here."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tr

import pyxlbert
from pyxlbert.integrations import attention as interface
from pyxlbert.testing import compare, models, tolerances

SMALL = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4}
TOKENS = {**SMALL, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
RIGHT = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8])
LEFT = RIGHT.flip(1)
HOLES = torch.tensor([[1] * 9, [1, 0, 1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0, 1, 1]])


@pytest.fixture(autouse=True)
def _registered() -> None:
    pyxlbert.register_attention()


def modernbert():
    fields = {"local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
    return tr.ModernBertModel(tr.ModernBertConfig(**TOKENS, **fields))


def llama(kind: str = "Llama", **fields):
    fields = {"num_key_value_heads": 2, "max_position_embeddings": 32, **fields}
    return getattr(tr, f"{kind}ForCausalLM")(getattr(tr, f"{kind}Config")(**TOKENS, **fields))


def vit():
    return tr.ViTModel(tr.ViTConfig(**SMALL, image_size=8, patch_size=4))


def whisper():
    fields = {"d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 20}
    fields |= {"num_mel_bins": 6, "max_source_positions": 8, "decoder_layers": 1, "decoder_attention_heads": 4}
    config = tr.WhisperConfig(**fields, vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return tr.WhisperModel(config).encoder


def ids(mask):
    drawn = torch.randint(3, 50, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": torch.where(mask.bool(), drawn, 0), "attention_mask": mask}


def drawn(name, *shape):
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(0))}


BERT = {**TOKENS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CASES = {
    "bert, right": (lambda: tr.BertModel(tr.BertConfig(**BERT)), ids(RIGHT)),
    "bert, holes": (lambda: tr.BertModel(tr.BertConfig(**BERT)), ids(HOLES)),
    "modernbert, right": (modernbert, ids(RIGHT)),
    "modernbert, holes": (modernbert, ids(HOLES)),
    "vit": (vit, drawn("pixel_values", 2, 3, 8, 8)),
    "whisper": (whisper, drawn("input_features", 2, 6, 16)),
    "llama, right": (llama, ids(RIGHT)),
    "llama, left": (llama, ids(LEFT)),
    "mistral, left": (lambda: llama("Mistral", sliding_window=3), ids(LEFT)),
}


def results(model, given, cotangents=None):
    real = given["attention_mask"].bool() if "attention_mask" in given else slice(None)

    def found(output):
        return {"output": output[0][real]}

    if cotangents is None:
        with torch.no_grad():
            cotangents = models.random_cotangents(found(model(**given)), torch.Generator().manual_seed(1))
    return models.results(model, given, cotangents, found, lambda _: None), cotangents


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case: str, monkeypatch) -> None:
    build, given = CASES[case]
    torch.manual_seed(0)
    model = build().train()
    models.randomize(model, torch.Generator().manual_seed(0))
    model.set_attn_implementation("sdpa")
    exact = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    truth, cotangents = results(copy.deepcopy(model).double(), exact)
    plain, _ = results(model, given, cotangents)
    masks = []
    old = interface.attention
    monkeypatch.setattr(interface, "attention", lambda *rows, **named: (masks.append(named), old(*rows, **named))[1])
    model.set_attn_implementation("pyxlbert")
    ours, _ = results(model, given, cotangents)
    # Of this one's few rows MKL's products are exact by luck on a processor with AVX2 alone.
    factor = tolerances.REPLACEMENT_FACTOR if case == "mistral, left" else tolerances.FACTOR
    models.within_budget(case, ours, plain, truth, factor)
    assert masks
    for named in masks:
        mask = named.get("attention_mask")
        # A window is no length; what lengths or keys say is never a T x T tensor.
        if "modernbert" not in case and "mistral" not in case:
            assert mask is None or mask.shape[2] == 1
        if case in ("bert, right", "llama, right"):
            assert mask is None and torch.equal(named["key_lengths"], RIGHT.sum(1).int())
    assert "pyxlbert" not in model.config.to_json_string()


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_generation_with_a_cache(kind: str) -> None:
    torch.manual_seed(0)
    model = llama(kind, **({"sliding_window": 3} if kind == "Mistral" else {})).eval()
    found = []
    for name in ("sdpa", "pyxlbert"):
        model.set_attn_implementation(name)
        found.append(model.generate(**ids(LEFT), max_new_tokens=6, do_sample=False))
    assert torch.equal(*found)


def test_several_new_tokens_after_a_cache() -> None:
    model = llama().eval()
    given = ids(torch.ones(2, 9, dtype=torch.long))["input_ids"]
    found = []
    for name in ("sdpa", "pyxlbert"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            first = model(given[:, :5], use_cache=True)
            found.append(model(given[:, 5:], past_key_values=first.past_key_values).logits)
    compare.close("logits", found[1], found[0], tolerances.MODEL_FLOAT32)


def test_weights_bias_and_dropout() -> None:
    class Module(torch.nn.Module):
        is_causal = False

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 4, generator=generator).requires_grad_() for _ in range(3))
    bias = torch.randn(1, 3, 5, 5, generator=generator).requires_grad_()
    mask = torch.rand(2, 1, 5, 5, generator=generator) < 0.7
    plain = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, torch.where(mask, bias, -torch.inf), scale=0.3
    ).transpose(1, 2)
    ours, none = interface.attention_forward(
        Module(), query, key, value, mask, scaling=0.3, position_bias=bias, output_attentions=False
    )
    assert none is None
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), (query, key, value, bias)),
        torch.autograd.grad(plain.square().sum(), (query, key, value, bias)),
        strict=True,
    ):
        compare.close("gradient", a, b, tolerances.MODEL_GRADIENT_FLOAT32)
    again, weights = interface.attention_forward(
        Module(), query, key, value, mask, scaling=0.3, position_bias=bias, output_attentions=True
    )
    compare.close("output", again, ours, tolerances.MODEL_FLOAT32)
    compare.close("weights", weights @ value, ours.transpose(1, 2), tolerances.MODEL_FLOAT32)
    dropped = interface.attention_forward(Module(), query, key, value, None, dropout=1.0)[0]
    assert not dropped.any()


def test_what_the_op_does_not_compute_is_refused() -> None:
    rows = [torch.zeros(1, 1, 2, 4)] * 3
    with pytest.raises(ValueError, match=r"softcap: got 30.0, wanted None"):
        interface.attention_forward(torch.nn.Module(), *rows, None, softcap=30.0)
    with pytest.raises(ValueError, match=r"attention_mask: got shape \[1, 2, 2\], wanted 1, 2 or 4 dimensions"):
        interface.attention_forward(torch.nn.Module(), *rows, torch.ones(1, 2, 2))


def test_compile() -> None:
    torch.compiler.reset()
    model = CASES["bert, right"][0]().eval()
    with torch.no_grad():
        wanted = model(**ids(HOLES))[0]
        model.set_attn_implementation("pyxlbert")
        got = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)(**ids(HOLES))[0]
    real = HOLES.bool()
    compare.close("output", got[real], wanted[real], tolerances.MODEL_FLOAT32)


def test_masks_of_older_versions_are_refused(monkeypatch) -> None:
    def before(batch_size, cache_position, kv_length):
        raise AssertionError

    monkeypatch.setattr(tr.masking_utils, "sdpa_mask", before)
    with pytest.raises(ImportError, match=r"register_attention: got transformers .*, wanted 5.4 or later"):
        pyxlbert.register_attention()
