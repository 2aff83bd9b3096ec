"""Rows of one section, written as they come; and the comparison that fills most of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastrec.measure.timing import ratio
from fastrec.runtime.cuda.roofline import GPUS
from gate import TOLERANCE, error_of
from gpu.timing import Call, Replay, host_us, in_turn

Row = dict[str, Any]
T = TypeVar("T")

OURS = "fastrec"
# More than the L2 cache of any GPU; and the most sets of inputs that a comparison keeps.
L2_BYTES = 128 << 20
MOST_SETS = 32


@dataclass(frozen=True)
class Work:
    """What a call must move and multiply: bytes, multiply-adds, and the type of its products."""

    moved: int
    macs: int
    dtype: str

    def bound_us(self) -> float:
        """The least time that the data sheet of the GPU at hand allows; of an H200 without one."""
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        gpu = next((known for known in GPUS if known in name), "H200")
        return 1e6 * GPUS[gpu].seconds(self.moved, self.macs, self.dtype)


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
        prepare: inputs -> the call; compiles at the first set of inputs, if at all.
        expected: inputs -> what it has to return, where that is not what the comparison says.
        part: of the result, what is compared.
        check: (result, expected) -> what is wrong, or None; by default the error's root mean square
            against the tolerance of ``precision``.
        replay: sets of inputs -> the graph to time, where it has one of its own.
        device: whether its device time can be told: an engine that is no graph has host times only.
        note: what a reader must know of it.
    """

    prepare: Callable[..., Call]
    expected: Callable[..., Any] | None = None
    part: Callable[[Any], Any] | None = None
    check: Callable[[Any, Any], str | None] | None = None
    precision: str = "bf16"
    replay: Callable[[], Replay] | None = None
    device: bool = True
    note: str = ""


class Sheet:
    """Where a section writes. ``gpu``: False on a machine without one: calls run once, on small
    inputs, and nothing is timed."""

    def __init__(self, file: Path, section: str, seconds: float, *, gpu: bool, out: Path) -> None:
        self.file, self.section, self.gpu, self.out = file, section, gpu, out
        self.end = time.monotonic() + seconds
        self.device = torch.device("cuda" if gpu else "cpu")

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def pick(self, there: T, here: T) -> T:
        """What a GPU measures, or what is tried without one."""
        return there if self.gpu else here

    def add(self, **row: Any) -> None:
        """Saved at once."""
        with self.file.open("a") as lines:
            lines.write(json.dumps({"section": self.section, **row}) + "\n")

    def compare(
        self,
        what: str,
        work: Work,
        inputs: Callable[[], tuple[Any, ...]],
        contenders: dict[str, Contender],
        expected: Callable[..., Any],
    ) -> None:
        """A row a contender, ours first: right, then timed, a rival in turn with the best of ours.

        ``inputs()`` makes a set of inputs; ``expected`` of them is what all have to return.
        """
        sets = [inputs()]
        size = sum(t.nbytes for t in sets[0] if isinstance(t, torch.Tensor))
        if self.gpu:
            count = min(MOST_SETS, L2_BYTES // max(size, 1) + 1)
            sets += [inputs() for _ in range(count - 1)]
        wanted: dict[Any, Any] = {}
        ours: tuple[float, Replay] | None = None
        for name, contender in contenders.items():
            row: Row = {"what": what, "engine": name, "bound_us": work.bound_us()}
            row |= {"moved": work.moved, "macs": work.macs, "dtype": work.dtype}
            row |= {"note": contender.note} if contender.note else {}
            try:
                if self.left() < 1:
                    raise TimeoutError("no time was left")
                source = contender.expected or expected
                if source not in wanted:
                    wanted[source] = source(*sets[0])
                row |= _right(contender, sets[0], wanted[source])
                if self.gpu:
                    found, replay = _timed(contender, sets, work, None if ours is None else ours[1])
                    row |= found
                    mine = name.startswith(OURS) and replay is not None
                    if mine and (ours is None or found["device_us"] < ours[0]):
                        ours = found["device_us"], replay
                else:
                    row["why"] = "right on small inputs; not measured: torch sees no CUDA device"
            except Exception as error:  # a rival that is missing must not end the section
                row["why"] = said(error)
            self.add(**row)


def said(error: BaseException) -> str:
    """An error in one line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'without a message'}"


def _right(contender: Contender, inputs: tuple[Any, ...], expected: Any) -> Row:
    """Runs it once and compares; raises where it is wrong."""
    result = contender.prepare(*inputs)()
    if contender.part is not None:
        result = contender.part(result)
    if contender.check is not None:
        if (wrong := contender.check(result, expected)) is not None:
            raise AssertionError(f"wrong: {wrong}")
        return {}
    error = error_of(result, expected)
    allowed = TOLERANCE[contender.precision]
    if not error <= allowed:
        raise AssertionError(f"wrong: error {error:.2g} > {allowed:g}")
    return {"error": error}


def _timed(
    contender: Contender, sets: Sequence[tuple[Any, ...]], work: Work, ours: Replay | None
) -> tuple[Row, Replay | None]:
    calls = [contender.prepare(*inputs) for inputs in sets]
    row: Row = {"host_us": host_us(calls[0])}
    if not contender.device:
        return row, None
    replay = contender.replay() if contender.replay else Replay.of(calls)
    taken = in_turn([replay] if ours is None else [replay, ours])
    us = taken[0].p50_ms * 1e3
    row |= {
        "device_us": us,
        "gb_per_s": work.moved / us / 1e3,
        "gop_per_s": 2 * work.macs / us / 1e3,
    }
    row["quartiles_us"] = [taken[0].percentile_ms(q) * 1e3 for q in (25, 75)]
    if ours is not None:
        faster = ratio(taken[0], taken[1])
        row["fastrec_is_faster_by"] = {"x": faster.value, "ci95": [faster.low, faster.high]}
    return row, replay
