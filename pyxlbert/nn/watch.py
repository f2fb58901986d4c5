"""Whether a part of a model still is as it was found: what may be computed without calling its modules.

Modules can be changed at any time: a hook set, an adapter put in place of a layer, a parameter written to or replaced.
Everything that would change what a call computes is looked at before each use.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_TRAINING, _PATCHED = operator.itemgetter("training"), operator.methodcaller("get", "forward")
_VERSION = operator.attrgetter("_version")

# Hooks on every module of the process; torch may move them, and has then no such hooks under these names.
_GLOBAL_HOOKS = [getattr(torch_module, name, {}) for name in ("_global_forward_pre_hooks", "_global_forward_hooks")]


# What a module of a layer computes with, beside its class: set on an instance, it is somebody's.
_METHODS = ("forward", "_call_impl", "project", "back", "finish")


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
        self._aliases: list[Tensor] = []
        self._seen: tuple[list[Any], ...] = ()

    def module(self, module: nn.Module) -> None:
        """A module that is in eval mode, has no hooks, and whose `forward` is that of its class."""
        state, kind = vars(module), type(module)
        if kind not in self._kinds and not _is_own(kind):
            raise Unusual
        self._kinds[kind] = vars(kind).get("forward")
        self._modules.append(module)
        self._states.append(state)
        self._hooks += (state["_forward_hooks"], state["_forward_pre_hooks"])

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
        # An alias of each is kept, so that no other values can come to lie at its address.
        self._aliases = [one.detach() for one in self._parameters]
        self._seen = self._look()
        if not self.unchanged() or any(name in state for state in self._states for name in _METHODS):
            raise Unusual

    def failed(self) -> None:
        """From here on `as_failed` says whether what was looked at still is what it was when something was unusual."""
        self._seen = self._state()

    def as_failed(self) -> bool:
        """Whether there is nothing new that would make another look worth its time."""
        return self._state() == self._seen and all(
            map(operator.is_, map(dict.get, self._where, self._name), self._what)
        )

    def _state(self) -> tuple[list[Any], ...]:
        of, states = self._modules, self._states
        hooks, training = [len(one) for one in self._hooks], [state["training"] for state in states]
        children = [list(children) for children, _ in self._lists]
        packed = [state.get("packed") is None for state in states]
        kinds = [vars(kind).get("forward") for kind in map(type, of)]
        return (hooks, training, children, packed, kinds, list(map(len, states)), *self._look())

    def unchanged(self) -> bool:
        """Whether every module and parameter is still the one that was found, in eval mode and without hooks."""
        # Maps and not loops: this is run for every call, and a loop would take longer than a short text's layers.
        return (
            all(map(operator.is_, map(dict.get, self._where, self._name), self._what))
            and not self._hooked()
            and not any(map(_TRAINING, self._states))
            and not any(map(_PATCHED, self._states))
            and all(list(children) == names for children, names in self._lists)
            and all(vars(kind).get("forward") is forward for kind, forward in self._kinds.items())
            and self._look() == self._seen
        )

    def _hooked(self) -> bool:
        if not any(self._hooks) or self._idle is None:
            return any(self._hooks)
        return any(getattr(hook, "__module__", None) != self._idle for hooks in self._hooks for hook in hooks.values())

    def _look(self) -> tuple[list[Any], ...]:
        # A write raises the version; `.data = ` another tensor changes the address, unless it is a view of what was
        # there, whose strides or size then differ.
        looks = (_VERSION, Tensor.data_ptr, Tensor.stride, Tensor.numel)
        return (
            *(list(map(look, self._parameters)) for look in looks),
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
