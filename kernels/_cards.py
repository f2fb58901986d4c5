"""Which cards there are: what the rows of the table of tiles are chosen by."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Card(NamedTuple):
    """What rows are chosen by.

    Attributes:
        architecture: compute capability times ten.
        shared: bytes of shared memory that a block can have.
    """

    architecture: int
    shared: int


# What tiles of the rows of SMALL may take, and of all others; and the oldest architecture, whose rows are for both
# where the small cards have none of their own.
SMALL_SHARED, LARGE_SHARED = 99 * 1024, 163 * 1024
SMALL, OLDEST = (86, 89, 120), 80


def holds_for(architecture: int, card: Card) -> bool:
    """Whether rows of an architecture are for such a card: it is not older, and its tiles fit."""
    small = card.shared < LARGE_SHARED
    return architecture <= card.architecture and (architecture == OLDEST or (architecture in SMALL) == small)


@functools.cache
def card(device: torch.device) -> Card:
    """The card that a device is; AMD's take the first rows."""
    if torch.version.hip is not None:
        return Card(OLDEST, LARGE_SHARED)
    properties = torch.cuda.get_device_properties(device)
    architecture = 10 * properties.major + properties.minor
    known = SMALL_SHARED if architecture in SMALL else LARGE_SHARED
    return Card(architecture, getattr(properties, "shared_memory_per_block_optin", known))
