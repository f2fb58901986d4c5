"""The class of an instance, replaced and given back; and who watches a module.

The new class is a subclass of the old one under its name, so `isinstance`, `repr` and what transformers looks up by a
class's name stay as they are, and no other instance is touched.
"""

from __future__ import annotations

import sys
from functools import cache, wraps
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from pyxlbert.nn import has_values
from pyxlbert.nn.packing import Packable

_STATE, _SETTINGS = "_pyxlbert", "_pyxlbert_settings"

# Hooks on every module of the process; torch may move them, and has then no such hooks under these names.
_GLOBAL_HOOKS = [getattr(torch_module, name, {}) for name in ("_global_forward_pre_hooks", "_global_forward_hooks")]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Whose hooks around a module see no values: that of gathered parameters.
_BLIND = "torch.distributed."

# Where transformers records hidden states and attentions, by hooks that it leaves in place.
RECORDER = "transformers.utils.output_capturing"


class Unlike(Exception):
    """A module that is not what its table says, with the reason."""


class Settings(NamedTuple):
    """What a module's own code may read of the module, beside its parameters, buffers and children.

    Attributes:
        values: attributes by name: numbers, words, functions.
        methods: classes with the names of their methods, none of which the instance had, and these.
    """

    values: tuple[tuple[str, Any], ...]
    methods: tuple[tuple[type, str, Any], ...]


# Of torch and of this package, and what every replacement reads at each call.
_NO_SETTINGS = frozenset(vars(nn.Module())) | {
    *("packed", "together", "gradient_checkpointing", "p", "inplace", "eps"),
    # Of a whole model, none of which it computes with.
    *("name_or_path", "loss_type", "kernel_config", "warnings_issued"),
}
_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_VALUES = (bool, int, float, str, tuple, type(None), *_FUNCTIONS)
# Whose classes have methods that call each other.
_AUTHORS = ("transformers.models.", "transformers.activations")


def settings_of(module: nn.Module) -> Settings:
    """The settings that a module has now."""
    state = {name: _function(value) for name, value in module.__dict__.items()}
    values = [
        (name, value)
        for name, value in state.items()
        if name not in _NO_SETTINGS and not name.startswith("_") and isinstance(value, _VALUES)
    ]
    classes = (kind for kind in type(module).__mro__ if kind.__module__.startswith(_AUTHORS))
    methods = [
        (kind, name, getattr(kind, name))
        for kind in classes
        for name, value in vars(kind).items()
        if isinstance(value, (FunctionType, staticmethod)) and not name.startswith("__") and name not in state
    ]
    return Settings(tuple(values), tuple(methods))


def is_as_set(module: nn.Module, known: Settings) -> bool:
    """Whether a module's settings are what they were: no value and no method another, nor one put on the instance."""
    state = module.__dict__
    for name, value in known.values:
        now = _function(state.get(name, known))
        if type(now) is not type(value) or now != value:
            return False
    return all(name not in state and getattr(kind, name) is method for kind, name, method in known.methods)


def _function(value: Any) -> Any:
    """The function of a method, whose module is another in a copy."""
    return value.__func__ if isinstance(value, MethodType) else value


class Replaced(nn.Module):
    """A module whose class was replaced; its subclasses come before the old class.

    Attributes:
        original, ours: the old class, and the one before it.
    """

    pyxlbert_original: ClassVar[type[nn.Module]]
    pyxlbert_ours: ClassVar[type[Replaced]]
    keeps_signature: ClassVar[bool] = False
    # Whether it computes with attributes of the module as they were when its class was replaced.
    remembers: ClassVar[bool] = False
    _pyxlbert: Any
    _pyxlbert_settings: Settings

    def is_as_set(self) -> bool:
        """Whether the attributes that it computes with still are what they were."""
        return is_as_set(self, self._pyxlbert_settings)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class has no name of its own by which it could be found.
        return _empty, (self.pyxlbert_original, self.pyxlbert_ours), self.__getstate__()


@cache
def replacement(original: type[nn.Module], ours: type[Replaced]) -> type[Replaced]:
    """The class that puts `ours` before `original`."""
    names: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "pyxlbert_original": original,
        "pyxlbert_ours": ours,
    }
    if getattr(ours, "fuses", None) is not None:
        # It is as linear as ours, and says so itself.
        names["forward"] = names["fuses"] = ours.fuses
    if ours.keeps_signature:

        @wraps(original.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return ours.forward(self, *args, **kwargs)

        names["forward"] = forward
    return type(original.__name__, (ours, original), names)


def _empty(original: type[nn.Module], ours: type[Replaced]) -> nn.Module:
    made = replacement(original, ours)
    return made.__new__(made)


def swap(module: nn.Module, ours: type[Replaced], state: Any = None) -> None:
    """Makes `module` an instance of `ours` before its own class, with what `ours` needs to know of it."""
    if ours.remembers:
        module.__dict__[_SETTINGS] = settings_of(module)
    module.__class__ = replacement(type(module), ours)
    if state is not None:
        module.__dict__[_STATE] = state


def is_as_made(module: Replaced) -> bool:
    """Whether nobody has replaced the class of a module once more."""
    return type(module) is replacement(module.pyxlbert_original, module.pyxlbert_ours)


def give_back(module: Replaced) -> None:
    """Makes `module` an instance of its old class again."""
    if isinstance(module, Packable):
        module.drop_packed()
    for name in (_STATE, _SETTINGS, "packed", "together"):
        module.__dict__.pop(name, None)
    module.__class__ = module.pyxlbert_original


def shares_weights(module: nn.Module) -> nn.Module:
    """A copy in eval mode and without hooks, of the same parameters and buffers."""
    return _shared(module, {})


def _shared(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in done:
        return done[module]
    done[module] = copy = type(module).__new__(type(module))
    copy.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers"):
        copy.__dict__[name] = dict(module.__dict__[name])
    for name in _HOOKS:
        copy.__dict__[name] = type(module.__dict__[name])()
    children = module.__dict__["_modules"].items()
    copy.__dict__["_modules"] = {name: child if child is None else _shared(child, done) for name, child in children}
    copy.training = False
    return copy


def recorded() -> frozenset[str] | None:
    """What transformers records of this call, by its names; None where that cannot be told."""
    if torch.compiler.is_compiling():
        return None
    recorder = sys.modules.get(RECORDER)
    collector = getattr(recorder, "_active_collector", None)
    return None if collector is None else frozenset(collector.get() or ())


def watched(module: nn.Module, recording: frozenset[str] | None = frozenset(), blind: bool = True) -> bool:
    """Whether somebody has set a hook on a module, or a `forward` of his own.

    Args:
        module: of which only its own hooks count.
        recording: what `recorded` says: hooks of transformers that record nothing in this call are nobody's; None
            counts them too.
        blind: whether hooks count that do not look at values.
    """
    state = module.__dict__
    if "forward" in state:
        return True
    for name in _HOOKS:
        for hook in state[name].values() if state[name] else ():
            owner = getattr(hook, "__module__", None) or ""
            idle = owner == RECORDER and recording is not None and not recording
            if not (idle or (not blind and owner.startswith(_BLIND))):
                return True
    return False


def watched_anywhere(module: nn.Module, recording: frozenset[str] | None = frozenset(), inside: bool = False) -> bool:
    """Whether somebody looks at what goes through a module (`inside`: not it), one inside it, or all there are."""
    if any(_GLOBAL_HOOKS):
        return True
    waiting = [child for child in module._modules.values() if child is not None] if inside else [module]
    while waiting:
        one = waiting.pop()
        if watched(one, recording, blind=False):
            return True
        waiting.extend(child for child in one._modules.values() if child is not None)
    return False


def can_look(tensor: Tensor) -> bool:
    """Whether a tensor's values may be branched on: not where a graph is made of what runs."""
    return has_values(tensor) and not torch.jit.is_tracing()


def at(module: nn.Module, path: tuple[str, ...]) -> Any:
    """The child of a child, or None."""
    for name in path:
        module = module._modules.get(name)  # type: ignore[assignment]
        if module is None:
            return None
    return module
