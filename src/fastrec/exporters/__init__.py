"""A torch model in the formats of other engines: ONNX and TFLite. Light to import (PEP 562)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastrec.errors import MissingDependencyError

if TYPE_CHECKING:
    from fastrec.exporters.onnx.export import export

__all__ = ["export"]


def __getattr__(name: str) -> Any:
    if name != "export":
        raise AttributeError(f"module 'fastrec.exporters' has no attribute {name!r}")
    try:
        from fastrec.exporters.onnx.export import export
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingDependencyError("torch", "torch", "fastrec.export") from error
    return export
