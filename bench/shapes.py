"""Cases at sizes of one's own."""

from __future__ import annotations

from dataclasses import replace

from pyxlbert.testing.specs._spec import Case


def parse(text: str) -> tuple[int, int]:
    """Batch and length of "8x128".

    Raises:
        ValueError: it is another text.
    """
    batch, _, length = text.partition("x")
    # No tensor has more digits than that.
    sizes = [int(part) if part.isdecimal() and len(part) < 10 else 0 for part in (batch, length)]
    if 0 in sizes:
        raise ValueError(f"got {text!r}, wanted a batch and a length such as 8x128")
    return sizes[0], sizes[1]


def sized(case: Case, batch: int, length: int) -> Case:
    """The same call of `batch` sequences of `length` places; of an op on rows that many rows together."""
    inputs, before = case.inputs, str(case.inputs)
    if hasattr(inputs, "sized"):  # no type: revisions of before have it elsewhere
        inputs = inputs.sized(batch, length, inputs.head_size)
    elif hasattr(inputs, "length"):
        inputs = replace(inputs, batch=batch, length=length)
    elif hasattr(inputs, "entries"):
        inputs = replace(inputs, shape=(batch, length))
    else:
        inputs = replace(inputs, shape=(batch * length, inputs.shape[-1]))
    return replace(case, id=case.id.replace(before, str(inputs), 1), inputs=inputs)


def length_of(case: Case) -> int | None:
    """Places of the longest sequence, or None of an op that takes no sequences."""
    inputs = case.inputs
    return inputs.longest if hasattr(inputs, "longest") else getattr(inputs, "length", None)
