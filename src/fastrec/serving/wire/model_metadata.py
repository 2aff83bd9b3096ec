"""Metadata and configuration of a model, from its engine's spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastrec.serving.core.config import Queueing, QueuePolicy
from fastrec.serving.core.inference_core import ModelInfo
from fastrec.serving.wire.messages import message
from fastrec.serving.wire.tensors import datatype

PLATFORM = "fastrec"
_MetadataResponse = message("inference.ModelMetadataResponse")
_ConfigResponse = message("inference.ModelConfigResponse")


def metadata(info: ModelInfo, versions: Sequence[str]) -> Any:
    """A ModelMetadataResponse; free dimensions are -1."""
    answer = _MetadataResponse(name=info.name, versions=versions, platform=PLATFORM)
    for f in info.spec.fields:
        answer.inputs.add(name=f.name, datatype=datatype(f.dtype), shape=_free(f.dims))
    for name, (dims, dtype) in info.outputs.items():
        answer.outputs.add(name=name, datatype=datatype(dtype), shape=_free(dims))
    return answer


def configuration(info: ModelInfo, queueing: Queueing, details: Mapping[str, str]) -> Any:
    """A ModelConfigResponse.

    ``max_batch_size`` is 0, Triton's way to say that shapes are complete: lengths ``[B]`` have no
    dimension left once the batch is taken away, which Triton's configuration cannot express.

    Args:
        queueing: how requests queue, reported as Triton's dynamic batching.
        details: shown as the configuration's parameters.
    """
    answer = _ConfigResponse()
    config = answer.config
    config.name, config.platform, config.backend = info.name, PLATFORM, "fastrec"
    for f in info.spec.fields:
        config.input.add(name=f.name, data_type=_type(f.dtype), dims=_free(f.dims))
    for name, (dims, dtype) in info.outputs.items():
        config.output.add(name=name, data_type=_type(dtype), dims=_free(dims))
    config.model_transaction_policy.decoupled = False
    batching = config.dynamic_batching
    batching.priority_levels = queueing.priority_levels
    batching.default_priority_level = queueing.default_priority
    _policy(batching.default_queue_policy, queueing.default_policy)
    for level, policy in queueing.policies.items():
        _policy(batching.priority_queue_policy[level], policy)
    for key, value in details.items():
        config.parameters[key].string_value = value
    return answer


def _policy(message: Any, policy: QueuePolicy) -> None:
    message.max_queue_size = policy.max_queue_size
    message.default_timeout_microseconds = policy.default_timeout_us
    message.allow_timeout_override = policy.allow_timeout_override
    message.timeout_action = policy.timeout_action


def _type(dtype: str) -> str:
    return f"TYPE_{datatype(dtype)}"


def _free(dims: Sequence[int | str]) -> list[int]:
    return [-1 if isinstance(size, str) else size for size in dims]
