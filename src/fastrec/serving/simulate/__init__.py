"""Fleet simulation: the real scheduler on a virtual clock, engines with a measured latency, and
callers that route by probes. See :mod:`.fleet` for what is simulated and what is not.
"""

from __future__ import annotations

from fastrec.serving.simulate.fleet import Fleet, Outcome, simulate
from fastrec.serving.simulate.profile import EngineProfile

__all__ = ["EngineProfile", "Fleet", "Outcome", "simulate"]
