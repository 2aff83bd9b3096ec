"""The scheduler: pure Python on an injectable clock, no gRPC, no torch.

InferenceCore.infer -> admission -> queues -> batches -> router -> EngineHandle
"""

from __future__ import annotations

from fastrec.errors import ConfigError, ServingError
from fastrec.serving.core.clock import Clock, LoopClock, VirtualClock
from fastrec.serving.core.config import (
    SLO,
    Admission,
    Batching,
    Canary,
    Pool,
    Queueing,
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
from fastrec.serving.core.inference_core import InferenceCore, ModelInfo
from fastrec.serving.core.request import Kind, Rejected, Request, Response, Timings

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
    "InferenceCore",
    "Kind",
    "LimitChanged",
    "LoopClock",
    "ModelInfo",
    "Observer",
    "Pool",
    "QueuePolicy",
    "Queueing",
    "Quota",
    "Rejected",
    "Request",
    "RequestDone",
    "Response",
    "RolloutChanged",
    "Screened",
    "Screening",
    "ServingConfig",
    "ServingError",
    "Tier",
    "Timings",
    "VirtualClock",
]
