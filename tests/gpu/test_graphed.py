"""`pyxlbert.graphed`: the graph where a GPU is; everywhere its errors, and that a forward pass waits for no value."""

from __future__ import annotations

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


@needs_gpu
def test_a_graph_is_one_launch() -> None:
    """The host is done with a replay long before it would have launched the kernels one by one."""
    model, given = build("bert")
    given = {n: x.cuda() for n, x in given.items()}
    run = pyxlbert.graphed(model.cuda(), given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(**given)
    launches = [event for event in profile.events() if "Launch" in event.name and "Graph" not in event.name]
    assert len(launches) <= len(given)


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
