"""What a training run is told."""

from __future__ import annotations

from dataclasses import dataclass, fields

SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train.

    Attributes:
        epochs: passes over the data; may be a fraction.
        max_steps: steps of the optimiser in place of `epochs`.
        batch_size: examples a step of the optimiser, all processes together.
        micro_batch_size: examples a pass of one process; gradients of several passes are added up. None: its whole
            share at once.
        learning_rate: the highest.
        head_learning_rate: of the parameters beside the encoder's; None: the same.
        layer_decay: what a layer's learning rate is of the layer's above, down to the embeddings.
        weight_decay: of AdamW, on matrices.
        beta1, beta2, epsilon: AdamW's.
        warmup: the steps until the highest rate: a fraction of all below 1, else a number of them.
        schedule: how the rate falls afterwards: "linear" or "cosine" to nothing, or "constant".
        max_gradient_norm: gradients are scaled down to this norm; 0: they are left alone.
        precision: "bfloat16": products in bfloat16, parameters and sums in float32.
        recompute: keep no activations of the layers, but compute them again in the backward pass.
        seed: the same seed gives the same run.
        evaluate_every: steps between evaluations; None: at the end of each epoch.
        evaluation_batch_size: rows a pass.
        patience: evaluations without a better score before training ends; None: all is trained.
        checkpoint_every: steps between checkpoints; None: at each evaluation.
        keep_checkpoints: how many of the last are kept, beside that of the best score.
        log_every: steps between points of the curves.
        workers: processes that make batches; 0: none but the training's own. The results are the same.
        progress: whether there is a bar; None: on a terminal.

    Raises:
        ValueError: a value means nothing; the message names it.
    """

    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 32
    micro_batch_size: int | None = None
    learning_rate: float = 5e-5
    head_learning_rate: float | None = None
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    warmup: float = 0.1
    schedule: str = "linear"
    max_gradient_norm: float = 1.0
    precision: str = "float32"
    recompute: bool = False
    seed: int = 0
    evaluate_every: int | None = None
    evaluation_batch_size: int = 64
    patience: int | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    log_every: int = 10
    workers: int = 0
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in _INTEGERS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}, wanted a whole number of at least {least}")
            if value > most:
                raise ValueError(f"{name}: got {value}, wanted a whole number of at most {most}")
        for name, (least, most) in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            # NaN is in no range.
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most
            if not good:
                raise ValueError(f"{name}: got {value!r}, wanted a number from {least:g} to {most:g}")
        for name in ("beta1", "beta2"):
            if getattr(self, name) == 1:
                raise ValueError(f"{name}: got 1, wanted less: the first gradient would be all that is ever seen")
        for name in ("recompute", "progress"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and name == "progress"):
                raise ValueError(f"{name}: got {value!r}, wanted True or False")
        if self.epochs == 0 and self.max_steps is None:
            raise ValueError("epochs: got 0, wanted more")
        for name, allowed in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted one of {', '.join(allowed)}")

    def decisive(self) -> dict[str, object]:
        """The options that decide what is trained: a run that is resumed must have the same."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _INDIFFERENT}


#: What counts rows or steps, and processes, may be at most; generators of random numbers take no larger seed.
MOST, MOST_WORKERS, MOST_SEED = 2**31 - 1, 4096, 2**63 - 1
# No parameter holds more; and so many epochs of any text are a number of steps.
_LARGEST, _MOST_EPOCHS = 1e38, 1e9
_INTEGERS = {
    **{name: (1, MOST) for name in ("batch_size", "micro_batch_size", "evaluation_batch_size", "max_steps")},
    **{name: (1, MOST) for name in ("evaluate_every", "patience", "checkpoint_every", "keep_checkpoints", "log_every")},
    **{"seed": (0, MOST_SEED), "workers": (0, MOST_WORKERS)},
}
_NUMBERS = {
    **{"epochs": (0, _MOST_EPOCHS), "learning_rate": (0, _LARGEST), "head_learning_rate": (0, _LARGEST)},
    **{"layer_decay": (0, 1), "weight_decay": (0, _LARGEST), "beta1": (0, 1), "beta2": (0, 1)},
    **{"epsilon": (0, _LARGEST), "warmup": (0, MOST), "max_gradient_norm": (0, _LARGEST)},
}
_OPTIONAL = {"micro_batch_size", "max_steps", "head_learning_rate", "evaluate_every", "patience", "checkpoint_every"}
# What changes neither the steps nor when they are evaluated.
_INDIFFERENT = {"workers", "progress", "checkpoint_every", "keep_checkpoints", "evaluation_batch_size", "recompute"}
