"""Reading and writing Hugging Face directories."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pyxlbert import models
from pyxlbert.models import BertConfig, BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertModel
from pyxlbert.testing import compare

SMALL = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
HEADS = [name for name in models.__all__ if name.startswith("BertFor")] + ["BertModel"]
IDS = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(0))


def small(head: str = "BertModel", **fields) -> torch.nn.Module:
    torch.manual_seed(3)
    return getattr(models, head)(BertConfig(**SMALL, **fields)).eval()


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> None:
    x, y = a.state_dict(), b.state_dict()
    assert set(x) == set(y)
    for name, value in x.items():
        compare.same_bits(name, value, y[name])


def rewrite(directory: Path, change) -> None:
    """Replace model.safetensors by what `change` makes of its tensors."""
    save_file(change(load_file(directory / "model.safetensors")), directory / "model.safetensors", {"format": "pt"})


def inputs_of(head: str) -> torch.Tensor:
    return IDS[:, None] if head == "BertForMultipleChoice" else IDS


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_what_we_write(head: str, tied: bool, tmp_path) -> None:
    ours = small(head, tie_word_embeddings=tied)
    ours.save_pretrained(tmp_path)
    theirs, info = getattr(transformers, head).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"] and not info["missing_keys"]
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [head]
    state = theirs.state_dict()
    for name, value in ours.state_dict().items():
        compare.same_bits(name, value, state[name])
    same_state(ours, type(ours).from_pretrained(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_we_read_what_transformers_writes(head: str, tied: bool, tmp_path, recwarn) -> None:
    theirs = getattr(transformers, head)(transformers.BertConfig(**SMALL, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    ours, info = getattr(models, head).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not [w for w in recwarn if "pyxlbert" in str(w.filename)]
    assert not ours.training
    ids = inputs_of(head)
    with torch.no_grad():
        for a, b in zip(ours(ids).to_tuple(), theirs(ids).to_tuple(), strict=True):
            compare.close(head, a, b, compare.tolerances.MODEL_FLOAT32)


def test_sharded(tmp_path) -> None:
    theirs = transformers.BertModel(transformers.BertConfig(**SMALL))
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    same_state(BertModel.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled(tmp_path, zipped: bool) -> None:
    ours = small()
    ours.config.save_pretrained(tmp_path)
    torch.save(ours.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    same_state(BertModel.from_pretrained(tmp_path), ours)


def test_sharded_pickles(tmp_path) -> None:
    ours = small()
    ours.config.save_pretrained(tmp_path)
    state = ours.state_dict()
    places = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
    for shard in set(places.values()):
        torch.save({name: state[name] for name, place in places.items() if place == shard}, tmp_path / shard)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    same_state(BertModel.from_pretrained(tmp_path), ours)


def test_old_names_and_buffers(tmp_path, recwarn) -> None:
    ours = small("BertForPreTraining")
    ours.save_pretrained(tmp_path)

    def old(state):
        state = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
            for name, value in state.items()
        }
        state["bert.embeddings.position_ids"] = torch.arange(16)[None]
        state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()
        return state

    rewrite(tmp_path, old)
    read, info = BertForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    same_state(read, ours)
    assert info == {"missing_keys": [], "unexpected_keys": [], "removed_prefixes": []}
    assert read.cls.predictions.decoder.weight is read.bert.embeddings.word_embeddings.weight
    assert read.cls.predictions.decoder.bias is read.cls.predictions.bias


def test_a_head_reads_a_bare_encoder_and_the_other_way_round(tmp_path) -> None:
    bare = small()
    bare.save_pretrained(tmp_path / "bare")
    with pytest.warns(UserWarning, match=r"classifier\.weight"):
        headed = BertForSequenceClassification.from_pretrained(tmp_path / "bare", num_labels=5)
    same_state(headed.bert, bare)
    assert headed.loading_info["missing_keys"] == ["classifier.bias", "classifier.weight"]
    assert headed.classifier.weight.shape == (5, 24)
    assert headed.classifier.weight.std() > 0 and not headed.classifier.bias.any()

    headed.save_pretrained(tmp_path / "headed")
    with pytest.warns(UserWarning, match=r"classifier\.weight"):
        read = BertModel.from_pretrained(tmp_path / "headed")
    same_state(read, bare)
    assert read.loading_info["unexpected_keys"] == ["classifier.bias", "classifier.weight"]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_forward_module.", "model.", "module._orig_mod."])
def test_prefixes_of_a_wrapped_model(prefix: str, tmp_path) -> None:
    """Of the bare encoder and of one with a head, read by either."""
    bare, headed = small(), BertForSequenceClassification(small().config)
    for ours, name in ((bare, "bare"), (headed, "headed")):
        ours.save_pretrained(tmp_path / name)
        rewrite(tmp_path / name, lambda state: {prefix + key: value for key, value in state.items()})
    for name, ours in (("bare", bare), ("headed", headed.bert)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for kind in (BertModel, BertForSequenceClassification):
                read = kind.from_pretrained(tmp_path / name)
                same_state(read.base_model, ours)
                assert read.loading_info["removed_prefixes"] == [prefix]
    same_state(read, headed)


def test_prefixes_of_wrapped_layers(tmp_path) -> None:
    ours = small()
    ours.save_pretrained(tmp_path)

    def wrap(state):
        return {
            key.replace("layer.0.", "layer.0._checkpoint_wrapped_module._orig_mod."): value
            for key, value in state.items()
        }

    rewrite(tmp_path, wrap)
    read = BertModel.from_pretrained(tmp_path)
    same_state(read, ours)
    assert read.loading_info["removed_prefixes"] == ["_orig_mod.", "_checkpoint_wrapped_module."]


def test_a_prefix_of_some_names_alone_stays(tmp_path) -> None:
    ours = small()
    ours.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: state | {"module.extra": torch.ones(1)})
    with pytest.warns(UserWarning, match=r"module\.extra"):
        assert BertModel.from_pretrained(tmp_path).loading_info["removed_prefixes"] == []


def test_without_a_pooler(tmp_path) -> None:
    small("BertForMaskedLM").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"pooler\.dense\.weight"):
        BertModel.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="cls"):
        model = BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert model.pooler is None and model(IDS).pooler_output is None


def test_a_decoder_that_differs_is_left_untied(tmp_path) -> None:
    small("BertForMaskedLM").save_pretrained(tmp_path)
    decoder = torch.randn(40, 24)
    rewrite(tmp_path, lambda state: state | {"cls.predictions.decoder.weight": decoder})
    with pytest.warns(UserWarning, match="untied"):
        model = BertForMaskedLM.from_pretrained(tmp_path)
    compare.same_bits("decoder", model.cls.predictions.decoder.weight, decoder)
    assert model.config.tie_word_embeddings is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(dtype: torch.dtype, tmp_path) -> None:
    small().to(dtype).save_pretrained(tmp_path)
    assert BertModel.from_pretrained(tmp_path).dtype == dtype
    assert BertModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert BertModel.from_pretrained(tmp_path, dtype="float64").dtype == torch.float64
    with pytest.raises(ValueError, match="dtype"):
        BertModel.from_pretrained(tmp_path, dtype="int4")


def test_a_missing_encoder_weight_is_named(tmp_path) -> None:
    small().save_pretrained(tmp_path)
    gone = "encoder.layer.1.attention.output.LayerNorm.bias"
    rewrite(tmp_path, lambda state: {name: value for name, value in state.items() if name != gone})
    with pytest.raises(ValueError, match=gone):
        BertModel.from_pretrained(tmp_path)


def test_a_wrong_shape_is_named(tmp_path) -> None:
    small().save_pretrained(tmp_path)
    name = "encoder.layer.0.output.dense.weight"
    rewrite(tmp_path, lambda state: state | {name: torch.zeros(24, 21)})
    with pytest.raises(ValueError, match=rf"{name}: got shape \[24, 21\], wanted \[24, 20\]"):
        BertModel.from_pretrained(tmp_path)


def test_integers_for_weights_are_refused(tmp_path) -> None:
    small().save_pretrained(tmp_path)
    name = "encoder.layer.0.output.dense.weight"
    rewrite(tmp_path, lambda state: state | {name: state[name].to(torch.int8)})
    with pytest.raises(ValueError, match=name):
        BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_truncated_file_is_named(tmp_path, keep: int, file: str) -> None:
    ours = small()
    ours.save_pretrained(tmp_path)
    if file == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(ours.state_dict(), tmp_path / file)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: keep if keep >= 0 else len(whole) + keep])
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        BertModel.from_pretrained(tmp_path)


class Malice:
    def __reduce__(self):
        return os.mkdir, ("made by a pickle",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    small().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Malice()}, protocol=2))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        BertModel.from_pretrained(tmp_path)
    assert not (tmp_path / "made by a pickle").exists()


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/outside.safetensors", "a/../../outside.safetensors", "C:\\o", 3]
)
def test_a_shard_outside_the_directory_is_refused(tmp_path, shard: object) -> None:
    inside = tmp_path / "model"
    ours = small()
    ours.config.save_pretrained(inside)
    save_file(ours.state_dict(), tmp_path / "outside.safetensors")
    index = {"weight_map": {name: shard for name in ours.state_dict()}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside"):
        BertModel.from_pretrained(inside)


def test_an_index_that_leads_nowhere(tmp_path) -> None:
    ours = small()
    ours.config.save_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        BertModel.from_pretrained(tmp_path)
    save_file({"b": torch.zeros(1)}, tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match="'a'"):
        BertModel.from_pretrained(tmp_path)
    for text in ("{}", '{"weight_map": []}', "nonsense"):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
            BertModel.from_pretrained(tmp_path)


def test_no_weights(tmp_path) -> None:
    small().config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        BertModel.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    ours = small()
    ours.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        ours.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
