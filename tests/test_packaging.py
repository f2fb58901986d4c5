"""What is shipped: every file of the packages and, in the source distribution, all that the build needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
FOLDERS = {"pyxlbert": "pyxlbert", "kernels": "pyxlbert.kernels", "bench": "pyxlbert.bench"}


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so there is no list of tracked files")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def test_every_package_is_listed() -> None:
    found = set()
    for folder, name in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            inner = file.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *inner)))
    assert sorted(found) == sorted(SETTINGS["packages"])


def test_data_of_the_packages_is_listed() -> None:
    # What is measured and drawn stays in the repository.
    folders = {folder: name for folder, name in FOLDERS.items() if folder != "bench"}
    data = [name for name in tracked() if name.split("/")[0] in folders and not name.endswith(".py")]
    data = [name.replace(folder := name.split("/")[0], folders[folder].replace(".", "/"), 1) for name in data]
    listed = [
        f"{package.replace('.', '/')}/{name}" for package, names in SETTINGS["package-data"].items() for name in names
    ]
    assert sorted(data) == sorted(listed)


def test_the_source_distribution_holds_all_that_the_build_needs(tmp_path: Path) -> None:
    """It is made of a copy of the tracked files, so that nothing else can help."""
    files = tracked()
    for name in files:
        target = tmp_path / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "tree", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    (tree,) = (path for path in tmp_path.glob("pyxlbert-*") if path.is_dir())
    # The settings of git and of the checks before a change are for developers.
    wanted = [name for name in files if not name.startswith(".") or name == ".clang-format"]
    assert not [name for name in wanted if not (tree / name).exists()]
    # setup.py runs there: it writes the ninja file, and ninja finds each source that the file names.
    code = (
        "import runpy, unittest.mock as m, pathlib, subprocess\n"
        "with m.patch('setuptools.setup'): found = runpy.run_path('setup.py')\n"
        "pathlib.Path('build.ninja').write_text(found['ninja_file'](pathlib.Path('out.so').resolve()))\n"
    )
    environment = os.environ | {"PYXLBERT_CUDA": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, env=environment)
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    dry = subprocess.run([ninja, "-n"], cwd=tree, capture_output=True, text=True)
    assert dry.returncode == 0 and "link" in dry.stdout, dry.stdout[-500:] + dry.stderr
