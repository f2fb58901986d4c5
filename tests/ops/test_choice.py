"""Which backend runs an op, and how a caller learns why."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pyxlbert
from pyxlbert import backends
from pyxlbert.backends import OPS


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
    call = {"fwd": (q, q, q, lengths, *rest), "bwd": (q, out, lse, q, q, q, lengths, *rest, [True, True, True, False])}[
        direction
    ]
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
    for direction in OPS[op].records:
        for key in ("CPU", "CUDA", "MPS", "XPU", "PrivateUse1"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"pyxlbert::{op}_{direction}", key)
