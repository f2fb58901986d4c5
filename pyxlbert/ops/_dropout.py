"""The seed of an op's dropout: an int64 tensor of one element, whatever the caller gave."""

from __future__ import annotations

import torch

from pyxlbert import checks


def dropout_of(
    op: str, dropout_p: float, seed: torch.Tensor | int | None, device: torch.device
) -> tuple[float, torch.Tensor | None]:
    """The probability as a float and the seed as a tensor on `device`; drawn from its default generator if None.

    Args:
        op: the op's name, for messages.
        dropout_p: probability of dropping; at 0 there is nothing to seed.
        seed: int64 tensor of one element, an int in its range, or None.
        device: where the op runs.

    Returns:
        dropout_p, and int64 `[1]`, or None when dropout_p is 0.

    Raises:
        TypeError: the seed is neither an int nor an int64 tensor, or dropout_p no number.
        ValueError: dropout_p is outside [0, 1]; the seed has more than one element, another device, or too many bits.
    """
    dropout_p = checks.probability(op, "dropout_p", dropout_p)
    if isinstance(seed, torch.Tensor):
        checks.tensor(op, "seed", seed)
        checks.dtype(op, "seed", seed, torch.int64)
        if seed.numel() != 1:
            raise ValueError(f"{op}: seed: got shape {list(seed.shape)}, wanted one element")
        if seed.device != device:
            raise ValueError(f"{op}: seed: got device {seed.device}, wanted {device}")
    elif seed is not None:
        seed = checks.integer(op, "seed", seed, "an int64 tensor, an int or None")
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"{op}: seed: got {seed}, wanted a 64-bit signed integer")
    if dropout_p == 0.0:
        return dropout_p, None
    if seed is None:
        return dropout_p, torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
    if isinstance(seed, torch.Tensor):
        return dropout_p, seed.reshape(1)
    return dropout_p, torch.full((1,), seed, dtype=torch.int64, device=device)
