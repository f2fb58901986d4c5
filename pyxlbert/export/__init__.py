"""Models as files for other runtimes: ONNX."""

from __future__ import annotations

from pyxlbert.export.onnx import Exported, export_onnx

__all__ = ["Exported", "export_onnx"]
