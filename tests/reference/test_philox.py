"""Philox 4x32-10 against its authors' known answers, and how masks are cut from it."""

from __future__ import annotations

import pytest
import torch

from pyxlbert.reference.philox import Tag, keep_rows, keep_scores, philox4x32

pytestmark = pytest.mark.quick

KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(low: int, high: int) -> int:
    value = low | high << 32
    return value - (1 << 64) if value >> 63 else value


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    got = philox4x32(tuple(torch.tensor(c) for c in counter), torch.tensor([signed(*key)]))
    assert tuple(int(word) for word in got) == words


def test_scores_count_keys_rows_and_heads():
    seed = torch.tensor([7])
    keep = keep_scores(seed, 0.5, 2, 3, 4, 9)
    words = philox4x32(tuple(torch.tensor(c) for c in (8 // 4, 3, 1 * 3 + 2, int(Tag.ATTENTION))), seed)
    assert keep.shape == (2, 3, 4, 9)
    assert bool(keep[1, 2, 3, 8]) == (int(words[8 % 4]) >= 2**31)
    # A longer row has the same start: the mask of a packed sequence is that of the padded one.
    assert torch.equal(keep, keep_scores(seed, 0.5, 2, 3, 6, 14)[:, :, :4, :9])


def test_rows_differ_by_tag_and_seed():
    masks = [keep_rows(torch.tensor([seed]), 0.5, 8, 64, tag) for seed in (1, 2) for tag in Tag]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(masks)


@pytest.mark.parametrize(("p", "low", "high"), [(0.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.1, 0.88, 0.92), (0.9, 0.08, 0.12)])
def test_share_kept(p, low, high):
    share = keep_rows(torch.tensor([3]), p, 100, 101, Tag.ATTENTION).double().mean().item()
    assert low <= share <= high
