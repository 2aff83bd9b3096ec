"""Refusals in the two protocols.

| kind | gRPC | HTTP |
|---|---|---|
| quota | RESOURCE_EXHAUSTED, with RetryInfo | 429, with Retry-After |
| overload, queue_full, deadline_infeasible, expired, not_ready | UNAVAILABLE | 503 |
| not_found | NOT_FOUND | 404 |
| invalid | INVALID_ARGUMENT | 400 |
| cancelled | CANCELLED | 499 |
| internal | INTERNAL | 500 |

Triton answers UNAVAILABLE where a queue is full or a timeout has run out, and the texts are its
own. The kind itself is the ``reason`` of a google.rpc.ErrorInfo, for programs. While the server
sheds load, clients are told not to retry (``grpc-retry-pushback-ms: -1``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import grpc

from fastrec.errors import FastrecError
from fastrec.serving.core.request import Kind, Rejected
from fastrec.serving.wire.messages import message

DOMAIN = "fastrec"
DETAILS = "grpc-status-details-bin"
PUSHBACK = "grpc-retry-pushback-ms"

_CODES = {
    Kind.QUOTA: (grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
    Kind.OVERLOAD: (grpc.StatusCode.UNAVAILABLE, 503),
    Kind.QUEUE_FULL: (grpc.StatusCode.UNAVAILABLE, 503),
    Kind.DEADLINE_INFEASIBLE: (grpc.StatusCode.UNAVAILABLE, 503),
    Kind.EXPIRED: (grpc.StatusCode.UNAVAILABLE, 503),
    Kind.NOT_READY: (grpc.StatusCode.UNAVAILABLE, 503),
    Kind.NOT_FOUND: (grpc.StatusCode.NOT_FOUND, 404),
    Kind.INVALID: (grpc.StatusCode.INVALID_ARGUMENT, 400),
    Kind.CANCELLED: (grpc.StatusCode.CANCELLED, 499),
    Kind.INTERNAL: (grpc.StatusCode.INTERNAL, 500),
}
# What a code means where nothing says more.
_KINDS = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: Kind.OVERLOAD,
    grpc.StatusCode.UNAVAILABLE: Kind.NOT_READY,
    grpc.StatusCode.DEADLINE_EXCEEDED: Kind.EXPIRED,
    grpc.StatusCode.NOT_FOUND: Kind.NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT: Kind.INVALID,
    grpc.StatusCode.UNAUTHENTICATED: Kind.INVALID,
    grpc.StatusCode.PERMISSION_DENIED: Kind.INVALID,
    grpc.StatusCode.CANCELLED: Kind.CANCELLED,
}
_REASONS = {kind.value for kind in Kind}
_SHEDDING = {Kind.OVERLOAD, Kind.QUEUE_FULL, Kind.DEADLINE_INFEASIBLE, Kind.EXPIRED}

_Status = message("google.rpc.Status")
_RetryInfo = message("google.rpc.RetryInfo")
_ErrorInfo = message("google.rpc.ErrorInfo")


class Refused(FastrecError):
    """The caller may not do this: no valid token, or an admin call that is switched off.

    Args:
        reason: for programs, e.g. ``"unauthenticated"``.
        message: for people.
        code: of gRPC.
        http: status.
    """

    def __init__(self, reason: str, message: str, code: grpc.StatusCode, http: int) -> None:
        self.reason, self.code, self.http = reason, code, http
        super().__init__(message)


class ErrorReply(NamedTuple):
    """An error as the protocols carry it."""

    code: grpc.StatusCode
    http: int
    text: str
    reason: str
    retry_after_s: float | None


@functools.lru_cache(1024)
def trailers(told: ErrorReply) -> tuple[tuple[str, str | bytes], ...]:
    """gRPC's trailing metadata: details, and whether a retry makes sense."""
    status = _Status(code=told.code.value[0], message=told.text)
    info = status.details.add()
    info.type_url = "type.googleapis.com/google.rpc.ErrorInfo"
    info.value = _ErrorInfo(reason=told.reason.upper(), domain=DOMAIN).SerializeToString()
    found: list[tuple[str, str | bytes]] = []
    if told.retry_after_s is not None:
        retry = _RetryInfo()
        nanos = round(told.retry_after_s * 1e9)
        retry.retry_delay.seconds, retry.retry_delay.nanos = divmod(nanos, 10**9)
        info = status.details.add()
        info.type_url = "type.googleapis.com/google.rpc.RetryInfo"
        info.value = retry.SerializeToString()
    if told.reason in _SHEDDING:
        found.append((PUSHBACK, "-1"))
    elif told.retry_after_s is not None:
        found.append((PUSHBACK, str(math.ceil(told.retry_after_s * 1e3))))
    found.append((DETAILS, status.SerializeToString()))
    return tuple(found)


def rejected(code: grpc.StatusCode, text: str | None, trailers: Iterable[Any] | None) -> Rejected:
    """The refusal behind a gRPC status, the inverse of :func:`error_reply`. Where the server gives
    no reason (proxies, gRPC itself), the code decides."""
    reason, retry_s = refusal_details(trailers)
    kind = Kind(reason) if reason in _REASONS else _KINDS.get(code, Kind.INTERNAL)
    return Rejected(kind, text or code.name, retry_s)


def refusal_details(trailers: Iterable[Any] | None) -> tuple[str, float | None]:
    """The reason ("" = not given) and the seconds to wait before a retry, from gRPC's trailers."""
    reason, retry_s = "", None
    for key, value in trailers or ():
        for detail in _Status.FromString(value).details if key == DETAILS else ():
            if detail.type_url.endswith("google.rpc.ErrorInfo"):
                reason = _ErrorInfo.FromString(detail.value).reason.lower()
            elif detail.type_url.endswith("google.rpc.RetryInfo"):
                delay = _RetryInfo.FromString(detail.value).retry_delay
                retry_s = delay.seconds + delay.nanos / 1e9
    return reason, retry_s


def error_reply(error: BaseException) -> ErrorReply:
    """The reply for an error; the text of one that is not fastrec's own goes to the log alone."""
    if isinstance(error, Rejected):
        code, http = _CODES[error.kind]
        retry_s = error.retry_after_s
        if retry_s is not None:
            # In whole milliseconds: refusals under overload are then alike, and made once.
            retry_s = math.ceil(retry_s * 1e3) / 1e3
        return ErrorReply(code, http, str(error), error.kind.value, retry_s)
    if isinstance(error, Refused):
        return ErrorReply(error.code, error.http, str(error), error.reason, None)
    if isinstance(error, FastrecError) and isinstance(error, ValueError | TypeError):
        return ErrorReply(
            grpc.StatusCode.INVALID_ARGUMENT, 400, str(error), Kind.INVALID.value, None
        )
    return ErrorReply(grpc.StatusCode.INTERNAL, 500, "internal error", Kind.INTERNAL.value, None)
