"""The vendor's matrix product on CPU: oneDNN through a private op of torch, which only this file names.

`torch.ops.mkldnn._linear_pointwise` computes a matrix product with bias and activation as one oneDNN
primitive, and takes weights that `_reorder_linear_weight` has put into oneDNN's own order.  It has no gradient
rule, reads a strided bias out of bounds, does not take float64, and refuses an empty inner dimension; all of
that ends here.  A probe, once per dtype, compares it with `torch.nn.functional.linear`; where it is missing or
wrong, backend "cpu" does not take the dtype and says so in `pyxlbert.backends.explain("linear", x)`.

Which product runs is a rule, not a measurement: see `few_rows`, for a kernel of ours, and `torch_is_faster`.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pyxlbert.cpu._tensors import refusal

try:
    from pyxlbert.cpu import _few_rows
except ImportError:  # it is not built, and backend "cpu" then takes no call
    _few_rows = None  # type: ignore[assignment]

# The attribute and the algorithm that `_linear_pointwise` wants, per activation.
_EPILOGUES = {None: ("none", ""), "none": ("gelu", "none"), "tanh": ("gelu", "tanh")}

_probes: dict[torch.dtype, str | None] = {}
_probing = threading.Lock()
_detours: dict[torch.dtype, str | None] = {}
_timing = threading.Lock()

# Times as long as float32 that a product may take before float32 does it.  Half of float32's speed comes of converting,
# a thousandth of it of oneDNN's reference code, and nothing lies between.
MOST_SLOWNESS = 20.0


def supports(*tensors: Tensor | None) -> str | None:
    """CPU tensors in float32, bfloat16 and float16, where oneDNN passes its probe."""
    return refusal(*tensors) or probe(tensors[0].dtype)  # type: ignore[union-attr]


def probe(dtype: torch.dtype) -> str | None:
    """Why the private op cannot be used for `dtype`, or None; found out once per process."""
    if dtype not in _probes:
        with _probing:
            if dtype not in _probes:
                _apart(_probe, dtype)
    return _probes[dtype]


# What `torch.compiler.assume_constant_result` sets: a compiler calls the probe and does not trace it.  The function
# itself would import the whole compiler.
probe._dynamo_marked_constant = True  # type: ignore[attr-defined]


def product(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str | None = None) -> Tensor:
    """activation(x weightᵀ + bias) by oneDNN; no dimension may be 0.

    Args:
        x: `[..., K]`; any strides.
        weight: `[N, K]`, any strides, or the result of `reorder`.
        bias: `[N]`; any strides.
        approximate: None for no activation, "none" or "tanh" for that gelu.
    """
    if bias is not None:
        # Its stride is not looked at.
        bias = bias.contiguous()
    if weight.layout is torch.strided and not (weight.is_contiguous() or weight.t().is_contiguous()):
        # A slice of a wider matrix or a spread row would be multiplied by oneDNN's reference code, 1000 times slower.
        weight = weight.contiguous()
    if not _native(x.dtype):
        wide = None if bias is None else bias.float()
        return _in_float32(x.float(), weight.float(), wide, approximate).to(x.dtype)
    return _linear_pointwise(x, weight, bias, *_attributes(approximate))


def _in_float32(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str | None) -> Tensor:
    """`product` of tensors that were widened, by the faster library."""
    if not torch_is_faster(x, weight.shape[0], saves=approximate is not None):
        return _linear_pointwise(x, weight, bias, *_attributes(approximate))
    y = F.linear(x, weight, bias)
    return y if approximate is None else torch.ops.aten.gelu_.default(y, approximate=approximate)


def torch_product(x: Tensor, weight: Tensor, bias: None) -> Tensor:
    return x @ weight.t()


def reorder(weight: Tensor) -> Tensor | None:
    """A copy of `weight` `[N, K]` in oneDNN's order, for `product`; None where there would be nothing to gain.

    The copy cannot be cast, pickled or deep-copied, and does not follow the original.
    """
    if weight.numel() == 0 or supports(weight) is not None or not _native(weight.dtype):
        return None
    return _reorder(weight.detach())


def few_rows(x: Tensor) -> bool:
    """Whether x `[..., K]`, K > 0, has so few rows that the kernel of ours beats the libraries."""
    return _few_rows is not None and x.numel() <= _few_rows.max_rows(x.dtype, _native(x.dtype)) * x.shape[-1]


def _attributes(approximate: str | None) -> tuple[str, list[object], str]:
    attribute, algorithm = _EPILOGUES[approximate]
    return attribute, [], algorithm


def _linear_pointwise(*arguments: object) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(*arguments)


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight.default(weight.contiguous())


def torch_is_faster(x: Tensor, n: int, saves: bool = False) -> bool:
    """Whether torch's own linear beats the private op for x `[..., K]` and N columns out; no dimension is 0.

    A rule from measurements (docs/ops/linear.md), not a measurement at run time: a call of the private op costs some
    30 µs before it multiplies.  In float32 torch calls MKL.  On a processor with AVX-512 that is not Intel's, MKL takes
    a path of half the speed; elsewhere it is as fast as oneDNN or faster.  With AVX-512 the private op wins if it
    `saves` a pass (gelu, or the reordering of the weight) and the rows are few; with AVX2 its gelu is slow.  In low
    precision torch calls oneDNN itself, with more around it;
    but it has products of its own for a single row.
    """
    products = x.numel() * n
    rows = x.numel() // x.shape[-1]
    if x.dtype is torch.float32:
        if not _mkl_at_full_speed():
            return products < 1 << 20
        return not (saves and _has_avx512() and 1 < rows < 512 and products > 1 << 22)
    return rows == 1 and _native(x.dtype) and (x.dtype is torch.float16 or products < 1 << 16)


def torch_goes_back(dy: Tensor, x: Tensor | None, weight: Tensor | None) -> bool:
    """Whether torch's own products are as fast for the gradient: everywhere but in float32 where MKL is slow."""
    sizes = [one.numel() for one in (dy, x, weight) if one is not None]
    if len(sizes) == 1 or 0 in sizes:
        return True
    if dy.dtype is not torch.float32:
        return _native(dy.dtype)
    return _mkl_at_full_speed() or dy.numel() * (x if x is not None else weight).shape[-1] < 1 << 20  # type: ignore[union-attr]


@functools.cache
def _mkl_at_full_speed() -> bool:
    """Whether MKL takes its best path: on processors that are not Intel's that is the one for AVX2."""
    if not torch.backends.mkl.is_available():
        return False
    return "GenuineIntel" in _processor() or not _has_avx512()


@functools.cache
def _has_avx512() -> bool:
    return "avx512f" in _processor()


@functools.cache
def _processor() -> frozenset[str]:
    """The words by which Linux describes the first processor; without any, one with AVX-512 that is not Intel's."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return frozenset(file.read(1 << 14).partition("\n\n")[0].split())
    except OSError:
        return frozenset({"avx512f"})


def note(*tensors: Tensor | None) -> str | None:
    """What `pyxlbert.backends.explain` adds where products are made in another dtype than the tensors'."""
    return detour(tensors[0].dtype)  # type: ignore[union-attr]


def detour(dtype: torch.dtype) -> str | None:
    """Why products of `dtype` are made in float32 and rounded, or None; found out once per process.

    oneDNN's word that it supports a dtype is not enough: on some processors its reference code does the work, a
    thousand times slower than float32.  So a small product of each is timed.
    """
    if dtype not in _detours:
        with _timing:
            if dtype not in _detours:
                _apart(_find_detour, dtype)
    return _detours[dtype]


detour._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _native(dtype: torch.dtype) -> bool:
    """Whether products of `dtype` are made in it; where not, float32 does it and the result is rounded."""
    return dtype is torch.float32 or detour(dtype) is None


def _find_detour(dtype: torch.dtype) -> None:
    _detours[dtype] = _slowness(dtype)


def _slowness(dtype: torch.dtype) -> str | None:
    """One sentence on why float32 is to do the products of `dtype`, or None."""
    if dtype is torch.float32:
        return None
    name, flag = {
        torch.bfloat16: ("bfloat16", "_is_mkldnn_bf16_supported"),
        torch.float16: ("float16", "_is_mkldnn_fp16_supported"),
    }[dtype]
    way = f"products of {name} are made in float32 and rounded"
    try:
        if not getattr(torch.ops.mkldnn, flag)():
            return f"{way}: oneDNN has none on this processor"
        times = {one: _least_time(one) for one in (torch.float32, dtype)}
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        # The other probe says what is wrong, and backend "cpu" takes no call.
        return None
    ratio = times[dtype] / times[torch.float32]
    return f"{way}: oneDNN takes {ratio:.0f} times as long in {name}" if ratio > MOST_SLOWNESS else None


def _least_time(dtype: torch.dtype) -> float:
    """Seconds of the fastest of a few products of 0.5 million multiplications; ordinary ones take 0.1 ms at most."""
    x, weight = torch.ones(32, 128, dtype=dtype), torch.ones(128, 128, dtype=dtype)
    found = []
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            _linear_pointwise(x, weight, None, "none", [], "")
            found.append(time.perf_counter() - start)
    return min(found)


def _apart(work: Callable[[torch.dtype], None], dtype: torch.dtype) -> None:
    """Runs `work` in a thread of its own, where no autocast, tracing mode or compiler of the caller is."""
    thread = threading.Thread(target=work, args=(dtype,), name="pyxlbert-probe")
    thread.start()
    thread.join()


def _probe(dtype: torch.dtype) -> None:
    _probes[dtype] = _find_fault(dtype)


def _find_fault(dtype: torch.dtype) -> str | None:
    """One sentence about what is wrong with the private op in `dtype`, or None."""
    if not _native(dtype):
        # Small products in float32 may be torch's own: the private op is asked as such.
        fault = _find_fault(torch.float32)
        if fault is not None:
            return fault
    try:
        if not torch.backends.mkldnn.is_available():
            return "this torch is built without oneDNN"
        with torch.no_grad():
            # Small integers over a power of two: every product and sum is exact in any dtype and order.
            x = (torch.arange(5 * 24).reshape(5, 24) % 7 - 3).to(dtype)
            weight = (torch.arange(16 * 24).reshape(16, 24) % 5 - 2).to(dtype)
            bias = (torch.arange(32) % 9 - 4).to(dtype)[::2]
            wanted = F.linear(x.double(), weight.double(), bias.double())
            packed = _reorder(weight) if _native(dtype) else weight
            for each in (weight, packed, weight.t().contiguous().t()):
                if not torch.equal(product(x, each, bias).double(), wanted.to(dtype).double()):
                    return "oneDNN's product, through torch's private op, differs from torch's linear"
            for approximate in ("none", "tanh"):
                # Of whole numbers, in eighths: no result lies where the rounding of any dtype could turn it.
                gelu = F.gelu(wanted, approximate=approximate)
                found = product(x, weight, bias, approximate).double()
                if not torch.equal((8 * found).round(), (8 * gelu).round()):
                    return "oneDNN's gelu, through torch's private op, differs from torch's"
    except (AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
        return f"torch's private oneDNN op does not answer as expected ({str(error).splitlines()[0]})"
    return None
