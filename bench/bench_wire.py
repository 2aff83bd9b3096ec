"""Cost of a request beside the engine: gRPC, decoding, the scheduler, encoding.

An engine that returns at once answers the canonical ranker's request (100 events, 50 or 1,000
candidates) over loopback, one after another; the client is gRPC's own, in another process, with
a message made beforehand. In-process calls of the same core show the scheduler alone.

    python bench/bench_wire.py --out bench/results
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvloop

from fastrec.measure.latency import LatencyHistogram
from fastrec.measure.machine import machine_card
from fastrec.serving.core import SLO, Pool, Request, ServingConfig
from fastrec.serving.server import Server, ServerOptions
from fastrec.serving.wire.messages import InferRequest
from fastrec.spec import InputField, InputSpec

HISTORY, CANDIDATES = ("B", "L"), ("B", "m")
SPEC = InputSpec(
    (
        InputField("item", HISTORY, rows=200_000),
        InputField("category", HISTORY, rows=10_000),
        InputField("behaviour", HISTORY, rows=5),
        InputField("length", ("B",), rows="L"),
        InputField("cand_item", CANDIDATES, rows=200_000),
        InputField("cand_category", CANDIDATES, rows=10_000),
    ),
    {"B": (1, None), "L": (1, 100), "m": (1, None)},
)
METHOD = "/inference.GRPCInferenceService/ModelInfer"


class Nothing:
    """An engine that costs next to nothing."""

    spec = SPEC

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        return np.zeros(inputs[4].shape, np.float32)


def summary(times: LatencyHistogram) -> dict[str, float]:
    return {f"p{q}_us": 1e3 * times.percentile_ms(q) for q in (50, 99)} | {"calls": times.count}


def message(inputs: dict[str, np.ndarray]) -> bytes:
    request = InferRequest(model_name="nothing")
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype="INT64", shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    return bytes(request.SerializeToString())


async def in_process(server: Server, inputs: dict[str, np.ndarray], calls: int) -> dict[str, float]:
    times = LatencyHistogram()
    for i in range(calls + calls // 10):
        start = time.perf_counter_ns()
        await server.core.infer(Request("nothing", "", inputs))
        if i >= calls // 10:
            times.add(time.perf_counter_ns() - start)
    return summary(times)


def over_grpc(url: str, data: bytes, calls: int) -> dict[str, float]:
    times = LatencyHistogram()
    with grpc.insecure_channel(url) as channel:
        method = channel.unary_unary(METHOD)
        for i in range(calls + calls // 10):
            start = time.perf_counter_ns()
            method(data)
            if i >= calls // 10:
                times.add(time.perf_counter_ns() - start)
    return summary(times)


def inputs_of(candidates: int) -> dict[str, np.ndarray]:
    return dict(zip(SPEC.names, SPEC.sample({"m": candidates}), strict=True))


def client(url: str, candidates: int, calls: int) -> Any:
    """:func:`over_grpc` in another process: its Python must not wait for the server's."""
    command = [sys.executable, __file__, "--client", url, str(candidates), str(calls)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def measure(kind: str, candidates: int, calls: int) -> dict[str, Any]:
    loop = uvloop.new_event_loop()  # what servers run on
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    # No deadline: on a busy machine the pause of one call must not end the run.
    config = ServingConfig(slo=SLO(latency_ms=60_000), pool=Pool(kind=kind))
    server = Server(None, config, ServerOptions(grpc_port=0, http_port=None))
    run(server.start())
    run(server.core.load("nothing", Nothing))
    inputs = inputs_of(candidates)
    result = {
        "engine": kind,
        "candidates": candidates,
        "in_process": run(in_process(server, inputs, calls)),
        "grpc": client(f"127.0.0.1:{server.grpc_port}", candidates, calls),
    }
    run(server.stop())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--client", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        url, candidates, calls = args.client
        data = message(inputs_of(int(candidates)))
        print(json.dumps(over_grpc(url, data, int(calls))))
        return
    rows = [measure(kind, m, args.calls) for kind in ("inline", "thread") for m in (50, 1000)]
    for row in rows:
        told = {k: {q: round(v, 1) for q, v in row[k].items()} for k in ("in_process", "grpc")}
        print(row["engine"], row["candidates"], told)
    args.out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine_card(), "rows": rows}
    (args.out / "wire.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
