"""Why a backend cannot run: its version, the driver, and the device that the tensor itself is on."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest
import torch

from pyxlbert import backends
from pyxlbert.backends import OPS, native, presence

OLD_DRIVER = "the driver is too old for the CUDA runtime of the native module"


class OnGpu:
    """What the choice looks at of a CUDA tensor `[4, 64]`."""

    dtype = torch.float32
    shape = torch.Size((4, 64))
    is_cpu = False

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)

    def numel(self) -> int:
        return self.shape.numel()

    def dim(self) -> int:
        return len(self.shape)

    def get_device(self) -> int:
        return self.device.index


@pytest.fixture
def three_devices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine with a current device, one that is too old, and one that the native module refuses; what was probed."""
    probed: list[int] = []

    def probe(device: int) -> str:
        probed.append(device)
        return OLD_DRIVER if device == 2 else ""

    monkeypatch.setattr(native, "cuda_is_emulated", False)
    monkeypatch.setattr(native, "cuda_kernels", SimpleNamespace(probe=probe, MAX_COLUMNS=4096))
    monkeypatch.setattr(presence, "_interpreted", lambda: False)
    monkeypatch.setattr(presence, "_refusals", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: [(9, 0), (7, 5), (9, 0)][device])
    return probed


def test_the_devices_own_refusal(three_devices: list[int]) -> None:
    for name in ("cuda", "triton"):
        assert backends.unavailable(name) is None
        assert backends.unavailable(name, torch.device("cuda", 1)) == "CUDA device 1 has a compute capability below 8.0"
    assert backends.unavailable("cuda", 2) == OLD_DRIVER
    assert backends.unavailable("triton", 2) is None
    assert three_devices == [0, 2], "a device too old is not probed, and each device once"


@pytest.mark.skipif(native._C is None, reason="backend cuda's modules need the native module")
def test_an_op_asks_the_tensors_own_device(three_devices: list[int]) -> None:
    op = OPS["layer_norm"]
    assert op.refusal("cuda", OnGpu(0)) is None
    assert "CUDA device 1" in op.refusal("cuda", OnGpu(1))
    assert op.refusal("cuda", OnGpu(2)) == OLD_DRIVER
    assert op.resolve(None, OnGpu(0)) == "cuda"
    assert op.resolve(None, OnGpu(1)) == "torch"
    text = op.explain(OnGpu(2))
    assert f"cuda: {OLD_DRIVER}" in text
    for _ in range(3):
        op.resolve(None, OnGpu(2))
    assert three_devices == [0, 2]


@pytest.mark.parametrize("version", ["2.1", "3.3.1", "3.4.0", "3.10.0+git1"])
def test_triton_before_3_4_cannot_compile_the_kernels(version: str, monkeypatch, three_devices) -> None:
    pytest.importorskip("triton")
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda p: version if p == "triton" else installed(p))
    reason = backends.unavailable("triton")
    if version.startswith(("3.4", "3.10")):
        assert reason is None
        return
    short = ".".join(version.split(".")[:2])
    assert reason == f"triton {short} is installed, and the kernels need 3.4 or later"
    with (
        pytest.raises(RuntimeError, match=f"backend 'triton' is unavailable: {reason}"),
        backends.use_backend("triton"),
    ):
        pass


def test_another_backend_runs_instead_of_an_old_triton(monkeypatch, three_devices) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "3.3.1")
    monkeypatch.setattr(native, "cuda_kernels", None)
    op = OPS["layer_norm"]
    monkeypatch.delitem(op._modules, "triton", raising=False)
    monkeypatch.delitem(op._modules, "cuda", raising=False)
    assert op.resolve(None, OnGpu(0)) == "torch"
