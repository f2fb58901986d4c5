"""`register_kernels`: transformers' GELU through the package `kernels`, in a process of its own, since it is global."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Where the Makefile puts it, beside what is installed: see requirements-dev.txt.
FOLDER = Path(sys.prefix) / "kernels"

CODE = """
import copy, torch, transformers as tr, pyxlbert
from pyxlbert.integrations import kernel_layers
from pyxlbert.testing import compare, tolerances

calls = []
op = kernel_layers.bias_gelu
kernel_layers.bias_gelu = lambda *rows, **named: (calls.append(named), op(*rows, **named))[1]
pyxlbert.register_kernels()
SMALL = dict(hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=20, vocab_size=50)
SMALL |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
ids = torch.arange(12).view(2, 6)
cotangent = torch.randn(2, 6, 24)
for act, approximate in (("gelu", "none"), ("gelu_new", "tanh"), ("gelu_pytorch_tanh", "tanh"), ("gelu_fast", "tanh")):
    for training in (False, True):
        plain = tr.BertModel(tr.BertConfig(hidden_act=act, **SMALL)).train(training)
        ours = copy.deepcopy(plain)
        ours.set_use_kernels(True)
        found = []
        for model in (plain, ours):
            calls.clear()
            out = model(ids)[0]
            (out * cotangent).sum().backward()
            found.append((out.detach(), model.encoder.layer[0].intermediate.dense.weight.grad))
        assert [named.get("approximate", "none") for named in calls] == [approximate] * 2, (act, calls)
        compare.close(act, found[1][0], found[0][0], tolerances.MODEL_FLOAT32)
        compare.close(act, found[1][1], found[0][1], tolerances.MODEL_GRADIENT_FLOAT32)
        assert "pyxlbert" not in ours.config.to_json_string()
model = tr.BertModel(tr.BertConfig(hidden_act="silu", **SMALL)).eval()
model.set_use_kernels(True)
calls.clear()
model(ids)
assert not calls
"""

WITHOUT = """
import sys
sys.modules["kernels"] = None
import pyxlbert
try:
    pyxlbert.register_kernels()
except ImportError as error:
    assert "kernels" in str(error)
else:
    raise AssertionError("no error")
"""


def run(code: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(FOLDER)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not FOLDER.is_dir(), reason="`make setup` has not put the package kernels there")
def test_gelu_is_ours() -> None:
    run(CODE)


def test_without_the_package() -> None:
    run(WITHOUT)
