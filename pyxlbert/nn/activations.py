"""The activations of the feed-forward layers, by the names that configurations use."""

from __future__ import annotations

#: Configuration name to what is computed. The GELU names differ only in how the formula was once typed in.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def activation_kind(name: str, argument: str = "activation") -> str:
    """Which function an activation's name stands for.

    Args:
        name: a name that Hugging Face configurations use, such as ``"gelu_new"``.
        argument: what the error calls it.

    Returns:
        One of ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"`` and ``"silu"``.

    Raises:
        ValueError: the name is not known.
    """
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{argument}: got {name!r}, wanted one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]
