"""Access to the compiled CPU kernels (``fastrec._native``): instruction sets and threads."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

from fastrec import env
from fastrec.errors import ArgumentError, BackendError, IsaError


@dataclass(frozen=True)
class Signature:
    """The facts of a call that the choice of a backend depends on."""

    device: str
    dtype: str = "float32"


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    if not _in_main_interpreter():
        return None, "the compiled CPU kernels run in Python's main interpreter only"
    try:
        from fastrec import _native
    except ImportError as error:
        return None, f"the compiled CPU kernels are not installed ({error})"
    forced = env.force_isa()
    if forced is not None:
        _force(_native, forced)
    if "torch" in sys.modules:
        _follow_torch(_native)
    return _native, None


def _in_main_interpreter() -> bool:
    """Whether this is the process's main interpreter: in others the compiled part would wait for a
    lock for ever while it is imported."""
    try:
        interpreters = importlib.import_module("_interpreters")
    except ImportError:
        try:
            interpreters = importlib.import_module("_xxsubinterpreters")
        except ImportError:
            return True
    return bool(interpreters.get_current() == interpreters.get_main())


def follow_torch() -> None:
    """Where no thread count is set, kernels use no more threads than torch does at that moment.

    Called when an op is imported, and so after torch. A call reads torch's count in its compiled
    part, through the function behind ``torch.get_num_threads`` (about 5 ns).
    """
    if _load.cache_info().currsize and (module := _load()[0]) is not None:
        _follow_torch(module)


def _follow_torch(module: ModuleType) -> None:
    try:
        # The library that this process already holds, or an error; nothing is loaded.
        library = ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        address = ctypes.cast(library["_ZN2at15get_num_threadsEv"], ctypes.c_void_p).value
    except (AttributeError, OSError):  # a torch without it: a count of its own, from the machine
        return
    module.follow_threads(address)


def reason_missing() -> str | None:
    """Why the compiled kernels can't be used, or None if they can."""
    return _load()[1]


def cpu_can_run(signature: Signature) -> str | None:
    """``can_run`` of every op's compiled CPU backend."""
    if signature.device != "cpu":
        return f"it runs on the CPU, the input is on {signature.device}"
    return reason_missing()


def cpu_takes(*dtypes: str) -> Callable[[Signature], str | None]:
    """``can_run`` of a compiled CPU backend that computes in these dtypes alone."""
    *first, last = dtypes
    named = f"{', '.join(first)} or {last}" if first else last

    def can_run(signature: Signature) -> str | None:
        dtype = signature.dtype.removeprefix("torch.")
        if dtype not in dtypes:
            return f"it computes in {named}, the input is {dtype}"
        return cpu_can_run(signature)

    return can_run


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
    """Threads that a kernel call of this Python thread uses at most.

    The first of these that is set, and never more than the CPUs of this process (its affinity mask
    and, rounded down, the CPU quota of its control groups):

    1. ``with call_threads(n)`` around the call, for the thread that entered it;
    2. ``set_num_threads(n)``, for the process;
    3. ``torch.get_num_threads()`` at the moment of the call, once torch is imported: lowering
       torch's threads lowers ours, ``OMP_NUM_THREADS`` included.
    """
    return int(native().num_threads())


def set_num_threads(threads: int | None) -> None:
    """Sets how many threads a kernel call uses at most, in all Python threads.

    Args:
        threads: the count, capped at the CPUs of this process; None follows torch again.

    Raises:
        ArgumentError: ``threads`` is below 1.
    """
    native().set_num_threads(0 if threads is None else _checked(threads))


class call_threads:
    """Within the block, kernel calls of this Python thread use at most ``threads`` threads.

    Outranks ``set_num_threads`` and torch's own count; an inner block outranks an outer one.

    Raises:
        ArgumentError: ``threads`` is below 1.
    """

    __slots__ = ("_before", "_exchange", "_threads")

    def __init__(self, threads: int) -> None:
        self._threads = _checked(threads)
        self._exchange = native().exchange_call_threads

    def __enter__(self) -> None:
        self._before = self._exchange(self._threads)

    def __exit__(self, *raised: object) -> None:
        self._exchange(self._before)


def _checked(threads: int) -> int:
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise ArgumentError("threads", "an integer >= 1", threads)
    return min(threads, 1 << 20)
