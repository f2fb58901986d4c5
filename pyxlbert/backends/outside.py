"""Backends of other packages, which an installation registers under the entry points ``pyxlbert.backends``.

An entry point's name is the backend's, its value the package that is the backend's room: see docs/backends.md. Names
are read from the metadata of what is installed when this package is imported, and the rooms when one is first asked
for: what is wrong with one is its reason to be unavailable, and nobody else's trouble.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

GROUP = "pyxlbert.backends"
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Registered(NamedTuple):
    """An entry point of the group.

    Attributes:
        name: the backend's.
        room: the dotted name of its package.
        owner: the distribution that registers it.
    """

    name: str
    room: str
    owner: str


class Room:
    """A backend of another package; its modules are imported when it is first asked for one.

    Args:
        registered: its entry points: more than one where several distributions claim the name.
    """

    def __init__(self, *registered: Registered) -> None:
        self.name, self.room, self.owner = registered[0]
        self._module: ModuleType | None = None
        self._problem: str | None = None
        if len(registered) > 1:
            owners = " and ".join(one.owner for one in registered)
            self._problem = f"{owners} both register a backend {self.name!r}, wanted one of them installed"

    def _where(self) -> str:
        return f"{self.room} of {self.owner}"

    def _enter(self) -> ModuleType | None:
        if self._module is None and self._problem is None:
            if not re.fullmatch(r"[\w.]+", self.room):
                self._problem = f"{self.owner} registers {self.room!r}, wanted the dotted name of a package"
                return None
            try:
                module = importlib.import_module(self.room)
            except (Exception, SystemExit) as error:
                self._problem = f"{self._where()} cannot be imported: {_said(error)}"
                return None
            if not hasattr(module, "__path__"):
                self._problem = f"{self._where()} is a module, wanted a package with a module for each op"
                return None
            self._module = module
        return self._module

    def missing(self) -> str | None:
        """Why it cannot run on this machine at all, or None: its import, then its own ``missing()``."""
        return self._problem if self._enter() is None else self._ask("missing")

    def refusal(self, device: int) -> str | None:
        """Why it cannot run on the CUDA device of this index, or None: its own ``refusal(device)``."""
        return self._ask("refusal", device)

    def _ask(self, function: str, *arguments: int) -> str | None:
        asked: Callable[..., object] | None = getattr(self._module, function, None)
        if asked is None:
            return None
        try:
            reason = asked(*arguments)
        except Exception as error:
            return f"{function}() of {self._where()} failed: {_said(error)}"
        if reason is None or (isinstance(reason, str) and reason):
            return reason
        return f"{function}() of {self._where()} returned {reason!r}, wanted None or a sentence"

    def device(self) -> str:
        """What its tensors are on: "cuda" where the room's ``DEVICE`` says so, else "cpu"."""
        return "cuda" if getattr(self._enter(), "DEVICE", "cpu") == "cuda" else "cpu"

    def has(self, op: str) -> bool:
        """Whether it holds a module of this name."""
        return self._enter() is not None and importlib.util.find_spec(f"{self.room}.{op}") is not None

    def module(self, op: str) -> ModuleType | str:
        """The module of an op that it has, or what is wrong with it."""
        name = f"{self.room}.{op}"
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:
            return f"{name} of {self.owner} cannot be imported: {_said(error)}"
        lacks = [one for one in (f"{op}_fwd", "supports") if not callable(getattr(module, one, None))]
        return f"{name} of {self.owner} has no {' and no '.join(lacks)}" if lacks else module


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def read(own: tuple[str, ...]) -> tuple[dict[str, Room], list[str]]:
    """The rooms that are registered, by name, and a sentence for each entry point that is not followed.

    Args:
        own: names that are taken.
    """
    try:
        points = importlib.metadata.entry_points(group=GROUP)
    except Exception as error:  # the metadata of any package may be broken
        return {}, [f"the entry points of the installed packages cannot be read: {_said(error)}"]
    found: dict[str, list[Registered]] = {}
    refused = []
    for point in points:
        owner = "a package" if point.dist is None else point.dist.name
        if point.name in own:
            refused.append(f"{owner} registers a backend {point.name!r}, wanted a name that is not {', '.join(own)}")
        elif not _NAME.fullmatch(point.name):
            wanted = "wanted small letters, digits and underscores, a letter first"
            refused.append(f"{owner} registers a backend {point.name!r}, {wanted}")
        else:
            found.setdefault(point.name, []).append(Registered(point.name, point.value, owner))
    return {name: Room(*found[name]) for name in sorted(found)}, refused


def warn(refused: list[str]) -> None:
    """Says what `read` has not followed, in a warning each, which stops no import."""
    for sentence in refused:
        try:
            warnings.warn(f"pyxlbert: {sentence}; it is left out", RuntimeWarning, stacklevel=2)
        except RuntimeWarning:  # where warnings are errors
            continue
