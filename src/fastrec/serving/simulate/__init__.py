"""A fleet on paper: the scheduler that serves, on a virtual clock, with engines that are a measured
latency, behind callers that route by probes. See :mod:`.fleet` for what is simulated and what not.
"""

from __future__ import annotations

from fastrec.serving.simulate.fleet import Fleet, Outcome, simulate
from fastrec.serving.simulate.profile import EngineProfile

__all__ = ["EngineProfile", "Fleet", "Outcome", "simulate"]
