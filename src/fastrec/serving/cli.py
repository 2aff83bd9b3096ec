"""``fastrec serve``: what ``fastrec.save`` or ``engine.save`` wrote, behind gRPC and HTTP."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastrec.errors import ArgumentError
from fastrec.files import atomic_write
from fastrec.model_source import ExampleOption, served_path
from fastrec.terminal import stderr, stdout

if TYPE_CHECKING:
    from fastrec.serving.server import Server


def serve(
    path: Annotated[
        str | None,
        typer.Argument(
            help="An engine's file, a checkpoint, a folder of several models; the output of train "
            "or autotune, or module:attribute, is compiled first."
        ),
    ] = None,
    example: ExampleOption = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(help="0: a free one; -1: no gRPC.")] = 8001,
    http_port: Annotated[
        int, typer.Option(help="REST, /metrics and the status page. 0: a free one; -1: none.")
    ] = 8000,
    config: Annotated[
        Path | None, typer.Option(help="The scheduler's configuration, JSON or TOML.")
    ] = None,
    engines: Annotated[int | None, typer.Option(min=1, help="Engines of each version.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of an engine.")] = None,
    slo_ms: Annotated[float | None, typer.Option(help="The latency goal.")] = None,
    auth: Annotated[Path | None, typer.Option(help="Who may call, as JSON.")] = None,
    admin: Annotated[
        bool | None,
        typer.Option(help="Loading over the wire; by default from loopback addresses alone."),
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM: clients need a certificate that it signed.")
    ] = None,
    message_mib: Annotated[int, typer.Option(min=1, help="Largest request.")] = 16,
    drain_s: Annotated[float, typer.Option(help="Wait for requests at the end.")] = 30.0,
    linger_s: Annotated[
        float, typer.Option(help="Serve on after SIGTERM while probes say NOT_SERVING.")
    ] = 0.0,
    cache: Annotated[Path | None, typer.Option(help="Compiled checkpoints.")] = None,
    traces: Annotated[
        float | None,
        typer.Option(help="Share of requests traced over OTLP; refused and slow ones besides."),
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="Write the ports here, as JSON, once it serves.")
    ] = None,
    new_token: Annotated[
        bool, typer.Option("--new-token", help="Print a token and its digest, and end.")
    ] = False,
) -> None:
    """Serve models over the Open Inference Protocol (gRPC and REST)."""
    from fastrec.serving.core.config import ServingConfig
    from fastrec.serving.server import Auth, Limits, Server, ServerOptions, Tls, run

    console = stderr()
    if new_token:
        from fastrec.serving.wire.auth import new_token as make

        token, digest = make()
        stdout().print_json(json.dumps({"token": token, "token_sha256": digest}))
        return
    if path is None:
        raise ArgumentError("path", "an engine file, a model folder, or a folder of either", None)
    if (tls_key is None) != (tls_cert is None):
        raise ArgumentError("tls", "--tls-key and --tls-cert together", "one of them")
    tls = None if tls_key is None or tls_cert is None else Tls(tls_key, tls_cert, tls_client_ca)
    if tls is None and tls_client_ca is not None:
        raise ArgumentError("tls", "--tls-key and --tls-cert with --tls-client-ca", "neither")
    settings = (ServingConfig() if config is None else ServingConfig.load(config)).to_dict()
    if engines is not None:
        settings["pool"]["engines"] = engines
    if threads is not None:
        settings["pool"]["threads"] = threads
    if slo_ms is not None:
        settings["slo"]["latency_ms"] = slo_ms
    provider = None
    if traces is not None:
        from fastrec.serving.observe.traces import over_otlp

        provider = over_otlp(traces)
    options = ServerOptions(
        host=host,
        grpc_port=None if grpc_port < 0 else grpc_port,
        http_port=None if http_port < 0 else http_port,
        tls=tls,
        auth=None if auth is None else Auth.read(auth),
        admin=admin,
        limits=Limits(message_mib=message_mib),
        drain_s=drain_s,
        linger_s=linger_s,
        cache=cache,
        tracer_provider=provider,
    )
    if options.auth is None and not _loopback(host):
        console.print(
            "anyone who reaches this address may send requests, under any tier: see --auth",
            style="yellow",
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

    def started(server: Server) -> None:
        ports = {"grpc_port": server.grpc_port, "http_port": server.http_port}
        scheme = "http" if tls is None else "https"
        names = ", ".join(f"{i.name}:{i.version}" for i in server.core.models())
        console.print(f"serving {names}", style="green")
        if server.grpc_port is not None:
            console.print(f"  gRPC  {host}:{server.grpc_port}")
        if server.http_port is not None:
            console.print(f"  HTTP  {scheme}://{host}:{server.http_port}/")
        if ready_file is not None:
            with atomic_write(ready_file, sync=False) as draft:
                draft.write_text(json.dumps(ports) + "\n")

    server = Server(served_path(path, example), ServingConfig.from_dict(settings), options)
    with contextlib.suppress(KeyboardInterrupt):
        run(server.run(started))
    if provider is not None:
        provider.shutdown()


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
