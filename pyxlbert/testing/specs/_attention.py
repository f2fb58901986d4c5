"""What the inputs of all ops of scores have in common: sizes, how the tensors lie in memory, lengths and a mask."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

from pyxlbert.testing import tolerances
from pyxlbert.testing.specs._spec import BOTH, HALF, SINGLE, Arguments, Draw, Dtypes, Use

# Of a mask's or a bias's shape: the size that it is broadcast to.
WHOLE = -1
FLOAT16: Dtypes = (torch.float16,)
# What kernels are compiled ahead for: head sizes, the usual dtypes, and those if all are asked for.
HEAD_SIZES: dict[int, tuple[Dtypes, Dtypes]] = {
    64: (BOTH, FLOAT16),
    128: (HALF, SINGLE),
    32: ((), HALF),
    80: ((), HALF),
    96: ((), FLOAT16),
    256: ((), BOTH),
}


def compiled(head_size: int, usual: Dtypes | None = None) -> dict[Use, Dtypes]:
    """The uses of a case with this head size that is compiled ahead, usually in other dtypes than HEAD_SIZES says."""
    first, more = HEAD_SIZES[head_size]
    if usual is not None:
        first, more = usual, tuple(dtype for dtype in first + more if dtype not in usual)
    return {Use.AHEAD: first, Use.AHEAD_ALL: more}


# From here on no backend takes the weights of backward from lse alone.
_EXACT_LSE = 64.0


def rounding_of_lse(p: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """What a backward that takes its weights from a float32 lse changes of a row's, in the unit of terms.

    A row's lse is the score of its largest weight less the logarithm of that weight; half an eps of it is the change.
    Backward finds lse anew where it is so large that this would count for much.

    Args:
        p: weights `[..., Tk]`.
        reach: of their scores, the sum of absolute terms.

    Returns:
        `[..., 1]`; 0 of a row without weights.
    """
    if p.shape[-1] == 0:  # an empty sequence
        return p.new_zeros(*p.shape[:-1], 1)
    largest, place = p.max(-1, keepdim=True)
    lse = reach.gather(-1, place) - largest.log()
    return torch.where(largest > 0, lse.clamp(max=_EXACT_LSE), 0.0) / (2 * tolerances.TERMS)


@dataclass(frozen=True)
class Scores:
    """Sizes and options of a call; what is None is not passed.

    Attributes:
        queries, keys: Tq and Tk, by default Tq.
        batch, heads, head_size: B, H, D.
        layout: of query, key and value.  "fused": slices `[B, T, 3, H, D]` of one projection, as a model has them
            (with Tk != Tq "apart"); "by head": slices of `[B, T, H, 3 D]`; "heads first": `[B, H, T, D]`; "strided":
            every other element; "expanded": query over sequences, key and value over heads; "apart": each a whole.
        lengths: key_lengths.
        fill: in the place of lengths those that rise evenly to Tk, so that this share of all keys is real.
        packed: the lengths of packed sequences, or True for those of `fill`.
        mask: attention_mask's shape, with WHOLE for the sizes themselves.
        hidden: the share of the mask's elements that may not attend.
        magnitude: standard deviation of all numbers.
        unseen: values that key_lengths hides are NaN.
        causal, scale, dropout_p, seed: arguments of the op.
    """

    queries: int
    keys: int | None = None
    batch: int = 2
    heads: int = 2
    head_size: int = 16
    layout: str = "fused"
    lengths: tuple[int, ...] | None = None
    fill: float | None = None
    packed: tuple[int, ...] | bool = False
    mask: tuple[int, ...] | None = None
    hidden: float = 0.3
    magnitude: float = 1.0
    unseen: bool = False
    causal: bool | None = None
    scale: float | None = None
    dropout_p: float | None = None
    seed: int | None = None

    @property
    def key_count(self) -> int:
        """Tk."""
        return self.queries if self.keys is None else self.keys

    @property
    def filled(self) -> tuple[int, ...]:
        """The lengths that `fill` says."""
        fill = 1.0 if self.fill is None else self.fill
        least = max(1, self.key_count * (2 * fill - 1))
        return tuple(torch.linspace(least, self.key_count, self.batch, device="cpu").round().int().tolist())

    @property
    def sequences(self) -> tuple[int, ...] | None:
        """The lengths of packed sequences."""
        if self.packed is False:
            return None
        return self.filled if self.packed is True else self.packed

    @property
    def longest(self) -> int:
        """The most keys that a row can meet."""
        return self.key_count if self.sequences is None else max((0, *self.sequences))

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of a number per query."""
        return (self.batch, self.queries) if self.sequences is None else (sum(self.sequences),)

    @property
    def column_shape(self) -> tuple[int, ...]:
        """Of a number per key."""
        return (self.batch, self.key_count) if self.sequences is None else (sum(self.sequences),)

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A mask's or a bias's shape in numbers."""
        sizes = (self.batch, self.heads, self.queries, self.key_count)
        return tuple(size if n == WHOLE else n for n, size in zip(shape, sizes, strict=True))

    def options(self, *names: str) -> Arguments:
        """The plain values among the op's arguments that are given."""
        given = {name: getattr(self, name) for name in (*names, "causal", "scale", "dropout_p", "seed")}
        return {name: value for name, value in given.items() if value is not None}

    def sized(self, batch: int, length: int, head_size: int, heads: int | None = None) -> Self:
        """The same call with this many keys per sequence, and as many queries in proportion."""
        queries = length * self.queries // max(1, self.key_count)
        keys = None if self.keys is None else length
        return replace(self, queries=queries, keys=keys, batch=batch, head_size=head_size, heads=heads or self.heads)

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.key_count}x{self.heads}x{self.head_size}"
        return shape if self.fill in (None, 1.0) else f"{shape} {self.fill:.0%} full"


def rows(inputs: Scores, draw: Draw, count: int) -> torch.Tensor:
    """`[B, count, H, D]` in a layout that says nothing of other tensors."""
    shape, scale = (inputs.batch, count, inputs.heads), inputs.magnitude
    if inputs.layout == "heads first":
        return draw.normal(inputs.batch, inputs.heads, count, inputs.head_size, scale=scale).transpose(1, 2)
    if inputs.layout == "strided":
        return draw.normal(*shape, 2 * inputs.head_size, scale=scale)[..., ::2]
    return draw.normal(*shape, inputs.head_size, scale=scale)


def query_key_value(inputs: Scores, draw: Draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query, key and value in the layout that is asked for."""
    heads, size, scale, layout = inputs.heads, inputs.head_size, inputs.magnitude, inputs.layout
    shape, keys = inputs.row_shape, inputs.key_count
    if layout == "by head":
        if inputs.row_shape == inputs.column_shape:
            return draw.normal(*shape, heads, 3 * size, scale=scale).split(size, -1)
        q = draw.normal(*shape, heads, size, scale=scale)
        return q, *draw.normal(*inputs.column_shape, heads, 2 * size, scale=scale).split(size, -1)
    if inputs.sequences is not None or (layout == "fused" and keys == inputs.queries):
        return draw.normal(*shape, 3, heads, size, scale=scale).unbind(-3)
    if layout == "expanded":
        q = draw.normal(1, inputs.queries, heads, size, scale=scale).expand(inputs.batch, -1, -1, -1)
        k, v = (draw.normal(inputs.batch, keys, 1, size, scale=scale).expand(-1, -1, heads, -1) for _ in range(2))
        return q, k, v
    q, k, v = (rows(inputs, draw, count) for count in (inputs.queries, keys, keys))
    return q, k, v


def packing(inputs: Scores, draw: Draw) -> Arguments:
    """Where packed sequences begin, and the longest one's length."""
    if inputs.sequences is None:
        return {}
    offsets = draw.numbers((0, *inputs.sequences)).cumsum(0).to(torch.int32)
    return {"cu_seqlens": offsets, "max_seqlen": inputs.longest}


def lengths_of(inputs: Scores, draw: Draw, arguments: Arguments) -> Arguments:
    """key_lengths; what they hide of the values becomes NaN where that is asked for."""
    lengths = inputs.lengths
    if inputs.fill is not None and inputs.packed is False:
        lengths = inputs.filled
    if lengths is None:
        return {}
    if inputs.unseen:
        for b, length in enumerate(lengths):
            arguments["value"][b, length:] = float("nan")
    return {"key_lengths": draw.numbers(lengths)}


def mask_of(inputs: Scores, draw: Draw) -> Arguments:
    """attention_mask."""
    return {} if inputs.mask is None else {"attention_mask": ~draw.share(inputs.hidden, inputs.whole(inputs.mask))}


def flops_of(products: float, a: Arguments) -> float:
    """Of so many products of all queries with all keys of their sequences."""
    heads, head_size = a["query"].shape[-2:]
    if a.get("cu_seqlens") is not None:
        lengths = a["cu_seqlens"].diff().long()
        return 2 * products * int((lengths * lengths).sum()) * heads * head_size
    if a.get("key_lengths") is not None:
        # What lies behind a sequence's keys is nobody's work.
        return 2 * products * (a["query"].numel() // len(a["query"])) * int(a["key_lengths"].sum())
    return 2 * products * a["query"].numel() * a["key"].shape[1]
