"""``fastrec simulate``."""

from __future__ import annotations

import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fastrec.errors import ArgumentError
from fastrec.model_source import ENGINE, find_model
from fastrec.terminal import JsonOption, Tell, progress, stdout, write_json


def simulate(
    engine: Annotated[str | None, ENGINE] = None,
    profile: Annotated[
        Path | None, typer.Option(help="A measured profile (JSON), instead of an engine.")
    ] = None,
    save_profile: Annotated[Path | None, typer.Option(help="Where the profile goes.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="The servers' configuration, JSON or TOML.")
    ] = None,
    slo_ms: Annotated[float | None, typer.Option(help="Latency goal.")] = None,
    engines: Annotated[int, typer.Option(help="In the whole fleet.")] = 10_000,
    host_engines: Annotated[int, typer.Option(help="Of one host.")] = 10,
    cell_hosts: Annotated[int, typer.Option(help="Hosts that one caller knows.")] = 50,
    cells: Annotated[int, typer.Option(help="Cells that are simulated.")] = 1,
    rate: Annotated[
        list[float] | None, typer.Option(help="Requests a second, whole fleet; several allowed.")
    ] = None,
    load: Annotated[
        list[float] | None,
        typer.Option(help="Rates as a share of what the engines could do one request a call."),
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="probes, random, round_robin, least; several allowed.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Virtual, counted.")] = 1.0,
    warm_s: Annotated[float, typer.Option(help="Virtual, before counting.")] = 0.3,
    round_trip_us: Annotated[float, typer.Option(help="Between caller and host.")] = 200.0,
    event_loop_us: Annotated[
        float,
        typer.Option(
            "--event-loop-us",
            "--door-us",
            help="Event loop time of a request on a host, before the scheduler.",
        ),
    ] = 0.0,
    candidates: Annotated[int, typer.Option(help="Of a request.")] = 50,
    slow_share: Annotated[float, typer.Option(help="Share of hosts that are slower.")] = 0.0,
    slow_factor: Annotated[float, typer.Option(help="By this factor.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    check: Annotated[
        bool, typer.Option("--check", help="Also run one host for real, and compare.")
    ] = False,
    json_out: JsonOption = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Plot, PNG.")] = None,
) -> None:
    """Simulate a fleet with the real scheduler, in virtual time, with a measured engine."""
    from fastrec.measure.machine import machine_card
    from fastrec.serving.core.config import ServingConfig
    from fastrec.serving.simulate import report
    from fastrec.serving.simulate.check import check as run_check
    from fastrec.serving.simulate.fleet import Fleet
    from fastrec.serving.simulate.fleet import simulate as run

    if (engine is None) == (profile is None):
        raise ArgumentError("engine", "an engine's file, or --profile", "both or neither")
    if rate and load:
        raise ArgumentError("rate", "--rate or --load", "both")
    measured = _profile(engine, profile, candidates)
    if save_profile is not None:
        measured.save(save_profile)
    settings = (ServingConfig() if config is None else ServingConfig.load(config)).to_dict()
    if slo_ms is not None:
        settings["slo"]["latency_ms"] = slo_ms
    servers = ServingConfig.from_dict(settings)
    alone_s = measured.line(1, candidates) * measured.mean_scatter()
    rates = list(rate or ([share * engines / alone_s for share in load] if load else [1e7]))
    fleets = [
        Fleet(
            engines=engines, host_engines=host_engines, cell_hosts=cell_hosts, cells=cells,
            rate=each, seconds=seconds, warm_s=warm_s, policy=rule, round_trip_us=round_trip_us,
            event_loop_us=event_loop_us, candidates={candidates: 1.0}, slow_share=slow_share,
            slow_factor=slow_factor, seed=seed,
        )
        for each in rates
        for rule in policy or ["probes"]
    ]  # fmt: skip
    rows = []
    with progress() as tell:
        for fleet in fleets:
            start = time.perf_counter()
            told = partial(_tell, tell, f"{fleet.policy}, {fleet.rate:,.0f}/s")
            outcomes = run(fleet, measured, servers, progress=told)
            rows.append(report.row(fleet, outcomes, time.perf_counter() - start))
    whole: dict[str, Any] = {
        "machine": machine_card(),
        "statement": fleets[0].statement(),
        "fleet": dataclasses.asdict(fleets[0]),
        "goal_ms": servers.slo.latency_ms,
        "profile": dataclasses.asdict(measured),
        "rows": rows,
        "check": run_check(fleets[0], measured, servers) if check else None,
    }
    out = stdout()
    out.print(whole["statement"])
    out.print(report.table(rows))
    if check:
        out.print_json(json.dumps(whole["check"]))
    write_json(json_out, whole)
    if plot_file is not None:
        report.plot(rows, servers.slo.latency_ms, plot_file)


def _tell(tell: Tell, stage: str, share: float) -> None:
    tell(stage, round(1000 * share), 1000)


def _profile(engine: str | None, profile: Path | None, candidates: int) -> Any:
    from fastrec.serving.simulate.profile import EngineProfile

    if profile is not None:
        return EngineProfile.load(profile)
    assert engine is not None
    opened = find_model(engine).announce().engine(threads=1)
    source = f"{Path(engine).name}, one thread"
    try:
        sizes = sorted({max(candidates // 2, 1), candidates})
        return EngineProfile.measure(opened, candidates=sizes, source=source)
    finally:
        opened.close()
