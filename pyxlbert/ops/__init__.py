"""The ops, one file each: contract, checks, registration, public function."""

from pyxlbert.ops.layer_norm import layer_norm

__all__ = ["layer_norm"]
