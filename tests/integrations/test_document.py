"""docs/drop-in.md: its examples run, and its table is what models do."""

from __future__ import annotations

import re
from pathlib import Path

import conformers
import pytest
import torch
import transformers
import zoo

import pyxlbert
from pyxlbert.integrations import conformer, funnel
from pyxlbert.integrations.drop_in import architectures
from pyxlbert.nn import relative_attention as relative

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "drop-in.md").read_text(encoding="utf-8")
PATTERN = r"^\| ([\w-]+) \| (yes) \| (yes) \| (.+?) \| (yes) \| (.+?) \|$"
ROWS = {row[0]: row[1:] for row in re.findall(PATTERN, TEXT, re.MULTILINE)}


def test_the_examples_run(capsys) -> None:
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(code, "docs/drop-in.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.strip() and all(f"    {line}" in TEXT for line in printed.strip().splitlines())


def test_the_oldest_version_is_the_one_that_is_tested() -> None:
    lines = (Path(__file__).resolve().parents[2] / "requirements-oldest.txt").read_text(encoding="utf-8")
    (oldest,) = re.findall(r"^transformers==(\d+\.\d+)", lines, re.MULTILINE)
    assert f"runs the tests with {oldest}, the oldest" in TEXT and f"Before {oldest}, `register_attention`" in TEXT


def test_the_table_has_every_architecture() -> None:
    assert sorted(architectures()) == list(ROWS)


@pytest.mark.parametrize("kind", sorted(zoo.ZOO))
def test_the_table_says_what_a_model_does(kind: str, monkeypatch) -> None:
    """The column of compilation is `test_compile` of each architecture."""
    model = pyxlbert.accelerate(zoo.build(kind))
    inside, attended = [], []
    linear, attention = pyxlbert.nn.linear.linear, pyxlbert.nn.self_attention.attention
    monkeypatch.setattr(pyxlbert.nn.linear, "linear", lambda x, *rest: (inside.append(x.dim()), linear(x, *rest))[1])
    monkeypatch.setattr(
        pyxlbert.nn.self_attention,
        "attention",
        lambda *rows, **named: (attended.append(named), attention(*rows, **named))[1],
    )
    model.eval()
    with torch.no_grad():
        model(**zoo.batch(model))
    assert set(inside) == {2}
    packed = {named["cu_seqlens"] is not None for named in attended}
    biased = {named["bias"] is not None for named in attended}
    said = ("yes" if packed == {True} else "yes, but in attention", "as a bias" if biased == {True} else "–")
    _, _, removed, _, relative = ROWS[kind]
    assert (removed, relative) == said
    model.train()(**zoo.batch(model))[0].sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pooler" not in name)


def test_the_table_says_what_xlnet_does(monkeypatch) -> None:
    """Padding goes where no memories are returned."""
    fields = {"vocab_size": 50, "d_model": 24, "n_layer": 1, "n_head": 3, "d_inner": 20}
    model = transformers.XLNetModel(transformers.XLNetConfig(**fields))
    pyxlbert.accelerate(model)
    packed, op = [], relative.relative_attention
    monkeypatch.setattr(
        relative,
        "relative_attention",
        lambda *rows, **named: (packed.append(named.get("cu_seqlens") is not None), op(*rows, **named))[1],
    )
    for use_mems in (False, True):
        output = model(torch.full((2, 5), 7), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]]), use_mems=use_mems)
    output[0].sum().backward()
    assert packed == [True, False] and model.layer[0].rel_attn.r.grad is not None
    assert ROWS["xlnet"] == ("yes", "yes", "where nobody reads it", "yes", "yes")


def test_the_table_says_what_funnel_does(monkeypatch) -> None:
    fields = {"vocab_size": 50, "d_model": 24, "n_head": 3, "d_head": 8, "d_inner": 20, "block_sizes": [1, 1]}
    model = pyxlbert.accelerate(transformers.FunnelBaseModel(transformers.FunnelConfig(**fields)).eval())
    lengths, op = [], funnel.relative_attention
    monkeypatch.setattr(
        funnel, "relative_attention", lambda x, *rows, **named: (lengths.append(x.shape[1]), op(x, *rows, **named))[1]
    )
    ids, mask = torch.full((2, 8), 7), torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    model(ids, attention_mask=mask)[0].sum().backward()
    # All places of every row, but for the first, which has no term of distance.
    assert lengths == [7, 3] and model.encoder.blocks[0][0].attention.r_kernel.grad is not None
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend="eager")(ids, attention_mask=mask)
    assert len(lengths) == 2
    assert ROWS["funnel"] == ("yes", "yes", "no, pooling sees it", "yes", "yes, but under compile")


@pytest.mark.parametrize("kind", sorted(conformers.MODELS))
def test_the_table_says_what_a_conformer_does(kind: str, monkeypatch) -> None:
    name = conformers.MODELS[kind]
    model = pyxlbert.accelerate(conformers.build(name))
    attended = []
    op = conformer.relative_attention
    monkeypatch.setattr(
        conformer, "relative_attention", lambda *rows, **named: (attended.append((rows, named)), op(*rows, **named))[1]
    )
    model.train()(**conformers.arguments(name, model))[0].sum().backward()
    assert all(p.grad is not None for path, p in model.named_parameters() if "self_attn" in path)
    whole = all(rows[0].dim() == 4 and "cu_seqlens" not in named for rows, named in attended)
    assert attended and ROWS[kind][2::2] == ("no, a convolution sees it" if whole else "yes", "yes")
