"""The description of every op's inputs, by name."""

from pyxlbert.testing.specs import layer_norm

SPECS = {module.SPEC.name: module.SPEC for module in (layer_norm,)}

__all__ = ["SPECS"]
