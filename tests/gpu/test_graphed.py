"""`pyxlbert.graphed`: the graph where a GPU is; everywhere its errors, and that a forward pass waits for no value."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import pyxlbert
from pyxlbert import models
from pyxlbert.models.graphed import check_arguments
from pyxlbert.nn import fixed_sizes
from pyxlbert.testing import compare, tolerances
from pyxlbert.testing.models import randomize

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here: make gpu runs it")


def build(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A small model in eval mode and a padded call of it."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([9, 20, 14])
    given = {
        "input_ids": torch.randint(5, 90, (3, 20), generator=generator),
        "attention_mask": (torch.arange(20)[None] < lengths[:, None]).long(),
        "token_type_ids": (torch.arange(20) > 7).long().expand(3, 20).contiguous(),
    }
    if name == "bert":
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        model = models.BertModel(models.BertConfig(vocab_size=90, **sizes))
    else:
        model = models.XLNetLMHeadModel(models.XLNetConfig(vocab_size=90, d_model=64, n_layer=2, n_head=4, d_inner=128))
    if name == "xlnet, targets":
        rank = torch.stack([torch.randperm(20, generator=generator) for _ in range(3)])
        given["perm_mask"] = (rank[:, :, None] <= rank[:, None, :]).float()
        given["target_mapping"] = torch.nn.functional.one_hot(rank[:, :4], 20).float()
    randomize(model, generator)
    return model.eval(), given


NAMES = ("bert", "xlnet", "xlnet, targets")


def output(model_output, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the tokens, or of the targets."""
    x = model_output[0]
    return x if "target_mapping" in given else x[given["attention_mask"].bool()]


@pytest.mark.parametrize("name", NAMES)
def test_no_size_depends_on_values(name: str) -> None:
    """Fake tensors have none: outside of the block a model asks for them, inside it does not."""
    model, given = build(name)
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {n: mode.from_tensor(x) for n, x in given.items()}
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            model(**fake)
        with fixed_sizes():
            model(**fake)


@pytest.mark.parametrize("name", NAMES)
def test_fixed_sizes_change_no_result(name: str) -> None:
    model, given = build(name)
    with torch.no_grad():
        usual = output(model(**given), given)
        with fixed_sizes():
            compare.close(name, output(model(**given), given), usual, tolerances.MODEL_FLOAT32)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_computes_what_the_model_does(name: str, dtype: torch.dtype) -> None:
    """For the example, for other values, after a write to the weights: bit for bit what the same kernels give."""
    model, given = build(name)
    model = model.cuda().to(dtype)
    given = {n: x.cuda() for n, x in given.items()}
    run = pyxlbert.graphed(model, given)
    others = given | {"input_ids": given["input_ids"].flip(0), "attention_mask": given["attention_mask"].flip(0)}
    for arguments in (given, others, given):
        with torch.inference_mode(), fixed_sizes():
            eager = model(**arguments)[0]
        compare.same_bits(name, run(**arguments)[0], eager)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)


class Launches(NamedTuple):
    """What the host started on the device: kernels one by one, and whole graphs."""

    kernels: int
    graphs: int


def launches(profile: torch.profiler.profile) -> Launches:
    """Counts the launches of a profile by the names of the runtime's and the driver's calls.

    Raises:
        AssertionError: there are none: the profiler did not record the device.
    """
    names = [event.name for event in profile.events()]
    found = Launches(sum("LaunchKernel" in name for name in names), sum("GraphLaunch" in name for name in names))
    assert any(found), f"the profiler recorded no launch among {len(names)} events"
    return found


def check_one_launch(eager: torch.profiler.profile, graph: torch.profiler.profile, inputs: int) -> None:
    """The model is many launches; replayed it is one, beside at most a copy of each input."""
    many, one = launches(eager), launches(graph)
    assert many.graphs == 0 and many.kernels > 10, f"eager: {many}"
    assert one.graphs == 1 and one.kernels <= inputs, f"graph: {one}"


@needs_gpu
def test_a_graph_is_one_launch() -> None:
    """The host is done with a replay long before it would have launched the kernels one by one."""
    model, given = build("bert")
    model, given = model.cuda(), {n: x.cuda() for n, x in given.items()}
    run = pyxlbert.graphed(model, given)

    def eager(**arguments: torch.Tensor) -> None:
        with torch.inference_mode(), fixed_sizes():
            model(**arguments)

    profiles = []
    for call in (eager, run):
        call(**given)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call(**given)
            torch.cuda.synchronize()
        profiles.append(profile)
    check_one_launch(*profiles, len(given))


class FakeProfile:
    """A profile that holds these events."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def events(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in self.names]


COPIES = ("aten::copy_", "cudaMemcpyAsync", "cudaLaunchKernel")
EAGER = FakeProfile(*("aten::addmm", "cudaLaunchKernel") * 8, *("cuLaunchKernelEx", "cudaLaunchKernelExC") * 4)
GRAPH = FakeProfile(*COPIES, "cudaGraphLaunch")


def test_launches_are_counted_by_the_calls_of_the_runtime_and_the_driver() -> None:
    assert launches(EAGER) == Launches(kernels=16, graphs=0)
    assert launches(GRAPH) == Launches(kernels=1, graphs=1)
    check_one_launch(EAGER, GRAPH, inputs=3)


@pytest.mark.parametrize(
    ("eager", "graph", "words"),
    [
        (EAGER, FakeProfile(*COPIES, *("cuLaunchKernel",) * 3, "cudaGraphLaunch"), r"graph: Launches\(kernels=4"),
        (EAGER, EAGER, r"graph: Launches\(kernels=16, graphs=0\)"),
        (EAGER, FakeProfile(*COPIES, "cudaGraphLaunch", "cudaGraphLaunch"), "graphs=2"),
        (EAGER, FakeProfile("aten::copy_"), "the profiler recorded no launch among 1 events"),
        (FakeProfile("aten::addmm"), GRAPH, "the profiler recorded no launch among 1 events"),
        (GRAPH, GRAPH, r"eager: Launches\(kernels=1, graphs=1\)"),
    ],
    ids=["kernels beside the graph", "no graph", "two graphs", "no device, graph", "no device, eager", "eager is one"],
)
def test_what_is_not_one_launch_fails(eager: FakeProfile, graph: FakeProfile, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_one_launch(eager, graph, inputs=3)


def test_a_profile_without_the_device_fails() -> None:
    """A real one, of the host alone."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3).add(1)
    with pytest.raises(AssertionError, match=r"the profiler recorded no launch among [1-9]"):
        launches(profile)


def test_errors_name_what_came_and_what_was_wanted() -> None:
    model, given = build("bert")
    with pytest.raises(ValueError, match=r"graphed: model: got one on cpu, wanted one on a CUDA device"):
        pyxlbert.graphed(model, given)
    with pytest.raises(ValueError, match=r"graphed: model: got \w+ in training mode, wanted model.eval\(\)"):
        pyxlbert.graphed(model.train(), given)
    with pytest.raises(TypeError, match=r"graphed: model: got str, wanted a torch\.nn\.Module"):
        pyxlbert.graphed("model", given)
    with pytest.raises(TypeError, match="graphed: example: got Tensor, wanted a mapping"):
        pyxlbert.graphed(model, given["input_ids"])


def test_arguments_are_those_of_the_example() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    inputs, others = {"input_ids": ids}, {"use_mems": False}
    check_arguments(inputs, others, {"input_ids": ids + 1, "use_mems": False})
    for arguments, words in (
        ({"input_ids": ids}, r"arguments: got \['input_ids'\], wanted \['input_ids', 'use_mems'\]"),
        ({"input_ids": ids, "use_mems": True}, "use_mems: got True, wanted False"),
        ({"input_ids": None, "use_mems": False}, "input_ids: got NoneType, wanted a tensor"),
        ({"input_ids": ids[:1], "use_mems": False}, r"input_ids: got shape \[1, 3\], wanted \[2, 3\]"),
        ({"input_ids": ids.int(), "use_mems": False}, "input_ids: got dtype torch.int32, wanted torch.int64"),
        ({"input_ids": ids.to("meta"), "use_mems": False}, "input_ids: got device meta, wanted cpu"),
    ):
        with pytest.raises(ValueError, match=f"graphed: {words}"):
            check_arguments(inputs, others, arguments)
