"""Models by name: a cache of the hub, a server that stands in for it, and what is said where neither helps."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import pyxlbert
from pyxlbert import models
from pyxlbert.hub import Hub, _chosen
from pyxlbert.models import BertConfig, BertModel, RobertaModel, XLNetConfig, XLNetModel
from pyxlbert.testing.directories import tiny_bert

hub_constants = pytest.importorskip("huggingface_hub.constants")


def _file(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, Path(__file__).parent / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hub_server = _file("hub_server.py")
COMMIT = hub_server.COMMIT
TEXTS = ["hello world", "the naive train"]
# Of one model many files lie on the hub that nothing here reads.
OTHERS = ("pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "openvino/openvino_model.bin", "README.md", "train.py")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the server, by what is special to each."""
    root = tmp_path_factory.mktemp("hub")
    sentence = tiny_bert(root / "org" / "sentence")
    (sentence / "tokenizer_config.json").write_text('{"model_max_length": 16}')
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (sentence / "modules.json").write_text(json.dumps(modules))
    (sentence / "1_Pooling").mkdir()
    (sentence / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (sentence / "2_Dense").mkdir()
    dense = {"in_features": 32, "out_features": 8, "bias": False, "activation_function": "torch.nn.Identity"}
    (sentence / "2_Dense" / "config.json").write_text(json.dumps(dense))
    save_file({"linear.weight": torch.eye(8, 32)}, sentence / "2_Dense" / "model.safetensors")
    for name in OTHERS:
        (sentence / name).parent.mkdir(exist_ok=True)
        (sentence / name).write_bytes(b"not read")
    plain = tiny_bert(root / "org" / "plain")
    (plain / "tokenizer_config.json").write_text("{}")
    pickled = root / "org" / "pickled"
    shutil.copytree(plain, pickled)
    model = BertModel.from_pretrained(plain, add_pooling_layer=False)
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    sharded = root / "org" / "sharded"
    shutil.copytree(plain, sharded)
    (sharded / "model.safetensors").unlink()
    parts = [dict(list(model.state_dict().items())[place::2]) for place in range(2)]
    names = [f"model-0000{place + 1}-of-00002.safetensors" for place in range(2)]
    for part, name in zip(parts, names, strict=True):
        save_file(part, sharded / name)
    placed = {key: name for part, name in zip(parts, names, strict=True) for key in part}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    empty = root / "org" / "empty"
    empty.mkdir()
    shutil.copy(plain / "config.json", empty)
    XLNetModel(XLNetConfig(vocab_size=40, d_model=24, n_layer=1, n_head=3, d_inner=20)).save_pretrained(
        root / "org" / "xlnet"
    )
    RobertaModel(
        models.XLMRobertaConfig(vocab_size=40, hidden_size=24, num_hidden_layers=1, num_attention_heads=3)
    ).save_pretrained(root / "org" / "roberta")
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    """An empty cache, which is the hub's own place here, and no network."""
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(hub_constants, name, str(tmp_path / "cache"), raising=False)
    return tmp_path / "cache"


@pytest.fixture
def hub(root: Path, cache: Path, monkeypatch) -> Iterator[hub_server.Hub]:
    with hub_server.served(root) as hub:
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def in_cache(cache: Path, name: str, source: Path, leave_out: tuple[str, ...] = (), revision: str = "main") -> Path:
    """A model laid into a cache by hand, as a download leaves it."""
    home = cache / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    shutil.copytree(source, snapshot, ignore=lambda _, names: [one for one in names if one in leave_out])
    (home / "refs").mkdir()
    (home / "refs" / revision).write_text(COMMIT)
    return snapshot


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def test_only_what_is_read_is_fetched_and_only_once(hub, root: Path, monkeypatch) -> None:
    encoder = pyxlbert.SentenceEncoder.from_pretrained("org/sentence")
    assert hub.fetched() == [
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "config.json"),
        *("model.safetensors", "modules.json", "tokenizer_config.json", "vocab.txt"),
    ]
    wanted = pyxlbert.SentenceEncoder.from_pretrained(root / "org" / "sentence").encode(TEXTS)
    assert wanted.shape == (2, 8) and np.array_equal(encoder.encode(TEXTS), wanted)
    hub.asked.clear()
    again = pyxlbert.SentenceEncoder.from_pretrained("org/sentence")
    BertModel.from_pretrained("org/sentence", add_pooling_layer=False)
    assert not hub.asked and np.array_equal(again.encode(TEXTS), wanted)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert np.array_equal(pyxlbert.SentenceEncoder.from_pretrained("org/sentence").encode(TEXTS), wanted)


@pytest.mark.parametrize(
    ("name", "kind", "weights"),
    [
        ("plain", BertModel, ["model.safetensors"]),
        ("pickled", BertModel, ["pytorch_model.bin"]),
        (
            "sharded",
            BertModel,
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ],
        ),
        ("xlnet", XLNetModel, ["model.safetensors"]),
        ("roberta", RobertaModel, ["model.safetensors"]),
    ],
)
def test_every_model_and_every_form_of_weights(hub, root: Path, cache: Path, name: str, kind: type, weights) -> None:
    options = {} if kind is XLNetModel else {"add_pooling_layer": False}
    with pytest.warns() if name == "roberta" else pytest.MonkeyPatch.context():
        found = kind.from_pretrained(f"org/{name}", **options)
        wanted = kind.from_pretrained(root / "org" / name, **options)
    assert same(found, wanted)
    assert hub.fetched() == sorted(["config.json", *weights])


def test_a_configuration_alone(hub) -> None:
    config = models.RobertaConfig.from_pretrained("org/roberta", num_labels=4)
    assert type(config) is models.XLMRobertaConfig and config.num_labels == 4
    assert hub.fetched() == ["config.json"]
    hub.asked.clear()
    models.RobertaConfig.from_pretrained("org/roberta", revision="main")
    assert not hub.asked
    RobertaModel.from_pretrained("org/roberta")
    assert hub.fetched() == ["model.safetensors"]


def test_a_model_without_modules_is_remembered_as_such(hub, recwarn) -> None:
    pyxlbert.SentenceEncoder.from_pretrained("org/plain")
    hub.asked.clear()
    pyxlbert.SentenceEncoder.from_pretrained("org/plain")
    assert not hub.asked and not recwarn.list


def test_revisions_and_places(hub, cache: Path, tmp_path: Path) -> None:
    BertModel.from_pretrained("org/plain", revision="v1", cache_dir=tmp_path / "other", add_pooling_layer=False)
    assert not cache.exists()
    assert (tmp_path / "other" / "models--org--plain" / "refs" / "v1").read_text() == COMMIT
    with pytest.raises(ValueError, match=r"revision: got 'v9', which the model 'org/plain' does not have"):
        BertModel.from_pretrained("org/plain", revision="v9")
    with pytest.raises(FileNotFoundError, match=r"local_files_only=True forbids"):
        BertModel.from_pretrained("org/plain", local_files_only=True)


def test_a_broken_off_download_is_completed(hub, root: Path, cache: Path) -> None:
    missing = ("model-00002-of-00002.safetensors",)
    snapshot = in_cache(cache, "org/sharded", root / "org" / "sharded", missing)
    with pytest.raises(FileNotFoundError, match=r"'org/sharded' is no folder, is in the hub's cache only in part"):
        BertModel.from_pretrained("org/sharded", local_files_only=True)
    BertModel.from_pretrained("org/sharded", add_pooling_layer=False)
    assert (snapshot / missing[0]).exists() and hub.fetched() == list(missing)


def test_what_the_hub_refuses_is_said(hub) -> None:
    for name, error, words in (
        ("org/nothing", FileNotFoundError, r"'org/nothing' is neither a folder nor a model of the hub"),
        ("org/gated", PermissionError, r"'org/gated' of the hub is gated: ask for access .* token="),
        ("org/empty", FileNotFoundError, r"'org/empty' of the hub has no weights: wanted one of model.safetensors"),
    ):
        for load in (BertModel.from_pretrained, pyxlbert.SentenceEncoder.from_pretrained):
            with pytest.raises(error, match=words):
                load(name)


def test_the_cache_alone(cache: Path, root: Path, recwarn) -> None:
    in_cache(cache, "org/sentence", root / "org" / "sentence", OTHERS)
    wanted = pyxlbert.SentenceEncoder.from_pretrained(root / "org" / "sentence").encode(TEXTS)
    assert np.array_equal(pyxlbert.SentenceEncoder.from_pretrained("org/sentence").encode(TEXTS), wanted)
    assert not recwarn.list
    in_cache(cache, "org/plain", root / "org" / "plain")
    with pytest.warns(UserWarning, match=r"org/plain: the cache does not say whether the model has a modules.json"):
        pyxlbert.SentenceEncoder.from_pretrained("org/plain")
    with pytest.raises(FileNotFoundError, match=r"'org/other' is no folder, is not in the hub's cache, and HF_HUB_OFF"):
        BertModel.from_pretrained("org/other")


def test_a_hub_that_cannot_be_reached(cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        FileNotFoundError, match=r"the hub gave no answer \(.*\); where there is a network, `hf download"
    ):
        BertModel.from_pretrained("org/plain")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_full_disk_is_not_hidden(hub, monkeypatch) -> None:
    import huggingface_hub

    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match=r"No space left on device: 'model.safetensors'"):
        BertModel.from_pretrained("org/plain")


def test_a_folder_stays_a_folder(root: Path, monkeypatch) -> None:
    monkeypatch.chdir(root)
    found = BertModel.from_pretrained("org/plain", add_pooling_layer=False, local_files_only=True)
    assert same(found, BertModel.from_pretrained(root / "org" / "plain", add_pooling_layer=False))
    for path in ("org/plain/config.json", "./nowhere", "/nowhere/x", "a/b/c", Path("org/nothing")):
        with pytest.raises((FileNotFoundError, NotADirectoryError), match=r"wanted a local directory"):
            BertModel.from_pretrained(path)


def test_without_the_library(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"'org/plain' does not exist; .* pip install pyxlbert\[hub\]"):
        BertModel.from_pretrained("org/plain")


@pytest.mark.parametrize(
    "given",
    [{"revision": 1}, {"cache_dir": 3}, {"token": 2}, {"local_files_only": None}],
    ids=lambda one: next(iter(one)),
)
def test_arguments(given: dict) -> None:
    with pytest.raises(TypeError, match=f"^{next(iter(given))}: got"):
        BertModel.from_pretrained("org/plain", **given)
    with pytest.raises(TypeError, match=f"^{next(iter(given))}: got"):
        pyxlbert.SentenceEncoder.from_pretrained("org/plain", **given)


def test_what_is_chosen_of_a_models_files() -> None:
    files = [
        "config.json",
        "vocab.json",
        "merges.txt",
        "model.fp16.safetensors",
        "model.safetensors",
        "0_A/config.json",
    ]
    files += ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "pytorch_model-00002-of-00002.bin"]
    assert _chosen(files, [""], text=False) == ["config.json", "model.safetensors"]
    assert _chosen(files, ["", "0_A/"], text=True) == [
        *("config.json", "vocab.json", "merges.txt", "model.safetensors", "0_A/config.json")
    ]
    pickled = [one for one in files if "safetensors" not in one]
    assert sorted(_chosen(pickled, [""], text=False)) == sorted(["config.json", *files[-3:]])
    assert Hub() == Hub(None, None, None, False)
    assert BertConfig().model_type == "bert"


def test_the_command_asks_the_endpoint_of_the_environment(root: Path, tmp_path: Path) -> None:
    texts, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    texts.write_text("\n".join(TEXTS))
    command = [sys.executable, "-m", "pyxlbert", "embed", str(texts), "--model", "org/sentence", "--out", str(out)]
    with hub_server.served(root) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = pyxlbert.SentenceEncoder.from_pretrained(root / "org" / "sentence").encode(TEXTS)
    assert np.array_equal(np.load(out), wanted)
