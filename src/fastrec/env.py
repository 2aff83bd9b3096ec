"""The one module that reads the environment. Read at call time, never on a hot path.

| variable | meaning |
|---|---|
| ``FASTREC_FORCE_ISA`` | instruction set that every CPU kernel must use; unknown or missing ones raise |
| ``FASTREC_FORCE_BACKEND`` | kernel backend to use where the caller names none; raises if it cannot run |
| ``FASTREC_BUILD_CPU`` / ``FASTREC_BUILD_CUDA`` | build time only (setup.py): unset = best effort, 1 = fail if it can't, 0 = skip |
"""

from __future__ import annotations

import os


def force_isa() -> str | None:
    """Name in ``FASTREC_FORCE_ISA``, or None where unset or empty."""
    return os.environ.get("FASTREC_FORCE_ISA") or None


def force_backend() -> str | None:
    """Name in ``FASTREC_FORCE_BACKEND``, or None where unset or empty."""
    return os.environ.get("FASTREC_FORCE_BACKEND") or None
