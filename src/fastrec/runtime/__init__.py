"""Engines: a model compiled for a backend, saved and loaded. Light to import (PEP 562)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastrec.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".artifact": ("load_engine",),
        ".backends": ("BACKENDS",),
        ".compiler": ("available_backends", "compile"),
        ".engine": ("Engine",),
    },
)

if TYPE_CHECKING:
    from fastrec.runtime.artifact import load_engine
    from fastrec.runtime.backends import BACKENDS
    from fastrec.runtime.compiler import available_backends, compile
    from fastrec.runtime.engine import Engine
