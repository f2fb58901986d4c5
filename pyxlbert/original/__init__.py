"""The checkpoints of the original codes of BERT and XLNet, read without TensorFlow and turned into directories."""

from __future__ import annotations

from pyxlbert.original.convert import Conversion, Row, convert

__all__ = ["Conversion", "Row", "convert"]
