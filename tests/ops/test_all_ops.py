"""The common suite: every op's description of inputs x every backend and instruction-set level that is here."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import pyxlbert
from pyxlbert import backends
from pyxlbert.backends import OPS
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Arguments, Bad, Case, Spec, as_tuple, to_float64

ALL = os.environ.get("PYXLBERT_TEST_ALL") == "1"
# The sanitizer run sets this to the levels it watches: small cases on those, backend cpu alone.
SMALL = [level for level in os.environ.get("PYXLBERT_TEST_SMALL", "").split(",") if level]
CPU = torch.device("cpu")
GPU = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _runners() -> list[str]:
    """Backend names, the cpu backend once per instruction-set level, "cpu/avx2", and torch on the GPU, "torch/cuda"."""
    names = []
    for name in backends.available():
        if name == "cpu":
            names += [f"cpu/{level}" for level in pyxlbert._C.levels() if not SMALL or level in SMALL]
        elif not SMALL:
            names.append(name)
    return names if GPU is None or SMALL else [*names, "torch/cuda"]


RUNNERS = _runners()
# Without a GPU Triton's interpreter takes a second for what a kernel does in microseconds, and the emulation of CUDA
# some milliseconds: small cases, in the interpreter of one dtype each.
SLOW = () if torch.cuda.is_available() else ("triton", "cuda")
SLOWEST = SLOW[:1]
FAST = [runner for runner in RUNNERS if "/" not in runner or runner in (f"cpu/{pyxlbert._C.level()}", "torch/cuda")]


def runners_of(spec: Spec) -> list[str]:
    """The runners that differ for this op: a vendor's library has no levels of ours, few ops use tiles."""
    candidates = FAST if spec.vendor else RUNNERS
    if "cpu/amx" in candidates and not spec.tiles:
        candidates = [runner for runner in candidates if runner != "cpu/avx512_bf16"]
    return [runner for runner in candidates if runner.partition("/")[0] in OPS[spec.name].backends]


def device_of(runner: str) -> torch.device:
    """Where the runner's tensors live."""
    return GPU if GPU is not None and runner in ("triton", "cuda", "torch/cuda") else CPU


def best(spec: Spec) -> str:
    """The backend that a caller on the CPU gets."""
    return "cpu" if "cpu" in OPS[spec.name].backends else "torch"


@contextlib.contextmanager
def running(runner: str) -> Iterator[str]:
    """Selects the runner's instruction-set level; gives the backend's name."""
    backend, _, level = runner.partition("/")
    before = pyxlbert._C.level()
    if backend == "cpu" and level:
        pyxlbert._C.set_level(level)
    try:
        yield backend
    finally:
        pyxlbert._C.set_level(before)


def arguments_of(spec: Spec, case: Case, dtype: torch.dtype, device: torch.device = CPU) -> Arguments:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{spec.name}/{case.id}".encode()))
    return case.make(generator, dtype, device)


def differentiable(spec: Spec, arguments: Arguments) -> list[str]:
    return [name for name in spec.differentiable if isinstance(arguments.get(name), torch.Tensor)]


def with_gradients(spec: Spec, arguments: Arguments) -> Arguments:
    """Arguments whose differentiable tensors are leaves (strides kept) that require a gradient."""
    result = dict(arguments)
    for name in differentiable(spec, arguments):
        result[name] = arguments[name].detach().requires_grad_()
    return result


def cotangents_of(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs)


def run(function, spec: Spec, arguments: Arguments, gradients: bool, cotangents=None) -> dict[str, torch.Tensor]:
    """Outputs as "out 0", ... and gradients as "grad x", ..., on the CPU."""
    if gradients:
        arguments = with_gradients(spec, arguments)
    outputs = as_tuple(function(**arguments))
    results = {f"out {i}": output.detach() for i, output in enumerate(outputs)}
    if gradients:
        names = differentiable(spec, arguments)
        if cotangents is None:
            cotangents = cotangents_of(outputs)
        cotangents = tuple(c.to(o) for c, o in zip(cotangents, outputs, strict=True))
        found = torch.autograd.grad(outputs, [arguments[n] for n in names], cotangents, allow_unused=True)
        for name, gradient in zip(names, found, strict=True):
            results[f"grad {name}"] = torch.zeros_like(arguments[name]) if gradient is None else gradient
    return {name: value.cpu() for name, value in results.items()}


@functools.lru_cache(maxsize=4)
def _expected(op: str, case_id: str, dtype: torch.dtype) -> tuple[dict, dict, dict]:
    """Plain PyTorch's results, the truth and the sums of absolute terms: one set for all runners."""
    spec = SPECS[op]
    case = next(case for case in spec.cases if case.id == case_id)
    arguments = arguments_of(spec, case, dtype)
    wide = to_float64(arguments)
    plain = run(spec.plain, spec, arguments, case.gradients)
    cotangents = cotangents_of(tuple(plain[k] for k in plain if k.startswith("out")))
    truth = run(spec.plain, spec, wide, case.gradients, cotangents)
    terms = {name: spec.terms(name, wide, cotangents) if spec.terms is not None else None for name in truth}
    return plain, truth, terms


def check_against_truth(spec: Spec, case: Case, ours: dict, dtype: torch.dtype, backend: str) -> None:
    plain, truth, terms = _expected(spec.name, case.id, dtype)
    for name, value in ours.items():
        compare.within_budget(
            f"{spec.name} {case.id} {name}",
            value,
            plain[name].to(value.dtype) if name.startswith("out") else plain[name],
            truth[name],
            terms=terms[name],
            factor=tolerances.factor(spec.name, dtype, backend),
        )


def _grid() -> Iterator[tuple[Spec, Case]]:
    for spec in SPECS.values():
        for case in spec.cases:
            if (ALL or not case.full_only) and (case.small or not SMALL):
                yield spec, case


def _ids(value) -> str | None:
    if isinstance(value, Spec):
        return value.name
    if isinstance(value, Case | Bad):
        return value.id.replace(" ", "_")
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return None


def _parity() -> Iterator[tuple[Spec, Case, torch.dtype, str]]:
    """Every dtype on the backends a user meets; each level below this machine's takes one dtype a case, in turn."""
    for number, (spec, case) in enumerate(_grid()):
        for place, dtype in enumerate(spec.dtypes):
            for turn, runner in enumerate(runners_of(spec)):
                if runner in SLOW and not case.small:
                    continue
                usual = runner in FAST and runner not in SLOWEST
                if ALL or usual or (number + turn) % len(spec.dtypes) == place:
                    yield spec, case, dtype, runner


PARITY = list(_parity())


def _deciding(arguments: Arguments) -> torch.Tensor:
    """The tensor that decides the backend: the first of a floating dtype."""
    return next(x for x in arguments.values() if isinstance(x, torch.Tensor) and x.is_floating_point())


@pytest.mark.parametrize(("spec", "case", "dtype", "runner"), PARITY, ids=_ids)
def test_parity(spec: Spec, case: Case, dtype: torch.dtype, runner: str, poisoned, ledger) -> None:
    """Forward and every gradient within the error budget, outputs poisoned with NaN before the run."""
    arguments = arguments_of(spec, case, dtype, device_of(runner))
    refusal = OPS[spec.name].refusal(runner.partition("/")[0], _deciding(arguments))
    if refusal is not None:
        with pytest.raises(RuntimeError, match=re.escape(refusal)):
            spec.function(**arguments, backend=runner)
        assert runner == "cuda" and "at most" in refusal
        return
    with running(runner) as backend, poisoned():
        ours = run(lambda **a: spec.function(**a, backend=backend), spec, arguments, case.gradients)
    check_against_truth(spec, case, ours, dtype, backend)
    ledger(spec.name, runner)


@pytest.mark.parametrize(("spec", "case"), list(_grid()), ids=_ids)
def test_reference_in_float64(spec: Spec, case: Case) -> None:
    """The readable definition, in float64, is the truth itself."""
    arguments = to_float64(arguments_of(spec, case, torch.float32))
    ours = run(lambda **a: spec.function(**a, backend="torch"), spec, arguments, case.gradients)
    truth = run(spec.plain, spec, arguments, case.gradients)
    cotangents = cotangents_of(tuple(truth[name] for name in truth if name.startswith("out")))
    for name in ours:
        terms = spec.terms(name, arguments, cotangents) if spec.terms is not None else None
        largest = float(torch.as_tensor(terms).max()) if terms is not None and torch.as_tensor(terms).numel() else 0.0
        finite = truth[name].isfinite()
        scale = torch.cat([truth[name][finite].abs().flatten(), torch.tensor([largest], dtype=torch.float64)]).max()
        difference = (ours[name] - truth[name])[finite].abs()
        if difference.numel():
            assert float(difference.max()) <= tolerances.FLOAT64 * float(scale), (name, float(difference.max()))


@pytest.mark.parametrize(
    ("spec", "forward", "backward"),
    [
        (spec, forward, backward)
        for spec in SPECS.values()
        for forward, backward in permutations(FAST, 2)
        if all(runner.partition("/")[0] in OPS[spec.name].backends for runner in (forward, backward))
        and device_of(forward) == device_of(backward)
    ],
    ids=_ids,
)
def test_any_backward_follows_any_forward(spec: Spec, forward: str, backward: str) -> None:
    """Every backend saves the same tensors, so one's backward may follow another's forward."""
    for case in [c for c in spec.cases if c.small and c.gradients][:4]:
        arguments = arguments_of(spec, case, torch.float32, device_of(forward))
        with running(forward) as f:
            other = backward.partition("/")[0]
            with pyxlbert.use_backend(f, backward=other):
                ours = run(spec.function, spec, arguments, True)
        check_against_truth(spec, case, ours, torch.float32, f)


@pytest.mark.parametrize(("spec", "case"), list(_grid()), ids=_ids)
def test_deterministic_for_any_number_of_threads(spec: Spec, case: Case) -> None:
    """The same bits twice, and with one thread, two and five (where a vendor multiplies: for each number of them)."""
    before = torch.get_num_threads()
    arguments = arguments_of(spec, case, torch.float32)
    try:
        results = []
        for threads in (2, 2) if spec.vendor or best(spec) == "torch" else (1, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(lambda **a: spec.function(**a, backend=best(spec)), spec, arguments, case.gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            compare.same_bits(f"{spec.name} {case.id} {name}", value, other[name])


@pytest.mark.parametrize("runner", [runner for runner in RUNNERS if runner in ("triton", "cuda")])
@pytest.mark.parametrize("spec", SPECS.values(), ids=_ids)
def test_deterministic_on_a_gpu(spec: Spec, runner: str) -> None:
    """The same bits twice; in the interpreter, where programs run one after the other, for one case."""
    if runner not in OPS[spec.name].backends:
        assert spec.vendor, "every op but the vendors' products has a kernel on every backend"
        return
    for case in [case for case in spec.cases if case.small][: 1 if runner in SLOWEST else None]:
        arguments = arguments_of(spec, case, torch.float32, device_of(runner))
        if OPS[spec.name].refusal(runner, _deciding(arguments)) is not None:
            continue
        results = [run(lambda **a: spec.function(**a, backend=runner), spec, arguments, case.gradients) for _ in "ab"]
        for name, value in results[0].items():
            compare.same_bits(f"{spec.name} {case.id} {name}", value, results[1][name])


@pytest.mark.parametrize(("spec", "bad"), [(spec, bad) for spec in SPECS.values() for bad in spec.bad], ids=_ids)
def test_bad_input(spec: Spec, bad: Bad) -> None:
    """The same exception with the same text on every backend; it names the argument, what came, what was wanted."""
    texts = set()
    for runner in (None, *OPS[spec.name].backends):
        arguments = {"backend": runner} | bad.change(arguments_of(spec, spec.cases[0], torch.float32))
        with pytest.raises(bad.error) as caught:
            spec.function(**arguments)
        texts.add(str(caught.value))
    assert len(texts) == 1, texts
    (text,) = texts
    for word in (f"{spec.name}: ", *bad.words):
        assert word in text, f"{word!r} not in {text!r}"


@pytest.mark.parametrize("spec", SPECS.values(), ids=_ids)
def test_numbers_of_numpy_are_numbers(spec: Spec) -> None:
    """A scalar of NumPy means what the same number of Python means."""
    arguments = arguments_of(spec, spec.cases[0], torch.float32)
    kinds = {float: np.float64, int: np.int64}
    given = {n: kinds[type(v)](v) for n, v in arguments.items() if type(v) in kinds}
    if "dropout_p" in arguments:
        arguments["dropout_p"], given["dropout_p"], given["seed"] = 0.5, np.float32(0.5), np.int32(3)
        arguments["seed"] = 3
    ours, wanted = run(spec.function, spec, arguments | given, True), run(spec.function, spec, arguments, True)
    for name, value in wanted.items():
        compare.same_bits(f"{spec.name} {name}", ours[name], value)


@pytest.mark.parametrize("spec", [SPECS[n] for n in OPS if n.endswith("attention")], ids=_ids)
def test_autocast_casts_no_float64(spec: Spec) -> None:
    """Beside float32 a float64 tensor is an error under autocast as it is without."""
    for name, tensor in _first_tensors(spec):
        if not tensor.is_floating_point():
            continue
        usual = arguments_of(spec, spec.cases[0], torch.float32)
        for arguments in (usual | {name: tensor.double()}, to_float64(usual) | {name: tensor}):
            texts = []
            for mode in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
                with mode, pytest.raises(TypeError, match=rf"{spec.name}: \w+: got dtype float(32|64)") as caught:
                    spec.function(**arguments)
                texts.append(str(caught.value).partition(", wanted")[0])
            assert texts[0] == texts[1]


def _first_tensors(spec: Spec) -> list[tuple[str, torch.Tensor]]:
    arguments = arguments_of(spec, spec.cases[0], torch.float32)
    return [(name, value) for name, value in arguments.items() if isinstance(value, torch.Tensor)]


LAYOUTS = {
    "sparse_coo": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.float().contiguous().to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda x: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=_ids)
def test_tensors_of_other_layouts_are_refused(spec: Spec, layout: str) -> None:
    """Sparse, mkldnn and nested tensors, in place of any tensor."""
    for name, tensor in _first_tensors(spec):
        arguments = arguments_of(spec, spec.cases[0], torch.float32)
        arguments[name] = LAYOUTS[layout](tensor)
        with pytest.raises(TypeError, match=rf"{spec.name}: {name}: got a tensor of layout \w+, wanted a strided one"):
            spec.function(**arguments)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=_ids)
def test_values_that_are_not_those_in_memory(spec: Spec, backend: str) -> None:
    """A view that negates, and a tensor of zeros without memory, count as what they are, forward and backward."""
    for name, tensor in _first_tensors(spec):
        if name not in spec.differentiable:
            continue
        usual = arguments_of(spec, spec.cases[0], torch.float32)
        for given, same in (
            (torch._neg_view(tensor), -tensor),
            (torch.complex(tensor, tensor).conj().imag, -tensor),
            (torch._efficientzerotensor(tensor.shape), torch.zeros_like(tensor)),
        ):
            call = functools.partial(spec.function, backend=backend)
            with torch.no_grad():
                ours, wanted = (as_tuple(call(**usual | {name: x})) for x in (given, same))
            for a, b in zip(ours, wanted, strict=True):
                compare.close(f"{spec.name} {name}", a, b, tolerances.SUMMATION_ORDER)
        usual = with_gradients(spec, usual)
        outputs = as_tuple(spec.function(**usual, backend=backend))
        for given, same in (
            ([torch._neg_view(o.detach()) for o in outputs], [-o.detach() for o in outputs]),
            ([torch._efficientzerotensor(o.shape, dtype=o.dtype) for o in outputs], [o.detach() * 0 for o in outputs]),
        ):
            ours, wanted = (
                torch.autograd.grad(outputs, [usual[name]], list(c), retain_graph=True)[0] for c in (given, same)
            )
            compare.close(f"{spec.name} grad {name}", ours, wanted, tolerances.SUMMATION_ORDER)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("op", [op for op in OPS if op.endswith("attention")])
def test_a_row_that_sees_nothing_takes_no_gradient(op: str, backend: str) -> None:
    """Not even from a NaN: it may be padding, whose gradient nobody looked at."""
    spec = SPECS[op]
    q = torch.randn(2, 5, 2, 8)
    lengths = torch.tensor([5, 0])
    arguments = {"query": q, "key": q + 1, "value": q - 1, "key_lengths": lengths}
    if op != "attention":
        arguments["position_key"] = torch.randn(10, 2, 8)
    if op == "two_stream_attention":
        arguments |= {"content_query": arguments.pop("query"), "query_query": q * 2}
    found = []
    for value in (torch.nan, 0.0):
        cotangents = tuple(torch.ones(2, 5, 2, 8) for _ in range(2 if op == "two_stream_attention" else 1))
        for one in cotangents:
            one[1] = value
        found.append(run(functools.partial(spec.function, backend=backend), spec, arguments, True, cotangents))
    for name, value in found[1].items():
        compare.same_bits(f"{op} {name}", found[0][name], value)


# An op's case, and the argument in it whose values say where the op reads and writes.
INDICES = [
    ("attention", "bias and lengths", "key_lengths"),
    ("attention", "packed", "cu_seqlens"),
    ("relative_attention", "everything", "key_lengths"),
    ("relative_attention", "positions", "query_positions"),
    ("relative_attention", "packed", "cu_seqlens"),
    ("two_stream_attention", "everything", "key_lengths"),
    ("two_stream_attention", "everything", "target_positions"),
    ("embedding_layer_norm", "padded", "input_ids"),
    ("embedding_layer_norm", "padded", "position_ids"),
    ("embedding_layer_norm", "padded", "token_type_ids"),
]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(("op", "case", "argument"), INDICES)
def test_backward_checks_values_again(op: str, case: str, argument: str, backend: str) -> None:
    """What a caller writes into a saved tensor past autograd's eyes is an error too, not a write out of bounds."""
    spec = SPECS[op]
    arguments = arguments_of(spec, next(c for c in spec.cases if c.id == case), torch.float32)
    outputs = as_tuple(spec.function(**with_gradients(spec, arguments), backend=backend))
    arguments[argument].data.view(-1)[-1] = 2**20
    with pytest.raises(ValueError, match=rf"{op}: {argument}: got .*1048576"):
        sum(o.sum() for o in outputs).backward()


def _opchecks() -> Iterator[tuple[Spec, Case, torch.dtype, str]]:
    """Every small case on every backend, in one dtype each, in turn."""
    for number, (spec, case) in enumerate((spec, case) for spec, case in _grid() if case.small):
        for place, backend in enumerate(OPS[spec.name].backends):
            if backend in SLOW and number % 8 and not ALL:
                continue
            yield spec, case, spec.dtypes[(number + place) % len(spec.dtypes)], backend


@pytest.mark.parametrize(("spec", "case", "dtype", "backend"), list(_opchecks()), ids=_ids)
def test_opcheck(spec: Spec, case: Case, dtype: torch.dtype, backend: str) -> None:
    """Schema, fake (strides and dtypes too) and the absence of hidden aliasing, for both directions."""
    with recorded_calls(spec.name) as calls:
        arguments = arguments_of(spec, case, dtype, device_of(backend))
        run(lambda **a: spec.function(**a, backend=backend), spec, arguments, case.gradients)
    assert {direction for direction, _ in calls} == ({"fwd", "bwd"} if case.gradients else {"fwd"})
    for direction, values in calls:
        detached = tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in values)
        overload = getattr(torch.ops.pyxlbert, f"{spec.name}_{direction}").default
        tensors = [v for v in detached if isinstance(v, torch.Tensor)]
        # opcheck can copy neither a view without elements nor a tensor with two dimensions of 0.
        if any(list(v.shape).count(0) > 1 for v in tensors):
            continue
        detached = tuple(
            v.new_empty(v.shape) if isinstance(v, torch.Tensor) and v.numel() == 0 else v for v in detached
        )
        torch.library.opcheck(overload, detached, test_utils=("test_schema", "test_faketensor"))


@contextlib.contextmanager
def recorded_calls(op: str) -> Iterator[list]:
    """The arguments of every raw call of `op` inside the block."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name()
            if name.startswith(f"pyxlbert::{op}_") and name.rpartition("_")[2] in ("fwd", "bwd"):
                calls.append((name.rpartition("_")[2], args))
            return func(*args, **(kwargs or {}))

    with Record():
        yield calls


@pytest.mark.parametrize("spec", SPECS.values(), ids=_ids)
def test_compiles_as_one_graph(spec: Spec) -> None:
    """torch.compile, full graph, dynamic shapes, forward and backward: equal to eager, for every shape it is given."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **a: spec.function(**a, backend=best(spec)), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    small = [case for case in spec.cases if case.small and case.gradients]
    for case in (small[0], small[1], small[2], small[-3]):
        arguments = arguments_of(spec, case, torch.float32)
        ours = run(compiled, spec, arguments, True)
        eager = run(lambda **a: spec.function(**a, backend=best(spec)), spec, arguments, True)
        for name, value in eager.items():
            compare.same_bits(f"{spec.name} {case.id} compiled {name}", ours[name], value)
        with torch.no_grad():
            eager = run(lambda **a: spec.function(**a, backend=best(spec)), spec, arguments, False)
            compare.same_bits("no grad", as_tuple(compiled(**arguments))[0], eager["out 0"])


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_inductor_gets_the_strides_it_was_promised(backend: str, tmp_path, monkeypatch) -> None:
    """The generated code asserts them: of an input whose rows are not in order, y is in order."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    x, ids = torch.randn(5, 3, 8).transpose(0, 1), torch.randint(0, 8, (4, 3)).t()
    weight, bias = torch.randn(8), torch.randn(8)

    def call(x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedded = pyxlbert.embedding_layer_norm(ids, weight.expand(8, 8), None, None, weight, bias, backend=backend)
        return pyxlbert.layer_norm(x, weight, bias, backend=backend), embedded

    for name, ours, eager in zip(("norm", "embedding"), torch.compile(call)(x, ids), call(x, ids), strict=True):
        compare.same_bits(name, ours, eager)


@pytest.mark.parametrize("spec", SPECS.values(), ids=_ids)
def test_exports(spec: Spec) -> None:
    """torch.export keeps the op as one node and the exported program computes the same."""
    arguments = arguments_of(spec, spec.cases[0], torch.float32)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    others = {name: value for name, value in arguments.items() if name not in tensors}

    class Module(torch.nn.Module):
        def forward(self, **tensors):
            return as_tuple(spec.function(**tensors, **others, backend=best(spec)))

    with torch.no_grad():
        program = torch.export.export(Module(), (), tensors)
        nodes = [str(n.target) for n in program.graph.nodes if "pyxlbert" in str(n.target)]
        assert nodes == [f"pyxlbert.{spec.name}_fwd.default"]
        for ours, eager in zip(program.module()(**tensors), Module()(**tensors), strict=True):
            compare.same_bits(f"{spec.name} exported", ours, eager)


@pytest.mark.parametrize("spec", SPECS.values(), ids=_ids)
def test_checkpointed(spec: Spec) -> None:
    """torch.utils.checkpoint recomputes to the same gradients."""
    arguments = arguments_of(spec, spec.cases[0], torch.float32)
    names = list(arguments)

    def checkpointed(**a):
        return checkpoint(
            lambda *v: spec.function(**dict(zip(names, v, strict=True))), *a.values(), use_reentrant=False
        )

    ours = run(checkpointed, spec, arguments, True)
    for name, value in run(spec.function, spec, arguments, True).items():
        compare.same_bits(f"{spec.name} checkpointed {name}", ours[name], value)


# What an op casts under autocast; parameters that are added in float32 stay, and so do LayerNorms and embeddings whole.
CAST = {
    "linear": ("x", "weight", "bias"),
    "linear_gelu": ("x", "weight", "bias"),
    "attention": ("query", "key", "value"),
    "relative_attention": ("query", "key", "value", "position_key"),
    "two_stream_attention": ("content_query", "query_query", "key", "value", "position_key"),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=_ids)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=_ids)
def test_autocast(spec: Spec, dtype: torch.dtype) -> None:
    """Under autocast the op equals itself on inputs cast as documented; gradients have their parameter's dtype."""
    usual = arguments_of(spec, spec.cases[0], torch.float32)
    arguments = with_gradients(spec, usual)
    with torch.autocast("cpu", dtype=dtype):
        outputs = as_tuple(spec.function(**arguments))
    sum(o.float().sum() for o in outputs).backward()
    cast = with_gradients(spec, {n: x.to(dtype) if n in CAST.get(spec.name, ()) else x for n, x in usual.items()})
    wanted = as_tuple(spec.function(**cast))
    sum(o.float().sum() for o in wanted).backward()
    for place, (ours, other) in enumerate(zip(outputs, wanted, strict=True)):
        compare.same_bits(f"{spec.name} out {place}", ours, other)
    for name in differentiable(spec, arguments):
        assert arguments[name].grad.dtype is torch.float32
        compare.same_bits(f"{spec.name} grad {name}", arguments[name].grad, cast[name].grad.float())


@pytest.mark.parametrize("gradients", [False, True], ids=["plain", "with gradients"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=_ids)
def test_double_backward_and_vmap_are_named_errors(spec: Spec, gradients: bool) -> None:
    arguments = arguments_of(spec, spec.cases[0], torch.float32)
    names = differentiable(spec, arguments)
    if gradients:
        arguments = with_gradients(spec, arguments)
        outputs = as_tuple(spec.function(**arguments))
        with pytest.raises(RuntimeError, match=rf"{spec.name}: double backward"):
            torch.autograd.grad(sum(o.sum() for o in outputs), [arguments[n] for n in names], create_graph=True)
    for name in names:
        stacked = torch.stack([arguments[name].detach()] * 2).requires_grad_(gradients)
        with pytest.raises(RuntimeError, match=rf"{spec.name}: vmap"):
            torch.vmap(lambda value, name=name: spec.function(**{**arguments, name: value}))(stacked)
        # Over the batch the tensors have a dimension less, and no seed may be drawn.
        if "dropout_p" in arguments:
            with pytest.raises(RuntimeError, match=rf"{spec.name}: vmap"):
                torch.vmap(lambda value, name=name: spec.function(**arguments | {name: value, "seed": None}))(
                    arguments[name]
                )


@pytest.mark.parametrize("gradients", [False, True], ids=["plain", "with gradients"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=_ids)
def test_transforms_are_named_errors(spec: Spec, gradients: bool) -> None:
    """Forward-mode differentiation, which would be a tangent of zeros, and torch.func's backward."""
    arguments = arguments_of(spec, spec.cases[0], torch.float32)
    for name in differentiable(spec, arguments):
        x = arguments[name].detach().requires_grad_(gradients)

        def call(value: torch.Tensor, name: str = name) -> torch.Tensor:
            return as_tuple(spec.function(**arguments | {name: value}))[0].sum()

        forward = rf"{spec.name}: forward-mode differentiation \(jvp\) is not supported"
        with pytest.raises(RuntimeError, match=forward):
            torch.func.jvp(call, (x,), (x.detach(),))
        with pytest.raises(RuntimeError, match=forward), torch.autograd.forward_ad.dual_level():
            call(torch.autograd.forward_ad.make_dual(x, x.detach()))
        for transform in (torch.func.grad, lambda f: functools.partial(torch.func.vjp, f), torch.func.jacrev):
            with pytest.raises(RuntimeError, match=rf"{spec.name}: torch.func.grad and vjp are not supported"):
                transform(call)(x)
        # A tensor that takes no part stays what it is.
        torch.vmap(lambda _, x=x: call(x).detach())(torch.zeros(2))


def test_named_backend_never_falls_back() -> None:
    for name in backends.NAMES:
        reason = backends.unavailable(name)
        if reason is not None:
            with pytest.raises(RuntimeError, match=name):
                pyxlbert.layer_norm(torch.randn(2, 4), torch.ones(4), torch.zeros(4), backend=name)
    with pytest.raises(RuntimeError, match=r"layer_norm: backend 'cpu' is unavailable: .*float64"):
        pyxlbert.layer_norm(*(torch.ones(s, dtype=torch.float64) for s in ((2, 4), 4, 4)), backend="cpu")


def test_use_backend_is_scoped_and_per_thread() -> None:
    assert backends.default_backend() is None
    with pyxlbert.use_backend("torch"):
        assert OPS["layer_norm"].resolve(None, torch.ones(1)) == "torch"
        with pytest.raises(ValueError, match="backend"), pyxlbert.use_backend("mkl"):
            pass
        assert backends.default_backend() == "torch"
    assert backends.default_backend() is None


def test_explain_names_every_backend(capsys) -> None:
    text = backends.explain("layer_norm", torch.ones(2, 4))
    assert capsys.readouterr().out.strip() == text
    assert "cpu: taken" in text and all(name in text for name in backends.NAMES)
    assert "float64" in backends.explain("layer_norm", torch.ones(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="layer_norm"):
        backends.explain("nonsense")


def test_explain_says_what_use_backend_does() -> None:
    x = torch.ones(2, 4)
    with pyxlbert.use_backend("torch"):
        text = backends.explain("layer_norm", x)
        assert "torch: taken, as use_backend names it" in text and "cpu: possible" in text
    with pyxlbert.use_backend("cpu"):
        text = backends.explain("layer_norm", x.double())
        assert "float64 runs on backend 'torch'; use_backend names it, so a call" in text and "torch: possible" in text
    with pyxlbert.use_backend(None, backward="torch"):
        assert "cpu: taken" in backends.explain("layer_norm", x)


def test_explain_refuses_what_decides_nothing() -> None:
    ids, table = torch.zeros(2, 3, dtype=torch.int64), torch.ones(4, 8)
    for op, tensors, error, words in (
        ("layer_norm", (), ValueError, "tensors: got none"),
        ("layer_norm", ([1.0],), TypeError, "tensor 0 of layer_norm: got list, wanted a tensor"),
        ("layer_norm", (table, None), TypeError, "tensor 1 of layer_norm: got NoneType"),
        ("layer_norm", (ids, table), TypeError, "tensor 0 of layer_norm: got dtype int64, wanted float32"),
        ("layer_norm", (table.to("meta"),), ValueError, "meta"),
        ("embedding_layer_norm", (ids,), ValueError, "tensors: got none of a floating dtype"),
        ("embedding_layer_norm", (ids, ids), TypeError, "int64"),
    ):
        with pytest.raises(error, match=f"explain: .*{words}"):
            backends.explain(op, *tensors)
    assert "cpu: taken" in backends.explain("embedding_layer_norm", ids, table)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_debug_checks_watch_the_values_on_a_gpu(direction: str) -> None:
    """What torch calls for CUDA tensors looks at values, which waits for the device, in the block alone."""
    op = OPS["attention"]
    q = torch.randn(2, 3, 1, 8)
    lengths, rest = torch.tensor([3, 4], dtype=torch.int32), (None, 0, None, None, False, 1.0, 0.0, None)
    out, lse = op.runners["fwd"]["CUDA"](q, q, q, lengths, *rest, "torch")
    call = {"fwd": (q, q, q, lengths, *rest), "bwd": (q, out, lse, q, q, q, lengths, *rest, False)}[direction]
    op.runners[direction]["CUDA"](*call, "torch")
    with pyxlbert.debug_checks():
        with pyxlbert.debug_checks():
            pass
        with pytest.raises(ValueError, match="attention: key_lengths: got 4, wanted lengths in"):
            op.runners[direction]["CUDA"](*call, "torch")
        # Backward on a GPU runs in a thread of torch's.
        with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="key_lengths"):
            pool.submit(op.runners[direction]["CUDA"], *call, "torch").result()
    op.runners[direction]["CUDA"](*call, "torch")
    with pytest.raises(ValueError, match="key_lengths"):
        op.runners[direction]["CPU"](*call, "torch")


@pytest.mark.parametrize("op", OPS)
def test_other_devices_have_backend_torch(op: str) -> None:
    for direction in ("fwd", "bwd"):
        for key in ("CPU", "CUDA", "MPS", "XPU", "PrivateUse1"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"pyxlbert::{op}_{direction}", key)


def test_specs_can_be_copied() -> None:
    """A description holds no tensors: only the recipe."""
    for spec in SPECS.values():
        copy.copy(spec)
        assert len({case.id for case in spec.cases}) == len(spec.cases)
        assert pickle.dumps([case.id for case in spec.cases])
