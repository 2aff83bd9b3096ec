"""A torch model in the formats of other engines: ONNX and TFLite. Light to import (PEP 562)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastrec.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {".onnx.export": ("export",)})

if TYPE_CHECKING:
    from fastrec.exporters.onnx.export import export
