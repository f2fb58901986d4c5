"""Runs ops on an emulation, `python runs.py MODULE OP ..`, and says "right" or "wrong" of each, against plain PyTorch.

Sizes are such that every pipeline turns more than three times, blocks have several rows or tiles, and warps meet.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch

from pyxlbert import backends
from pyxlbert.testing import tolerances
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Arguments, as_tuple, to_float64


def arguments_of(op: str) -> Arguments:
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def numbers(top: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, top, shape, generator=generator, dtype=torch.int32)

    # A head for which 4 tiles of 64 keys, 7 of 32, and 7 windows of 32 queries are walked.
    length, heads, size = 200, 2, 64
    q, k, v = (randn(1, length, heads, size) for _ in range(3))
    table, bias = randn(2 * length, heads, size), randn(heads, size)
    rank = torch.randperm(length, generator=generator).int()[None]
    if op == "layer_norm":
        return {"x": randn(21, 2048), "weight": randn(2048), "bias": randn(2048)}
    if op == "layer_norm of short rows":
        return {"x": randn(21, 768), "weight": randn(768), "bias": randn(768)}
    if op == "bias_gelu":
        return {"x": randn(21, 768), "bias": randn(768)}
    if op == "dropout_add_layer_norm":
        x = {"x": randn(21, 768), "residual": randn(21, 768, dtype=torch.float32), "weight": randn(768)}
        return x | {"bias": randn(768), "x_bias": randn(768), "dropout_p": 0.2, "seed": 5}
    if op == "embedding_layer_norm":
        tables = {"word": randn(50, 64), "token_type": randn(2, 64), "position": randn(99, 64)}
        return {"input_ids": numbers(50, 3, 90), **tables, "weight": randn(64), "bias": randn(64)}
    if op == "attention":
        return {"query": q, "key": k, "value": v}
    if op.startswith("attention on Hopper"):
        # Three tiles of 128 keys, three windows of 128 queries, the last of each a part.
        length, size = 330, 128 if "long" in op else 64
        q, k, v = randn(2, length, heads, 3 * size).split(size, -1)
        if "packed" in op:
            offsets = torch.tensor([0, 200, 201, 660], dtype=torch.int32)
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            return {"query": q, "key": k, "value": v, "cu_seqlens": offsets, "max_seqlen": 459}
        if "causal" in op:
            return {"query": q, "key": k, "value": v, "causal": True}
        if "expanded" in op:
            # Strides of 0, which the copy engine does not know: the other kernel's.
            return {"query": q, "key": k[:, :, :1].expand_as(q), "value": v}
        lengths = torch.tensor([330, 201], dtype=torch.int32)
        v[1, 201:] = float("nan")
        return {"query": q, "key": k, "value": v, "key_lengths": lengths}
    if op.startswith("relative_attention on Hopper"):
        # Three windows of 128 queries and six tiles of 64 keys, more than the table's blocks that are kept.
        length, memory, size = 330, 70 if "memory" in op else 0, 40 if "short" in op else 64
        q, bias, table = randn(2, length, heads, size), randn(heads, size), randn(2 * length + memory, heads, size)
        k, v = randn(2, length + memory, heads, 2 * size).split(size, -1)
        given = {"position_key": table, "content_bias": bias, "position_bias": randn(heads, size)}
        if "packed" in op:
            offsets = torch.tensor([0, 200, 201, 660], dtype=torch.int32)
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            given |= {"cu_seqlens": offsets, "max_seqlen": 459, "position_key": randn(918, heads, size)}
        if "memory" in op:
            given |= {"causal": True, "offset": length + memory}
        if "segments" in op:
            given |= {"segment_bias": randn(heads, size), "segment_embedding": randn(2, heads, size)}
            given |= {"query_segments": numbers(2, *q.shape[:-2]), "key_segments": numbers(2, *k.shape[:-2])}
            if "expanded" in op:
                given["position_key"] = table[:, :1].expand_as(table)
            if "packed" not in op:
                given["key_lengths"] = torch.tensor([330, 201], dtype=torch.int32)
                v[1, 201:] = float("nan")
        return {"query": q, "key": k, "value": v, **given}
    if op == "attention with everything":
        mask = torch.rand(1, 1, length, length, generator=generator) > 0.1
        more = {
            "attention_mask": mask,
            "bias": randn(1, 1, length, length),
            "causal": True,
            "dropout_p": 0.2,
            "seed": 5,
        }
        return {"query": q, "key": k, "value": v} | more
    relative = {"key": k, "value": v, "position_key": table, "content_bias": bias, "position_bias": bias}
    segments = {"segment_bias": bias, "segment_embedding": randn(2, heads, size)}
    ranks = {"query_rank": rank, "key_rank": rank, "key_segments": numbers(2, 1, length)}
    if op == "relative_attention":
        return {"query": q, **relative}
    if op == "relative_attention with everything":
        more = {"query_segments": numbers(2, 1, length), "see_self": True, "dropout_p": 0.2, "seed": 5}
        return {"query": q, **relative, **segments, **ranks, **more}
    targets = torch.randperm(length, generator=generator)[:40].int()[None]
    streams = {"content_query": q, "query_query": randn(1, 40, heads, size), "target_positions": targets}
    return {**streams, **relative, **segments, **ranks, "query_segments": numbers(2, 1, length)}


OPS = (
    "layer_norm",
    "layer_norm of short rows",
    "bias_gelu",
    "dropout_add_layer_norm",
    "embedding_layer_norm",
    "attention",
    "attention with everything",
    "relative_attention",
    "relative_attention with everything",
    "two_stream_attention",
)

# With CUDA_EMULATION_HOPPER=1.
HOPPER_OPS = (
    "attention on Hopper",
    "attention on Hopper, causal",
    "attention on Hopper, packed",
    "attention on Hopper, long heads",
    "attention on Hopper, expanded",
    "relative_attention on Hopper, segments",
    "relative_attention on Hopper, causal with memory",
    "relative_attention on Hopper, packed, segments",
    "relative_attention on Hopper, short heads",
    "relative_attention on Hopper, segments, expanded",
)


def results_of(spec, function, arguments: Arguments) -> list[torch.Tensor]:
    names = [n for n in spec.differentiable if isinstance(arguments.get(n), torch.Tensor)]
    arguments = arguments | {n: arguments[n].detach().requires_grad_() for n in names}
    outputs = as_tuple(function(**arguments))
    generator = torch.Generator().manual_seed(4)
    cotangents = [torch.randn(o.shape, generator=generator).to(torch.bfloat16).to(o.dtype) for o in outputs]
    found = [*outputs, *torch.autograd.grad(outputs, [arguments[n] for n in names], cotangents)]
    return [x.detach() for x in found]


def wrong(op: str) -> str | None:
    """The first result that is not plain PyTorch's, or None."""
    spec = SPECS[op.split()[0]]
    arguments = arguments_of(op)
    ours = results_of(spec, lambda **a: spec.function(**a, backend="cuda"), arguments)
    # What nobody may see is NaN to ours alone: plain PyTorch would multiply it by zero.
    seen = {n: x.nan_to_num() if n == "value" else x for n, x in to_float64(arguments).items()}
    truth = results_of(spec, spec.plain, seen)
    for place, (x, wanted) in enumerate(zip(ours, truth, strict=True)):
        error = float((x.double() - wanted).norm() / wanted.norm())
        if not error <= tolerances.MODEL_BFLOAT16:
            return f"result {place} is off by {error:.3g}"
    return None


def main(module: str, *ops: str) -> int:
    spec = importlib.util.spec_from_file_location("_emulated", Path(module))
    # A bug's build has but the functions that its op needs.
    sys.setdlopenflags(os.RTLD_LAZY)
    emulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulated)
    backends.emulate_cuda(emulated)
    for op in ops:
        found = wrong(op)
        print(f"{op}: {'right' if found is None else f'wrong, {found}'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
