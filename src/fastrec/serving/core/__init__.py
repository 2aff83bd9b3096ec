"""The scheduler: pure Python on an injectable clock, no gRPC, no torch.

Runtime.infer -> admission -> lanes -> batches -> router -> EngineHandle
"""

from __future__ import annotations

from fastrec.errors import ConfigError, ServingError
from fastrec.serving.core.clock import Clock, LoopClock, VirtualClock
from fastrec.serving.core.config import (
    SLO,
    Admission,
    Batching,
    Canary,
    Lanes,
    Pool,
    QueuePolicy,
    Quota,
    Screening,
    ServingConfig,
    Tier,
)
from fastrec.serving.core.engines import EngineDied, EngineHandle, EntryPoint
from fastrec.serving.core.events import (
    BatchDone,
    EngineChanged,
    Event,
    LimitChanged,
    Observer,
    RequestDone,
    RolloutChanged,
    Screened,
)
from fastrec.serving.core.request import Kind, Rejected, Request, Response, Timings
from fastrec.serving.core.runtime import ModelInfo, Runtime

__all__ = [
    "SLO",
    "Admission",
    "BatchDone",
    "Batching",
    "Canary",
    "Clock",
    "ConfigError",
    "EngineChanged",
    "EngineDied",
    "EngineHandle",
    "EntryPoint",
    "Event",
    "Kind",
    "Lanes",
    "LimitChanged",
    "LoopClock",
    "ModelInfo",
    "Observer",
    "Pool",
    "QueuePolicy",
    "Quota",
    "Rejected",
    "Request",
    "RequestDone",
    "Response",
    "RolloutChanged",
    "Runtime",
    "Screened",
    "Screening",
    "ServingConfig",
    "ServingError",
    "Tier",
    "Timings",
    "VirtualClock",
]
