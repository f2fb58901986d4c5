"""Other libraries' models on our ops: `accelerate`, `restore`, `register_attention` and `register_kernels`.

`pyxlbert/integrations/transformers` holds a table per architecture, found by folder; nothing here imports transformers
before it is needed.
"""

from __future__ import annotations

from pyxlbert.integrations.attention import register_attention
from pyxlbert.integrations.drop_in import accelerate, restore
from pyxlbert.integrations.kernel_layers import register_kernels
from pyxlbert.integrations.report import Entry, Report

__all__ = ["Entry", "Report", "accelerate", "register_attention", "register_kernels", "restore"]
