"""Whole models against an oracle: random weights, outputs and gradients, and the budget they are held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from pyxlbert.testing import compare, tolerances

Results = dict[str, torch.Tensor]


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights of a size that keeps activations near one, LayerNorm's weights near one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = name.lower().replace("layer_norm", "layernorm").endswith("layernorm.weight")
            small = parameter.dim() == 1 or name.endswith("_bias")
            scale = 0.3 if small else parameter[0].numel() ** -0.5
            parameter.copy_(1 + 0.2 * noise if norm else noise * scale)


def results(
    model: torch.nn.Module,
    arguments: Mapping[str, Any],
    cotangents: Results,
    outputs: Callable[[Any], Results],
    loss: Callable[[Any], torch.Tensor | None],
) -> Results:
    """Outputs, loss, and the gradients of a random linear functional of the outputs plus the loss.

    Args:
        model: called with `arguments`.
        arguments: a copy of `inputs_embeds` among them gets a gradient too.
        cotangents: the functional's weights, by output; without any there is no backward pass.
        outputs: the tensors to compare, by name.
        loss: the loss, or None.
    """
    model.zero_grad()
    arguments = dict(arguments)
    if "inputs_embeds" in arguments:
        arguments["inputs_embeds"] = arguments["inputs_embeds"].detach().requires_grad_()
    output = model(**arguments)
    found = outputs(output)
    value = loss(output)
    # What has no gradient, such as an index or a memory, is compared but not differentiated.
    total = sum((found[name] * g.to(found[name].dtype)).sum() for name, g in cotangents.items())
    if value is not None:
        found["loss"] = value
        total = total + value
    if cotangents:
        total.backward()
        found |= {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        if "inputs_embeds" in arguments and arguments["inputs_embeds"].grad is not None:
            found["d inputs_embeds"] = arguments["inputs_embeds"].grad
    return {name: value.detach() for name, value in found.items()}


def random_cotangents(probe: Results, generator: torch.Generator) -> Results:
    """One for every floating-point output."""
    return {
        name: torch.randn(value.shape, generator=generator)
        for name, value in probe.items()
        if name != "loss" and value.is_floating_point()
    }


def within_budget(case: Any, ours: Results, plain: Results, truth: Results, factor: float = tolerances.FACTOR) -> None:
    """Every output and gradient of `ours` is at most `factor` times as wrong as `plain`.

    Raises:
        AssertionError: one is not, or one is missing.
    """
    if set(ours) != set(truth):
        raise AssertionError(f"{sorted(set(ours) ^ set(truth))} on one side only: {case}")
    # A gradient, and a result of few elements, may be a sum that cancels (a key bias has none in exact arithmetic): the
    # largest of all scales it.
    largest = max((float(value.abs().max()) for name, value in truth.items() if name.startswith("d ")), default=0.0)
    few = [name for name, value in truth.items() if value.numel() < tolerances.MODEL_FEW]
    # Nothing of such a gradient is left in float64, and in float32 what rounding leaves.
    zero = [
        name for name in few if name.startswith("d ") and float(truth[name].abs().max()) <= tolerances.FLOAT64 * largest
    ]
    rounding = tolerances.MODEL_GRADIENT_FLOAT32 * tolerances.MODEL_SMALL_GRADIENT * largest
    for name in zero:
        left = max(rounding, tolerances.ZERO_GRADIENT_FLOAT32)
        compare.close(f"{name} of {case}", ours[name], truth[name], 1.0, least=left)
    for name, value in truth.items():
        if name not in few:
            terms = largest if name.startswith("d ") else None
            compare.within_budget(f"{name} of {case}", ours[name], plain[name], value, terms=terms, factor=factor)
    for kind, relative in (("", tolerances.MODEL_FLOAT32), ("d ", tolerances.MODEL_GRADIENT_FLOAT32)):
        small = [name for name in few if name.startswith("d ") == bool(kind) and name not in zero]
        if small:
            ours_small, truth_small = (torch.cat([r[name].flatten().double() for name in small]) for r in (ours, truth))
            least = tolerances.MODEL_SMALL_GRADIENT * largest if kind else 0.0
            compare.close(f"{', '.join(small)} of {case}", ours_small, truth_small, relative, least=least)
