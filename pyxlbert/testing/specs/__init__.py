"""The description of every op's inputs, by name."""

from pyxlbert.testing.specs import layer_norm, linear, linear_gelu

SPECS = {module.SPEC.name: module.SPEC for module in (layer_norm, linear, linear_gelu)}

__all__ = ["SPECS"]
