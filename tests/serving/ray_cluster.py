"""Serves an engine on a local Ray cluster of three nodes in two regions, and says what happened.

    python tests/serving/ray_cluster.py ENGINE REQUEST.npz

A process of its own: Ray starts servers and threads that a test's process would keep. The last line
printed is JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import time
from typing import Any

import grpc
import numpy as np
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.config import gRPCOptions

from fastrec.serving.ray import build
from fastrec.serving.ray.routing import REGION, ZONE
from fastrec.serving.wire.messages import SERVICE, InferRequest, InferResponse, methods
from fastrec.serving.wire.tensors import to_raw

NAME = "ranker"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def message(arrays: dict[str, np.ndarray], model: str = NAME) -> bytes:
    request = InferRequest(model_name=model)
    for name, array in arrays.items():
        request.inputs.add(name=name, datatype="INT64", shape=array.shape)
        request.raw_input_contents.append(to_raw(array))
    return bytes(request.SerializeToString())


def refusal(call: Any, data: bytes) -> list[Any]:
    try:
        call(data, timeout=30)
    except grpc.RpcError as error:
        keys = sorted(key for key, _ in error.trailing_metadata() or ())
        return [error.code().name, error.details(), keys]
    return ["OK", "", []]


def over_grpc(port: int, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        reply = InferResponse.FromString(infer(message(arrays), timeout=60))
        scores = np.frombuffer(reply.raw_output_contents[0], np.float32)
        kind, told = methods(SERVICE)["ModelMetadata"]
        metadata = channel.unary_unary(f"/{SERVICE}/ModelMetadata")
        described = told.FromString(metadata(kind(name=NAME).SerializeToString(), timeout=30))
        wrong = {**arrays, "cand_item": arrays["cand_item"] + 10**6}
        return {
            "scores": scores.reshape(list(reply.outputs[0].shape)).tolist(),
            "inputs": [tensor.name for tensor in described.inputs],
            "bad_input": refusal(infer, message(wrong)),
            "bad_message": refusal(infer, b"\xff\xff"),
            "unknown_model": refusal(infer, message(arrays, "other")),
        }


async def scaled(handle: Any, arrays: dict[str, np.ndarray]) -> float:
    """Seconds until requests one after another, which are too many for one replica by the
    deployment's thresholds, have brought a second."""
    start = time.monotonic()
    while running() < 2 and time.monotonic() - start < 180:
        for _ in range(5):
            await handle.infer.remote(NAME, arrays, timeout_s=10.0)
            await asyncio.sleep(0.05)  # the new replica needs the machine more
    return time.monotonic() - start


def running() -> int:
    application = serve.status().applications["fastrec"]
    return application.deployments["fastrec"].replica_states.get("RUNNING", 0)


def places(handle: Any, count: int = 30) -> list[str]:
    """Regions of the replicas that ``count`` calls reach."""
    return [handle.place.remote().result(timeout_s=30)[0] for _ in range(count)]


def until_elsewhere(handle: Any) -> tuple[float, int]:
    """Seconds until calls reach the other region, and calls that failed on the way."""
    start, failed = time.monotonic(), 0
    while time.monotonic() - start < 60:
        try:
            if places(handle, 1) == ["us"]:
                break
        except Exception:
            failed += 1
        time.sleep(0.05)
    return time.monotonic() - start, failed


def main(engine: str, request: str) -> dict[str, Any]:
    arrays = dict(np.load(request).items())
    port, http_port = free_ports(2)
    # No more processes than it takes: Ray gives its daemons fixed times to start in.
    common = {
        "object_store_memory": 100 << 20,
        "include_dashboard": False,
        "include_log_monitor": False,
        "no_monitor": True,
    }
    eu, us = ({REGION: name, ZONE: f"{name}-a"} for name in ("eu", "us"))
    cluster = Cluster(initialize_head=True, head_node_args={**common, "num_cpus": 0, "labels": eu})
    near = cluster.add_node(num_cpus=1, resources={"eu": 1}, labels=eu, **common)
    cluster.add_node(num_cpus=1, resources={"us": 1}, labels=us, **common)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    told: dict[str, Any] = {}
    start = time.monotonic()

    def step(name: str) -> None:
        sys.stderr.write(f"{time.monotonic() - start:6.1f} s  {name}\n")

    step("cluster")
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"port": http_port},
            grpc_options=gRPCOptions(
                port=port, grpc_servicer_functions=["fastrec.serving.ray:add_inference_service"]
            ),
        )
        application = build(
            {
                "path": engine,
                "config": {"slo": {"latency_ms": 5000.0}, "pool": {"threads": 1}},
                "max_replicas": 2,
                # Any work at all asks for a second replica.
                "queue_delay_ms": 1e-3,
                "busy": 0.001,
                "upscale_delay_s": 0.0,
            }
        )
        handle = serve.run(application, name="fastrec")
        step("served")
        told["grpc"] = over_grpc(port, arrays)
        step("grpc")
        told["replicas_before"] = running()
        told["scaled_s"] = asyncio.run(scaled(handle, arrays))
        told["replicas_after"] = running()
        step("scaled")
        time.sleep(3.0)  # replicas tell where they are and how loaded, once a second
        told["near"] = places(handle)
        step("near")
        cluster.remove_node(near, allow_graceful=False)
        told["rerouted_s"], told["failed_calls"] = until_elsewhere(handle)
        told["after_loss"] = places(handle, 10)
        told["grpc_after_loss"] = over_grpc(port, arrays)["scores"] == told["grpc"]["scores"]
        step("rerouted")
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
    return told


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])) + "\n")
