"""The learning rate: of each step, and of each layer."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from pyxlbert.training.options import TrainingOptions

_LAYER = re.compile(r"\.layer\.(\d+)\.")
_SHARED = re.compile(r"\.albert_layer_groups\.(\d+)\.")


def warmup_steps(options: TrainingOptions, total: int) -> int:
    """How many steps the rate rises."""
    return min(total, math.ceil(options.warmup * total) if options.warmup < 1 else int(options.warmup))


def rate(options: TrainingOptions, step: int, total: int) -> float:
    """The share of the highest learning rate that step number `step`, from 0, has.

    It rises to 1 at the last step of the warm-up and falls to what would be 0 one step behind the end.
    """
    warmup = warmup_steps(options, total)
    if step < warmup:
        return (step + 1) / warmup
    if options.schedule == "constant":
        return 1.0
    left = (total - step) / max(1, total - warmup)
    return left if options.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def parameter_groups(model: nn.Module, options: TrainingOptions) -> list[dict[str, Any]]:
    """The parameters in groups of one rate and one weight decay each.

    The rate falls from layer to layer, from the last one down to the embeddings, which are below the first; weights
    that several layers share have the rate of the last of them. Biases and the weights of LayerNorms do not decay.

    Args:
        model: a `PretrainedModel`, whose encoder is `base_model`.
        options: the rates.

    Returns:
        Groups for an optimiser, with `base_lr`, the highest rate, beside `lr`.
    """
    encoder = f"{model.base_model_prefix}."
    depth = model.config.num_hidden_layers
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # What is in the encoder behind its layers, the pooler, goes with the head.
        above = depth if name.startswith(encoder) and "embedding" in name else 0
        layer = _LAYER.search(name)
        if layer:
            above = depth - 1 - int(layer[1])
        shared = _SHARED.search(name)
        if shared:
            above = depth - 1 - model.config.last_layer(int(shared[1]))
        highest = options.learning_rate
        if not name.startswith(encoder) and options.head_learning_rate is not None:
            highest = options.head_learning_rate
        decays = parameter.dim() > 1 and not name.endswith("bias")
        key = (highest * options.layer_decay**above, options.weight_decay if decays else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": highest, "base_lr": highest, "weight_decay": decay}
        for (highest, decay), parameters in groups.items()
    ]


def optimiser(model: nn.Module, options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, in one pass over each parameter: six times as fast on the CPU."""
    betas = (options.beta1, options.beta2)
    return torch.optim.AdamW(parameter_groups(model, options), betas=betas, eps=options.epsilon, fused=True)


def set_rate(optimiser: torch.optim.Optimizer, share: float) -> None:
    """Gives every group its share of its highest rate."""
    for group in optimiser.param_groups:
        group["lr"] = group["base_lr"] * share
