"""The engine that runs a whole program in one native call. numpy only: it imports no torch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastrec import kernels
from fastrec.errors import ArgumentError, ArtifactError, DtypeError
from fastrec.measure.ceilings import Ceilings
from fastrec.runtime.engine import Engine, closed_loop
from fastrec.runtime.native import file
from fastrec.runtime.native.emit import entrance, executor
from fastrec.runtime.native.faults import error_of
from fastrec.runtime.native.profile import Request, profile
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.split import CANDIDATES, candidate_positions
from fastrec.runtime.native.split_executors import SplitExecutors
from fastrec.runtime.native.user_state import State


class PlanEngine(Engine):
    """A program and its native executor; any number of threads may call it at once."""

    spin_s = 0.0005  # the kernels' pool parks after 0.3 ms

    def __init__(self, program: Program, **about: Any) -> None:
        super().__init__(**about)
        self._program = program
        self._executor, self._constants = executor(program)
        # Where each symbol's size is found: (input, dimension).
        self._sizes = [
            next(
                (i, d)
                for i, buffer in enumerate(program.inputs)
                for d, size in enumerate(buffer.shape)
                if size.symbols == (symbol,) and size.coefficient == 1
            )
            for symbol in program.symbols
        ]
        self._out_shape = program.output.shape
        self._entrance = entrance(self._executor, self._constants, program, self.spec)
        # By the candidates' positions, and whether events can be appended.
        self._splits: dict[tuple[tuple[int, ...], bool], SplitExecutors] = {}
        self._building = threading.Lock()

    def __call__(self, *inputs: Any) -> Any:
        scores = self._straight(inputs, self.threads)
        return super().__call__(*inputs) if scores is None else scores

    def _straight(self, inputs: tuple[Any, ...], threads: int) -> np.ndarray | None:
        """The scores without Python code in between, where the inputs are arrays as the spec says.

        None for other inputs, which :meth:`__call__` then converts or refuses.
        """
        entrance = self._entrance  # another thread may close the engine, which unsets it
        done = None if entrance is None else entrance(inputs, threads)
        if isinstance(done, tuple):
            fault, step, value = done
            raise self._error(fault, step, value, inputs)
        return done

    def encode(
        self,
        *history: Any,
        candidates: str | int | Sequence[str | int] | None = None,
        appendable: bool = False,
    ) -> State:
        """The histories of B users, encoded for :meth:`score`; numpy or torch.

        Args:
            history: the model's inputs but the candidates', in order.
            candidates: names or positions of the candidates' inputs; by default those with a
                dimension ``m``. ``()`` for a model that has none: ``state.output`` is then what a
                call gives.
            appendable: keep what :meth:`append` needs too: the keys and values of every layer.

        Raises:
            ArgumentError, DtypeError, DeviceError, ShapeError, IdRangeError: a bad input, named.
            BackendError: the program does not split there, or cannot append, and why; or the engine
                is closed.
        """
        self._require_open()
        none = candidates == () and not any(CANDIDATES in f.dims for f in self.spec.fields)
        which = () if none else candidate_positions(self.spec, candidates)
        key = (which, bool(appendable))
        executors = self._splits.get(key)
        if executors is None:
            with self._building:
                executors = self._splits.get(key) or SplitExecutors(
                    self._program, self.spec, self._executor, self.threads, *key
                )
                self._splits[key] = executors
        return executors.encode(history)

    def append(self, state: State, *events: Any) -> State:
        """The state after new events, as many for each of its users; ``state`` is unchanged.

        In a causal model (as SASRec is) an event changes nothing before it, so only the new events'
        rows are computed: their queries meet the keys and values that the state keeps, those that
        the attention pattern shows them. Values differ from :meth:`encode` of the whole history by
        rounding alone: sums are taken in another order.

        Args:
            state: of ``encode(..., appendable=True)`` or of this method.
            events: the history's inputs that have a value for each event, in order, [B, n, ...];
                lengths are counted on.

        Raises:
            DtypeError, ArgumentError: ``state`` is not a state, not this engine's, or has no past.
            ShapeError: another number of users, or more events than the model takes.
            ArgumentError, DtypeError, DeviceError, IdRangeError: a bad input, named.
            BackendError: the engine is closed.
        """
        return self._own(state)._executors.append(state, events)

    def score(self, state: State, *candidates: Any) -> Any:
        """The scores of candidates for the users of ``state``: the bits that a call with all inputs
        gives. numpy in, numpy out; torch in, torch out.

        Raises:
            DtypeError, ArgumentError: ``state`` is not a state, or is another engine's.
            ArgumentError, DtypeError, DeviceError, ShapeError, IdRangeError: a bad input, named.
            BackendError: the engine is closed.
        """
        return self._own(state)._executors.score(state, candidates)

    def _own(self, state: Any) -> State:
        self._require_open()
        if not isinstance(state, State):
            raise DtypeError("state", "what encode returned", type(state).__name__)
        if not any(state._executors is own for own in self._splits.values()):
            raise ArgumentError("state", "one that this engine encoded", "another engine's")
        return state

    def _run(self, arrays: list[np.ndarray]) -> np.ndarray:
        with kernels.call_threads(self.threads):
            return self._call(arrays)

    def throughput(
        self, requests: Sequence[tuple[np.ndarray, ...]], *, seconds: float = 2.0
    ) -> float:
        """Requests per second with one client per thread, each request on one core.

        Raises:
            ArgumentError: no request.
        """

        def alone(*request: np.ndarray) -> np.ndarray:
            scores = self._straight(request, 1)
            if scores is not None:
                return scores
            with kernels.call_threads(1):
                return self._call(self.spec.check(request)[0])

        return closed_loop(alone, requests, self.threads, seconds)

    def _call(self, arrays: list[np.ndarray], step_ns: np.ndarray | None = None) -> np.ndarray:
        arrays = [np.ascontiguousarray(a) for a in arrays]
        sizes = [arrays[i].shape[d] for i, d in self._sizes]
        known = dict(zip(self._program.symbols, sizes, strict=True))
        out = np.empty([size.at(known) for size in self._out_shape], np.float32)
        # Held until the call is over: another thread may close the engine meanwhile.
        native, _constants = self._held()
        fault, step, value = native.run(
            sizes,
            [a.ctypes.data for a in arrays],
            [out.ctypes.data],
            0 if step_ns is None else step_ns.ctypes.data,
        )
        if fault:
            raise self._error(fault, step, value, arrays)
        return out

    def _held(self) -> tuple[Any, list[np.ndarray]]:
        """The executor and the constants that it borrows, to keep during a call."""
        try:
            return self._executor, self._constants
        except AttributeError:
            self._require_open()
            raise

    def _error(self, fault: int, step: int, value: int, arrays: Sequence[np.ndarray]) -> Exception:
        sizes = self._sizes_of(arrays)
        return error_of(self._program, self.spec.names, fault, step, value, sizes, arrays)

    def _sizes_of(self, arrays: Sequence[np.ndarray]) -> dict[str, int]:
        """Each symbol's size in a call."""
        return {
            symbol: arrays[i].shape[d]
            for symbol, (i, d) in zip(self._program.symbols, self._sizes, strict=True)
        }

    def profile(
        self, inputs: Sequence[Any], *, calls: int = 5, limits: bool | Ceilings = False
    ) -> list[dict[str, Any]]:
        """Time and cost of each step on one request, over ``calls`` calls.

        Args:
            inputs: the model's inputs, numpy or torch.
            calls: at least 1; rows hold the best and the median of them.
            limits: compare each step with this machine's ceilings on the engine's threads: True
                measures them first (some 2 s), or give :class:`~fastrec.measure.ceilings.Ceilings`.

        Returns:
            a row a step: ``module``, ``op``, ``kernel`` (with its instruction set), ``density``,
            ``bytes`` (its constants, whole tables included), ``read_bytes`` and ``written_bytes``
            (of constants and activations, each once a call), ``macs`` (padding and zero groups left
            out; None where the step has none or they are not known), ``us`` (best) and
            ``us_median``. With ``limits`` also ``limit`` (the bound that is reached first: ``fp32
            peak``, ``int8 peak`` or ``bandwidth``), ``limit_us`` (the time it allows) and
            ``of_limit`` (``limit_us / us``); None where the step's arithmetic is not known.

        Raises:
            ArgumentError, DtypeError, DeviceError, ShapeError, IdRangeError: a bad input, named.
            BackendError: the engine is closed.
        """
        self._require_open()
        if isinstance(calls, bool) or not isinstance(calls, int) or calls < 1:
            raise ArgumentError("calls", "a positive integer", calls)
        arrays = self.spec.check(inputs)[0]
        ceilings = Ceilings(self.threads) if limits is True else limits or None
        taken = np.zeros((calls, len(self._program.steps)), np.int64)
        with kernels.call_threads(self.threads):
            for call in taken:
                self._call(arrays, call)
            request = Request(self._sizes_of(arrays), arrays)
            return profile(self._program, request, taken, ceilings)

    def save(self, path: str | Path) -> Path:
        """Write one file that :func:`fastrec.runtime.load_engine` maps, without torch.

        Raises:
            ArtifactError: ``path`` exists and is not a native engine's file.
            BackendError: the engine is closed, or its program has a form that files do not hold.
        """
        self._require_open()
        return file.write(self._program, self.spec, self._header(), path)

    @classmethod
    def load(cls, path: Path, threads: int | None = None) -> PlanEngine:
        """Open what :meth:`save` wrote.

        Args:
            path: the file.
            threads: threads that a call may use; None means as when it was saved.

        Raises:
            ArgumentError: ``threads`` is not a positive integer or None.
            ArtifactError: missing, foreign, truncated, altered, newer, or an unsound program.
            BackendError: the compiled kernels are missing, or lack what the file requires.
        """
        program, about = file.read(path, threads)
        try:
            return cls(program, **about)
        except (TypeError, ValueError, OverflowError) as error:  # of the compiled executor
            raise ArtifactError(f"{path}: an invalid program: {error}") from error

    def close(self) -> None:
        """Free the executor and the constants."""
        if not self._closed:
            super().close()
            self._splits.clear()
            self._entrance = None
            del self._executor, self._constants
