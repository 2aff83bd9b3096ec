"""``fastrec loadtest``: an open-loop load test of a server, or of an engine in this process."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastrec.errors import ArgumentError, ServingError
from fastrec.model_source import find_model
from fastrec.terminal import JsonOption, progress, stdout, write_json

_ADDRESS = re.compile(r".+:\d+")

if TYPE_CHECKING:
    from fastrec.serving.load import LoadPlan, Mix, Stage


def loadtest(
    target: Annotated[
        str,
        typer.Argument(
            metavar="HOST:PORT|MODEL", help="A gRPC server, or a model to run right here."
        ),
    ],
    model: Annotated[str, typer.Option(help="Its name on the server.")] = "",
    plan: Annotated[Path | None, typer.Option(help="All of the load, as JSON.")] = None,
    rate: Annotated[float, typer.Option(help="Requests a second.")] = 100.0,
    seconds: Annotated[float, typer.Option(help="How long.")] = 10.0,
    profile: Annotated[
        str | None,
        typer.Option(help="Stages RATE:SECONDS or RATE-RATE:SECONDS, like 100:10,100-400:20."),
    ] = None,
    arrivals: Annotated[str, typer.Option(help="poisson, bursts or uniform.")] = "poisson",
    tiers: Annotated[
        str | None,
        typer.Option(help="TIER:SHARE[:PRIORITY] each, like gold:0.2:1,bulk:0.8."),
    ] = None,
    tenants: Annotated[int, typer.Option(min=0, help="Of each tier.")] = 0,
    users: Annotated[int, typer.Option(min=1, help="A request.")] = 1,
    candidates: Annotated[int, typer.Option(min=1, help="A request.")] = 50,
    tail: Annotated[
        float | None, typer.Option(help="Heavy-tailed candidates: the Pareto exponent.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Candidates of the largest request.")] = 1000,
    tries: Annotated[int, typer.Option(min=1, help="Of a client that is refused.")] = 1,
    stubborn: Annotated[
        bool, typer.Option("--stubborn", help="Retry even where the server says not to.")
    ] = False,
    slo_ms: Annotated[float, typer.Option(help="Answers within it are good.")] = 50.0,
    timeout_ms: Annotated[float | None, typer.Option(help="Sent with each request.")] = None,
    capacity: Annotated[
        bool,
        typer.Option("--capacity", help="Find the highest rate that keeps 99 % in time first."),
    ] = False,
    request: Annotated[
        Path | None, typer.Option(help="A .npz of inputs, for servers that tell no id ranges.")
    ] = None,
    token: Annotated[str, typer.Option(envvar="FASTREC_TOKEN", help="Bearer token.")] = "",
    config: Annotated[
        Path | None, typer.Option(help="Of the scheduler, where the engine runs here.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and requests.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for loadtest.html and .json.")] = None,
    json_out: JsonOption = None,
) -> None:
    """Put load on a server whatever it answers, and tell how its latency held."""
    from fastrec.report.loadtest import print_result, write_report
    from fastrec.serving.load import LoadPlan, RequestSizes, Retry, Stage, run_precisely

    if plan is not None:
        made = LoadPlan.load(plan)
    else:
        made = LoadPlan(
            stages=(Stage(seconds, rate),) if profile is None else _stages(profile),
            arrivals=arrivals,
            mix=_mix(tiers, tenants, timeout_ms),
            sizes=RequestSizes(users, candidates, tail, max(most, candidates)),
            retry=Retry(tries, obey=not stubborn),
            slo_ms=slo_ms,
            seed=seed,
        )
    engine = None
    if Path(target).exists() or not _ADDRESS.fullmatch(target):
        source = find_model(target).announce()
        model, engine = model or source.name, source.engine_path()
    with progress() as tell:

        def note(rate: float, reached: float) -> None:
            tell.console.print(f"{rate:8.1f} /s: {reached:.2%} in time")

        tell("sending load", 0, 0)
        result = run_precisely(
            _measure(target, model, engine, made, capacity, request, token, config, note)
        )
    print_result(result, stdout())
    write_json(json_out, result)
    if out is not None:
        stdout().print(f"Report: {write_report(result, out)}")
    if not result["all"]["answered"]:
        raise ServingError("nothing was answered: the table says why")


async def _measure(
    target: str,
    model: str,
    engine: Path | None,
    plan: LoadPlan,
    capacity: bool,
    request: Path | None,
    token: str,
    config: Path | None,
    note: Callable[[float, float], None],
) -> dict[str, Any]:
    from fastrec.measure.machine import machine_card
    from fastrec.serving.core import InferenceCore, ServingConfig
    from fastrec.serving.load.targets import (
        CoreTarget,
        GrpcTarget,
        requests_in,
        requests_of,
    )

    if engine is not None:
        core = InferenceCore(ServingConfig() if config is None else ServingConfig.load(config))
        try:
            info = await core.load(model, engine)
            requests = (
                requests_of(info.spec, plan.sizes) if request is None else requests_in(request)
            )
            result = await _run(plan, CoreTarget(core, model, requests), capacity, note)
        finally:
            await core.close()
        return {"target": f"{model}, in this process", **result,
                "machine": machine_card()}  # fmt: skip
    if not model:
        raise ArgumentError("--model", "the model's name on the server", None)
    async with GrpcTarget(
        target, model, timeout_s=max(plan.patience_s, 0.1), token=token
    ) as server:
        spec = await server.spec()
        if request is not None:
            server.prepare(requests_in(request))
        elif spec is not None:
            server.prepare(requests_of(spec, plan.sizes))
        else:
            raise ArgumentError(
                "--request", "a .npz of inputs, as this server tells no id ranges", None
            )
        result = await _run(plan, server, capacity, note)
    return {"target": f"{model} at {target}", **result, "machine": machine_card()}


async def _run(
    plan: LoadPlan, target: Any, capacity: bool, note: Callable[[float, float], None]
) -> dict[str, Any]:
    """The plan; with ``capacity``, a search first, and then the plan's last stage at that rate."""
    from fastrec.serving.core import LoopClock
    from fastrec.serving.load import Stage, find_capacity, run, summary

    clock = LoopClock()
    found = None
    if capacity:

        async def probe(rate: float) -> dict[str, Any]:
            once = dataclasses.replace(plan, stages=(Stage(plan.stages[-1].seconds, rate),))
            return summary(await run(once, target, clock))

        found = await find_capacity(probe, start=plan.stages[0].rate, note=note)
        if found:
            plan = dataclasses.replace(plan, stages=(Stage(plan.stages[-1].seconds, found),))
    return {"capacity_rps": found, **summary(await run(plan, target, clock))}


def _stages(text: str) -> tuple[Stage, ...]:
    from fastrec.serving.load import Stage

    made = []
    for part in text.split(","):
        rates, _, seconds = part.partition(":")
        low, _, high = rates.partition("-")
        try:
            made.append(Stage(float(seconds), float(low), float(high) if high else None))
        except ValueError:
            raise ArgumentError(
                "--profile", "stages like 100:10 or 100-400:20, with commas between", part
            ) from None
    return tuple(made)


def _mix(text: str | None, tenants: int, timeout_ms: float | None) -> tuple[Mix, ...]:
    from fastrec.serving.load import Mix

    if text is None:
        return (Mix(tenants=tenants, timeout_ms=timeout_ms),)
    made = []
    for part in text.split(","):
        try:
            tier, share, *rest = part.split(":")
            (priority,) = rest or ["0"]
            made.append(
                Mix(tier, float(share), tenants, priority=int(priority), timeout_ms=timeout_ms)
            )
        except ValueError:
            raise ArgumentError(
                "--tiers", "tiers like gold:0.2 or gold:0.2:1, with commas between", part
            ) from None
    return tuple(made)
