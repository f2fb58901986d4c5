"""Whether a part of a model still is as it was found: what may be computed without calling its modules.

Modules can be changed at any time: a hook set, an adapter put in place of a layer, a parameter written to or replaced.
Everything that would change what a call computes is looked at before each use.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from pyxlbert.ops import _seen

_TRAINING, _PATCHED = operator.itemgetter("training"), operator.methodcaller("get", "forward")
_VERSION = operator.attrgetter("_version")

# Hooks on every module of the process; torch may move them, and has then no such hooks under these names.
_GLOBAL_HOOKS = [getattr(torch_module, name, {}) for name in ("_global_forward_pre_hooks", "_global_forward_hooks")]


# What a module of a layer computes with, beside its class: set on an instance, it is somebody's.
_METHODS = ("forward", "_call_impl", "project", "back", "finish")


def hooked_everywhere() -> bool:
    """Whether there are hooks on every module of the process."""
    return any(_GLOBAL_HOOKS)


# Of one module, and of every one of the process.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_EVERYWHERE = [getattr(torch_module, f"_global{name}", {}) for name in _HOOKS]


def is_patched(module: nn.Module) -> bool:
    """Whether a method that computes is set on the instance."""
    return any(name in vars(module) for name in _METHODS)


def unseen(modules: Iterable[nn.Module]) -> bool:
    """Whether nobody sees how often these modules are called, and with which rows: they have no hooks, forward or
    backward, and are of this package, with the methods of their classes.

    While a model is compiled it is not asked for: True.
    """
    if torch.compiler.is_compiling():
        return True
    if any(_EVERYWHERE):
        return False
    for module in modules:
        kind = type(module)
        if not kind.__module__.startswith("pyxlbert.") or not _is_own(kind) or is_patched(module):
            return False
        if any(getattr(module, name, None) for name in _HOOKS):
            return False
    return True


class Unusual(Exception):
    """A module that only it itself can compute."""


def _is_own(kind: type[nn.Module]) -> bool:
    """Whether the class computes what it was written to: nobody has put another `forward` in its place."""
    forward = vars(kind).get("forward")
    if forward is None or forward is vars(kind).get("fuses"):
        return True
    named = getattr(forward, "__qualname__", None), getattr(forward, "__module__", None)
    return named == (f"{kind.__qualname__}.forward", kind.__module__) and not hasattr(forward, "__wrapped__")


class Watch:
    """Modules, attributes and parameters as they were found.

    Args:
        idle: the Python module whose hooks do nothing.

    Raises:
        Unusual: by its methods, if something is not what was expected there.
    """

    def __init__(self, idle: str | None = None) -> None:
        self._idle = idle
        self._owner: Callable[[], nn.Module | None] | None = None
        self._owner_kind: type[nn.Module] = nn.Module
        self._owner_attributes: list[tuple[str, Any]] = []
        # What was found where: an attribute, a parameter or a child by its name in the dictionary that holds it.
        self._where: list[dict[str, Any]] = []
        self._name: list[str] = []
        self._what: list[Any] = []
        self._parameters: list[Tensor] = []
        self._states: list[dict[str, Any]] = []
        self._hooks: list[dict[int, Any]] = list(_GLOBAL_HOOKS)
        self._lists: list[tuple[dict[str, Any], list[str]]] = []
        self._modules: list[nn.Module] = []
        self._kinds: dict[type[nn.Module], Any] = {}
        self._contents: _seen.Contents | None = None
        self._seen: tuple[Any, ...] = ()

    def module(self, module: nn.Module) -> None:
        """A module that is in eval mode, has no hooks, and whose `forward` is that of its class."""
        state, kind = vars(module), type(module)
        if kind not in self._kinds and not _is_own(kind):
            raise Unusual
        self._kinds[kind] = vars(kind).get("forward")
        self._modules.append(module)
        self._states.append(state)
        self._watch_hooks(state)

    def owner(self, module: nn.Module, *attributes: str) -> None:
        """The same of the module that keeps this watch, which is not to keep it alive; and values set on it."""
        state, kind = vars(module), type(module)
        if not _is_own(kind):
            raise Unusual
        self._kinds[kind] = vars(kind).get("forward")
        self._owner, self._owner_kind = ref(module), kind
        self._owner_attributes = [(name, state.get(name)) for name in attributes]
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            self._hooks.append(state[name])

    def _watch_hooks(self, state: dict[str, Any]) -> None:
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            self._hooks.append(state[name])
            self._remember(state, name, state[name])

    def _owner_changed(self) -> bool:
        if self._owner is None:
            return False
        owner = self._owner()
        if owner is None or type(owner) is not self._owner_kind or owner.training:
            return True
        state = vars(owner)
        return "forward" in state or any(state.get(name) is not value for name, value in self._owner_attributes)

    def kind(self, kind: type[nn.Module]) -> None:
        """A class that is not that of a module here, and whose `forward` counts all the same."""
        self._kinds[kind] = vars(kind).get("forward")

    def child(self, parent: nn.Module, name: str, kind: type[nn.Module] | None = None) -> Any:
        """The child, which is exactly of this class."""
        children = vars(parent)["_modules"]
        child = children.get(name)
        if child is None or (kind is not None and type(child) is not kind):
            raise Unusual
        self._remember(children, name, child)
        self.module(child)
        return child

    def children(self, parent: nn.Module) -> list[str]:
        """The names of all children, to which none may be added."""
        children = vars(parent)["_modules"]
        self._lists.append((children, list(children)))
        return list(children)

    def attribute(self, module: nn.Module, name: str) -> Any:
        """A value set on the instance; None if there is none."""
        value = vars(module).get(name)
        self._remember(vars(module), name, value)
        return value

    def parameter(self, module: nn.Module, name: str) -> Tensor | None:
        """A parameter in the processor's memory; None where the module has None."""
        parameters = vars(module)["_parameters"]
        if name not in parameters:
            raise Unusual
        one = parameters[name]
        self._remember(parameters, name, one)
        if one is None:
            return None
        # A subclass of tensor or an inference tensor has no version to follow.
        if type(one) is not nn.Parameter or not one.is_cpu or one.is_inference() or one.is_neg():
            raise Unusual
        self._parameters.append(one)
        return one

    def found(self) -> None:
        """From here on nothing may change.

        Raises:
            Unusual: it has already.
        """
        if any(one.is_meta for one in self._parameters):
            raise Unusual
        self._contents = _seen.Contents(self._parameters)
        self._seen = self._look()
        if not self.unchanged() or any(name in state for state in self._states for name in _METHODS):
            raise Unusual

    def failed(self) -> None:
        """From here on `as_failed` says whether what was looked at still is what it was when something was unusual."""
        self._seen = self._state()

    def as_failed(self) -> bool:
        """Whether there is nothing new that would make another look worth its time."""
        return self._state() == self._seen and _seen.held(self._where, self._name, self._what)

    def _state(self) -> tuple[Any, ...]:
        of, states = self._modules, self._states
        hooks, training = [len(one) for one in self._hooks], [state["training"] for state in states]
        children = [list(children) for children, _ in self._lists]
        packed = [state.get("packed") is None for state in states]
        kinds = [vars(kind).get("forward") for kind in (*map(type, of), *self._kinds)]
        return (hooks, training, children, packed, kinds, list(map(len, states)), *self._look())

    def unchanged(self) -> bool:
        """Whether every module and parameter is still the one that was found, in eval mode and without hooks."""
        # Maps and not loops: this is run for every call, and a loop would take longer than a short text's layers.
        return (
            _seen.held(self._where, self._name, self._what)
            and not self._hooked()
            and not self._owner_changed()
            and not any(map(_TRAINING, self._states))
            and not any(map(_PATCHED, self._states))
            and all(list(children) == names for children, names in self._lists)
            and all(vars(kind).get("forward") is forward for kind, forward in self._kinds.items())
            and self._look() == self._seen
            # Last, for what has been looked at before is that the memory is still there.
            and (self._contents is None or self._contents.unchanged())
        )

    def _hooked(self) -> bool:
        if not any(self._hooks) or self._idle is None:
            return any(self._hooks)
        return any(getattr(hook, "__module__", None) != self._idle for hooks in self._hooks for hook in hooks.values())

    def _look(self) -> tuple[Any, ...]:
        # A write raises the version; `.data = ` another tensor changes the address, unless it is a view of what was
        # there, whose strides or size then differ.
        return (
            list(map(_VERSION, self._parameters)),
            _seen.layouts(self._parameters),
            list(map(type, self._modules)),
            list(map(len, self._states)),
        )

    def _remember(self, where: dict[str, Any], name: str, what: Any) -> None:
        self._where.append(where)
        self._name.append(name)
        self._what.append(what)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copy would watch the original's modules.
        return type(None), ()


def usual_call(x: Tensor) -> bool:
    """Whether nobody traces, compiles or differentiates what is computed with x."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return type(x) is Tensor and not (traced or torch.is_grad_enabled())
