"""Which backend a call takes: the named one, or the first in a written or measured order that supports the inputs."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from pyxlbert import checks
from pyxlbert.backends import measured, switches
from pyxlbert.backends.presence import BACKENDS, NAMES, refusal_on, unavailable

# The first backend of a row that supports the inputs is taken; on a GPU the faster of the first two comes first: see
# measured.py.
PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}

# Every op by its name.
OPS: dict[str, Choice] = {}


class Choice:
    """The backends of one op, and which of them a call takes.

    Args:
        name: the op's name on every floor; backend `b` implements it in the module of this name in b's room, which
            holds `<name>_fwd`, `<name>_bwd`, `supports(*tensors) -> None | sentence`, and where it has something to
            say of how it runs inputs that it takes, `note(*tensors) -> None | sentence`.
        backends: the names of the backends that have it.
        ids_first: the first argument holds ids, which do not decide the backend.
    """

    def __init__(self, name: str, backends: tuple[str, ...], *, ids_first: bool = False) -> None:
        self.name = name
        self.backends = backends
        self.ids_first = ids_first
        self._modules: dict[str, ModuleType] = {}
        for backend in ("torch", "cpu"):
            if backend in backends and unavailable(backend) is None:
                self.module(backend)
        self._native = self._modules["cpu"].supports if "cpu" in self._modules else None
        OPS[name] = self

    def resolve(self, backend: str | None, *tensors: torch.Tensor | None) -> str:
        """The backend to run: the named one, the default of `use_backend`, or the first that supports the tensors.

        Args:
            backend: what the caller named, or None.
            tensors: the ones that decide, checked before to be on one device; a parameter that must have
                x's dtype or float32 need not be here.

        Raises:
            ValueError: the name is unknown.
            RuntimeError: the named backend is not here, or does not take these inputs.
        """
        if backend is not None and not (isinstance(backend, str) and backend in NAMES):
            raise ValueError(f"{self.name}: backend: got {backend!r}, wanted one of {', '.join(NAMES)}")
        asked = backend if backend is not None else switches.default_backend()
        if asked is None:
            # The usual call first, without a look at the tables.
            native = self._native
            if native is not None and tensors[0].is_cpu and native(*tensors) is None:  # type: ignore[union-attr]
                return "cpu"
            for name in self._order(tensors[0]):
                if self.refusal(name, *tensors) is None:
                    return name
            raise RuntimeError(f"{self.name}: no backend takes these inputs:\n{self.explain(*tensors)}")
        reason = self.refusal(asked, *tensors)
        if reason is not None:
            raise RuntimeError(f"{self.name}: backend {asked!r} is unavailable: {reason}")
        return asked

    def refusal(self, backend: str, *tensors: torch.Tensor | None) -> str | None:
        """Why `backend` cannot run this op on these tensors, or None."""
        module = self._modules.get(backend)
        if module is None:
            reason = BACKENDS[backend].missing()
            if reason is not None:
                return reason
            if backend not in self.backends:
                return f"{self.name} has no {backend} kernel"
            module = self.module(backend)
        device = tensors[0].device  # type: ignore[union-attr]
        reason = refusal_on(backend, device.index) if device.type == "cuda" else None
        return reason or module.supports(*tensors)

    def explain(self, *tensors: torch.Tensor | None) -> str:
        """One line per backend: taken, possible, or why not."""
        device = tensors[0].device.type  # type: ignore[union-attr]
        order = self._order(tensors[0])
        asked = switches.default_backend()
        lines, taken = [f"{self.name} on {device}:"], False
        for name in (*order, *(name for name in NAMES if name not in order)):
            reason = self.refusal(name, *tensors)
            if name == asked:
                how = f"taken, as use_backend names it{self._note(name, *tensors)}" if reason is None else reason
                lines.append(f"  {name}: {how}")
                if reason is not None:
                    lines[-1] += "; use_backend names it, so a call without backend= raises this"
                continue
            if reason is None and name not in order:
                reason = f"not for {device} tensors"
            if reason is None and not taken and asked is None:
                why = f", {measured.reason(self.name, tensors[0])}" if name in order[:2] and device == "cuda" else ""
                lines.append(f"  {name}: taken{why}{self._note(name, *tensors)}")
                taken = True
            else:
                lines.append(f"  {name}: {reason or 'possible'}")
        return "\n".join(lines)

    def _note(self, backend: str, *tensors: torch.Tensor | None) -> str:
        """What a module says of how it will run these inputs, if that is not as one would think."""
        note = getattr(self.module(backend), "note", None)
        text = None if note is None else note(*tensors)
        return "" if text is None else f"; {text}"

    def _order(self, tensor: torch.Tensor | None) -> tuple[str, ...]:
        """The backends for a call that this tensor decides; the first that supports it is taken."""
        device = tensor.device.type  # type: ignore[union-attr]
        if device == "cuda" and "cuda" in self.backends:
            return (*measured.order(self.name, tensor), "torch")
        return PREFERENCE.get(device, ("torch",))

    def module(self, backend: str) -> ModuleType:
        """The op's module in the room of `backend`, which is here."""
        if backend not in self._modules:
            self._modules[backend] = importlib.import_module(f"{BACKENDS[backend].room}.{self.name}")
        return self._modules[backend]


def explain(op: str, *tensors: torch.Tensor) -> str:
    """The backend that op `op` takes for these tensors, and a reason for each one it does not take; also printed.

    Args:
        op: the name of an op, such as "layer_norm".
        tensors: the op's first tensors, as in a call; at least one of a floating dtype.

    Raises:
        ValueError: there is no such op, no tensor, or they are on several devices or on meta.
        TypeError: one is no tensor, or has a dtype that the op does not take.
    """
    if op not in OPS:
        raise ValueError(f"explain: op: got {op!r}, wanted one of {', '.join(sorted(OPS))}")
    for place, one in enumerate(tensors):
        checks.tensor("explain", f"tensor {place} of {op}", one)
    if OPS[op].ids_first and tensors and not tensors[0].is_floating_point():
        tensors = tensors[1:]
    if not tensors:
        raise ValueError(f"explain: tensors: got none of a floating dtype, wanted the first ones of a call of {op}")
    for place, one in enumerate(tensors):
        checks.floating("explain", f"tensor {place} of {op}", one)
        checks.same_device("explain", f"tensor {place} of {op}", one, "the first", tensors[0])
    text = OPS[op].explain(*tensors)
    print(text)
    return text
