"""Blocks of keys or queries that nobody may see are no work: multiplications of GPU kernels are counted.

Where there is a GPU nobody counts; the emulation of CUDA and Triton's interpreter do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from pyxlbert import attention, backends, relative_attention, two_stream_attention

LENGTH, HEAD_SIZE = 384, 64
# A block of keys or queries is no longer than this on either backend.
BLOCK = 128


class Work(NamedTuple):
    """Multiplications and additions of forward and backward, in the counter's own unit."""

    forward: int
    backward: int


@pytest.fixture(params=["cuda", "triton"])
def counter(request, monkeypatch) -> Iterator[tuple[str, Callable[[], int]]]:
    """A backend, and what it has multiplied so far."""
    backend = request.param
    if torch.cuda.is_available() or backends.unavailable(backend) is not None:
        pytest.skip(f"{backend} is neither emulated nor interpreted here: {backends.unavailable(backend)}")
    if backend == "cuda":
        yield backend, backends.cuda_kernels.matrix_products
        return
    assert os.environ["TRITON_INTERPRET"] == "1"
    from triton.runtime.interpreter import InterpreterBuilder

    total, made = 0, InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        nonlocal total
        total += a.data.size * b.data.shape[-1]
        return made(self, a, b, *rest)

    # What the first call of a process tries is none of an op's work.
    attention(*tensors(16, 16, 16), backend=backend)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    yield backend, lambda: total


def tensors(*lengths: int, batch: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, length, 1, HEAD_SIZE, generator=generator).bfloat16().requires_grad_() for length in lengths
    ]


def work_of(counter: tuple[str, Callable[[], int]], op: Callable, *inputs: torch.Tensor, **options: Any) -> Work:
    backend, now = counter
    start = now()
    outputs = op(*inputs, backend=backend, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    middle = now()
    torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs])
    return Work(middle - start, now() - middle)


def assert_share(found: Work, whole: Work, least: float, most: float) -> None:
    """Both passes do such a share of the whole; no less, or something that is seen was left out."""
    for part, all_of_it in zip(found, whole, strict=True):
        assert least <= part / all_of_it <= most, (found, whole)


def test_keys_past_the_length(counter) -> None:
    inputs = tensors(LENGTH, LENGTH, LENGTH)
    whole = work_of(counter, attention, *inputs)
    for keys in (BLOCK, 2 * BLOCK):
        found = work_of(counter, attention, *inputs, key_lengths=torch.tensor([keys]))
        assert_share(found, whole, keys / LENGTH, keys / LENGTH)
    one_more = work_of(counter, attention, *inputs, key_lengths=torch.tensor([BLOCK + 1]))
    assert_share(one_more, whole, BLOCK / LENGTH, 2 * BLOCK / LENGTH)
    assert work_of(counter, attention, *inputs, key_lengths=torch.tensor([0])) == (0, 0)


def test_keys_after_the_query(counter) -> None:
    inputs = tensors(LENGTH, LENGTH, LENGTH)
    found = work_of(counter, attention, *inputs, causal=True)
    # Half, and what of the blocks on the diagonal lies above it.
    assert_share(found, work_of(counter, attention, *inputs), 0.5, 0.5 + BLOCK / LENGTH / 2)


def test_rows_of_a_ragged_batch(counter) -> None:
    lengths = (2 * BLOCK, BLOCK)
    whole = work_of(counter, attention, *tensors(LENGTH, LENGTH, LENGTH))
    packed = [x[0].detach().requires_grad_() for x in tensors(LENGTH, LENGTH, LENGTH)]
    offsets = torch.tensor([0, lengths[0], LENGTH], dtype=torch.int32)
    found = work_of(counter, attention, *packed, cu_seqlens=offsets, max_seqlen=max(lengths))
    share = sum(n * n for n in lengths) / LENGTH**2
    assert_share(found, whole, share, share)


def test_relative_attention(counter) -> None:
    inputs = tensors(LENGTH, LENGTH, LENGTH, 2 * LENGTH)
    inputs[3] = inputs[3][0].detach().requires_grad_()
    whole = work_of(counter, relative_attention, *inputs)
    found = work_of(counter, relative_attention, *inputs, key_lengths=torch.tensor([BLOCK]))
    # A block's band of the table is twice as wide as its keys.
    assert_share(found, whole, BLOCK / LENGTH, 1.3 * BLOCK / LENGTH)
    found = work_of(counter, relative_attention, *inputs, causal=True)
    assert_share(found, whole, 0.5, 0.5 + BLOCK / LENGTH)


def test_ranks_in_order(counter) -> None:
    """Ranks 0, 1, 2, ... are causal for both streams, and tiles above the diagonal are fully masked by them."""
    inputs = tensors(LENGTH, LENGTH, LENGTH, LENGTH, 2 * LENGTH)
    inputs[4] = inputs[4][0].detach().requires_grad_()
    ranks = torch.arange(LENGTH)[None].int()
    found = work_of(counter, two_stream_attention, *inputs, query_rank=ranks, key_rank=ranks)
    whole = work_of(counter, two_stream_attention, *inputs)
    assert_share(found, whole, 0.5, 0.5 + BLOCK / LENGTH)
