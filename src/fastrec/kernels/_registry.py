"""The declaration of an op; contract tests, the bench and ``fastrec info`` read it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastrec import env
from fastrec.errors import BackendError
from fastrec.kernels import _compiled
from fastrec.kernels._compiled import Signature

_compiled.follow_torch()

CanRun = Callable[[Signature], "str | None"]


def always(signature: Signature) -> str | None:
    """``can_run`` of the references: nothing stops them."""
    return None


class Backends:
    """The backends of one op, best first, each with its ``can_run(signature) -> reason | None``."""

    def __init__(self, op_id: str, can_run: dict[str, CanRun]) -> None:
        self.op_id, self.can_run = op_id, can_run
        self._choose = functools.lru_cache(maxsize=None)(self._choose_uncached)

    def choose(self, signature: Signature, backend: str | None = None) -> str:
        """The backend for this signature: the one named, else the best that can; chosen once.

        Raises:
            BackendError: the named one is unknown or can't run; the message says why.
        """
        return self._choose(signature, backend or env.force_backend())

    @functools.cached_property
    def cpu_is_compiled(self) -> bool:
        """Whether CPU tensors, no backend named, run on the compiled kernel; decided once."""
        return self.choose(Signature("cpu")) == "cpu"

    def _choose_uncached(self, signature: Signature, wanted: str | None) -> str:
        if wanted is None:
            return next(name for name, reason in self.can_run.items() if reason(signature) is None)
        if wanted not in self.can_run:
            names = ", ".join(self.can_run)
            raise BackendError(f"{self.op_id}: backend: expected one of {names}, got {wanted!r}")
        if (reason := self.can_run[wanted](signature)) is not None:
            raise BackendError(f"{self.op_id}: backend {wanted!r} can't run: {reason}")
        return wanted


@dataclass(frozen=True)
class Sample:
    """One named case, shared by tests and bench.

    ``make()`` returns ``(args, kwargs)`` for the op's public function, deterministic by name.
    ``macs`` counts the multiply-adds that the op asks for and ``bytes_moved`` the bytes that it
    must read and write once.
    """

    name: str
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    macs: int
    bytes_moved: int
    bench: bool = False
    labels: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OpSpec:
    """One op under its id, the same string in every folder.

    Attributes:
        op_id: e.g. ``"sparse_int8_linear"``; the torch op is ``fastrec::<op_id>``.
        function: the public function; takes ``backend=None | name``.
        reference: same arguments, pure torch: the definition.
        backends: what can run it, best first.
        samples: the shared cases.
        compare: raises AssertionError where ``(actual, args, kwargs)`` is off the reference by more
            than the op's derived tolerance.
    """

    op_id: str
    summary: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    backends: Backends
    samples: Callable[[], Sequence[Sample]]
    compare: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]

    def kernel_isa(self) -> str:
        """Name of the instruction set whose CPU kernel runs now."""
        return str(getattr(_compiled.native(), self.op_id).kernel_isa())
