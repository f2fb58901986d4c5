"""The seed of an op's dropout: an int64 tensor of one element, whatever the caller gave."""

from __future__ import annotations

import torch

from pyxlbert.ops import _check


def seed_tensor(
    op: str, seed: torch.Tensor | int | None, dropout_p: float, device: torch.device
) -> torch.Tensor | None:
    """The seed as a tensor on `device`; drawn from the device's default generator when there is none.

    Args:
        op: the op's name, for messages.
        seed: int64 tensor of one element, an int in its range, or None.
        dropout_p: probability of dropping; at 0 there is nothing to seed.
        device: where the op runs.

    Returns:
        int64 `[1]`, or None when `dropout_p` is 0.

    Raises:
        TypeError: the seed is neither an int nor an int64 tensor.
        ValueError: dropout_p is outside [0, 1]; the seed has more than one element, another device, or too many bits.
    """
    _check.probability(op, "dropout_p", dropout_p)
    if isinstance(seed, torch.Tensor):
        _check.tensor(op, "seed", seed)
        _check.dtype(op, "seed", seed, torch.int64)
        if seed.numel() != 1:
            raise ValueError(f"{op}: seed: got shape {list(seed.shape)}, wanted one element")
        if seed.device != device:
            raise ValueError(f"{op}: seed: got device {seed.device}, wanted {device}")
    elif isinstance(seed, int) and not isinstance(seed, bool):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"{op}: seed: got {seed}, wanted a 64-bit signed integer")
    elif seed is not None:
        raise TypeError(f"{op}: seed: got {_check.describe(seed)}, wanted an int64 tensor, an int or None")
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
    if isinstance(seed, int):
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    return seed.reshape(1)
