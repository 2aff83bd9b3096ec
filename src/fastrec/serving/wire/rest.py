"""The Open Inference Protocol over HTTP, with the binary-tensor extension, and the server's pages.

| path | what |
|---|---|
| ``/`` , ``/status.json`` | the status page |
| ``/metrics`` | Prometheus |
| ``/v2``, ``/v2/health/live``, ``/v2/health/ready`` | the server |
| ``/v2/models/M[/versions/V]``, and ``/ready``, ``/config``, ``/stats``, ``/infer`` | a model |
| ``/v2/repository/index``, ``/v2/repository/models/M/load``, ``.../unload`` | the repository |
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
from google.protobuf.json_format import MessageToDict

from fastrec import __version__
from fastrec.errors import ArgumentError
from fastrec.serving.core.request import Kind, Rejected
from fastrec.serving.wire.auth import Identity
from fastrec.serving.wire.http import HttpReply, HttpRequest
from fastrec.serving.wire.json_body import BodyDecoder, read_object
from fastrec.serving.wire.model_metadata import configuration, metadata
from fastrec.serving.wire.request_handler import EXTENSIONS, RequestHandler
from fastrec.serving.wire.request_parameters import from_values, with_headers
from fastrec.serving.wire.status import Refused
from fastrec.serving.wire.tensors import datatype, to_raw

_MODEL = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(/ready|/config|/stats|/infer)?")
_ADMIN = re.compile(r"/v2/repository/models/([^/]+)/(load|unload)")
_LENGTH = "inference-header-content-length"
_HTML = "text/html; charset=utf-8"


class Rest:
    """Answers HTTP requests from a handler.

    Args:
        handler: what answers.
        metrics: ``accept header -> (text, content type)``.
        status: what ``/status.json`` holds.
        page: the status page.
    """

    def __init__(
        self,
        handler: RequestHandler,
        *,
        metrics: Callable[[str], tuple[bytes, str]],
        status: Callable[[], dict[str, Any]],
        page: bytes,
    ) -> None:
        self._decode = BodyDecoder()
        self._handler, self._metrics, self._status, self._page = handler, metrics, status, page

    def close(self) -> None:
        """End the process that decodes large bodies."""
        self._decode.close()

    async def handle(self, request: HttpRequest) -> HttpReply:
        """ErrorReply one request; errors become their status codes."""
        try:
            return await self._route(request)
        except Exception as error:
            told = self._handler.error_reply(error, f"http {request.method}")
            reply = _json({"error": told.text, "reason": told.reason.upper()}, told.http)
            if told.retry_after_s is not None:
                reply.headers.append(("retry-after", str(math.ceil(told.retry_after_s))))
            if told.http == 401:
                reply.headers.append(("www-authenticate", "Bearer"))
            return reply

    async def _route(self, request: HttpRequest) -> HttpReply:
        path = request.path.partition("?")[0]
        core = self._handler.core
        get = request.method in ("GET", "HEAD")
        if path == "/v2/health/live" and get:
            return _json({"live": True})
        if path == "/v2/health/ready" and get:
            return _ready(core.ready())
        identity = self._handler.identify(
            request.headers.get("authorization"), request.certificate_names
        )
        if get and path == "/":
            return HttpReply(body=self._page, kind=_HTML, headers=_PAGE_HEADERS)
        if get and path == "/status.json":
            return _json(self._status())
        if get and path == "/metrics":
            body, kind = self._metrics(request.headers.get("accept", ""))
            return HttpReply(body=body, kind=kind)
        if get and path == "/v2":
            return _json({"name": "fastrec", "version": __version__, "extensions": EXTENSIONS})
        if path == "/v2/repository/index" and request.method == "POST":
            return _json(self._handler.index())
        if (match := _ADMIN.fullmatch(path)) and request.method == "POST":
            _same_site(request)
            name, action = match.groups()
            if action == "load":
                if (read_object(request.body) if request.body else {}).get("parameters"):
                    raise ArgumentError("parameters", "none", "some")
                await self._handler.load(name, identity, request.peer)
            else:
                await self._handler.unload(name, identity, request.peer)
            return _json({})
        if get and path == "/v2/models/stats":
            return self._statistics("", "")
        if match := _MODEL.fullmatch(path):
            name, version, what = match[1], match[2] or "", match[3] or ""
            if what == "/infer":
                if request.method == "POST":
                    return await self._infer(request, name, version, identity)
            elif get:
                return self._model(name, version, what)
        raise Rejected(Kind.NOT_FOUND, "no such path")

    def _model(self, name: str, version: str, what: str) -> HttpReply:
        core = self._handler.core
        info = core.model(name, version)
        if what == "/ready":
            return _ready(core.ready(name, version))
        if what == "/config":
            told = configuration(info, core.config.lanes, self._handler.details(info)).config
            return _json(MessageToDict(told, preserving_proto_field_name=True))
        if what == "/stats":
            return self._statistics(name, version)
        message = metadata(info, [version] if version else self._handler.versions(name))
        tensors = {
            kind: [
                {"name": t.name, "datatype": t.datatype, "shape": list(t.shape)}
                for t in getattr(message, kind)
            ]
            for kind in ("inputs", "outputs")
        }
        return _json(
            {
                "name": message.name,
                "versions": list(message.versions),
                "platform": message.platform,
                **tensors,
            }
        )

    def _statistics(self, name: str, version: str) -> HttpReply:
        rows = self._handler.statistics(name, version)
        return _json({"model_stats": [_durations(row) for row in rows]})

    async def _infer(
        self, request: HttpRequest, name: str, version: str, who: Identity
    ) -> HttpReply:
        body = await self._decode(*_split(request))
        binary, request_id = bool(body.parameters.get("binary_data_output")), body.request_id
        sent = from_values(with_headers(dict(body.parameters), request.headers.items()))
        response = await self._handler.infer(
            name,
            version,
            body.inputs,
            sent,
            who,
            request_id=request_id,
            outputs=list(body.wanted),
            headers=request.headers.items(),
        )
        raw: list[bytes] = []
        rows = []
        for key, array in response.outputs.items():
            row: dict[str, Any] = {
                "name": key,
                "datatype": datatype(array.dtype),
                "shape": list(array.shape),
            }
            if body.wanted.get(key, binary):
                raw.append(to_raw(array))
                row["parameters"] = {"binary_data_size": len(raw[-1])}
            else:
                row["data"] = _values(key, array)
            rows.append(row)
        told = {"model_name": response.model, "model_version": response.version, "outputs": rows}
        if request_id:
            told["id"] = request_id
        reply = _json(told)
        if raw:
            reply.headers.append((_LENGTH, str(len(reply.body))))
            reply.body = b"".join((reply.body, *raw))
            reply.kind = "application/octet-stream"
        return reply


# The page runs its own script and talks to its own server, nothing else.
_PAGE_HEADERS = [
    (
        "content-security-policy",
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; frame-ancestors 'none'",
    ),
    ("cache-control", "no-store"),
]


def _json(value: Any, status: int = 200) -> HttpReply:
    return HttpReply(status, json.dumps(value, separators=(",", ":"), allow_nan=False).encode())


def _values(name: str, array: np.ndarray) -> list[Any]:
    """An output's values for JSON, which has no NaN (null) and no infinities (refused)."""
    values: list[Any] = array.reshape(-1).tolist()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        if np.isinf(array).any():
            why = f"output '{name}' holds infinities, which JSON has not: ask for binary data"
            raise Rejected(Kind.INTERNAL, why)
        values = [None if value != value else value for value in values]
    return values


def _ready(ready: bool) -> HttpReply:
    return _json({"ready": ready}, 200 if ready else 503)


def _split(request: HttpRequest) -> tuple[bytes, memoryview]:
    """The JSON and the binary part."""
    text = request.headers.get(_LENGTH)
    if text is None:
        return request.body, memoryview(b"")
    if not (text.isascii() and text.isdigit()) or int(text[:12]) > len(request.body):
        raise ArgumentError(_LENGTH, "a length within the body", text[:32])
    length = int(text)
    return request.body[:length], memoryview(request.body)[length:]


def _durations(row: dict[str, Any]) -> dict[str, Any]:
    stats = {k: {"count": n, "ns": ns} for k, (n, ns) in row["inference_stats"].items()}
    return {**row, "inference_stats": stats}


def _same_site(request: HttpRequest) -> None:
    """A page from elsewhere, open in a browser on this machine, must not change models."""
    if "origin" in request.headers or request.headers.get("sec-fetch-site", "none") not in (
        "none",
        "same-origin",
    ):
        raise Refused(
            "permission_denied",
            "admin calls do not come from web pages",
            grpc.StatusCode.PERMISSION_DENIED,
            403,
        )
