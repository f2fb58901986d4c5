"""Files of a model directory: reading with errors that name the file, writing whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WANTED = "wanted a local directory with a model's files"


def model_directory(directory: str | Path) -> Path:
    """The directory as a Path.

    Raises:
        FileNotFoundError: nothing is there.
        NotADirectoryError: it is a file.
    """
    path = Path(directory)
    if not path.exists():
        raise FileNotFoundError(f"directory: {str(path)!r} does not exist; {_WANTED}")
    if not path.is_dir():
        raise NotADirectoryError(f"directory: {str(path)!r} is not a directory; {_WANTED}")
    return path


def require_file(directory: str | Path, name: str) -> Path:
    """The path of a file that must be there.

    Raises:
        FileNotFoundError: the directory or the file is missing.
        NotADirectoryError: the directory is a file.
    """
    path = model_directory(directory) / name
    if not path.is_file():
        raise FileNotFoundError(f"{name} is missing in {directory}")
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to: it becomes `path` when the block ends, and is removed when the block raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file whose outermost value is a `kind`.

    Raises:
        ValueError: the file is not JSON, or holds something else than a `kind`.
    """
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; wanted a {kind.__name__}")
    return content


def read_optional_json(path: Path) -> dict[str, Any]:
    """Like `read_json`, and an empty dict when the file is not there."""
    return read_json(path) if path.is_file() else {}


def setting(path: Path, content: dict[str, Any], key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
    """A field of a settings file, or `default` where it is missing or null.

    Raises:
        ValueError: it is of another type; true and false are no numbers.
    """
    value = content.get(key)
    if value is None:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(_JSON_NAMES[one] for one in kinds)
        raise ValueError(f"{path}: {key} is {value!r}; wanted {wanted}")
    return value


_JSON_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
_JSON_NAMES |= {list: "a list", dict: "an object"}
