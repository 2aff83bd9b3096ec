"""The engine that runs a plan in one native call. numpy only: torch is not imported here."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastrec import kernels
from fastrec.errors import ArgumentError, DtypeError
from fastrec.measure.ceilings import Ceilings
from fastrec.runtime.engine import Engine, closed_loop
from fastrec.runtime.native import file
from fastrec.runtime.native.emit import door, executor
from fastrec.runtime.native.faults import error_of
from fastrec.runtime.native.ir import Plan
from fastrec.runtime.native.profile import profile
from fastrec.runtime.native.split import CANDIDATES, candidate_positions
from fastrec.runtime.native.state import Halves, State


class PlanEngine(Engine):
    """A plan and its native executor; any number of threads may call it at once."""

    spin_s = 0.0005  # the kernels' pool parks after 0.3 ms

    def __init__(self, plan: Plan, **about: Any) -> None:
        super().__init__(**about)
        self._plan = plan
        self._executor, self._constants = executor(plan)
        # Where each symbol's size is found: (input, dimension).
        self._sizes = [
            next(
                (i, d)
                for i, buffer in enumerate(plan.inputs)
                for d, size in enumerate(buffer.shape)
                if size.symbols == (symbol,) and size.coefficient == 1
            )
            for symbol in plan.symbols
        ]
        self._out_shape = plan.output.shape
        self._door = door(self._executor, self._constants, plan, self.spec)
        # By the candidates' positions, and whether events can be appended.
        self._halves: dict[tuple[tuple[int, ...], bool], Halves] = {}
        self._building = threading.Lock()

    def __call__(self, *inputs: Any) -> Any:
        scores = self._straight(inputs, self.threads)
        return super().__call__(*inputs) if scores is None else scores

    def _straight(self, inputs: tuple[Any, ...], threads: int) -> np.ndarray | None:
        """The scores without Python code between, where the inputs are arrays in order.

        Whatever else they are, the plain way serves it or says what is wrong.
        """
        way = self._door  # closing the engine, maybe in another thread, takes it away
        done = None if way is None else way(inputs, threads)
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
            BackendError: the plan does not split there, or cannot append, and why; or the engine is
                closed.
        """
        self._require_open()
        none = candidates == () and not any(CANDIDATES in f.dims for f in self.spec.fields)
        which = () if none else candidate_positions(self.spec, candidates)
        key = (which, bool(appendable))
        halves = self._halves.get(key)
        if halves is None:
            with self._building:
                halves = self._halves.get(key) or Halves(self, *key)
                self._halves[key] = halves
        return halves.encode(history)

    def append(self, state: State, *events: Any) -> State:
        """The state after new events, as many for each of its users; ``state`` itself stays.

        In a causal model (as SASRec is) an event changes nothing before it, so only the new events'
        rows are computed: their queries meet the keys and values that the state keeps, those that
        the attention pattern shows them. Values differ from :meth:`encode` of the whole history by
        rounding alone: sums are taken in another order.

        Args:
            state: of ``encode(..., appendable=True)`` or of this method.
            events: the history's inputs that have a value for each event, in order, [B, n, ...];
                lengths are counted on.

        Raises:
            DtypeError, ArgumentError: ``state`` is none, another engine's, or keeps no past.
            ShapeError: another number of users, or more events than the model takes.
            ArgumentError, DtypeError, DeviceError, IdRangeError: a bad input, named.
            BackendError: the engine is closed.
        """
        return self._own(state)._halves.append(state, events)

    def score(self, state: State, *candidates: Any) -> Any:
        """The scores of candidates for the users of ``state``: the bits that a call with all inputs
        gives. numpy in, numpy out; torch in, torch out.

        Raises:
            DtypeError, ArgumentError: ``state`` is none, or another engine's.
            ArgumentError, DtypeError, DeviceError, ShapeError, IdRangeError: a bad input, named.
            BackendError: the engine is closed.
        """
        return self._own(state)._halves.score(state, candidates)

    def _own(self, state: Any) -> State:
        self._require_open()
        if not isinstance(state, State):
            raise DtypeError("state", "what encode returned", type(state).__name__)
        if state._halves.engine is not self:
            raise ArgumentError("state", "one that this engine encoded", "another engine's")
        return state

    def _run(self, arrays: list[np.ndarray]) -> np.ndarray:
        with kernels.call_threads(self.threads):
            return self._call(arrays)

    def throughput(
        self, requests: Sequence[tuple[np.ndarray, ...]], *, seconds: float = 2.0
    ) -> float:
        """Requests per second with a client a thread, each request on one core.

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
        known = dict(zip(self._plan.symbols, sizes, strict=True))
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
        """The executor, and the constants that it borrows."""
        try:
            return self._executor, self._constants
        except AttributeError:
            self._require_open()
            raise

    def _error(self, fault: int, step: int, value: int, arrays: Sequence[np.ndarray]) -> Exception:
        sizes = {
            symbol: arrays[i].shape[d]
            for symbol, (i, d) in zip(self._plan.symbols, self._sizes, strict=True)
        }
        return error_of(self._plan, self.spec.names, fault, step, value, sizes, arrays)

    def profile(
        self, inputs: Sequence[Any], *, calls: int = 5, limits: bool | Ceilings = False
    ) -> list[dict[str, Any]]:
        """What each step costs on one request, timed in ``calls`` calls.

        Args:
            inputs: the model's inputs, numpy or torch.
            calls: at least 1; the best and the median of them are told.
            limits: hold each step against what this machine can do on the engine's threads: True
                measures that first (some 2 s), :class:`~fastrec.measure.ceilings.Ceilings` have it.

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
        with kernels.call_threads(self.threads):
            return profile(self, arrays, calls, ceilings)

    def save(self, path: str | Path) -> Path:
        """Write one file that :func:`fastrec.runtime.load_engine` maps, without torch.

        Raises:
            ArtifactError: ``path`` exists and is not a native engine's file.
            BackendError: the engine is closed, or its plan has a form that files do not hold.
        """
        self._require_open()
        return file.save(self, path)

    def close(self) -> None:
        """Free the executor and the constants."""
        if not self._closed:
            super().close()
            self._halves.clear()
            self._door = None
            del self._executor, self._constants
