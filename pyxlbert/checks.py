"""Checks of an op's arguments.  Every message names the op, the argument, what came and what was wanted."""

from __future__ import annotations

import numbers
import operator

import torch

LOW_PRECISION = (torch.bfloat16, torch.float16)
FLOATING = (torch.float32, *LOW_PRECISION, torch.float64)


def short(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def short_storage(x: torch.Tensor) -> str | None:
    """What is wrong with a tensor whose memory was given back or shrunk; None if all of it is there."""
    if x.numel() == 0:
        return None
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    wanted, held = (x.storage_offset() + last + 1) * x.element_size(), x.untyped_storage().nbytes()
    return None if held >= wanted else f"got {describe(x)} whose storage holds {held} bytes, wanted at least {wanted}"


def describe(value: object) -> str:
    """A tensor's dtype and shape, or the type of anything else."""
    if isinstance(value, torch.Tensor):
        return f"{short(value.dtype)} {list(value.shape)}"
    return type(value).__name__


def tensor(op: str, name: str, value: object) -> None:
    """`value` is a tensor of strided elements in memory.

    Raises:
        TypeError: it is not a tensor, or a sparse, nested or otherwise packed one.
        ValueError: it is on the meta device.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name}: got {describe(value)}, wanted a tensor")
    if value.is_nested or value.layout is not torch.strided:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.").removeprefix("_")
        raise TypeError(f"{op}: {name}: got a tensor of layout {layout}, wanted a strided one")
    if value.device.type == "meta":
        raise ValueError(f"{op}: {name}: got a tensor on meta, which has no values")


def usual_rows(x: object, *parameters: object) -> bool:
    """Whether x `[..., N]` and parameters `[N]` pass the checks below: tensor, floating, dtype, device, shape.

    One cheap look at the usual call; on False the named checks say what is wrong, if anything is.
    """
    if not isinstance(x, torch.Tensor) or x.is_meta or x.layout is not torch.strided:
        return False
    try:
        dtype, device, last = x.dtype, x.device, x.shape[-1:]
        if dtype not in FLOATING or not last:
            return False
        for value in parameters:
            if (
                not isinstance(value, torch.Tensor)
                or value.layout is not torch.strided
                or value.shape != last
                or value.device != device
                or (value.dtype is not dtype and (value.dtype is not torch.float32 or dtype not in LOW_PRECISION))
            ):
                return False
    except RuntimeError:
        return False  # a nested tensor has no shape
    return True


def rows(op: str, x: object, **parameters: object) -> None:
    """x is `[..., N]` in a floating dtype; each parameter is `[N]`, on its device, in its dtype or float32.

    Raises:
        TypeError: one is not a tensor or has another dtype.
        ValueError: a shape or a device is wrong.
    """
    for name, value in {"x": x, **parameters}.items():
        tensor(op, name, value)
    floating(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x: got a scalar, wanted at least one dimension")
    for name, value in parameters.items():
        same_device(op, name, value, "x", x)
        parameter_dtype(op, name, value, x)
        shape(op, name, value, (x.shape[-1],), "N, the last dimension of x")


def floating(op: str, name: str, value: torch.Tensor) -> None:
    """`value` has a floating dtype that ops compute in.

    Raises:
        TypeError: it has another dtype.
    """
    if value.dtype not in FLOATING:
        raise TypeError(f"{op}: {name}: got dtype {short(value.dtype)}, wanted float32, bfloat16, float16 or float64")


def dtype(op: str, name: str, value: torch.Tensor, *wanted: torch.dtype) -> None:
    """`value` has one of the wanted dtypes.

    Raises:
        TypeError: it has not.
    """
    if value.dtype not in wanted:
        names = " or ".join(dict.fromkeys(short(one) for one in wanted))
        raise TypeError(f"{op}: {name}: got dtype {short(value.dtype)}, wanted {names}")


def parameter_dtype(op: str, name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    """A weight or bias beside `like`: of its dtype, or float32 (which autocast makes), or float64 in float64."""
    if value.dtype is not like.dtype and not (value.dtype is torch.float32 and like.dtype in LOW_PRECISION):
        dtype(op, name, value, like.dtype, *((torch.float32,) if like.dtype in LOW_PRECISION else ()))


def floating_like(op: str, name: str, value: torch.Tensor, like: torch.Tensor, *, parameter: bool = False) -> None:
    """`value` meets `like` in a product: in its dtype (a `parameter` may be float32, see `parameter_dtype`).

    Under autocast, which casts both, any dtype will do; but float64 is not cast, so it stays among itself.

    Raises:
        TypeError: it has another dtype.
    """
    if value.dtype is like.dtype:
        return
    if torch.is_autocast_enabled(like.device.type):
        if torch.float64 in (value.dtype, like.dtype):
            wanted = (torch.float64,) if like.dtype is torch.float64 else (torch.float32, *LOW_PRECISION)
            dtype(op, name, value, *wanted)
    elif parameter:
        parameter_dtype(op, name, value, like)
    else:
        dtype(op, name, value, like.dtype)


def output_dtype(op: str, name: str, value: torch.dtype | None, like: torch.Tensor) -> None:
    """A dtype that is asked for, or None: one that kernels write; float64 only where the op computes in it.

    Raises:
        TypeError: it is another.
    """
    wanted = FLOATING if like.dtype is torch.float64 else (torch.float32, *LOW_PRECISION)
    if value is not None and value not in wanted:
        got = short(value) if isinstance(value, torch.dtype) else repr(value)
        raise TypeError(f"{op}: {name}: got {got}, wanted {' or '.join(short(one) for one in wanted)}")


def same_device(op: str, name: str, value: torch.Tensor, first: str, like: torch.Tensor) -> None:
    """`value` is on the device of `like`, the argument called `first`.

    Raises:
        ValueError: it is not.
    """
    if value.device != like.device:
        raise ValueError(f"{op}: {name}: got device {value.device}, wanted {first}'s, {like.device}")


def shape(op: str, name: str, value: torch.Tensor, wanted: tuple[int, ...], letters: str = "") -> None:
    """`value` has exactly the wanted shape.

    Raises:
        ValueError: it has another.
    """
    if tuple(value.shape) != wanted:
        meaning = f" ({letters})" if letters else ""
        raise ValueError(f"{op}: {name}: got shape {list(value.shape)}, wanted {list(wanted)}{meaning}")


def number(op: str, name: str, value: object, wanted: str = "a number") -> float:
    """`value` as a float: any real number, NumPy's included, but no bool.

    Raises:
        TypeError: it is none.
        ValueError: it is too large for a float.
    """
    if type(value) is float or isinstance(value, torch.SymFloat):
        return value  # type: ignore[return-value]
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{op}: {name}: got {describe(value)}, wanted {wanted}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{op}: {name}: got an integer that no float holds, wanted {wanted}") from None


def integer(op: str, name: str, value: object, wanted: str = "an int") -> int:
    """`value` as an int: any integer, NumPy's included, but no bool.

    Raises:
        TypeError: it is none.
    """
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{op}: {name}: got {describe(value)}, wanted {wanted}")
    return operator.index(value)


def flag(op: str, name: str, value: object) -> None:
    """`value` is True or False; what merely has a truth value, such as the word "no", may mean the other.

    Raises:
        TypeError: it is neither.
    """
    if value is not True and value is not False:
        raise TypeError(f"{op}: {name}: got {describe(value)}, wanted a bool")


def probability(op: str, name: str, value: object) -> float:
    """`value` as a float in [0, 1].

    Raises:
        ValueError: it is outside.
        TypeError: it is no number.
    """
    found = number(op, name, value, "a number in [0, 1]")
    if not 0.0 <= found <= 1.0:
        raise ValueError(f"{op}: {name}: got {value}, wanted a number in [0, 1]")
    return found


def non_negative(op: str, name: str, value: object) -> float:
    """`value` as a float of at least 0.

    Raises:
        ValueError: it is negative or not a number.
        TypeError: it is no number.
    """
    found = number(op, name, value, "a number of at least 0")
    if not found >= 0.0:
        raise ValueError(f"{op}: {name}: got {value}, wanted a number of at least 0")
    return found
