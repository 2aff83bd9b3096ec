"""The rival of bench_serving.py that Ray users have: the same engine in a Serve replica, batched by
``@serve.batch``, behind Serve's own gRPC ingress. A module of its own, as replicas import it."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import grpc
import numpy as np
import ray
from ray import serve as ray_serve

from fastrec.runtime import load_engine
from fastrec.serving.wire.messages import SERVICE, InferRequest, InferResponse
from fastrec.serving.wire.tensors import datatype, tensor_inputs, to_raw


class Reply:
    """A reply as Serve expects it."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> bytes:
        return self._data


class Model:
    """One replica, one engine of one thread."""

    def __init__(self, engine: str, batch: dict[str, Any]) -> None:
        self.engine = load_engine(engine, threads=1)
        for users in (1, 2, 4, 8):
            self.engine(*self.engine.spec.sample({"B": users, "m": 50}))
        self.scores.set_max_batch_size(batch["max_batch_size"])
        self.scores.set_batch_wait_timeout_s(batch["batch_wait_timeout_s"])

    @ray_serve.batch
    async def scores(self, requests: list[bytes]) -> list[Reply]:
        inputs = [tensor_inputs(InferRequest.FromString(data)) for data in requests]
        joined = [np.concatenate([i[name] for i in inputs]) for name in self.engine.spec.names]
        replies = []
        for row in await asyncio.to_thread(self.engine, *joined):
            reply = InferResponse(model_name="ranker")
            reply.outputs.add(name="scores", datatype=datatype(row.dtype), shape=(1, *row.shape))
            reply.raw_output_contents.append(to_raw(row))
            replies.append(Reply(bytes(reply.SerializeToString())))
        return replies

    async def ModelInfer(self, request: bytes) -> Reply:
        return await self.scores(request)


def add(servicer: Any, server: Any) -> None:
    """For Serve's ``grpc_servicer_functions``."""
    handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(servicer.ModelInfer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def serve(engine: str, settings: dict[str, Any]) -> None:
    """Until standard input ends; ``settings``: port, batch."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray_serve.start(
        grpc_options={"port": settings["port"], "grpc_servicer_functions": ["serving_ray:add"]}
    )
    options = {"max_ongoing_requests": 10_000, "ray_actor_options": {"num_cpus": 1}}
    deployment = ray_serve.deployment(Model).options(**options)
    ray_serve.run(deployment.bind(engine, settings["batch"]), name="ranker", route_prefix="/")
    print(json.dumps({"port": settings["port"]}), flush=True)
    sys.stdin.read()
    ray_serve.shutdown()
    ray.shutdown()
