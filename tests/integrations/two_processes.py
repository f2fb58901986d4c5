"""What each of two processes does in the test of DDP and FSDP2; it must be importable by name there."""

from __future__ import annotations

import os
from typing import Any

import conformers
import torch
import zoo
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

import pyxlbert

HEAD = "ForTokenClassification"
PARTS = (slice(0, 1), slice(1, 3))
RATE = 0.5


def parakeet() -> tuple[Any, dict[str, Tensor]]:
    """A Conformer and a batch of three."""
    model = conformers.build("parakeet, ctc")
    return model, conformers.arguments("parakeet, ctc", model)


def adapted() -> tuple[Any, dict[str, Tensor]]:
    """The same with adapters on its linear layers."""
    import peft

    model, given = parakeet()
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "relative_k_proj", "linear1"], init_lora_weights=False)
    return peft.get_peft_model(model, config), given


def bert() -> tuple[Any, dict[str, Tensor]]:
    """A text model and a batch of three."""
    model = zoo.build("bert", HEAD)
    return model, zoo.batch(model, HEAD)


def rows() -> list[dict[str, Tensor]]:
    """Two examples for a loader, of one batch each."""
    given = zoo.batch(zoo.build("bert", HEAD), HEAD)
    return [{name: value[place] for name, value in given.items()} for place in (0, 1)]


def step(model: Any, optimizer: Any, loader: Any, backward: Any) -> None:
    """One step for each of the loader's batches."""
    for batch in loader:
        optimizer.zero_grad()
        backward(model(**batch).loss)
        optimizer.step()


def prepared() -> Tensor:
    """The weights of a model after a step under `accelerate.Accelerator`, which shares the batches out."""
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    model = pyxlbert.accelerate(bert()[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(), batch_size=1))
    step(model, optimizer, loader, accelerator.backward)
    return torch.cat([one.detach().flatten() for one in accelerator.unwrap_model(model).parameters()])


def _gradients(model: Any, given: dict[str, Tensor], sharded: bool) -> Tensor:
    """Of one process's part of a batch, averaged over both."""
    pyxlbert.accelerate(model)
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        layers = [one for one in model.modules() if type(one).__name__ in ("BertLayer", "ParakeetEncoderBlock")]
        for module in (*layers, model):
            fully_shard(module, mesh=mesh)
    else:
        model = torch.nn.parallel.DistributedDataParallel(model)
    model(**given).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([(g.full_tensor() if sharded else g).flatten() for g in gradients])


def run(rank: int, port: int, folder: str) -> None:
    """One of two processes: gradients of a third and of two thirds of a batch, averaged, and weights after a step."""
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in where.items()} | {"ACCELERATE_USE_CPU": "true"})
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for make, sharded in ((bert, False), (bert, True), (parakeet, True), (adapted, True)):
        model, given = make()
        part = {name: value[PARTS[rank]] for name, value in given.items()}
        found[f"{make.__name__}, {'FSDP2' if sharded else 'DDP'}"] = _gradients(model, part, sharded)
    found["Accelerator"] = prepared()
    if rank == 0:
        torch.save(found, folder)
    torch.distributed.destroy_process_group()
    # DTensor's caches keep the group of a mesh, whose threads may abort a process that ends (pytorch's issue 190489).
    os._exit(0)
