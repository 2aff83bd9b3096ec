"""Engines: a model compiled for a backend, saved and loaded. Light to import (PEP 562)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastrec.errors import MissingDependencyError

_EXPORTS = {
    "BACKENDS": "backends",
    "Engine": "engine",
    "available_backends": "compiler",
    "compile": "compiler",
    "load_engine": "artifact",
}

if TYPE_CHECKING:
    from fastrec.runtime.artifact import load_engine
    from fastrec.runtime.backends import BACKENDS
    from fastrec.runtime.compiler import available_backends, compile
    from fastrec.runtime.engine import Engine

__all__ = [
    "BACKENDS",
    "Engine",
    "available_backends",
    "compile",
    "load_engine",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        try:
            module = importlib.import_module(f"fastrec.runtime.{_EXPORTS[name]}")
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise MissingDependencyError("torch", "torch", f"fastrec.{name}") from error
        return getattr(module, name)
    raise AttributeError(f"module 'fastrec.runtime' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
