"""One small module per backend, each with the functions of :class:`fastrec.runtime.engine.Backend`.

Importing a backend's module imports neither torch nor the backend's package where it can be
avoided: ``can_run`` says what is missing.
"""

from __future__ import annotations

import importlib

from fastrec.runtime.engine import Backend, as_backend

# name -> module; the order is that of preference where timings tie.
BACKENDS = {
    "native": "native",
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
    "litert": "litert",
    "torch_compile": "torch_compile",
    "torch": "torch_eager",
    "cuda": "cuda",
    "tensorrt": "tensorrt",
    "qnn": "qnn",
}


def backend_module(name: str) -> Backend:
    """The backend of that name (a key of :data:`BACKENDS`)."""
    return as_backend(importlib.import_module(f"{__name__}.{BACKENDS[name]}"))
