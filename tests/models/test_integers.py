"""`int8.safetensors` in a model's directory: the outputs of the model that was saved, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import pyxlbert
from pyxlbert import backends
from pyxlbert.models import BertConfig, BertForSequenceClassification, BertModel, XLNetConfig, XLNetModel, integers
from pyxlbert.nn.packing import integers_of
from pyxlbert.ops._integers import quantise
from pyxlbert.testing import compare

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=str(backends.unavailable("cpu")))

IDS = torch.tensor([[2, 5, 9, 13, 7, 3], [2, 8, 21, 3, 0, 0]])
NAME = "encoder.layer.1.output.dense.weight"


def bert(head: type = BertModel) -> Any:
    torch.manual_seed(3)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return head(BertConfig(**sizes, intermediate_size=48, max_position_embeddings=16)).eval()


def xlnet() -> XLNetModel:
    torch.manual_seed(3)
    return XLNetModel(XLNetConfig(vocab_size=40, d_model=32, n_layer=2, n_head=2, d_inner=48)).eval()


def output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)[0]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Of a model in float32, its layers in integers."""
    pyxlbert.pack(bert(), dtype="int8").save_pretrained(tmp_path)
    return tmp_path


def change(path: Path, **changes: torch.Tensor | None) -> None:
    """Replaces tensors of a file, or removes them."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path) | {name: one for name, one in changes.items() if one is not None}
    save_file({name: one for name, one in tensors.items() if changes.get(name, one) is not None}, path, metadata)


def content(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [bert, xlnet, lambda: bert(BertForSequenceClassification)])
def test_a_saved_model_has_the_same_outputs(make, dtype: torch.dtype, tmp_path: Path) -> None:
    model = pyxlbert.pack(make().to(dtype), dtype="int8")
    wanted = output(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype="int8")
    assert loaded.dtype is dtype
    if loaded.base_model is not loaded:
        pyxlbert.pack(loaded, dtype="int8")  # an encoder packs itself, and a head does not
    compare.same_bits("loaded", output(loaded), wanted)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", integers.FILE):
        assert content(tmp_path / "again" / name) == content(tmp_path / name)


def test_the_integers_of_the_file_are_multiplied_by(directory: Path) -> None:
    """Not those that the weights would be quantised to: another scale is seen in the outputs, and saved again."""
    plain = output(BertModel.from_pretrained(directory, dtype="int8"))
    scales = load_file(directory / integers.FILE)[NAME + ".scales"]
    change(directory / integers.FILE, **{NAME + ".scales": scales * 2})
    other = BertModel.from_pretrained(directory, dtype="int8")
    assert not torch.equal(output(other), plain)
    other.save_pretrained(directory / "again")
    assert torch.equal(load_file(directory / "again" / integers.FILE)[NAME + ".scales"], scales * 2)
    # What was dropped is made again of the same integers, until the weight is written to.
    found = output(other)
    other.train()
    compare.same_bits("packed again", output(other.eval()), found)
    parameter = other.get_parameter(NAME)
    with torch.no_grad():
        parameter.mul_(1.0)
    assert not torch.equal(output(other), found)
    assert torch.equal(dict(integers_of(other))[parameter].scales, quantise(parameter).scales)


def test_the_directory_is_an_ordinary_one(directory: Path) -> None:
    transformers = pytest.importorskip("transformers")
    bert().save_pretrained(directory / "plain")
    for name in ("model.safetensors", "config.json"):
        assert (directory / name).read_bytes() == (directory / "plain" / name).read_bytes()
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    theirs = transformers.BertModel.from_pretrained(directory).eval()
    with torch.no_grad():
        wanted = theirs(IDS).last_hidden_state
    compare.close("transformers", output(BertModel.from_pretrained(directory)), wanted, 1e-4)
    # Rows of 32 numbers have coarse integers.
    similar = F.cosine_similarity(output(BertModel.from_pretrained(directory, dtype="int8")), wanted, dim=-1)
    assert similar.min() > 0.99


def test_another_model_takes_the_file_along(directory: Path) -> None:
    assert (directory / integers.FILE).is_file()
    bert().save_pretrained(directory)
    assert not (directory / integers.FILE).exists()
    model = BertModel.from_pretrained(directory, dtype="int8")
    assert model.dtype is (torch.bfloat16 if backends.multiplies_bfloat16() else torch.float32)
    assert output(model).isfinite().all()


def test_integers_of_other_weights_are_refused(directory: Path) -> None:
    weight = load_file(directory / "model.safetensors")[NAME]
    change(directory / "model.safetensors", **{NAME: weight + 1e-3})
    with pytest.raises(ValueError, match=rf"belongs to other weights: {NAME} is another in .*pyxlbert quantise"):
        BertModel.from_pretrained(directory, dtype="int8")
    assert BertModel.from_pretrained(directory).get_parameter(NAME).equal(weight + 1e-3)
    BertModel.from_pretrained(directory).save_integers(directory)
    output(BertModel.from_pretrained(directory, dtype="int8"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({NAME: None}, f"lacks {NAME}"),
        ({NAME + ".scales": None}, rf"lacks {NAME}.scales"),
        ({NAME: torch.zeros(32, 48)}, r"got torch.float32 \[32, 48\], wanted int8"),
        ({NAME: torch.full((32, 48), -128, dtype=torch.int8)}, "from -127 to 127"),
        ({NAME: torch.zeros(31, 48, dtype=torch.int8)}, r"wanted float32 \[31\]"),
        ({NAME: torch.zeros(32, 47, dtype=torch.int8)}, r"wanted int8 \[32, 48\]"),
        ({NAME: torch.zeros(9, 3, dtype=torch.int8), NAME + ".scales": torch.zeros(9)}, r"got int8 \[9, 3\], wanted"),
        ({NAME + ".scales": torch.zeros(32, 1)}, r"scales: got torch.float32 \[32, 1\], wanted float32 \[32\]"),
    ],
)
def test_what_does_not_fit_is_refused(directory: Path, changes: dict[str, Any], words: str) -> None:
    change(directory / integers.FILE, **changes)
    with pytest.raises(ValueError, match=words):
        BertModel.from_pretrained(directory, dtype="int8")


def test_a_broken_file_is_named(directory: Path) -> None:
    path = directory / integers.FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{integers.FILE} is not a whole safetensors file"):
        BertModel.from_pretrained(directory, dtype="int8")
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="dtype of all else: got None, wanted one of float32"):
        BertModel.from_pretrained(directory, dtype="int8")


def test_nothing_is_left_half_written(directory: Path, monkeypatch) -> None:
    before = (directory / integers.FILE).read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        bert().save_integers(directory)
    assert (directory / integers.FILE).read_bytes() == before
    assert {path.name for path in directory.iterdir()} == {"config.json", "model.safetensors", integers.FILE}


def test_arguments_that_contradict_each_other(directory: Path) -> None:
    with pytest.raises(ValueError, match='pack: got False together with dtype "int8"'):
        BertModel.from_pretrained(directory, dtype="int8", pack=False)
    with pytest.raises(ValueError, match=r"lacks weights of this model's layers: encoder\.layer\.2"):
        config = bert().config
        config.num_hidden_layers = 3
        BertModel(config).eval().save_integers(directory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_nearest_integers(dtype: torch.dtype) -> None:
    weight = torch.randn(9, 31, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[1], weight[2, 3], weight[3, 4] = 0.0, torch.inf, torch.nan
    weight[4], weight[5] = -0.7, torch.arange(-120, 121, 8) + torch.arange(-120, 121, 8).sign() * 0.5
    weight[5, 0] = 127
    whole, scales = quantise(weight.t().contiguous().t())
    assert whole.dtype is torch.int8 and whole.is_contiguous() and scales.dtype is torch.float32
    finite = torch.tensor([0, 1, 4, 5, 6, 7, 8])
    most = weight[finite].float().abs().amax(1)
    assert torch.equal(scales[finite], most * (1 / 127)) and scales[[2, 3]].isnan().all()
    assert (whole[[1, 2, 3]] == 0).all() and (whole[4] == -127).all()
    off = weight[finite].double() - scales[finite, None].double() * whole[finite]
    assert (off.abs() <= (most[:, None] / 127).double() * 0.5001).all()
    # The largest element has whole numbers for steps here; halves go away from zero.
    assert whole[5].tolist() == [127, *range(-113, -8, 8), 0, *range(9, 122, 8)]
