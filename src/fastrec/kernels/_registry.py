"""What every op declares about itself; contract tests, bench and ``fastrec info`` walk it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


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
        backends: name -> ``can_run(signature) -> reason | None``, best first.
        samples: the shared cases.
        compare: raises AssertionError where ``(actual, args, kwargs)`` is off the reference by more
            than the op's derived tolerance.
        kernel_isa: name of the ISA whose CPU kernel runs now.
    """

    op_id: str
    summary: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    backends: dict[str, Callable[[Any], str | None]]
    samples: Callable[[], Sequence[Sample]]
    compare: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
    kernel_isa: Callable[[], str]
