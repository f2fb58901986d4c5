"""What each of two processes does in the test of DDP and FSDP2; it must be importable by name there."""

from __future__ import annotations

import torch
import zoo
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pyxlbert


def run(rank: int, port: int, folder: str) -> None:
    """One of two processes: gradients of a third and of two thirds of a batch, averaged."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    head, part = "ForTokenClassification", (slice(0, 1), slice(1, 3))[rank]
    found = []
    for sharded in (False, True):
        model = pyxlbert.accelerate(zoo.build("bert", head))
        given = {name: value[part] for name, value in zoo.batch(model, head).items()}
        if sharded:
            mesh = init_device_mesh("cpu", (2,))
            for module in (*model.bert.encoder.layer, model):
                fully_shard(module, mesh=mesh)
        else:
            model = torch.nn.parallel.DistributedDataParallel(model)
        model(**given).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append(torch.cat([(g.full_tensor() if sharded else g).flatten() for g in gradients]))
    if rank == 0:
        torch.save(found, folder)
    torch.distributed.destroy_process_group()
