"""The protocol's messages, in a descriptor pool of our own.

Importing two packages that register ``inference.ModelInferRequest`` in protobuf's default pool
fails; tritonclient and kserve both do. Ours stay out of it, so that a process may hold all three.
The schema is read from a descriptor set (``make protos`` writes it from ``protos/*.proto``), so no
generated code ties the installed protobuf to the version of a generator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastrec.errors import MissingDependencyError

try:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    from google.protobuf.message import DecodeError, Message
except ImportError as error:
    raise MissingDependencyError("protobuf", "serve", "serving") from error

SCHEMA = Path(__file__).with_name("protos") / "schema.binpb"

LOAD_SERVICE = "fastrec.serving.Load"
SERVICE = "inference.GRPCInferenceService"
HEALTH_SERVICE = "grpc.health.v1.Health"


def _load() -> Any:
    pool = descriptor_pool.DescriptorPool()
    files = descriptor_pb2.FileDescriptorSet.FromString(SCHEMA.read_bytes())
    for file in files.file:
        pool.Add(file)
    return pool


pool = _load()


def message(name: str) -> Any:
    """The class of a message, e.g. ``message("inference.ModelInferRequest")``."""
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


def methods(service: str) -> dict[str, tuple[Any, Any]]:
    """Method -> (class of its request, class of its response)."""
    return {
        method.name: (
            message_factory.GetMessageClass(method.input_type),
            message_factory.GetMessageClass(method.output_type),
        )
        for method in pool.FindServiceByName(service).methods
    }


InferRequest = message("inference.ModelInferRequest")
InferResponse = message("inference.ModelInferResponse")

__all__ = [
    "HEALTH_SERVICE",
    "LOAD_SERVICE",
    "SERVICE",
    "DecodeError",
    "InferRequest",
    "InferResponse",
    "Message",
    "message",
    "methods",
    "pool",
]
