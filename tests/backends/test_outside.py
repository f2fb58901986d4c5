"""The project of docs/backends.md as a stranger makes it: installed, checked, raced, in models; and broken ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pyxlbert
from pyxlbert import backends
from pyxlbert.backends import OPS, choice, outside, presence
from pyxlbert.testing import check_op

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")


def install(folder: Path, name: str = "pyxlbert-aten", points: str = "aten = pyxlbert_aten") -> None:
    """What pip leaves of a distribution beside its files: it is then found by whoever has the folder on its path."""
    about = folder / f"{name.replace('-', '_')}-0.1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text(f"[{outside.GROUP}]\n{points}\n")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The files of the document, and its shell loop, in an empty folder."""
    folder = tmp_path_factory.mktemp("project")
    files = re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in files] == ["pyproject.toml", "pyxlbert_aten/__init__.py", "pyxlbert_aten/layer_norm.py"]
    for name, text in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (loop,) = re.findall(r"```sh\n(for .*?)```", DOCUMENT, re.DOTALL)
    subprocess.run(["sh", "-c", loop], cwd=folder, check=True)
    point = re.search(r'"pyxlbert.backends"\]\n(\w+) = "(\w+)"', (folder / "pyproject.toml").read_text())
    install(folder, points=f"{point[1]} = {point[2]}")
    return folder


def python(code: str, *folders: Path, status: int = 0) -> str:
    """What a fresh process prints that has the folders on its path."""
    path = os.pathsep.join(map(str, folders))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=folders[0])
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


WORKS = """
import json, sys
import pyxlbert
assert "pyxlbert_aten" not in sys.modules
import torch
from pyxlbert import backends
from pyxlbert.cli import main, info_text
from pyxlbert.testing import check_op, compare, tolerances

compiled = torch.compile(lambda x: pyxlbert.layer_norm(x, x[0], x[1], backend="aten"), fullgraph=True, backend="eager")
x = torch.randn(4, 8)
first = compiled(x)  # before anything else has asked for the room
assert torch.equal(first, pyxlbert.layer_norm(x, x[0], x[1], backend="aten"))
assert backends.NAMES == ("torch", "cpu", "triton", "cuda", "aten") and backends.unavailable("aten") is None
assert not backends.REFUSED
text = backends.explain("layer_norm", x)
assert "cpu: taken" in text and "aten: possible where backend= names it" in text, text
assert "aten: bias_gelu has no aten kernel" in backends.explain("bias_gelu", x)
assert "aten    available" in info_text()
rows = check_op("layer_norm", "aten")
assert {row.verdict for row in rows} == {"ok"} and {row.runner for row in rows} == {"aten"}
try:
    pyxlbert.layer_norm(x.double(), x[0].double(), x[1].double(), backend="aten")
except RuntimeError as error:
    assert str(error) == "layer_norm: backend 'aten' is unavailable: float64 runs on backend 'torch'"
config = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=48, vocab_size=50)
model = pyxlbert.models.BertForMaskedLM(pyxlbert.models.BertConfig(**config)).eval()
ids = torch.arange(14).view(2, 7)
with pyxlbert.use_backend("aten"):
    ours = model(ids).logits
    ours.sum().backward()
compare.close("logits", ours, model(ids).logits, tolerances.MODEL_FLOAT32)
assert "pyxlbert_aten.attention" in sys.modules
config = pyxlbert.models.XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=48, vocab_size=50)
xlnet = pyxlbert.models.XLNetModel(config)
try:
    with pyxlbert.use_backend("aten"):
        xlnet(ids)
except RuntimeError as error:
    assert "backend 'aten' is unavailable: relative_attention has no aten kernel" in str(error), error
else:
    raise SystemExit("XLNet ran on a backend that lacks its attention")
assert 0 == main(["parity", "--op", "layer_norm", "--backend", "aten", "--quick", "--json", "rows.json"])
"""


RACE = """
import sys
import torch
sys.path.insert(0, {tests!r})
from small_cases import small
from pyxlbert.bench import ops
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Use
case = next(SPECS["layer_norm"].used(Use.RACE))
row = ops.race_of(SPECS["layer_norm"], small(case), torch.float32, rounds=2).run()
print(row.details())
if "pyxlbert aten" in row.timings:
    assert not row.faults and set(row.timings) == {{"pyxlbert", "pyxlbert aten", "F.layer_norm"}}
else:
    print(row.faults["pyxlbert aten"])
"""


def test_the_documented_project_is_a_backend_like_ours(project: Path) -> None:
    text = python(WORKS + RACE.format(tests=str(ROOT / "tests" / "bench")), project)
    assert "pyxlbert aten" in text and "no time" not in text
    rows = json.loads((project / "rows.json").read_text())["rows"]
    assert {row["runner"] for row in rows} == {"aten"} and {row["verdict"] for row in rows} == {"ok"}
    assert len(rows) == 6  # three dtypes, forward and backward


def test_one_that_is_subtly_wrong_fails_everywhere(project: Path, tmp_path: Path) -> None:
    """The variance of a sample, one row less in its divisor: 0.1 % at 768 columns."""
    install(tmp_path)
    for file in (project / "pyxlbert_aten").iterdir():
        if file.suffix == ".py":
            text = file.read_text()
            wrong = "y = ((y - call.bias) * (1 - 1 / y.shape[-1]) ** 0.5 + call.bias).to(call.x.dtype)"
            (tmp_path / "pyxlbert_aten").mkdir(exist_ok=True)
            text = text.replace("y = y.to(call.x.dtype)", wrong)
            (tmp_path / "pyxlbert_aten" / file.name).write_text(text)
    text = python(CHECK + RACE.format(tests=str(ROOT / "tests" / "bench")), tmp_path)
    assert re.search(r"^1 of 2 rows wrong", text, re.MULTILINE) and "over budget" in text and "STATUS 1" in text
    assert "CHECK check_op: " in text and "times the budget" in text.partition("CHECK")[2]
    assert "no time: wrong answer" in text


CHECK = """
from pyxlbert.cli import main
from pyxlbert.testing import check_op
given = ["--op", "layer_norm", "--backend", "aten", "--quick", "--dtype", "float32"]
print("STATUS", main(["parity", *given]))
try:
    check_op("layer_norm", "aten", quick=True)
except AssertionError as error:
    print("CHECK", error)
"""
PACKAGE, MODULE = "pyxlbert_aten/__init__.py", "pyxlbert_aten/layer_norm.py"
FORWARD = "def layer_norm_fwd(call): return [call.x.clone(), call.x[..., 0] * 0, call.x[..., 0] * 0 + 1]\n"
BROKEN = {
    "does not import": ({PACKAGE: "import no_such_module"}, "cannot be imported: ModuleNotFoundError: No module named"),
    "leaves": ({PACKAGE: "raise SystemExit(3)"}, "pyxlbert_aten of pyxlbert-aten cannot be imported: SystemExit: 3"),
    "is not there": ({}, "cannot be imported: ModuleNotFoundError: No module named 'pyxlbert_aten'"),
    "is a module": ({"pyxlbert_aten.py": ""}, "is a module, wanted a package with a module for each op"),
    "is missing": ({PACKAGE: "def missing(): return 'no accelerator is here'"}, "no accelerator is here"),
    "cannot say": ({PACKAGE: "def missing(): 1 / 0"}, "missing() of pyxlbert_aten of pyxlbert-aten failed: Zero"),
    "says nothing": ({PACKAGE: "def missing(): return False"}, "returned False, wanted None or a sentence"),
    "lacks the op": ({PACKAGE: ""}, "backend 'aten' is unavailable: layer_norm has no aten kernel"),
    "has a bad module": ({PACKAGE: "", MODULE: "1 / 0"}, "layer_norm of pyxlbert-aten cannot be imported"),
    "has no supports": ({PACKAGE: "", MODULE: FORWARD}, "pyxlbert_aten.layer_norm of pyxlbert-aten has no supports"),
}


@pytest.fixture
def registered(tmp_path: Path, monkeypatch) -> Callable[[dict[str, str]], Path]:
    """Makes a backend "aten" of some files, in this process and for this test."""

    def make(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        room = outside.Room(outside.Registered("aten", "pyxlbert_aten", "pyxlbert-aten"))
        record = presence.Backend("aten", room.room, room.missing, room.refusal, room)
        monkeypatch.setitem(presence.BACKENDS, "aten", record)
        for module in (presence, choice):
            monkeypatch.setattr(module, "NAMES", (*presence.OWN, "aten"))

    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyxlbert_aten"]:
        del sys.modules[name]
    for op in OPS.values():
        vars(op._modules).pop("aten", None)


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_wrong_with_a_room_is_its_own_trouble(kind: str, registered) -> None:
    files, words = BROKEN[kind]
    registered(files)
    x = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError) as caught:
        pyxlbert.layer_norm(x, x[0], x[1], backend="aten").sum().backward()
    assert words in str(caught.value)
    pyxlbert.layer_norm(x, x[0], x[1]).sum().backward()  # ours is as it was
    pyxlbert.layer_norm(x, x[0], x[1], backend="cpu")
    reason = backends.unavailable("aten")
    assert backends.explain("layer_norm", x).count("aten: ") == 1
    if PACKAGE in files and MODULE not in files and files[PACKAGE]:
        assert words.removeprefix("backend 'aten' is unavailable: ") in reason
    with pytest.raises(RuntimeError, match="check_op: backend 'aten' is unavailable: "):
        check_op("bias_gelu", "aten")


def test_a_backend_without_a_gradient(registered) -> None:
    registered({PACKAGE: "", MODULE: FORWARD + "def supports(x): pass"})
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"backend 'aten' has no layer_norm_bwd; use_backend\(\.\.\., back"):
        pyxlbert.layer_norm(x, x[0], x[1], backend="aten").sum().backward()
    with pyxlbert.use_backend("aten", backward="torch"):
        pyxlbert.layer_norm(x, x[0], x[1]).sum().backward()


ASK = """
import warnings
warnings.simplefilter("error")
from pyxlbert import backends
from pyxlbert.cli import info_text
print(info_text())
"""


def test_no_import_is_stopped_and_names_are_refused(tmp_path: Path) -> None:
    install(tmp_path, "thief", "cpu = somewhere\nBad-Name = somewhere\nlost = no_such_package")
    install(tmp_path, "one", "aten = somewhere")
    install(tmp_path, "two", "aten = elsewhere")
    text = python(ASK, tmp_path)
    assert "left out: thief registers a backend 'cpu', wanted a name that is not torch, cpu, triton, cuda" in text
    assert "left out: thief registers a backend 'Bad-Name', wanted small letters" in text
    assert "missing: no_such_package of thief cannot be imported: ModuleNotFoundError" in text
    assert re.search("(one and two|two and one) both register a backend 'aten', wanted one of them installed", text)


def test_what_is_left_out_is_warned_of() -> None:
    with pytest.warns(RuntimeWarning, match="pyxlbert: thief registers .*; it is left out"):
        outside.warn(["thief registers a backend 'cpu'"])
