"""Pooling modes against their formulas, and what a sentence-transformers directory may say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pyxlbert.testing import compare, tolerances
from pyxlbert.text import pool, read_modules

pytestmark = pytest.mark.quick

MODES = {
    "cls": lambda x: x[0],
    "max": lambda x: x.max(0),
    "mean": lambda x: x.sum(0) / len(x),
    "mean_sqrt_len_tokens": lambda x: x.sum(0) / np.sqrt(len(x)),
    "weightedmean": lambda x: (x * np.arange(1, len(x) + 1)[:, None]).sum(0) / (len(x) * (len(x) + 1) / 2),
    "lasttoken": lambda x: x[-1],
}
ST = "sentence_transformers.models"
TRANSFORMER = {"path": "", "type": f"{ST}.Transformer"}
POOLING = {"path": "1_Pooling", "type": f"{ST}.Pooling"}
NORMALIZE = {"path": "2_Normalize", "type": f"{ST}.Normalize"}
DENSE = {"path": "2_Dense", "type": f"{ST}.Dense"}


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def directory(root: Path, *modules: dict, pooling: dict | None = None) -> Path:
    write(root / "modules.json", [{"idx": i, "name": str(i), **m} for i, m in enumerate(modules)])
    write(root / "1_Pooling" / "config.json", pooling or {"pooling_mode_mean_tokens": True})
    return root


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_is_its_formula(mode: str, dtype: torch.dtype) -> None:
    lengths = [3, 1, 0, 7, 2]
    x = torch.randn(sum(lengths), 5).to(dtype)
    rows = np.split(x.double().numpy(), np.cumsum(lengths)[:-1])
    expected = np.stack([MODES[mode](r) if len(r) else np.zeros(5) for r in rows])
    result = pool(x, lengths, (mode,))
    assert result.dtype == torch.float32
    compare.close("result", result, torch.from_numpy(expected).float(), tolerances.SUMMATION_ORDER)


def test_pool_does_not_look_at_neighbours() -> None:
    x = torch.randn(9, 8)
    y = x.clone()
    y[4:] = float("nan")
    for mode in MODES:
        assert torch.equal(pool(x, [4, 5], (mode,))[0], pool(y, [4, 5], (mode,))[0])


def test_pool_of_nothing() -> None:
    assert pool(torch.zeros(0, 6), []).shape == (0, 6)
    assert pool(torch.zeros(0, 6), [0, 0]).tolist() == [[0.0] * 6] * 2


def test_several_modes_are_concatenated_in_the_order_of_sentence_transformers(tmp_path: Path) -> None:
    chosen = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True, "word_embedding_dimension": 4}
    modules, folder = read_modules(directory(tmp_path, TRANSFORMER, POOLING, pooling=chosen))
    assert folder == tmp_path
    assert modules.modes == ("cls", "mean")
    assert modules.size(4) == 8
    assert not modules.normalize
    x = torch.randn(3, 4)
    compare.close("result", modules(x, [3])[0], torch.cat([x[0], x.mean(0)]), tolerances.SUMMATION_ORDER)


def test_without_modules_texts_are_mean_pooled(tmp_path: Path) -> None:
    modules, folder = read_modules(tmp_path)
    assert (folder, modules.modes, modules.normalize) == (tmp_path, ("mean",), False)


def test_the_transformer_may_have_a_folder_of_its_own(tmp_path: Path) -> None:
    own = {"path": "0_BERT", "type": f"{ST}.Transformer"}
    modules, folder = read_modules(directory(tmp_path, own, POOLING, NORMALIZE))  # 2_Normalize need not exist
    assert folder == tmp_path / "0_BERT"
    assert modules.normalize


@pytest.mark.parametrize("word", ["cls", ["cls"], "mean", ["mean", "max"]])
def test_newer_pooling_files(tmp_path: Path, word: object) -> None:
    modules, _ = read_modules(directory(tmp_path, TRANSFORMER, POOLING, pooling={"pooling_mode": word}))
    assert set(modules.modes) == ({word} if isinstance(word, str) else set(word))


@pytest.mark.parametrize("activation", ["Tanh", "Identity", "GELU"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_dense(tmp_path: Path, activation: str, bias: bool, file: str) -> None:
    root = directory(tmp_path, TRANSFORMER, POOLING, DENSE, NORMALIZE)
    layer = torch.nn.Linear(6, 3, bias=bias)
    name = f"torch.nn.modules.activation.{activation}"
    write(root / "2_Dense/config.json", {"in_features": 6, "out_features": 3, "activation_function": name})
    state = {f"linear.{key}": value.detach() for key, value in layer.state_dict().items()}
    (save_file if file == "model.safetensors" else torch.save)(state, root / "2_Dense" / file)
    modules, _ = read_modules(root)
    assert modules.size(6) == 3
    assert modules.normalize
    x = torch.randn(4, 6)
    with torch.no_grad():
        expected = getattr(torch.nn, activation)()(layer(x.mean(0)))
    compare.close("result", modules(x, [4])[0], expected, tolerances.SUMMATION_ORDER)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([TRANSFORMER], "no Pooling"),
        ([], "no Transformer"),
        ([POOLING, TRANSFORMER], "Pooling"),
        ([TRANSFORMER, POOLING, {"path": "2_LSTM", "type": f"{ST}.LSTM"}], "LSTM"),
        ([TRANSFORMER, {"path": "1_CNN", "type": f"{ST}.CNN"}, POOLING], "CNN"),
        ([TRANSFORMER, POOLING, NORMALIZE, DENSE], "Dense"),
        ([TRANSFORMER, POOLING, POOLING], "Pooling"),
        ([TRANSFORMER, {"path": "../1_Pooling", "type": f"{ST}.Pooling"}], r"\.\./1_Pooling"),
        ([TRANSFORMER, {"path": "3_Pooling", "type": f"{ST}.Pooling"}], "3_Pooling"),
        ([TRANSFORMER, POOLING, DENSE], "2_Dense"),
        ([{"path": ""}], "type"),
    ],
)
def test_modules_that_are_not_supported(tmp_path: Path, modules: list[dict], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_modules(directory(tmp_path, *modules))


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_attention": True}, "pooling_mode_attention"),
        ({"pooling_mode": "median"}, "median"),
        ({"pooling_mode": 3}, "3"),
    ],
)
def test_pooling_files_that_are_not_supported(tmp_path: Path, pooling: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_modules(directory(tmp_path, TRANSFORMER, POOLING, pooling=pooling))


def test_dense_files_that_are_not_supported(tmp_path: Path) -> None:
    root = directory(tmp_path, TRANSFORMER, POOLING, DENSE)
    write(root / "2_Dense/config.json", {"activation_function": "os.system"})
    with pytest.raises(ValueError, match="system"):
        read_modules(root)
    write(root / "2_Dense/config.json", {"in_features": 2, "out_features": 2})
    (root / "2_Dense/model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"2_Dense.model\.safetensors is not a whole"):
        read_modules(root)
    save_file({"weight": torch.zeros(2, 2)}, root / "2_Dense/model.safetensors")
    with pytest.raises(ValueError, match=r"linear\.weight"):
        read_modules(root)
    save_file({"linear.weight": torch.zeros(2, 3)}, root / "2_Dense/model.safetensors")
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        read_modules(root)


def test_corrupt_listing(tmp_path: Path) -> None:
    for content in ("{}", "[", "[3]"):
        (tmp_path / "modules.json").write_text(content)
        with pytest.raises(ValueError, match=r"modules\.json"):
            read_modules(tmp_path)
