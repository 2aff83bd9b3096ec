"""The one module that reads the environment. Read at call time, never on a hot path.

| variable | meaning |
|---|---|
| ``FASTREC_FORCE_ISA`` | newest instruction set CPU kernels may use; unknown ones raise |
| ``FASTREC_FORCE_BACKEND`` | kernel backend where the caller names none; raises if it can't run |
| ``FASTREC_CACHE_DIR`` | tuned launches, choices of ``backend="auto"``, compiled models; default
  ``~/.cache/fastrec`` |
| ``TRITON_INTERPRET`` | Triton's own: kernels run in its interpreter, on CPU tensors |
| ``GRPC_VERBOSITY`` | gRPC's own; where it is not set, a server has gRPC's core log nothing |
| ``FASTREC_BUILD_CPU``, ``FASTREC_BUILD_CUDA``, ``FASTREC_CUDA_ARCHS`` | only setup.py reads them |
"""

from __future__ import annotations

import os
from pathlib import Path


def force_isa() -> str | None:
    """Name in ``FASTREC_FORCE_ISA``, or None where unset or empty."""
    return os.environ.get("FASTREC_FORCE_ISA") or None


def force_backend() -> str | None:
    """Name in ``FASTREC_FORCE_BACKEND``, or None where unset or empty."""
    return os.environ.get("FASTREC_FORCE_BACKEND") or None


def triton_interpret() -> bool:
    """Whether Triton interprets kernels (it reads this when a kernel's module is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def omp_num_threads() -> str | None:
    """``OMP_NUM_THREADS`` as it is set, for the machine card; torch, whose count kernels follow,
    obeys it."""
    return os.environ.get("OMP_NUM_THREADS")


def cache_dir() -> Path:
    """``FASTREC_CACHE_DIR``, else ``fastrec`` in the user's cache folder."""
    if own := os.environ.get("FASTREC_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastrec"


def silence_grpc() -> None:
    """gRPC's core logs nothing, unless ``GRPC_VERBOSITY`` asks for it: it writes a line for each
    header of a client that does not parse, as many as the client likes. Before gRPC is imported.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
