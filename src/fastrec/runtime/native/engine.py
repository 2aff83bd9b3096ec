"""The engine that runs a whole program in one native call. numpy only: it imports no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastrec import kernels
from fastrec.errors import ArgumentError, BackendError, DtypeError
from fastrec.kernels import _compiled
from fastrec.measure.ceilings import Ceilings
from fastrec.runtime.engine import Engine, closed_loop
from fastrec.runtime.native import file
from fastrec.runtime.native.header import described
from fastrec.runtime.native.profile import profile_rows
from fastrec.runtime.native.program import Program
from fastrec.runtime.native.user_state import (
    CANDIDATES,
    Parts,
    State,
    aligned,
    candidate_positions,
)


def _numpy_of(inputs: Sequence[Any]) -> tuple[np.ndarray, ...] | None:
    """Plain tensors as arrays, without a look at what they hold; None for anything else."""
    if not inputs or isinstance(inputs[0], np.ndarray):
        return None
    torch = sys.modules.get("torch")
    if torch is None or any(type(value) is not torch.Tensor for value in inputs):
        return None
    try:
        return tuple([value.numpy() for value in inputs])
    except (RuntimeError, TypeError):
        return None  # a gradient, a device or a dtype, of which the spec's check tells


class PlanEngine(Engine):
    """The compiled engine of a program; any number of threads may call it at once.

    It owns its weights: what becomes of the model that it was compiled from changes nothing.

    Args:
        native: the compiled engine, of :meth:`build` or :func:`fastrec.runtime.native.file.load`.
        about: see :class:`~fastrec.runtime.engine.Engine`.
    """

    spin_s = 0.0005  # the kernels' pool parks after 0.3 ms

    def __init__(self, native: Any, **about: Any) -> None:
        super().__init__(**about)
        self._native: Any = native
        # By the candidates' positions, and whether events can be appended.
        self._parts: dict[tuple[tuple[int, ...], bool], Parts] = {}

    @classmethod
    def build(cls, program: Program, **about: Any) -> PlanEngine:
        """Check and plan a program; its constants are copied.

        Raises:
            BackendError: the engine cannot hold the program, and why.
        """
        values, constants = described(program)
        spec = about["spec"].to_dict()
        header = {"program": values, "spec": spec, "threads": about["threads"]}
        native = _compiled.native().engine.Engine.build(
            json.dumps(header), [np.ascontiguousarray(c) for c in constants]
        )
        return cls(native, **about)

    @classmethod
    def load(cls, path: Path, threads: int | None = None, *, copy: bool = False) -> PlanEngine:
        """Open what :meth:`save` wrote; arguments and errors are
        :func:`fastrec.runtime.native.file.read`'s."""
        native, about = file.read(path, threads, copy=copy)
        return cls(native, **about)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if self.structure is not None or named:
            return super().__call__(*inputs, **named)
        return self._call(*inputs)

    def _call(self, *inputs: Any) -> Any:
        native = self._native  # another thread may close the engine, which unsets it
        if native is not None:
            if (arrays := _numpy_of(inputs)) is None:
                scores = native(inputs, self.threads)
            elif (scores := native(arrays, self.threads)) is not None:
                scores = sys.modules["torch"].from_numpy(scores)
            if scores is not None:
                return scores
        return super()._call(*inputs)

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
        native = self._open()
        none = candidates == () and not any(CANDIDATES in f.dims for f in self.spec.fields)
        which = () if none else candidate_positions(self.spec, candidates)
        key = (which, bool(appendable))
        parts = self._parts.get(key)
        if parts is None:
            parts = self._parts[key] = Parts(native.split(list(which), key[1]), self.spec)
        return parts.encode(history, self.threads)

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
        return self._own(state).append(state, events, self.threads)

    def score(self, state: State, *candidates: Any) -> Any:
        """The scores of candidates for the users of ``state``: the bits that a call with all inputs
        gives. numpy in, numpy out; torch in, torch out.

        Raises:
            DtypeError, ArgumentError: ``state`` is none, or another engine's.
            ArgumentError, DtypeError, DeviceError, ShapeError, IdRangeError: a bad input, named.
            BackendError: the engine is closed.
        """
        return self._own(state).score(state, candidates, self.threads)

    def _own(self, state: Any) -> Parts:
        self._open()
        if not isinstance(state, State):
            raise DtypeError("state", "what encode returned", type(state).__name__)
        if not any(state.parts is own for own in self._parts.values()):
            raise ArgumentError("state", "one that this engine encoded", "another engine's")
        return state.parts

    def _open(self) -> Any:
        native = self._native
        if native is None:
            self._require_open()
        return native

    def results(self, arrays: tuple[np.ndarray, ...], threads: int) -> tuple[np.ndarray, ...]:
        """All outputs of a program that may have several.

        Args:
            arrays: the inputs, contiguous.
            threads: that the call may use.

        Raises:
            BackendError: the inputs are not as the spec says, or the engine is closed.
            IdRangeError: an id lies outside its table.
        """
        found = self._open()(arrays, threads)
        if found is None:
            raise BackendError(f"expected inputs of {self.spec.names} that the spec accepts")
        return found if isinstance(found, tuple) else (found,)

    def _run(self, arrays: list[np.ndarray]) -> np.ndarray:
        return self._checked(arrays, self.threads)

    def _checked(self, arrays: Sequence[np.ndarray], threads: int) -> np.ndarray:
        """The scores of arrays that the spec has accepted, in whatever order they lie."""
        scores = self._open()(aligned(arrays), threads)
        if scores is None:
            raise BackendError("inputs that the spec accepts were refused by the native engine")
        return scores

    def throughput(
        self, requests: Sequence[tuple[np.ndarray, ...]], *, seconds: float = 2.0
    ) -> float:
        """Requests per second with a client a thread, each request on one core.

        Raises:
            ArgumentError: no request.
        """

        def alone(*request: np.ndarray) -> np.ndarray:
            scores: np.ndarray | None = self._open()(request, 1)
            return self._checked(self.spec.check(request)[0], 1) if scores is None else scores

        return closed_loop(alone, requests, self.threads, seconds)

    def profile(
        self, inputs: Sequence[Any], *, calls: int = 5, limits: bool | Ceilings = False
    ) -> list[dict[str, Any]]:
        """The cost of each step on one request, timed in ``calls`` calls.

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
        native = self._open()
        if isinstance(calls, bool) or not isinstance(calls, int) or calls < 1:
            raise ArgumentError("calls", "a positive integer", calls)
        arrays = aligned(self.spec.check(inputs)[0])
        ceilings = Ceilings(self.threads) if limits is True else limits or None
        with kernels.call_threads(self.threads):
            steps = native.profile(arrays, calls, self.threads)
        return profile_rows(steps, ceilings)

    def save(self, path: str | Path) -> Path:
        """Write one file that :func:`fastrec.runtime.load_engine` maps, without torch.

        Raises:
            ArtifactError: ``path`` exists and is not a native engine's file.
            BackendError: the engine is closed.
            OSError: the disk is full, or the folder may not be written; an older file is as it was.
        """
        native = self._open()
        program = json.loads(native.header)["program"]
        return file.write({**self._header(), "program": program}, native.constants, Path(path))

    def plan(self) -> dict[str, Any]:
        """The program in the order that it runs, and how: ``users`` (the symbol that counts
        independent users, or None), ``groups`` ([first step, step behind the last, symbol] whose
        rows threads share out) and ``slots`` (buffers that take turns in the same memory).

        Raises:
            BackendError: the engine is closed.
        """
        return dict(json.loads(self._open().plan()))

    def lookups(self) -> list[tuple[int, np.ndarray, np.ndarray | None]]:
        """The tables whose rows are looked up by an input as it is: (the input's position, table
        [R, D] float32 or int8, scale [R] of an int8 one), read-only.

        Raises:
            BackendError: the engine is closed.
        """
        plan, constants = self.plan(), self._open().constants

        def values(view: list[Any] | None) -> np.ndarray | None:
            if view is None:
                return None
            buffer = plan["buffers"][view[0]]
            shape = [size[0] for size in buffer["shape"]]
            array: np.ndarray = constants[buffer["index"]].view(buffer["dtype"]).reshape(shape)
            return array

        found = []
        for step in plan["steps"]:
            if step["kind"] != "gather":
                continue
            operands = step["operands"]
            ids, table = plan["buffers"][operands["ids"][0]], operands["table"]
            if ids["space"] == "input" and plan["buffers"][table[0]]["space"] == "constant":
                whole = values(table)
                assert whole is not None
                found.append((ids["index"], whole, values(operands.get("scale"))))
        return found

    def close(self) -> None:
        """Free the native engine."""
        if not self._closed:
            super().close()
            self._parts.clear()
            self._native = None
