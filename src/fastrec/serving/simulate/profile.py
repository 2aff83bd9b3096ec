"""Measured latency of an engine: a linear model, and the scatter about it."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastrec.errors import ArtifactError
from fastrec.files import atomic_write
from fastrec.serving.core.latency import LatencyModel

_QUANTILES = 200


@dataclass(frozen=True)
class EngineProfile:
    """Seconds of a call: ``(call_s + user_s x users + row_s x rows)`` times one of ``scatter``.

    Args:
        call_s, user_s, row_s: fitted to the medians of the measured shapes.
        scatter: evenly spaced quantiles of measured times over that line, from the least to the
            largest; (1.0,) = no scatter.
        source: what was measured, where and how, for the report.
    """

    call_s: float
    user_s: float
    row_s: float
    scatter: tuple[float, ...] = (1.0,)
    source: str = ""

    def __post_init__(self) -> None:
        costs = (self.call_s, self.user_s, self.row_s, *self.scatter)
        numbers = all(isinstance(c, int | float) and math.isfinite(c) and c >= 0 for c in costs)
        if not numbers or not self.scatter or self.line(1, 1) <= 0:
            raise ArtifactError(f"profile: expected costs of 0 or more, not all 0, got {self}")

    def line(self, users: int, rows: int) -> float:
        """Seconds of a usual call."""
        return self.call_s + self.user_s * users + self.row_s * rows

    def scaled(self, factor: float) -> EngineProfile:
        """The profile of an engine that takes ``factor`` times as long."""
        return dataclasses.replace(
            self,
            call_s=self.call_s * factor,
            user_s=self.user_s * factor,
            row_s=self.row_s * factor,
        )

    def sampler(self, rng: random.Random) -> Callable[[int, int], float]:
        """Seconds of one call after another, each with a scatter drawn by itself."""
        scatter, last, draw = self.scatter, len(self.scatter) - 1, rng.random
        if not last:
            only = scatter[0]
            return lambda users, rows: self.line(users, rows) * only

        def seconds(users: int, rows: int) -> float:
            at = draw() * last
            low = int(at)
            ratio = scatter[low] + (at - low) * (scatter[low + 1] - scatter[low])
            return self.line(users, rows) * ratio

        return seconds

    def mean_scatter(self) -> float:
        """Of :meth:`sampler`'s draws."""
        s = self.scatter
        return s[0] if len(s) == 1 else (sum(s) - (s[0] + s[-1]) / 2) / (len(s) - 1)

    @classmethod
    def measure(
        cls,
        engine: Any,
        *,
        users: Sequence[int] = (1, 2, 4, 8),
        candidates: Sequence[int] = (25, 50),
        calls: int = 200,
        source: str = "",
    ) -> EngineProfile:
        """Of an engine with a ``spec``, called here: shapes in turn, so that all see the same
        machine.

        Args:
            users, candidates: shapes, each with each.
            calls: of each shape; a tenth more go before, uncounted.
        """
        shapes = [(u, m) for u in users for m in candidates]
        inputs = [engine.spec.sample({"B": u, "m": m}) for u, m in shapes]
        times = np.empty((calls, len(shapes)))
        for call in range(-(calls // 10) - 1, calls):
            for i, arrays in enumerate(inputs):
                start = time.perf_counter()
                engine(*arrays)
                if call >= 0:
                    times[call, i] = time.perf_counter() - start
        model = LatencyModel()
        for _ in range(50):
            for (u, m), median in zip(shapes, np.median(times, axis=0), strict=True):
                model.observe(u, u * m, float(median), seed=True)
        line = np.array([model.predict(u, u * m) for u, m in shapes])
        scatter = np.quantile(times / line, np.linspace(0, 1, _QUANTILES + 1))
        return cls(model.beta, model.gamma, model.alpha, tuple(map(float, scatter)), source)

    def save(self, path: str | Path) -> None:
        """As JSON."""
        with atomic_write(path) as draft:
            draft.write_text(json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> EngineProfile:
        """Read the file that :meth:`save` wrote.

        Raises:
            ArtifactError: it is no profile.
        """
        try:
            values = json.loads(Path(path).read_text())
            if not isinstance(values, Mapping):
                raise TypeError("not an object")
            return cls(**{**values, "scatter": tuple(values["scatter"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ArtifactError(f"{path}: not a profile of an engine ({error})") from error
