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
from fastrec.serving.wire.model_metadata import configuration, metadata
from fastrec.serving.wire.request_handler import EXTENSIONS, RequestHandler
from fastrec.serving.wire.request_parameters import from_values, with_headers
from fastrec.serving.wire.status import Refused
from fastrec.serving.wire.tensors import datatype, from_raw, to_raw
from fastrec.serving.wire.tensors import from_values as tensor_of

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
        self._handler, self._metrics, self._status, self._page = handler, metrics, status, page

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
                if (_object(request.body) if request.body else {}).get("parameters"):
                    raise ArgumentError("parameters", "none", "some")
                await self._handler.load(name, identity, request.peer)
            else:
                await self._handler.unload(name, identity, request.peer)
            return _json({})
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
            return _json(
                {"model_stats": [_durations(r) for r in self._handler.statistics(name, version)]}
            )
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

    async def _infer(
        self, request: HttpRequest, name: str, version: str, who: Identity
    ) -> HttpReply:
        head, binary = _split(request)
        body = _object(head)
        parameters = body.get("parameters", {})
        if not isinstance(parameters, dict):
            raise ArgumentError("parameters", "an object", type(parameters).__name__)
        sent = from_values(with_headers(dict(parameters), request.headers.items()))
        request_id = body.get("id", "")
        if not isinstance(request_id, str) or len(request_id) > 128:
            raise ArgumentError("id", "text of up to 128 characters", type(request_id).__name__)
        inputs = _inputs(body.get("inputs"), binary)
        wanted = _outputs(body.get("outputs"), bool(parameters.get("binary_data_output")))
        response = await self._handler.infer(
            name,
            version,
            inputs,
            sent,
            who,
            request_id=request_id,
            outputs=list(wanted),
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
            if wanted.get(key, bool(parameters.get("binary_data_output"))):
                raw.append(to_raw(array))
                row["parameters"] = {"binary_data_size": len(raw[-1])}
            else:
                row["data"] = array.reshape(-1).tolist()
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
    # JSON has no NaN: Python's own spelling is what tritonclient and numpy users read.
    return HttpReply(status, json.dumps(value, separators=(",", ":")).encode())


def _ready(ready: bool) -> HttpReply:
    return _json({"ready": ready}, 200 if ready else 503)


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise ArgumentError(
            "body", "a JSON object", f"{len(body)} bytes that do not parse as JSON"
        ) from None
    if not isinstance(value, dict):
        raise ArgumentError("body", "a JSON object", type(value).__name__)
    return value


def _split(request: HttpRequest) -> tuple[bytes, memoryview]:
    """The JSON and the binary part."""
    text = request.headers.get(_LENGTH)
    if text is None:
        return request.body, memoryview(b"")
    if not (text.isascii() and text.isdigit()) or int(text[:12]) > len(request.body):
        raise ArgumentError(_LENGTH, "a length within the body", text[:32])
    length = int(text)
    return request.body[:length], memoryview(request.body)[length:]


def _inputs(rows: Any, binary: memoryview) -> dict[str, np.ndarray]:
    if not isinstance(rows, list) or not rows:
        raise ArgumentError("inputs", "a list of tensors", type(rows).__name__)
    arrays: dict[str, np.ndarray] = {}
    at = 0
    for row in rows:
        if not isinstance(row, dict):
            raise ArgumentError("inputs", "objects", type(row).__name__)
        name, kind, shape = row.get("name"), row.get("datatype"), row.get("shape")
        if not isinstance(name, str) or not isinstance(kind, str) or len(name) > 256:
            raise ArgumentError("inputs", "a name and a datatype in each", str(row)[:64])
        if name in arrays:
            raise ArgumentError(name[:64], "one input of this name", "two")
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            raise ArgumentError(name[:64], "a shape of whole numbers", str(shape)[:64])
        parameters = row.get("parameters") or {}
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(binary) - at:
                raise ArgumentError(name[:64], "a binary_data_size within the body", size)
            arrays[name] = from_raw(name, kind, shape, binary[at : at + size])
            at += size
        else:
            arrays[name] = tensor_of(name, kind, shape, _flat(name, row.get("data")))
    if at != len(binary):
        raise ArgumentError("body", f"{at} binary bytes as the inputs say", f"{len(binary)}")
    return arrays


def _flat(name: str, data: Any) -> list[Any]:
    """JSON data, nested as the shape or flat."""
    if not isinstance(data, list):
        raise ArgumentError(name[:64], "data: a list", type(data).__name__)
    for _ in range(8):
        if not any(isinstance(part, list) for part in data):
            return data
        if not all(isinstance(part, list) for part in data):
            break
        data = [value for part in data for value in part]
    raise ArgumentError(name[:64], "a list, flat or nested as the shape", "another")


def _outputs(rows: Any, binary: bool) -> dict[str, bool]:
    """Output asked for -> whether it should come binary."""
    if rows is None:
        return {}
    if not isinstance(rows, list):
        raise ArgumentError("outputs", "a list", type(rows).__name__)
    wanted = {}
    for row in rows:
        name = row.get("name") if isinstance(row, dict) else None
        if not isinstance(name, str):
            raise ArgumentError("outputs", "objects with a name", str(row)[:64])
        parameters = row.get("parameters") or {}
        own = parameters.get("binary_data") if isinstance(parameters, dict) else None
        wanted[name] = binary if own is None else bool(own)
    return wanted


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
