"""How alike two vectors are, by the names that sentence-transformers gives the functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


def similarity(a: object, b: object, name: str = "cosine") -> torch.Tensor:
    """Every vector of `a` with every vector of `b`.

    Args:
        a: [N, E] or [E], NumPy or a tensor.
        b: [M, E] or [E].
        name: "cosine", "dot", "euclidean" or "manhattan"; the last two are distances with their sign turned, so that
            more is more alike.

    Returns:
        float32 [N, M].

    Raises:
        ValueError: `name` is another word, or the vectors' lengths differ.
    """
    x, y = _vectors("a", a), _vectors("b", b)
    _check(name, x.shape[-1] == y.shape[-1], x, y)
    if name in ("cosine", "dot"):
        x, y = (F.normalize(x, dim=-1), F.normalize(y, dim=-1)) if name == "cosine" else (x, y)
        return x @ y.T
    return -torch.cdist(x, y, p=1.0 if name == "manhattan" else 2.0)


def similarity_pairwise(a: object, b: object, name: str = "cosine") -> torch.Tensor:
    """Vector i of `a` with vector i of `b`.

    Args:
        a, b: [N, E] or [E], NumPy or tensors.
        name: as in `similarity`.

    Returns:
        float32 [N].

    Raises:
        ValueError: `name` is another word, or the shapes differ.
    """
    x, y = _vectors("a", a), _vectors("b", b)
    _check(name, x.shape == y.shape, x, y)
    if name == "cosine":
        return (F.normalize(x, dim=-1) * F.normalize(y, dim=-1)).sum(-1)
    if name == "dot":
        return (x * y).sum(-1)
    return -(x - y).abs().sum(-1) if name == "manhattan" else -torch.linalg.vector_norm(x - y, dim=-1)


def _vectors(argument: str, value: object) -> torch.Tensor:
    try:
        x = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{argument}: got {type(value).__name__}, wanted vectors as NumPy or a tensor") from None
    x = x.float()
    x = x[None] if x.dim() == 1 else x
    if x.dim() != 2:
        raise ValueError(f"{argument}: got shape {tuple(x.shape)}, wanted [N, E] or [E]")
    return x


def _check(name: str, fits: bool, x: torch.Tensor, y: torch.Tensor) -> None:
    if name not in SIMILARITIES:
        raise ValueError(f"similarity: got {name!r}, wanted one of {', '.join(SIMILARITIES)}")
    if not fits:
        raise ValueError(f"b: got shape {tuple(y.shape)}, which does not go with a's {tuple(x.shape)}")
