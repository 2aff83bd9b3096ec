"""The cost of each step of a plan, and the least time that the machine allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastrec.measure.ceilings import Ceilings


def profile_rows(
    steps: Sequence[Mapping[str, Any]], ceilings: Ceilings | None = None
) -> list[dict[str, Any]]:
    """The rows of ``PlanEngine.profile``.

    Args:
        steps: of the compiled engine: costs, and the nanoseconds of each call.
        ceilings: of this machine, or None.
    """
    # Between two calls of a step all others use the caches too.
    resident = sum(s["constant_bytes"] for s in steps) + max(
        (s["activation_bytes"] + s["written_bytes"] for s in steps), default=0
    )
    rows = []
    for step in steps:
        best, median = min(step["ns"]) / 1e3, float(np.median(step["ns"])) / 1e3
        row = {
            "module": step["module"],
            "op": step["op"],
            "kernel": f"cpu/{step['isa']}" if step["isa"] else "cpu",
            "density": step["density"],
            "bytes": step["bytes"],
            "read_bytes": step["constant_bytes"] + step["activation_bytes"],
            "written_bytes": step["written_bytes"],
            "macs": step["macs"],
            "us": best,
            "us_median": median,
            "why": "a step of the plan, run without Python",
        }
        if ceilings is not None:
            row.update(_limit(step, best, resident, ceilings))
        rows.append(row)
    return rows


def _limit(step: Mapping[str, Any], us: float, resident: int, ceilings: Ceilings) -> dict[str, Any]:
    """The time that the machine allows at best, and by what."""
    precision, macs = step["peak"], step["macs"]
    peak = ceilings.peaks.get(precision, 0.0) if precision else 0.0
    if precision is None or (macs and not peak):
        return {"limit": None, "limit_us": None, "of_limit": None}
    # 10^9 a second is 10^3 a microsecond; a multiply-add is two operations. Weights come from where
    # those of a whole call lie, activations from where the step before has left them.
    moved = step["activation_bytes"] + step["written_bytes"]
    bounds = {
        "bandwidth": step["constant_bytes"] / (ceilings.reading(resident) * 1e3)
        + moved / (ceilings.reading(moved) * 1e3)
    }
    if macs:
        bounds[f"{precision} peak"] = 2 * macs / (peak * 1e3)
    name = max(bounds, key=lambda n: bounds[n])
    return {
        "limit": name,
        "limit_us": bounds[name],
        "of_limit": bounds[name] / us if us > 0 else None,
    }
