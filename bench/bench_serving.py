"""Serving under load: the goals, measured on the canonical ranker (40 % pruned, INT8).

    python bench/bench_serving.py --out DIR

C is the highest Poisson rate at which at least 99 % of the requests are answered in time, measured
in the same run; everything else is a multiple of it. Server, engine and generator share the
machine, over gRPC and loopback; what the generator takes is in the report. Pieces that are done are
in DIR/serving_parts and are not run again (``--pieces`` names those to run, ``--again`` anew). Each
takes two minutes at most, all but the heavy-tailed ones ten.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench_engine_serving import saved
from fastrec.measure.machine import machine_card
from fastrec.models import RankerConfig
from fastrec.runtime import load_engine
from fastrec.serving.core import LoopClock
from fastrec.serving.load import (
    Generator,
    LoadPlan,
    Mix,
    RequestSizes,
    Retry,
    Stage,
    find_capacity,
    run_precisely,
    summary,
)
from fastrec.serving.load import run as run_plan
from fastrec.serving.load.targets import GrpcTarget, requests_of
from fastrec.spec import InputSpec
from serving_report import FACTORS, write

SLO_MS = 50.0
WEIGHTS = {"gold": 5.0, "silver": 3.0, "bulk": 2.0}
# Clients wait no longer than the goal: gRPC's own deadline, and the request's timeout.
MIX = tuple(Mix(n, s, timeout_ms=SLO_MS) for n, s in (("gold", 2), ("silver", 4), ("bulk", 4)))
# A tenth of the traffic may overtake.
ALONE = Mix("express", 1.0, priority=1, timeout_ms=SLO_MS)
EXPRESS = (*(replace(m, share=0.9 * m.share) for m in MIX), ALONE)
TIERS = {name: {"weight": weight} for name, weight in WEIGHTS.items()}
CONFIG: dict[str, Any] = {
    "slo": {"latency_ms": SLO_MS},
    "tiers": {**TIERS, "express": {"weight": 1e-6}},
    "pool": {"threads": 1, "engines": 1},
}
# Small requests; ones whose engine time makes the wire's small; and heavy-tailed ones whose mean is
# some 200 candidates. With the rate that the search for C begins with.
LOADS = {
    "canonical": RequestSizes(1, 50),
    "eight": RequestSizes(8, 50),
    "heavy": RequestSizes(1, 100, tail=1.5, most=1000),
}
STARTS = {"canonical": 400.0, "eight": 50.0, "heavy": 100.0}


@contextlib.asynccontextmanager
async def server(kind: str, engine: Path, **settings: Any) -> AsyncIterator[Server]:
    made = Server(kind, engine, settings)
    try:
        yield made
    finally:
        made.close()


class Server:
    """A server in a process of its own."""

    def __init__(self, kind: str, engine: Path, settings: dict[str, Any]) -> None:
        command = [sys.executable, str(Path(__file__).with_name("serving_servers.py"))]
        # Without its errors, that is: Ray and torch are talkative.
        self.process = subprocess.Popen(
            [*command, kind, str(engine), json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "RAY_SERVE_LOG_TO_STDERR": "0"},
        )  # fmt: skip
        self.lines: list[dict[str, Any]] = []
        self.port = int(self._line()["port"])

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"the server ended with status {self.process.wait()}")

    def cpu_s(self) -> float:
        """Processor time of it and all of its children."""
        own = psutil.Process(self.process.pid)
        total = 0.0
        for process in (own, *own.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def workers(self) -> list[int]:
        """Process ids of its engines."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [c.pid for c in children if "fastrec.serving.core.worker" in " ".join(c.cmdline())]

    def close(self) -> None:
        """End it; what it printed is in ``lines``."""
        out, _ = self.process.communicate(timeout=60)
        self.lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def busy_s() -> float:
    """Processor time of everything on the machine."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


class Bench:
    """State shared by all parts of the benchmark."""

    def __init__(self, engine: Path, parts: Path, scale: float) -> None:
        self.engine, self.parts, self.scale = engine, parts, scale
        self.spec: InputSpec = load_engine(engine, threads=1).spec

    def part(self, name: str) -> dict[str, Any]:
        """A piece that has been run."""
        path = self.parts / f"{name}.json"
        if not path.exists():
            raise SystemExit(f"{name} has not been run")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    async def load(
        self,
        at: Server,
        rate: float,
        seconds: float,
        *,
        sizes: RequestSizes = LOADS["canonical"],
        mix: tuple[Mix, ...] = MIX,
        during: Callable[[Generator], None] | None = None,
        stages: tuple[Stage, ...] | None = None,
        **options: Any,
    ) -> tuple[dict[str, Any], Generator]:
        """One run, and who took how much processor time."""
        stages = (Stage(seconds * self.scale, rate),) if stages is None else stages
        plan = LoadPlan(
            stages=stages, mix=mix, sizes=sizes, slo_ms=SLO_MS, patience_s=5.0, **options
        )
        async with GrpcTarget(f"127.0.0.1:{at.port}", "ranker", connections=4) as target:
            target.prepare(requests_of(self.spec, sizes, 8))
            before, whole = at.cpu_s(), busy_s()
            generator = await run_plan(plan, target, LoopClock(), during)
            spent, whole = at.cpu_s() - before, busy_s() - whole
        result = summary(generator)
        result["server_cores"] = spent / plan.seconds
        # What else ran: where that is much, the figures are no measure of the server.
        result["other_cores"] = max(whole - spent - generator.log.cpu_s, 0.0) / plan.seconds
        for bulky in ("plan", "series", "curve"):
            del result[bulky]
        return result, generator

    async def warm(self, at: Server, sizes: RequestSizes) -> None:
        """A second of a low rate: connections, caches, the scheduler's model of the engine."""
        patient = tuple(replace(m, timeout_ms=5e3) for m in MIX)
        await self.load(at, 50.0, 1.0, sizes=sizes, mix=patient)

    async def capacity(self, at: Server, sizes: RequestSizes, start: float) -> dict[str, Any]:
        """C on a running server."""
        await self.warm(at, sizes)
        tried: list[list[float]] = []
        seeds = iter(range(100))

        async def probe(rate: float) -> dict[str, Any]:
            return (await self.load(at, rate, 4.0, sizes=sizes, seed=next(seeds)))[0]

        def note(rate: float, reached: float) -> None:
            tried.append([rate, reached])
            print(f"  {rate:.0f} /s: {reached:.2%}", flush=True)

        found = await find_capacity(probe, start=start, precision=0.06, note=note)
        return {"capacity_rps": found, "tried": tried}


async def engine_alone(bench: Bench, sizes: RequestSizes) -> dict[str, float]:
    """Milliseconds of the engine itself, one call after another."""
    engine = load_engine(bench.engine, threads=1)
    requests = [tuple(kinds[0].values()) for kinds in requests_of(bench.spec, sizes, 1)]
    times = []
    for i in range(300):
        start = time.perf_counter()
        engine(*requests[i % len(requests)])
        times.append(1e3 * (time.perf_counter() - start))
    return {f"p{q}": float(np.percentile(times[50:], q)) for q in (50, 99)}


async def steady(bench: Bench, load: str) -> dict[str, Any]:
    """C; then half of it, 0.95 of it with an express queue, and twice and five times it."""
    sizes = LOADS[load]
    made: dict[str, Any] = {"engine_ms": await engine_alone(bench, sizes)}
    async with server("ours", bench.engine, config=CONFIG) as at:
        made |= await bench.capacity(at, sizes, STARTS[load])
        c = made["capacity_rps"]
        for name, factor, seconds, mix in (
            ("unloaded", 0.05, 12, (ALONE,)),
            ("half", 0.5, 10, MIX),
            ("nearly", 0.95, 12, EXPRESS),
            ("double", 2.0, 12, MIX),
            ("fivefold", 5.0, 10, MIX),
            ("after", 0.5, 5, MIX),
        ):
            made[name], _ = await bench.load(at, factor * c, seconds, sizes=sizes, mix=mix, seed=7)
            print(f"  {name}: {made[name]['all']['attainment']:.2%}", flush=True)
    return made


async def recovery(bench: Bench, load: str) -> dict[str, Any]:
    """0.7 C, 30 s of 3 C with clients that retry, 0.7 C again."""
    c = bench.part(f"steady_{load}")["capacity_rps"]
    seconds = [n * bench.scale for n in (5.0, 30.0, 12.0)]
    stages = tuple(Stage(s, f * c) for s, f in zip(seconds, (0.7, 3.0, 0.7), strict=True))
    async with server("ours", bench.engine, config=CONFIG) as at:
        await bench.warm(at, LOADS[load])
        result, generator = await bench.load(
            at, 0, 0, sizes=LOADS[load], stages=stages, retry=Retry(3, backoff_ms=50.0)
        )
    return {**result, "recovery_s": recovered(generator, sum(seconds[:2])), "stages_s": seconds}


def recovered(generator: Generator, end_s: float) -> float | None:
    """Seconds after ``end_s`` from which on 99 % of the next two seconds' requests were in time."""
    at, log = generator.schedule.at_s, generator.log
    good = (log.outcome == log.outcomes.index("ok")) & (1e3 * (log.done_s - at) <= SLO_MS)
    for begin in np.arange(end_s, generator.plan.seconds - 2, 0.25):
        inside = (at >= begin) & (at < begin + 2)
        if good[inside].mean() >= 0.99:
            return float(begin - end_s)
    return None


async def fifo(bench: Bench, load: str) -> dict[str, Any]:
    """The rival without a scheduler, at our C."""
    return await rival(bench, load, "fifo", {"config": CONFIG}, ("half", "nearly", "double"))


async def ray(bench: Bench, load: str) -> dict[str, Any]:
    """Ray Serve's @serve.batch, at our C; its batches as ours are bounded, without waiting."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    batch = {"max_batch_size": 8, "batch_wait_timeout_s": 0.0}
    names = ("tenth", "quarter", "half", "nearly")
    return await rival(bench, load, "ray", {"port": port, "batch": batch}, names)


async def rival(
    bench: Bench, load: str, kind: str, settings: dict[str, Any], names: tuple[str, ...]
) -> dict[str, Any]:
    c = bench.part(f"steady_{load}")["capacity_rps"]
    made: dict[str, Any] = {"settings": settings}
    async with server(kind, bench.engine, **settings) as at:
        await bench.warm(at, LOADS[load])
        for name in names:
            made[name], _ = await bench.load(at, FACTORS[name] * c, 8.0, sizes=LOADS[load], seed=7)
            print(f"  {kind} {name}: {made[name]['all']['attainment']:.2%}", flush=True)
    return made


async def kill(bench: Bench) -> dict[str, Any]:
    """Two engines in processes of their own, and a warm spare; one is killed at 0.7 C."""
    sizes = LOADS["canonical"]
    pool = {"threads": 1, "engines": 2, "spares": 1, "kind": "process"}
    async with server("ours", bench.engine, config={**CONFIG, "pool": pool}) as at:
        made = await bench.capacity(at, sizes, 200.0)
        killed: dict[str, float] = {}

        def during(generator: Generator) -> None:
            def shoot() -> None:
                victim = at.workers()[0]
                killed["at_s"] = generator.elapsed()
                os.kill(victim, signal.SIGKILL)

            generator.clock.call_at(generator.clock.now() + 4.0, shoot)

        rate = 0.7 * made["capacity_rps"]
        result, generator = await bench.load(at, rate, 10.0, sizes=sizes, during=during)
    schedule, log = generator.schedule, generator.log
    latency = 1e3 * (log.done_s - schedule.at_s)
    moment = killed["at_s"]
    around = (log.sent_s < moment + 0.05) & (log.done_s > moment)
    before = log.done_s < moment
    soon = (schedule.at_s >= moment) & (schedule.at_s < moment + 2)
    good = (log.outcome == log.outcomes.index("ok")) & (latency <= SLO_MS)
    return {
        **made,
        **result,
        "around_kill": int(around.sum()),
        "around_kill_max_ms": float(np.nanmax(latency[around])),
        "before_p99_ms": float(np.nanpercentile(latency[before], 99)),
        "first_2s_after": float(good[soon].mean()),
    }


async def grey(bench: Bench) -> dict[str, Any]:
    """A version that is twice as slow, and one that fails on a request in twenty, at 0.4 C."""
    c = bench.part("steady_canonical")["capacity_rps"]
    canary = {"steps": [0.1, 0.5, 1.0], "window_s": 2.0, "min_requests": 20}
    made: dict[str, Any] = {"canary": canary}
    for fault in ("slow", "fails"):
        settings = {
            "config": {**CONFIG, "canary": canary},
            "release": {"after_s": 2.0, "fault": fault},
        }
        async with server("ours", bench.engine, **settings) as at:
            result, _ = await bench.load(at, 0.4 * c, 12.0, sizes=LOADS["canonical"])
        made[fault] = {**result, "steps": at.lines}
    return made


PIECES: dict[str, Callable[[Bench], Any]] = {
    "steady_canonical": lambda b: steady(b, "canonical"),
    "recovery_canonical": lambda b: recovery(b, "canonical"),
    "fifo_canonical": lambda b: fifo(b, "canonical"),
    "kill": kill,
    "grey": grey,
    "steady_eight": lambda b: steady(b, "eight"),
    "ray_canonical": lambda b: ray(b, "canonical"),
    "steady_heavy": lambda b: steady(b, "heavy"),
    "recovery_heavy": lambda b: recovery(b, "heavy"),
    "fifo_heavy": lambda b: fifo(b, "heavy"),
}
# All that the table of goals needs, and the rivals.
USUAL = [name for name in PIECES if not name.endswith("heavy")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--pieces", default=",".join(USUAL), help=", ".join(PIECES))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--scale", type=float, default=1.0, help="Of all durations.")
    args = parser.parse_args()
    parts = args.out / "serving_parts"
    parts.mkdir(parents=True, exist_ok=True)
    engine = parts / "ranker.fastrec"
    if not engine.exists():
        saved(RankerConfig.taobao(), 0.4, parts, 1)
    bench = Bench(engine, parts, args.scale)
    for name in args.pieces.split(","):
        path = parts / f"{name}.json"
        if path.exists() and not args.again:
            continue
        print(name, flush=True)
        start = time.monotonic()
        result = run_precisely(PIECES[name](bench))
        result["machine"], result["took_s"] = machine_card(), time.monotonic() - start
        path.write_text(json.dumps(result, indent=1) + "\n")
    done = {name: bench.part(name) for name in PIECES if (parts / f"{name}.json").exists()}
    write(done, args.out)


if __name__ == "__main__":
    main()
