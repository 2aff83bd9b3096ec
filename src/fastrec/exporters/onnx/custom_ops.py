"""fastrec's CPU kernels inside ONNX Runtime: custom operators, for those who ask for them.

A file of ``fastrec.export(..., custom_ops=True)`` holds operators of the domain ``fastrec`` where a
standard one would lose something: pruned groups stay neither stored nor multiplied. To run it, a
session loads the library of :func:`library_path`, which holds the kernels and knows neither Python
nor torch, so that sessions in C++, C# or Java load it too::

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(ort_custom_ops.library_path()))
    session = onnxruntime.InferenceSession("model.onnx", options)

Work is shared out among the session's own threads. Operators (``csrc/onnxruntime``, version 1):
``SparseInt8Linear``, ``SparseInt8LinearU8`` and ``WindowSparseAttention``.
"""

from __future__ import annotations

import importlib.machinery
from pathlib import Path
from typing import Any

from fastrec.errors import BackendError

DOMAIN, VERSION = "fastrec", 1
# csrc/onnxruntime/register.cpp.
OPERATORS = ("SparseInt8Linear", "SparseInt8LinearU8", "WindowSparseAttention")


def library_path() -> Path:
    """The library for ``SessionOptions.register_custom_ops_library``; ONNX Runtime 1.17 or later.

    Raises:
        BackendError: it was not built.
    """
    folder = Path(__file__).parents[2]
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_onnxruntime_ops{suffix}"
        if path.is_file():
            return path
    raise BackendError(
        "the custom ops for ONNX Runtime were not built: they are a part of fastrec's wheels for "
        "Linux; from source, reinstall with FASTREC_BUILD_CPU=1 to see why"
    )


def reason_missing() -> str | None:
    """Why sessions cannot load the library, or None if they can."""
    try:
        library_path()
    except BackendError as error:
        return str(error)
    return None


def register(options: Any) -> None:
    """Have sessions of these ``onnxruntime.SessionOptions`` know the operators.

    Raises:
        BackendError: the library was not built, or this ONNX Runtime is older than 1.17.
    """
    path = library_path()
    try:
        options.register_custom_ops_library(str(path))
    except RuntimeError as error:  # what all of ONNX Runtime's errors are
        raise BackendError(f"ONNX Runtime does not load {path.name}: {error}") from error


def uses_custom_ops(nodes: Any) -> bool:
    """Whether any of a graph's nodes is an operator of this library."""
    return any(node.domain == DOMAIN for node in nodes)
