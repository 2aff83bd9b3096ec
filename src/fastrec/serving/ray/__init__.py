"""The same core on many machines, through Ray Serve (extra ``ray``).

A replica is a core with its engines: admission, queues and batches are its own. Ray starts
replicas, replaces them, tells them requests over gRPC, and has these parts of ours:

- :mod:`.routing`: to the replica expected to answer first, the way there included;
- :mod:`.scaling`: as many replicas as the queue's delay and the engines' work ask for.

Start a cluster's Serve with ``fastrec.serving.ray:add_inference_service`` among its
``grpc_servicer_functions``, then ``serve.run(fastrec.serving.ray.build({"path": "models", ...}))``;
clients speak the Open Inference Protocol to any node's gRPC port, as to ``fastrec serve``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import grpc

from fastrec.errors import ArgumentError, ConfigError, MissingDependencyError
from fastrec.serving.core.config import ServingConfig
from fastrec.serving.wire.messages import SERVICE, methods

try:
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
except ImportError as error:
    if (error.name or "").partition(".")[0] != "ray":
        raise
    raise MissingDependencyError("ray[serve]", "ray", "fastrec.serving.ray") from error

from fastrec.serving.ray.replica import CALLS, Replica

# The replica's limits decide: Ray's own queue is first come, first served, without tiers.
_MOST_ONGOING = 10_000


@dataclass(frozen=True)
class RayOptions:
    """Options of :func:`build`.

    Args:
        path: what ``fastrec serve`` takes: an engine file, a model folder, or a folder of either;
            the same on every node.
        config: the scheduler's configuration, as plain types (:class:`ServingConfig`).
        auth: a file, as ``fastrec serve --auth`` takes it.
        cache: where compiled checkpoints are kept, on each node.
        min_replicas, max_replicas: bounds of the autoscaler.
        num_cpus, num_gpus: of a replica; None = the configuration's engines x threads.
        resources: of a replica, by Ray's names of its own resources.
        busy: the share of time that engines should be at work.
        queue_delay_ms: beyond which the 95th percentile of the queue's delay asks for replicas;
            None = a fifth of the latency goal.
        upscale_delay_s, downscale_delay_s: how long the autoscaler's wish must last.
        network_ms: what the way to a replica costs: on the same node, in the same zone, in the same
            region, elsewhere.
        drain_s: how long a replica that is to end may go on answering.
    """

    path: str
    config: Mapping[str, Any] = field(default_factory=dict)
    auth: str | None = None
    cache: str | None = None
    min_replicas: int = 1
    max_replicas: int = 10
    num_cpus: float | None = None
    num_gpus: float = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    busy: float = 0.6
    queue_delay_ms: float | None = None
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 300.0
    network_ms: tuple[float, float, float, float] = (0.0, 0.5, 2.0, 80.0)
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            got = f"{self.min_replicas} and {self.max_replicas}"
            raise ArgumentError("min_replicas, max_replicas", "1 or more, rising", got)
        if not 0 < self.busy <= 1:
            raise ArgumentError("busy", "a share above 0", self.busy)
        ways = tuple(self.network_ms)
        if len(ways) != 4 or list(ways) != sorted(ways) or ways[0] < 0:
            raise ArgumentError("network_ms", "four times that do not fall", self.network_ms)


def build(options: RayOptions | Mapping[str, Any]) -> serve.Application:
    """The application that ``serve.run`` and Serve's configuration files deploy.

    Args:
        options: or its fields by name, as ``args`` of ``import_path: fastrec.serving.ray:build``.

    Raises:
        ArgumentError: an option is unknown or wrong.
        ConfigError: the scheduler's configuration is wrong.
    """
    if not isinstance(options, RayOptions):
        known = {f.name for f in fields(RayOptions)}
        if unknown := sorted(set(options) - known):
            raise ArgumentError("options", f"names among {sorted(known)}", unknown[0])
        if "path" not in options:
            raise ArgumentError("path", "an engine file, a model folder, or a folder of either", "")
        options = RayOptions(**options)
    config = ServingConfig.from_dict(options.config)
    cpus = options.num_cpus
    if cpus is None:
        if config.pool.threads is None:
            raise ConfigError("pool.threads: expected a number, or num_cpus of a replica, got none")
        cpus = config.pool.engines * config.pool.threads
    delay_ms = options.queue_delay_ms
    goal_s = (config.slo.latency_ms / 5 if delay_ms is None else delay_ms) / 1e3
    policy = AutoscalingPolicy(
        policy_function="fastrec.serving.ray.scaling:QueueDelay",
        policy_kwargs={"goal_s": goal_s, "busy": options.busy},
    )
    deployment = serve.deployment(Replica).options(
        name="fastrec",
        max_ongoing_requests=_MOST_ONGOING,
        graceful_shutdown_timeout_s=options.drain_s,
        ray_actor_options={
            "num_cpus": cpus,
            "num_gpus": options.num_gpus,
            "resources": dict(options.resources),
        },
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            upscale_delay_s=options.upscale_delay_s,
            downscale_delay_s=options.downscale_delay_s,
            look_back_period_s=max(2 * options.upscale_delay_s, 11.0),
            policy=policy,
        ),
        request_router_config=RequestRouterConfig(
            request_router_class="fastrec.serving.ray.routing:NearestRouter",
            request_router_kwargs={"network_s": [ms / 1e3 for ms in options.network_ms]},
            request_routing_stats_period_s=1.0,
            request_routing_stats_timeout_s=5.0,
        ),
    )
    return deployment.bind(options.path, asdict(config), auth=options.auth, cache=options.cache)


def add_inference_service(servicer: Any, server: grpc.Server) -> None:
    """For Serve's ``grpc_servicer_functions``: the protocol's calls, as bytes."""
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(getattr(servicer, name))
        for name in methods(SERVICE)
        if name in CALLS
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


__all__ = ["RayOptions", "Replica", "add_inference_service", "build"]
