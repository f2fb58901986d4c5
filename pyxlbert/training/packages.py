"""Packages of the extra "train": what is missing is said before data is read or anything trained."""

from __future__ import annotations

import importlib.util

# What pip calls a package, where it is not what is imported.
_INSTALLED_AS = {"sklearn": "scikit-learn"}


def require(what: str, *packages: str) -> None:
    """That packages can be imported.

    Args:
        what: needs them, for the message.
        packages: their names as they are imported.

    Raises:
        ImportError: one is not installed.
    """
    missing = [_INSTALLED_AS.get(name, name) for name in packages if not _is_there(name)]
    if missing:
        raise ImportError(f"{what}: needs {' and '.join(missing)}: pip install 'pyxlbert[train]'")


def _is_there(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # the program itself has put something in its place
        return True
    # Any folder of that name on the path has a specification, but no origin.
    return spec is not None and spec.origin is not None
