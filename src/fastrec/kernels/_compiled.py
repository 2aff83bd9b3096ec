"""Access to the compiled CPU kernels (``fastrec._native``): instruction sets and threads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from fastrec import env
from fastrec.errors import ArgumentError, BackendError, IsaError


@dataclass(frozen=True)
class Signature:
    """What the choice of a backend may depend on."""

    device: str
    dtype: str = "float32"


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from fastrec import _native
    except ImportError as error:
        return None, f"the compiled CPU kernels are not installed ({error})"
    forced = env.force_isa()
    if forced is not None:
        _force(_native, forced)
    return _native, None


def reason_missing() -> str | None:
    """Why the compiled kernels can't be used, or None if they can."""
    return _load()[1]


def cpu_can_run(signature: Signature) -> str | None:
    """``can_run`` of every op's compiled CPU backend."""
    if signature.device != "cpu":
        return f"it runs on the CPU, the input is on {signature.device}"
    return reason_missing()


def native() -> ModuleType:
    """The compiled module.

    Raises:
        BackendError: it was not built or does not load.
        IsaError: ``FASTREC_FORCE_ISA`` names an instruction set that is unknown or not there.
    """
    module, reason = _load()
    if module is None:
        raise BackendError(f"{reason}; reinstall with FASTREC_BUILD_CPU=1 to see why")
    return module


def _force(module: ModuleType, name: str) -> None:
    known = module.isa_names()
    if name not in known:
        raise IsaError(f"force_isa: expected one of {', '.join(known)}, got {name!r}")
    if not module.force_isa(name):
        needed = module.isa_target(name)
        raise IsaError(f"force_isa: {name} needs {needed}, which this CPU or its system lacks")


def isa_names() -> list[str]:
    """Every instruction set fastrec knows, oldest first."""
    return list(native().isa_names())


def available_isas() -> list[str]:
    """The instruction sets that this CPU and its operating system can run, oldest first."""
    return [name for name in isa_names() if native().machine_has(name)]


def active_isa() -> str:
    """The newest instruction set that kernels may use now."""
    return str(native().active_isa())


@contextlib.contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Within the block, CPU kernels use nothing newer than the instruction set ``name``.

    Process-wide, meant for tests and measurements.

    Raises:
        IsaError: the name is unknown, or the CPU or its operating system lacks it.
    """
    module = native()
    before = module.active_isa()
    _force(module, name)
    try:
        yield
    finally:
        module.force_isa(before)


def num_threads() -> int:
    """Threads that one kernel call uses at most."""
    return int(native().num_threads())


def set_num_threads(threads: int) -> None:
    """Sets how many threads one kernel call uses at most (capped at the CPUs of this process).

    Raises:
        ArgumentError: ``threads`` is below 1.
    """
    if threads < 1:
        raise ArgumentError("threads", "an integer >= 1", threads)
    native().set_num_threads(threads)
