"""The tree holds to the design: names, arrows, and what may stand where."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from pyxlbert.backends import OPS
from pyxlbert.backends.presence import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pyxlbert"

# Which rooms of the package a room may import from; ops' own helpers count as ops.
ARROWS = {
    "checks": set(),
    "files": set(),
    "hub": {"files"},
    "machine": set(),
    # Imported to say why it is missing.
    "backends": {"backends", "checks", "_C"},
    "launch": {"launch"},
    "reference": {"reference"},
    "cpu": {"cpu", "launch", "_C"},
    "kernels": {"kernels", "backends", "launch"},
    "cuda": {"cuda", "backends", "launch"},
    "ops": {"ops", "checks", "backends", "launch", "reference", "cpu", "kernels", "cuda", "_C"},
    "nn": {"nn", "ops", "backends"},
    "models": {"checks", "models", "nn", "ops", "backends", "files", "hub"},
    "text": {"text", "models", "nn", "ops", "backends", "files", "hub"},
    "embed": {"embed", "text", "files"},
    "training": {"training", "text", "models", "nn", "ops", "backends", "files", "hub"},
    "original": {"original", "text", "models", "nn", "ops", "backends", "files"},
    "export": {"export", "models", "nn", "ops", "backends", "reference", "testing", "files"},
    "integrations": {"integrations", "checks", "models", "nn", "ops", "backends", "testing"},
    "testing": {"testing", "ops", "reference", "backends", "nn", "models"},
}

# Folders of the package and the names they are installed under.
FOLDERS = {"pyxlbert": "pyxlbert", "kernels": "pyxlbert.kernels", "bench": "pyxlbert.bench"}

# Pairs of modules that import each other, which nothing new may do.
CIRCLES: set[tuple[str, str]] = set()

# What one reader can hold.
MAX_PARAMETERS, MAX_LINES = 15, 800

# Ops that wrap a vendor's GEMM have a kernel of ours for few rows only, which both share.
VENDOR_OPS = {"linear", "linear_gelu"}

# Headers that define nothing an AVX-512 copy of which could end up in another file.
KERNEL_HEADERS = {"cstdint", "cstddef", "immintrin.h", "omp.h"}


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so there is no list of tracked files")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports from the package."""
    found: set[str] = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package[: len(package) - node.level + 1]
                base = ".".join((*parents, base)).rstrip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names} | ({base} - {"pyxlbert"})
    return _at_home(found)


def _at_home(names: set[str]) -> set[str]:
    """The package's among the names; the package itself, and a name it re-exports, as the modules they live in."""
    exported: dict[str, str] = {}
    for node in ast.walk(ast.parse(text_of(PACKAGE / "__init__.py"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyxlbert."):
            exported |= {f"pyxlbert.{alias.asname or alias.name}": node.module or "" for alias in node.names}
    found = {exported.get(name, name) for name in names if name.startswith("pyxlbert.")}
    return found | set(exported.values()) if "pyxlbert" in names else found


@pytest.mark.parametrize("op", sorted(OPS))
def test_an_op_has_its_file_on_every_floor(op: str) -> None:
    wanted = [
        f"pyxlbert/ops/{op}.py",
        f"tests/ops/test_{op}.py",
        f"pyxlbert/testing/specs/{op}.py",
        f"docs/ops/{op}.md",
    ]
    if op not in VENDOR_OPS:
        floors = {
            "torch": [f"pyxlbert/reference/{op}.py"],
            "cpu": [f"pyxlbert/cpu/{op}.py", f"csrc/cpu/{op}.cpp", f"csrc/cpu/{op}.h"],
            "triton": [f"kernels/{op}.py"],
            "cuda": [f"pyxlbert/cuda/{op}.py", f"csrc/cuda/{op}.cu", f"csrc/cuda/{op}.h"],
        }
        for backend in OPS[op].own_backends:
            wanted += floors[backend]
    missing = [path for path in wanted if not (ROOT / path).exists()]
    assert not missing


def test_every_ops_file_is_an_op() -> None:
    files = {path.stem for path in (PACKAGE / "ops").glob("*.py") if not path.stem.startswith("_")}
    assert files == set(OPS)


@pytest.mark.parametrize("room", sorted(ARROWS))
def test_import_arrows(room: str) -> None:
    folder = ROOT / "kernels" if room == "kernels" else PACKAGE / room
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    rooms = {*ARROWS, "cli", "commands", "demo", "evaluate", "layer_scores", "bench", "_C"}
    wrong = []
    for path in files:
        if not path.exists():
            continue
        for name in imports(path):
            target = name.split(".")[1]
            if target in rooms and target not in ARROWS[room] | {room}:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; a package is its `__init__`."""
    found = {}
    for folder, name in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = (name, *path.relative_to(ROOT / folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported_modules(code: str, module: str, known: set[str], is_package: bool = False) -> set[str]:
    """The modules among `known` that a module's code imports anywhere: in functions and under TYPE_CHECKING too."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join((*parents, *([node.module] if node.module else ())))
            # A name of a package may be a module of it.
            found |= {name if (name := f"{base}.{alias.name}") in known else base for alias in node.names}
    return found & known - {module}


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Modules each of which imports the next and the last the first, the first again at the end; or nothing."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def test_no_modules_import_each_other() -> None:
    """Neither two directly nor several in turn, wherever in a file the import stands."""
    files = modules()
    known = {*files, "pyxlbert._C"}
    arrows = {
        name: imported_modules(text_of(path), name, known, path.name == "__init__.py") for name, path in files.items()
    }
    pairs = {(a, b) for a in arrows for b in arrows[a] if a < b and a in arrows[b]}
    assert pairs == CIRCLES
    for a, b in CIRCLES:
        # What is known is cut, so that nothing longer hides behind it.
        arrows[a].discard(b)
    assert not circle(arrows)


def test_an_import_is_seen_wherever_it_stands() -> None:
    known = {"pyxlbert", "pyxlbert.a", "pyxlbert.a.b", "pyxlbert.a.c", "pyxlbert._C"}
    for code, wanted in (
        ("import pyxlbert.a.c", {"pyxlbert.a.c"}),
        ("from pyxlbert.a import c", {"pyxlbert.a.c"}),
        ("from pyxlbert.a import Name", {"pyxlbert.a"}),
        ("from pyxlbert import _C", {"pyxlbert._C"}),
        ("from . import c", {"pyxlbert.a.c"}),
        ("from .c import Name", {"pyxlbert.a.c"}),
        ("from .. import a", {"pyxlbert.a"}),
        ("def f():\n    from pyxlbert.a.c import Name", {"pyxlbert.a.c"}),
        ("if TYPE_CHECKING:\n    from pyxlbert.a.c import Name", {"pyxlbert.a.c"}),
        ("import torch\nfrom pyxlbert.a.b import Own", set()),
    ):
        assert imported_modules(code, "pyxlbert.a.b", known) == wanted, code
    assert imported_modules("from .c import Name", "pyxlbert.a", known, is_package=True) == {"pyxlbert.a.c"}
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) in (list("abca"), list("bcab"), list("cabc"))
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_contributing_names_every_room_and_its_arrows() -> None:
    rows = re.findall(r"^\| (`.+?) \|.+\| (.+?) \|$", text_of(ROOT / "CONTRIBUTING.md"), re.MULTILINE)
    said = {room: arrows for names, arrows in rows for room in re.findall(r"`(?:pyxlbert/)?(\w+)(?:/|\.py)`", names)}
    here = {path.stem for path in PACKAGE.iterdir() if not path.stem.startswith("_") and path.suffix in ("", ".py")}
    assert here <= set(said), here - set(said)
    for room in here & set(ARROWS):
        named = set(re.findall(r"\w+", said[room]))
        if said[room] == "those above":
            continue
        wanted = {"module" if arrow == "_C" else arrow for arrow in ARROWS[room] - {room}}
        assert wanted == named & {*ARROWS, "module"}, room


def test_backends_never_import_each_other() -> None:
    """What an op names as a backend lives in its room, which imports no other: at most what holds for all backends."""
    for room in (backend.room.removeprefix("pyxlbert.") for backend in BACKENDS.values()):
        for path in (ROOT / "kernels" if room == "kernels" else PACKAGE / room).glob("*.py"):
            others = {n.split(".")[1] for n in imports(path)} - {room, "_C", "backends", "launch"}
            assert not others, path


def test_an_import_of_the_package_is_an_arrow_to_where_the_name_lives(tmp_path, monkeypatch) -> None:
    """The check above sees a way around by the package's own names."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "pyxlbert" / "reference" / "sly.py"
    path.parent.mkdir(parents=True)
    for code, room in (
        ("from pyxlbert import SentenceEncoder", "text"),
        ("from pyxlbert import attention", "ops"),
        ("import pyxlbert", "nn"),
        ("import pyxlbert as p", "backends"),
        ("from .. import ops", "ops"),
        ("from ..ops._define import Op", "ops"),
        ("from pyxlbert import _C", "_C"),
    ):
        path.write_text(code)
        assert room in {name.split(".")[1] for name in imports(path)}, code


def long_signatures(code: str, public: set[str]) -> list[str]:
    """Functions with too many parameters, lambdas too; those that are `public` are left out, as ``C.f`` in a class."""
    found = []

    def walk(node: ast.AST, owner: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                name = owner + getattr(child, "name", "<lambda>")
                given = child.args.posonlyargs + child.args.args + child.args.kwonlyargs
                count = len(given) - (given[0].arg in ("self", "cls") if given else 0)
                if count > MAX_PARAMETERS and name not in public:
                    found.append(f"{name} has {count}")
            walk(child, f"{child.name}." if isinstance(child, ast.ClassDef) else owner)

    walk(ast.parse(code), "")
    return found


def public_signatures(path: Path) -> set[str]:
    """What callers and editors read: an op's function, and a module's `__init__` and `forward`."""
    if path.parent == PACKAGE / "ops":
        return {path.stem}
    if path.parent not in (PACKAGE / "models", PACKAGE / "nn"):
        return set()
    classes = [node.name for node in ast.walk(ast.parse(text_of(path))) if isinstance(node, ast.ClassDef)]
    return {f"{name}.{method}" for name in classes for method in ("__init__", "forward")}


def test_signatures_are_short() -> None:
    many = ", ".join(f"p{i}" for i in range(MAX_PARAMETERS + 1))
    code = (
        f"def f({many}): pass\ndef g({many[4:]}): pass\nclass C:\n    def f(self, {many}): pass\nh = lambda {many}: 0"
    )
    assert long_signatures(code, set()) == ["f has 16", "C.f has 16", "<lambda> has 16"]
    assert long_signatures(code, {"f", "C.f"}) == ["<lambda> has 16"]
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for folder in (*FOLDERS, "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in long_signatures(text_of(path), public_signatures(path))
    ]
    assert not found


def test_files_are_short() -> None:
    found = [
        f"{path.relative_to(ROOT)} has {lines}"
        for folder in (*FOLDERS, "tests", "csrc")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
        and (lines := len(text_of(path).splitlines())) > MAX_LINES
    ]
    assert not found


def test_no_assert_on_user_input() -> None:
    """An assert vanishes under python -O; errors are part of the interface."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.Assert)
    ]
    assert not found


def test_no_record_of_a_call_is_sliced() -> None:
    """torch.compile of torch 2.6, the oldest that is supported, cannot trace a slice of a NamedTuple."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (PACKAGE / "ops").glob("*.py")
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice) and ast.unparse(node.value) == "call"
    ]
    assert not found


def test_no_tolerance_outside_its_file() -> None:
    pattern = re.compile(r"\b(atol|rtol)\s*=|[<>]=?\s*\d*\.?\d+e-\d")
    found = []
    for folder in ("tests", "bench", "pyxlbert"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name in ("tolerances.py", Path(__file__).name):
                continue
            for number, line in enumerate(text_of(path).splitlines(), 1):
                if pattern.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found


def unnamed_comparisons(code: str) -> list[int]:
    """Lines that compare by a library's own tolerance: no argument of theirs is a number of `tolerances`."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).rpartition(".")[2] in ("assert_close", "allclose", "isclose", "approx")
        and not any(
            isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "tolerances"
            for argument in (*node.args, *node.keywords)
            for part in ast.walk(argument)
        )
    ]


def test_no_comparison_by_a_librarys_own_tolerance() -> None:
    code = "torch.testing.assert_close(a, b)\nx == approx(1)\nnp.allclose(a, b)"
    assert sorted(unnamed_comparisons(code)) == [1, 2, 3]
    assert not unnamed_comparisons("x == pytest.approx(1, rel=tolerances.FLOAT64)")
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in ("tests", "bench", "pyxlbert")
        for path in (ROOT / folder).rglob("*.py")
        for line in unnamed_comparisons(text_of(path))
    ]
    assert not found


START = """
import sys
import pyxlbert, pyxlbert.models, pyxlbert.text
loaded = [name for name in ("triton", "transformers", "tokenizers", "matplotlib") if name in sys.modules]
print("import:", loaded)
model = pyxlbert.models.BertModel(pyxlbert.models.BertConfig(hidden_size=12, num_hidden_layers=1, intermediate_size=8))
model.save_pretrained(sys.argv[1])
pyxlbert.models.BertModel.from_pretrained(sys.argv[1])
# Each costs a second and more.
print("a model:", [name for name in ("torch._dynamo", "sympy", "transformers") if name in sys.modules])
"""


def test_what_a_command_does_not_need_is_not_loaded(tmp_path: Path) -> None:
    command = [sys.executable, "-c", START, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "docs")
    assert done.stdout.splitlines() == ["import: []", "a model: []"], done.stdout + done.stderr


def test_the_name_kernels_is_left_to_its_owner() -> None:
    """transformers imports a package called `kernels` when it finds one; it must not find ours."""
    code = (
        "import importlib.util as u, sys; s = u.find_spec('kernels');"
        f"sys.exit(s is not None and {str(ROOT / 'kernels')!r} in list(s.submodule_search_locations))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT).returncode == 0
    assert text_of(ROOT / "kernels" / "__init__.py") == ""
    assert not (ROOT / "conftest.py").exists()


def test_paths_that_the_documents_name_exist() -> None:
    missing = []
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        text = text_of(document)
        named = set(re.findall(r"`((?:csrc|kernels|pyxlbert|tests|bench|docs)/[\w./-]*\w)`", text))
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            named.add(str((document.parent / target).resolve().relative_to(ROOT)))
        missing += [f"{document.name}: {name}" for name in named if not (ROOT / name).exists()]
    assert not missing


def test_no_tracked_file_holds_an_absolute_path() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:home|root|work|tmp|Users|mnt|opt)/\w")
    found = []
    for path in tracked():
        try:
            lines = text_of(path).splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if pattern.search(line)
        ]
    assert not found


def test_kernel_files_include_no_library_code() -> None:
    found = []
    for path in sorted((ROOT / "csrc" / "cpu").iterdir()):
        for header in re.findall(r"#include <([^>]+)>", text_of(path)):
            if header not in KERNEL_HEADERS:
                found.append(f"{path.name}: <{header}>")
    assert not found


def test_one_pybind_module_and_no_torch_header() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert [p.name for p in sources if "PYBIND11_MODULE" in text_of(p)] == ["module.cpp"]
    assert not [p for p in sources if re.search(r"#include [<\"](torch|ATen|c10)/", text_of(p))]


def test_public_functions_say_shapes_and_errors() -> None:
    import pyxlbert

    for name in sorted(OPS):
        document = getattr(pyxlbert, name).__doc__ or ""
        for section in ("Args:", "Returns:", "Raises:"):
            assert section in document, (name, section)
