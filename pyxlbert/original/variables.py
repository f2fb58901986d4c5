"""What a variable of an original checkpoint is: its name and shape there, and its parameters here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

Shape = tuple[int, ...]


class Parameter(NamedTuple):
    """A parameter of ours and how it is made of a variable."""

    name: str
    of: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Variable:
    """One variable.

    Attributes:
        name: in the checkpoint.
        shape: as the configuration says.
        parameters: ours, one or several.
        part: what it belongs to, such as "encoder" or a head's name: a checkpoint holds a part whole or not at all.
        optional: whether it may be missing though the rest of its part is there.
    """

    name: str
    shape: Shape
    parameters: tuple[Parameter, ...]
    part: str
    optional: bool = False


def as_it_is(x: Tensor) -> Tensor:
    return x


def transposed(x: Tensor) -> Tensor:
    """A kernel ``[in, out]`` of TensorFlow as a weight ``[out, in]``."""
    return x.t()


def one(name: str, shape: Shape, parameter: str, part: str, of: Callable[[Tensor], Tensor] = as_it_is) -> Variable:
    """A variable that is one parameter."""
    return Variable(name, shape, (Parameter(parameter, of),), part)


def dense(name: str, inputs: int, outputs: int, parameter: str, part: str, bias: bool = True) -> list[Variable]:
    """A linear layer's kernel and bias."""
    found = [one(f"{name}/kernel", (inputs, outputs), f"{parameter}.weight", part, transposed)]
    return found + [one(f"{name}/bias", (outputs,), f"{parameter}.bias", part)] * bias


def norm(name: str, width: int, parameter: str, part: str) -> list[Variable]:
    """A LayerNorm's gamma and beta."""
    return [
        one(f"{name}/LayerNorm/gamma", (width,), f"{parameter}.weight", part),
        one(f"{name}/LayerNorm/beta", (width,), f"{parameter}.bias", part),
    ]


class Architecture(Protocol):
    """A module that knows an original code's checkpoints: `bert` or `xlnet`."""

    #: Its `model_type`, its configuration file, and the files of its vocabulary.
    MODEL_TYPE: str
    CONFIG_FILE: str
    VOCABULARY: str
    #: Fields without which a configuration is refused: the original's defaults are not ours, or it has none.
    FIELDS: tuple[str, ...]
    #: The configuration's name for the activation.
    ACTIVATION: str

    @staticmethod
    def task_of(names: Iterable[str]) -> str:
        """The task that a checkpoint's variables are for."""

    @staticmethod
    def variables(config: Mapping, task: str, found: Mapping[str, Shape]) -> list[Variable]:
        """Every variable of a task's model, in the order of the original code.

        Args:
            config: the original configuration.
            task: one of `TASKS`.
            found: the checkpoint's variables, which say how many classes there are and what a task's scope is called.
        """

    @staticmethod
    def settings(config: Mapping, task: str, found: Mapping[str, Shape]) -> dict:
        """Fields of ``config.json``."""

    @staticmethod
    def fresh(config: Mapping, task: str) -> dict[str, Tensor]:
        """What is written where the checkpoint lacks it, though no head is without it."""
