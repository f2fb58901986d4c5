"""The description of every op's inputs, by name."""

from pyxlbert.testing.specs import bias_gelu, layer_norm, linear, linear_gelu

SPECS = {module.SPEC.name: module.SPEC for module in (bias_gelu, layer_norm, linear, linear_gelu)}

__all__ = ["SPECS"]
