"""What every op takes and refuses, and with which words; what it does with tensors that are not what they seem."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from runners import (
    arguments_of,
    first_tensors,
    ids_of,
    run,
    with_gradients,
)

from pyxlbert.backends import OPS
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Bad, Spec, Use, as_tuple, to_float64


@pytest.mark.parametrize(("spec", "bad"), [(spec, bad) for spec in SPECS.values() for bad in spec.bad], ids=ids_of)
def test_bad_input(spec: Spec, bad: Bad) -> None:
    """The same exception with the same text on every backend; it names the argument, what came, what was wanted."""
    texts = set()
    for runner in (None, *OPS[spec.name].backends):
        arguments = {"backend": runner} | bad.change(arguments_of(spec, spec.suite[0], torch.float32))
        with pytest.raises(bad.error) as caught:
            spec.function(**arguments)
        texts.add(str(caught.value))
    assert len(texts) == 1, texts
    (text,) = texts
    for word in (f"{spec.name}: ", *bad.words):
        assert word in text, f"{word!r} not in {text!r}"


@pytest.mark.parametrize("spec", SPECS.values(), ids=ids_of)
def test_numbers_of_numpy_are_numbers(spec: Spec) -> None:
    """A scalar of NumPy means what the same number of Python means."""
    arguments = arguments_of(spec, spec.suite[0], torch.float32)
    kinds = {float: np.float64, int: np.int64}
    given = {n: kinds[type(v)](v) for n, v in arguments.items() if type(v) in kinds}
    if "dropout_p" in arguments:
        arguments["dropout_p"], given["dropout_p"], given["seed"] = 0.5, np.float32(0.5), np.int32(3)
        arguments["seed"] = 3
    ours, wanted = run(spec.function, spec, arguments | given, True), run(spec.function, spec, arguments, True)
    for name, value in wanted.items():
        compare.same_bits(f"{spec.name} {name}", ours[name], value)


@pytest.mark.parametrize("spec", [SPECS[n] for n in OPS if n.endswith("attention")], ids=ids_of)
def test_autocast_casts_no_float64(spec: Spec) -> None:
    """Beside float32 a float64 tensor is an error under autocast as it is without."""
    for name, tensor in first_tensors(spec):
        if not tensor.is_floating_point():
            continue
        usual = arguments_of(spec, spec.suite[0], torch.float32)
        for arguments in (usual | {name: tensor.double()}, to_float64(usual) | {name: tensor}):
            texts = []
            for mode in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
                with mode, pytest.raises(TypeError, match=rf"{spec.name}: \w+: got dtype float(32|64)") as caught:
                    spec.function(**arguments)
                texts.append(str(caught.value).partition(", wanted")[0])
            assert texts[0] == texts[1]


LAYOUTS = {
    "sparse_coo": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.float().contiguous().to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda x: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=ids_of)
def test_tensors_of_other_layouts_are_refused(spec: Spec, layout: str) -> None:
    """Sparse, mkldnn and nested tensors, in place of any tensor."""
    for name, tensor in first_tensors(spec):
        arguments = arguments_of(spec, spec.suite[0], torch.float32)
        arguments[name] = LAYOUTS[layout](tensor)
        with pytest.raises(TypeError, match=rf"{spec.name}: {name}: got a tensor of layout \w+, wanted a strided one"):
            spec.function(**arguments)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=ids_of)
def test_values_that_are_not_those_in_memory(spec: Spec, backend: str) -> None:
    """A view that negates, and a tensor of zeros without memory, count as what they are, forward and backward."""
    for name, tensor in first_tensors(spec):
        if name not in spec.differentiable:
            continue
        usual = arguments_of(spec, spec.suite[0], torch.float32)
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
    arguments = arguments_of(spec, next(c for c in spec.suite if c.id == case), torch.float32)
    outputs = as_tuple(spec.function(**with_gradients(spec, arguments), backend=backend))
    arguments[argument].data.view(-1)[-1] = 2**20
    with pytest.raises(ValueError, match=rf"{op}: {argument}: got .*1048576"):
        sum(o.sum() for o in outputs).backward()


# What an op casts under autocast; parameters that are added in float32 stay, and so do LayerNorms and embeddings whole.
CAST = {
    "linear": ("x", "weight", "bias"),
    "linear_gelu": ("x", "weight", "bias"),
    "encoder_layer": ("x", *(f"{name}_{part}" for name in ("qkv", "out", "up", "down") for part in ("weight", "bias"))),
    "attention": ("query", "key", "value"),
    "relative_attention": ("query", "key", "value", "position_key"),
    "two_stream_attention": ("content_query", "query_query", "key", "value", "position_key"),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=ids_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids_of)
def test_autocast(spec: Spec, dtype: torch.dtype) -> None:
    """Under autocast the op equals itself on inputs cast as documented; gradients have their parameter's dtype."""
    usual = arguments_of(spec, spec.suite[0], torch.float32)
    arguments = with_gradients(spec, usual)
    with torch.autocast("cpu", dtype=dtype):
        outputs = as_tuple(spec.function(**arguments))
    sum(o.float().sum() for o in outputs).backward()
    cast = with_gradients(spec, {n: x.to(dtype) if n in CAST.get(spec.name, ()) else x for n, x in usual.items()})
    wanted = as_tuple(spec.function(**cast))
    sum(o.float().sum() for o in wanted).backward()
    for place, (ours, other) in enumerate(zip(outputs, wanted, strict=True)):
        compare.same_bits(f"{spec.name} out {place}", ours, other)
    for name in spec.leaves(arguments):
        assert arguments[name].grad.dtype is torch.float32
        compare.same_bits(f"{spec.name} grad {name}", arguments[name].grad, cast[name].grad.float())


@pytest.mark.parametrize("gradients", [False, True], ids=["plain", "with gradients"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=ids_of)
def test_double_backward_and_vmap_are_named_errors(spec: Spec, gradients: bool) -> None:
    arguments = arguments_of(spec, spec.suite[0], torch.float32)
    names = spec.leaves(arguments)
    if gradients:
        arguments = with_gradients(spec, arguments)
        outputs = as_tuple(spec.function(**arguments))
        # What is made of other ops speaks in their name.
        name = r"\w+" if spec.composed else spec.name
        with pytest.raises(RuntimeError, match=rf"{name}: double backward"):
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
@pytest.mark.parametrize("spec", SPECS.values(), ids=ids_of)
def test_transforms_are_named_errors(spec: Spec, gradients: bool) -> None:
    """Forward-mode differentiation, which would be a tangent of zeros, and torch.func's backward."""
    arguments = arguments_of(spec, spec.suite[0], torch.float32)
    for name in spec.leaves(arguments):
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


def test_every_op_has_cases_for_whoever_calls_it() -> None:
    """An op without one would not be timed, compiled ahead or walked by the emulation, and nothing would say so."""
    for name, spec in SPECS.items():
        wanted = {Use.SUITE, Use.RACE}
        if "triton" in OPS[name].backends:
            wanted |= {Use.AHEAD, Use.AHEAD_ALL}
        if "cuda" in OPS[name].backends:
            wanted |= {Use.EMULATION, Use.PREFER}
        assert wanted <= {use for case in spec.cases for use in case.uses}, name
        for case in spec.cases:
            # Small is said of the suite's cases alone.
            assert case.uses and (case.small or Use.SUITE in case.uses), case.id
            meta = spec.arguments(case, None, torch.float32, torch.device("meta"))
            assert spec.bytes_moved(meta, False) <= spec.bytes_moved(meta, True)


def test_specs_can_be_copied() -> None:
    """A description holds no tensors: only the recipe."""
    for spec in SPECS.values():
        copy.copy(spec)
        assert len({case.id for case in spec.cases}) == len(spec.cases)
        assert pickle.dumps([case.id for case in spec.cases])
