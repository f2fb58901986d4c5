"""Every number that a comparison uses; tests and benchmarks hold none of their own.

The rule: float64 is the truth.  A kernel may be at most FACTOR times as wrong as plain PyTorch in the same
dtype on the same inputs, plus one rounding of the output, plus a small multiple of the accumulation
dtype's eps times the sum of the absolute terms (a difference of equal terms is zero in exact arithmetic
and noise in any other).
"""

from __future__ import annotations

import torch

# How much more wrong than plain PyTorch a kernel may be.
FACTOR = 2.0

# The same of a layer that takes the place of another library's, tried once on a few rows: it is to be refused for
# another formula, not because the other was exact by luck.
REPLACEMENT_FACTOR = 4.0

# Roundings of the output granted beyond that, in units of half its spacing.
OUTPUT_ROUNDINGS = 1.0

# Multiples of eps(accumulation dtype) x the sum of absolute terms.
TERMS = 4.0

# The torch backend in float64 against the truth, relative to the largest element.
FLOAT64 = 1e-10

# Two float32 results of one formula whose sums are added up in another order, relative to the largest element.
SUMMATION_ORDER = 1e-5

# Float32 sums of two thousand terms of one sign, relative to the largest element: a few roundings, where what rests in
# accumulators of tensor cores would lose 1e-5 and more.
LONG_SUM_FLOAT32 = 4e-6

# (op, dtype, backend) -> (factor instead of FACTOR, reason).  A dtype or backend of None means any.
EXCEPTIONS: dict[tuple[str, torch.dtype | None, str | None], tuple[float, str]] = {}

# Whole models, relative to the largest element, against transformers in float32 on random small configurations.
MODEL_FLOAT32 = 2e-5
MODEL_GRADIENT_FLOAT32 = 2e-4
# What may be left, in a small model, of a gradient that is zero but for rounding.
ZERO_GRADIENT_FLOAT32 = 1e-6
# Whole small models in bfloat16, by the norm of the difference.
MODEL_BFLOAT16 = 2e-2

# A result of fewer elements (a loss, the logits of one row) may by luck be exact in plain PyTorch, which says nothing
# about the error to expect: it is held to the two numbers above instead of FACTOR.
MODEL_FEW = 64

# A gradient of so few elements has at least this share of the largest of all as its scale: what is zero in exact
# arithmetic has none of its own.
MODEL_SMALL_GRADIENT = 1e-3

# A small model with packed weights against itself without, relative to the largest element: another product, which sums
# in another order and rounds less often.
PACKED = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# A small model in eight-bit integers against itself in float64, by the norm of the difference.
INT8 = 2e-2

# A graph in ONNX Runtime against the model it was made of, relative to the largest element of an output, at least 1.
ONNX = 1e-5

# Worst 1 - cosine of a sentence vector against transformers in float32.
COSINE = {torch.float32: 1e-6, torch.bfloat16: 2e-4, torch.float16: 1e-5}

# The same in eight-bit integers.
COSINE_INT8 = 1e-2

# What another library's vectors may be off in a race: its integers are as far as that.
COSINE_CONTESTANT = 5e-2

# A contestant of a race that is not held to plain PyTorch's error, relative to the largest element: it may round as it
# likes, and what is further off computes something else.
CONTESTANT = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}
# The same of a whole model in eight-bit integers.
CONTESTANT_INT8 = 0.3

# What a result of ours, or one with dropout of any contestant, may be a multiple of the truth by, beside 1.
GAIN = {torch.float32: 2e-5, torch.bfloat16: 5e-4, torch.float16: 1e-4}
GAIN_DROPOUT = 0.1


def factor(op: str, dtype: torch.dtype, backend: str) -> float:
    """FACTOR, or the exception's for this op, dtype and backend."""
    for key in ((op, dtype, backend), (op, None, backend), (op, dtype, None)):
        if key in EXCEPTIONS:
            return EXCEPTIONS[key][0]
    return FACTOR


# Weights after a few steps of training whose sums are cut differently, of the largest weight but at least of 1; they
# have moved by 1e-2. With an epsilon that keeps AdamW from dividing rounding by rounding.
TRAINED_FLOAT32 = 2e-5
