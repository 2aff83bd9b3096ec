"""The engine that every backend builds: checked inputs, one call, a description of itself."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fastrec.errors import ArgumentError, BackendError, FastrecError
from fastrec.runtime.ending import watch
from fastrec.spec import InputSpec
from fastrec.structure import Structure

if TYPE_CHECKING:
    import torch

# The choices of the native backend: one plan, or several with torch between them, or torch.
PLAN, PARTS = "one plan", "parts"
PRECISIONS = ("fp32", "bf16", "fp16", "int8")


@dataclass(frozen=True)
class BuildOptions:
    """The options that :func:`fastrec.compile` hands to a backend.

    Args:
        threads: threads a call may use.
        precision: one of :data:`PRECISIONS`, or None for the model as it is.
        calibration: requests (tuples of numpy arrays) for backends that quantise by calibration.
        spec: the inputs that the model accepts.
        settings: the backend's own settings, forced instead of chosen; see its page in the docs.
    """

    threads: int
    precision: str | None
    calibration: list[tuple[np.ndarray, ...]]
    spec: InputSpec
    settings: dict[str, Any] = field(default_factory=dict)

    def setting(self, name: str, choices: Sequence[str], default: str = "auto") -> str:
        """One of the backend's own settings.

        Raises:
            ArgumentError: the value is not among ``choices``.
        """
        value = self.settings.get(name, default)
        if value not in (*choices, default):
            raise ArgumentError(f"settings[{name!r}]", f"one of {(*choices, default)}", value)
        return str(value)

    def allow(self, *names: str) -> None:
        """Refuse settings that the backend does not have.

        Raises:
            ArgumentError: a setting is not among ``names``.
        """
        unknown = sorted(set(self.settings) - set(names))
        if unknown:
            raise ArgumentError("settings", f"keys among {sorted(names)}", unknown)


class Backend(Protocol):
    """The interface of each module of :mod:`fastrec.runtime.backends`."""

    PRECISIONS: tuple[str, ...]

    def can_run(self) -> str | None:
        """None, or the reason why this backend cannot run here."""

    def build(
        self,
        model: torch.nn.Module,
        example_inputs: tuple[torch.Tensor, ...],
        options: BuildOptions,
    ) -> Engine:
        """Compile the model, ready for its first call."""

    def versions(self) -> dict[str, str]:
        """Package -> version."""


class Engine(abc.ABC):
    """A model ready to serve. Call it with the model's inputs: tensors in, tensor out; numpy in,
    numpy out (float32). A call that raises leaves the engine usable.

    Attributes:
        backend: the backend's name.
        precision: one of :data:`PRECISIONS`.
        threads: threads a call may use.
        spec: the inputs accepted, as tensors one after the other.
        structure: how a call's arguments and its result look around their tensors; None where they
            are tensors alone.
        spin_s: how long idle workers keep a core busy after a call, in seconds (for timing).
    """

    spin_s: float = 0.05

    def __init__(
        self,
        *,
        backend: str,
        precision: str,
        threads: int,
        spec: InputSpec,
        rows: list[dict[str, Any]],
        versions: dict[str, str],
        structure: Structure | None = None,
    ) -> None:
        watch(type(self))
        self.backend = backend
        self.precision = precision
        self.threads = threads
        self.spec = spec
        self._rows = rows
        self._versions = versions
        self._closed = False
        self.structure = structure

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Scores of one batch; the inputs of the model's forward, all numpy or all torch.

        Raises:
            ArgumentError, DtypeError, DeviceError, ShapeError, IdRangeError: a bad input, named;
                nothing was computed.
            BackendError: the engine is closed.
        """
        if self.structure is not None:
            return self.structure.call(self._call, inputs, named)
        if named:
            raise ArgumentError("inputs", "positional inputs", f"named ones: {sorted(named)}")
        return self._call(*inputs)

    def _call(self, *inputs: Any) -> Any:
        """The scores of tensors or arrays, one after the other."""
        self._require_open()
        arrays, from_torch = self.spec.check(inputs)
        try:
            if from_torch:
                return self._run_torch(inputs, arrays)
            return self._run(arrays)
        except (FastrecError, MemoryError):
            raise
        except Exception as error:  # of a library below, which may raise anything
            raise BackendError(f"this {self.backend} engine failed in a call: {error}") from error

    def encode(self, *history: Any, candidates: Any = None) -> Any:
        """The histories of B users, encoded for :meth:`score`; see ``PlanEngine.encode``.

        Raises:
            BackendError: this engine runs the model in one piece.
        """
        raise self._one_piece()

    def score(self, state: Any, *candidates: Any) -> Any:
        """The scores of candidates for the users that ``encode`` made ``state`` of.

        Raises:
            BackendError: this engine runs the model in one piece.
        """
        raise self._one_piece()

    def _one_piece(self) -> BackendError:
        return BackendError(
            f"this {self.backend} engine runs the model in one piece; encode and score need a "
            'native engine that runs one plan: compile with backend="native" and '
            'settings={"executor": "plan"}, whose error says what stands in the way'
        )

    def _require_open(self) -> None:
        if self._closed:
            raise BackendError(f"this {self.backend} engine is closed")

    @abc.abstractmethod
    def _run(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Compute checked numpy inputs; the array returned is the caller's own."""

    def _run_torch(self, tensors: Sequence[torch.Tensor], arrays: list[np.ndarray]) -> torch.Tensor:
        """Compute checked torch inputs, whose numpy views are ``arrays``."""
        import torch

        return torch.from_numpy(self._run(arrays))

    def describe(self) -> list[dict[str, Any]]:
        """Rows of plain values: what runs, on which kernel or setting, and why."""
        return [dict(row) for row in self._rows]

    def versions(self) -> dict[str, str]:
        """Package -> version of what this engine runs on."""
        return dict(self._versions)

    def throughput(
        self, requests: Sequence[tuple[np.ndarray, ...]], *, seconds: float = 2.0
    ) -> float:
        """Requests per second (batches, whatever their B) in a closed loop over ``requests``.

        Here: one call after another. Backends with a mode for throughput use it.

        Raises:
            ArgumentError: no request.
        """
        return closed_loop(self, requests, 1, seconds)

    def save(self, path: str | Path) -> Path:
        """Write an artifact that :func:`fastrec.runtime.load_engine` opens without torch.

        Raises:
            BackendError: this backend has no file of its own.
        """
        raise BackendError(
            f"a {self.backend} engine in this form has no file of its own: save the model with "
            "fastrec.save and compile it where it is loaded; onnxruntime and openvino engines can "
            "be saved, and native ones that run one plan"
        )

    def _header(self) -> dict[str, Any]:
        """The engine's facts that an artifact holds."""
        return {
            "backend": self.backend,
            "precision": self.precision,
            "threads": self.threads,
            "spec": self.spec.to_dict(),
            "rows": self._rows,
            "versions": self._versions,
            "structure": None if self.structure is None else self.structure.to_dict(),
        }

    def close(self) -> None:
        """Free what the engine holds; later calls raise BackendError. Closing twice is harmless."""
        self._closed = True

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"Engine({self.backend}, {self.precision}, threads={self.threads}{state})"


def closed_loop(
    call: Callable[..., Any],
    requests: Sequence[tuple[Any, ...]],
    clients: int,
    seconds: float,
) -> float:
    """Calls per second of ``clients`` threads that each send their next request at once.

    Raises:
        ArgumentError: no request.
    """
    if not requests:
        raise ArgumentError("requests", "at least one request", "none")
    call(*requests[0])
    start = time.perf_counter()

    def client(first: int) -> int:
        done = 0
        while time.perf_counter() - start < seconds:
            call(*requests[(first + done) % len(requests)])
            done += 1
        return done

    if clients == 1:
        total = client(0)
    else:
        with ThreadPoolExecutor(clients) as pool:
            total = sum(pool.map(client, range(clients)))
    return total / (time.perf_counter() - start)


def as_backend(module: ModuleType) -> Backend:
    """The module as the protocol (a module cannot declare that it implements one)."""
    return module
