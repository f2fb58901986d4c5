"""linear: the private op of torch behind its guard, and the rule that chooses between the vendors."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time

import pytest
import torch

import pyxlbert
from pyxlbert import backends
from pyxlbert.backends import native
from pyxlbert.cpu import _few_rows, _onednn
from pyxlbert.testing import compare
from pyxlbert.testing.specs import SPECS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = [case for case in SPECS["linear"].suite if case.small]


@pytest.fixture
def fresh_probe(monkeypatch):
    """No probe has run yet, and none of this test's stays."""
    monkeypatch.setattr(_onednn, "_probes", {})
    monkeypatch.setattr(_onednn, "_detours", {})


def arguments(dtype: torch.dtype = torch.float32, m: int = 6, n: int = 32, k: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*size, generator=generator).to(dtype) for size in ((m, k), (n, k), (n,))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_probe_passes_at_the_pinned_torch(dtype: torch.dtype, fresh_probe) -> None:
    """A new torch that moves or changes the private op fails here, not silently."""
    assert _onednn.probe(dtype) is None


def test_a_wrong_product_is_found_and_explained(monkeypatch, fresh_probe) -> None:
    right = _onednn._linear_pointwise
    monkeypatch.setattr(_onednn, "_linear_pointwise", lambda *a: right(*a) * 1.01)
    x, weight, bias = arguments()
    text = backends.explain("linear", x)
    assert "differs from torch's linear" in text and "torch: taken" in text
    with pytest.raises(RuntimeError, match="linear: backend 'cpu' is unavailable: oneDNN's product"):
        pyxlbert.linear(x, weight, bias, backend="cpu")
    compare.same_bits("fallback", pyxlbert.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


def test_a_wrong_gelu_is_found(monkeypatch, fresh_probe) -> None:
    right = _onednn._linear_pointwise
    monkeypatch.setattr(_onednn, "_linear_pointwise", lambda x, w, b, *_: right(x, w, b, "none", [], ""))
    assert "oneDNN's gelu" in _onednn.probe(torch.float32)


def test_a_missing_op_is_explained(monkeypatch, fresh_probe) -> None:
    def gone(*_: object) -> None:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    monkeypatch.setattr(_onednn, "_linear_pointwise", gone)
    assert "has no attribute '_linear_pointwise'" in backends.explain("linear_gelu", torch.ones(2, 3))
    pyxlbert.linear_gelu(*arguments())


class _Slow:
    """oneDNN on a processor that it says has `dtype`, where its reference code does the work."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.right, self.calls = dtype, _onednn._linear_pointwise, 0

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *how: object) -> torch.Tensor:
        if x.dtype is not self.dtype:
            return self.right(x, weight, bias, *how)
        self.calls += 1
        time.sleep(0.02)
        wide = None if bias is None else bias.float()
        return self.right(x.float(), weight.float(), wide, *how).to(self.dtype)


def test_a_product_of_reference_code_is_not_taken(monkeypatch, fresh_probe) -> None:
    """Float32 does the work where a dtype is slower than anything that a processor with it could be, and it is said."""
    slow = _Slow(torch.float16)
    monkeypatch.setattr(_onednn, "_linear_pointwise", slow)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)
    monkeypatch.setattr(_onednn, "few_rows", lambda x: False)
    # Whole numbers, so that float32 is exact in any order.
    x, weight, bias = (one.round() for one in arguments(torch.float16))
    for op in ("linear", "linear_gelu"):
        text = backends.explain(op, x)
        assert re.search(
            r"cpu: taken; products of float16 are made in float32 and rounded: oneDNN takes \d+ times", text
        )
    timed = slow.calls
    wanted = torch.nn.functional.linear(x.double(), weight.double(), bias.double()).half()
    compare.same_bits("by float32", pyxlbert.linear(x, weight, bias), wanted)
    assert slow.calls == timed


def test_an_ordinary_product_makes_no_detour(fresh_probe) -> None:
    """Float32 does it only where oneDNN says that the processor has none; merely slower is no reference code."""
    for dtype, flag in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported")):
        detour, has = _onednn.detour(dtype), getattr(torch.ops.mkldnn, flag)()
        assert detour is None if has else detour is not None and "has none on this processor" in detour
        assert ("; products of" in backends.explain("linear", torch.ones(2, 3, dtype=dtype))) is not has
    assert _onednn.detour(torch.float32) is None


def test_the_first_call_may_be_a_traced_or_an_autocast_one() -> None:
    """The probe computes with real tensors in its own dtype even when a compiler or autocast watches the caller."""
    code = """
import torch, pyxlbert
from pyxlbert.cpu import _onednn
x, weight = torch.randn(3, 24), torch.randn(32, 24)
class Model(torch.nn.Module):
    def forward(self, x):
        return pyxlbert.linear(x, weight)
with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
    for first in (
        lambda: torch.compile(Model(), fullgraph=True, backend="aot_eager")(x),
        lambda: torch.export.export(Model(), (x,)),
        lambda: torch.export.export(Model(), (x,), strict=True),
        lambda: torch.jit.trace(Model(), x),
        lambda: pyxlbert.linear(x, weight),
    ):
        _onednn._probes.clear()
        _onednn._detours.clear()
        first()
        assert _onednn._probes == {torch.bfloat16: None}, _onednn._probes
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_threads_share_one_probe(monkeypatch, fresh_probe) -> None:
    runs = []
    right = _onednn._find_fault
    monkeypatch.setattr(_onednn, "_find_fault", lambda dtype: runs.append(dtype) or right(dtype))
    threads = [threading.Thread(target=_onednn.probe, args=(torch.float32,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runs == [torch.float32]


@pytest.mark.parametrize("mkl", [True, False], ids=["mkl_fast", "mkl_slow"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id.replace(" ", "_"))
def test_either_choice_of_vendor_is_right(monkeypatch, case, mkl: bool) -> None:
    """The choice follows the processor and the size; here each side of it runs at every size, forward and backward."""
    monkeypatch.setattr(_onednn, "few_rows", lambda x: False)
    monkeypatch.setattr(_onednn, "torch_is_faster", lambda *_, **__: mkl)
    monkeypatch.setattr(_onednn, "torch_goes_back", lambda *tensors: mkl or any_empty(*tensors))
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id.replace(" ", "_"))
def test_a_processor_without_the_dtype_rounds_once(monkeypatch, case, dtype: torch.dtype) -> None:
    monkeypatch.setattr(_onednn, "few_rows", lambda x: False)
    monkeypatch.setattr(_onednn, "_native", lambda dtype: dtype is torch.float32)
    check(case, dtype)


def any_empty(*tensors: torch.Tensor | None) -> bool:
    given = [t for t in tensors if t is not None]
    return len(given) == 1 or any(t.numel() == 0 for t in given)


def check(case, dtype: torch.dtype) -> None:
    spec = SPECS["linear"]
    given = spec.arguments(case, torch.Generator().manual_seed(5), dtype, torch.device("cpu"))
    dy = torch.randn(spec.plain(**given).shape, generator=torch.Generator().manual_seed(6)).to(dtype)

    def run(function, given, dy) -> dict[str, torch.Tensor]:
        leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
        y = function(**leaves)
        return {"out 0": y.detach()} | {
            f"grad {name}": gradient
            for name, gradient in zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True)
        }

    ours = run(lambda **a: spec.function(**a, backend="cpu"), given, dy)
    plain, wide = run(spec.plain, given, dy), spec.in_float64(given)
    truth = run(spec.plain, wide, dy.double())
    for name, value in ours.items():
        terms = spec.terms(name, wide, (dy,))
        compare.within_budget(f"{case.id} {name}", value, plain[name], truth[name], terms=terms)


@pytest.fixture(params=native._C.levels())
def level(request):
    """Each instruction-set level in turn."""
    before = native._C.level()
    native._C.set_level(request.param)
    yield request.param
    native._C.set_level(before)


# Rows of x in every group that the kernel sums at once, columns and an inner dimension that end within a vector.
@pytest.mark.parametrize(
    "m, n, k", [(1, 1, 1), (2, 3, 17), (5, 16, 64), (6, 21, 40), (11, 50, 71), (13, 64, 96), (24, 7, 5)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", [None, "none", "tanh"])
def test_few_rows(level: str, m: int, n: int, k: int, dtype: torch.dtype, approximate: str | None) -> None:
    """The kernel of ours, on every level and at sizes that the rule may leave to the vendor's library."""
    x, weight, bias = given = arguments(dtype, m, n, k)
    spec = SPECS["linear" if approximate is None else "linear_gelu"]
    options = {} if approximate is None else {"approximate": approximate}
    wide = dict(zip(("x", "weight", "bias"), (t.double() for t in given), strict=True))
    ours = _few_rows.linear_fwd(x, weight, bias, approximate)
    terms = SPECS["linear"].terms("out 0", wide, (ours,))
    compare.within_budget("few rows", ours, spec.plain(*given, **options), spec.plain(**wide, **options), terms=terms)
    without = spec.plain(wide["x"], wide["weight"], **options)
    plain = spec.plain(x, weight, **options)
    compare.within_budget("no bias", _few_rows.linear_fwd(x, weight, None, approximate), plain, without, terms=terms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_have_the_same_bits_for_any_number_of_threads(level: str, dtype: torch.dtype) -> None:
    x, weight, bias = arguments(dtype, 7, 200, 333)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(_few_rows.linear_fwd(x, weight, bias, "none"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        compare.same_bits("threads", other, found[0])


def test_few_rows_are_read_where_they_lie() -> None:
    wide = torch.full((9, 3, 100), float("nan"))
    x, weight, bias = arguments(m=9, k=40)
    wide[:, 1, 30:70] = x
    right = _few_rows.linear_fwd(x, weight, bias, None)
    compare.same_bits("view", _few_rows.linear_fwd(wide[:, 1, 30:70], weight, bias, None), right)
    spread = torch.full((32, 7), float("nan"))
    spread[:, 3] = bias
    compare.same_bits("strided bias", _few_rows.linear_fwd(x, weight, spread[:, 3], None), right)


def test_many_rows_are_left_to_the_vendor(monkeypatch) -> None:
    rows = []
    right = _few_rows.linear_fwd
    monkeypatch.setattr(_few_rows, "linear_fwd", lambda x, *rest: rows.append(len(x)) or right(x, *rest))
    most = _few_rows.max_rows(torch.float32, True)
    for m in (most, most + 1):
        pyxlbert.linear(*arguments(m=m))
        pyxlbert.linear_gelu(*arguments(m=m))
    pyxlbert.linear(arguments()[0], arguments(n=24, k=32)[1].t())
    assert rows == [most, most]


def test_a_strided_bias_is_read_in_bounds() -> None:
    """The private op looks at the bias's address and not at its stride; what lies between must not be seen."""
    x, weight, bias = arguments(n=32)
    wide = torch.full((32, 7), float("nan"))
    wide[:, 3] = bias
    for function in (pyxlbert.linear, pyxlbert.linear_gelu):
        ours = function(x, weight, wide[:, 3], backend="cpu")
        compare.same_bits("strided bias", ours, function(x, weight, bias, backend="cpu"))
    compare.same_bits("product", _onednn.product(x, weight, wide[:, 3]), _onednn.product(x, weight, bias))


def test_a_weight_with_gaps_or_repeats_is_multiplied_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's reference code, which takes any strides, is a thousand times slower; overlapping ones it refuses."""
    x = torch.randn(40, 64)
    weights = {
        "rows": torch.randn(192, 64)[::2],
        "columns": torch.randn(96, 128)[:, ::2],
        "slice": torch.randn(96, 80)[:, :64],
        "one row": torch.randn(1, 64).expand(96, 64),
        "one column": torch.randn(96, 1).expand(96, 64),
        "overlap": torch.randn(200).as_strided((96, 64), (1, 1)),
    }
    right, seen = _onednn._linear_pointwise, []
    monkeypatch.setattr(_onednn, "_linear_pointwise", lambda x, w, *rest: seen.append(w) or right(x, w, *rest))
    for name, weight in weights.items():
        for w in (weight, weight.t()):
            rows = x if w is weight else torch.randn(40, 96)
            truth = rows.double() @ w.double().t()
            compare.within_budget(name, _onednn.product(rows, w, None), rows @ w.t(), truth, terms=1.0)
    assert len(seen) == 12 and all(w.is_contiguous() or w.t().is_contiguous() for w in seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_has_the_dtypes_of_torchs_linear(dtype: torch.dtype) -> None:
    for mixed in (False, True):
        x, weight, bias = arguments()
        x = x.to(torch.bfloat16) if mixed else x
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        with torch.autocast("cpu", dtype=dtype):
            y, wanted = pyxlbert.linear(*leaves), torch.nn.functional.linear(*leaves)
            assert y.dtype is wanted.dtype is dtype
            compare.same_bits(
                "double", *(f(*(t.double() for t in leaves)) for f in (pyxlbert.linear, torch.nn.functional.linear))
            )
        gradients = torch.autograd.grad(y.float().sum(), leaves)
        assert [g.dtype for g in gradients] == [t.dtype for t in leaves]


def test_backward_inside_autocast_keeps_float32() -> None:
    """A float32 forward outside autocast has float32 gradients, wherever backward is called."""
    leaves = [t.requires_grad_() for t in arguments(m=40, n=64, k=48)]
    for backend in ("torch", "cpu"):
        y = pyxlbert.linear(*leaves, backend=backend)
        wanted = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = torch.autograd.grad(y.sum(), leaves)
        for a, b in zip(found, wanted, strict=True):
            compare.same_bits(backend, a, b)


@pytest.mark.parametrize("needed", range(1, 8))
def test_only_the_asked_gradients_are_computed_and_only_their_tensors_kept(needed: int) -> None:
    leaves = [t.requires_grad_(bool(needed & 1 << i)) for i, t in enumerate(arguments())]
    wanted = [t for t in leaves if t.requires_grad]
    y = pyxlbert.linear(*leaves)
    x_kept, weight_kept = y.grad_fn.saved_tensors
    assert (x_kept is not None) is bool(needed & 2) and (weight_kept is not None) is bool(needed & 1)
    plain = torch.nn.functional.linear(*leaves)
    dy = torch.ones_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(plain, wanted, dy), strict=True):
        compare.within_budget("gradient", ours, theirs, theirs.double(), terms=float(theirs.abs().max()) + 40)


def test_sizes_past_two_to_the_31st_are_counted_right() -> None:
    """The rule multiplies rows, columns and the inner dimension; nothing is allocated for it."""
    x = torch.empty(1, dtype=torch.float32).expand(1 << 20, 1 << 12)
    assert _onednn.torch_is_faster(x, 1 << 14, saves=True) is _onednn._mkl_at_full_speed()


@pytest.mark.parametrize(
    ("processor", "library", "with_gelu"),
    [
        ({"GenuineIntel", "avx2", "avx512f"}, "MKL", "oneDNN"),
        ({"AuthenticAMD", "avx2", "avx512f"}, "oneDNN", "oneDNN"),
        ({"GenuineIntel", "avx2"}, "MKL", "MKL"),
        ({"AuthenticAMD", "avx2"}, "MKL", "MKL"),
        (set(), "MKL", "MKL"),
    ],
)
def test_which_library_multiplies_float32(monkeypatch, processor: set[str], library: str, with_gelu: str) -> None:
    """MKL is slow where it has AVX-512 and does not take it; oneDNN's gelu is where there is none."""
    monkeypatch.setattr(_onednn, "_processor", lambda: processor)
    for cached in (_onednn._mkl_at_full_speed, _onednn._has_avx512):
        monkeypatch.setattr(_onednn, cached.__name__, cached.__wrapped__)
    x, weight = torch.empty(128, 768), torch.empty(3072, 768)
    mkl = torch.backends.mkl.is_available()
    assert _onednn.torch_is_faster(x, 3072) is (mkl and library == "MKL")
    assert _onednn.torch_is_faster(x, 3072, saves=True) is (mkl and with_gelu == "MKL")
    assert _onednn.torch_goes_back(torch.empty(128, 3072), x, weight) is (mkl and library == "MKL")


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("op", [pyxlbert.linear, pyxlbert.linear_gelu])
def test_a_gradient_lies_as_its_weight_does(op, backend: str) -> None:
    """A parameter that is multiplied transposed takes its gradient without a transposed copy of it."""
    x, weight, bias = arguments()
    found = []
    for one in (weight, weight.t().contiguous().t()):
        own = one.detach().requires_grad_()
        y = op(x.requires_grad_(), own, bias, backend=backend)
        (dweight,) = torch.autograd.grad(y, own, torch.ones_like(y))
        assert dweight.stride() == own.stride()
        found.append(dweight)
    compare.close("dweight", found[1], found[0], compare.tolerances.MODEL_FLOAT32)
