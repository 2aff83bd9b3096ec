"""One module per backend, each with the functions of :class:`fastrec.runtime.engine.Backend`.

Importing a backend's module imports neither torch nor the backend's package where it can be
avoided: ``can_run`` says what is missing.
"""

from __future__ import annotations

import importlib

from fastrec.runtime.engine import Backend, as_backend

# name -> module; the order is that of preference where timings tie.
BACKENDS = {
    "native": "fastrec.runtime.native.backend",
    "openvino": "fastrec.runtime.backends.openvino",
    "onnxruntime": "fastrec.runtime.backends.onnxruntime",
    "litert": "fastrec.runtime.backends.litert",
    "torch_compile": "fastrec.runtime.backends.torch_compile",
    "torch": "fastrec.runtime.backends.torch_eager",
    "cuda": "fastrec.runtime.backends.cuda",
    "tensorrt": "fastrec.runtime.backends.tensorrt",
    "qnn": "fastrec.runtime.backends.qnn",
}


def backend_module(name: str) -> Backend:
    """The backend of that name (a key of :data:`BACKENDS`)."""
    return as_backend(importlib.import_module(BACKENDS[name]))
