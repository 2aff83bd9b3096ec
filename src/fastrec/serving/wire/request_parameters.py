"""Request parameters: priority, timeout, tier and tenant.

Request parameters come first, metadata (or HTTP headers) second: load generators that reach gRPC
through C++ can set the former alone. Priorities and timeouts are Triton's: 1 is the highest
priority and 0 the default, timeouts are microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastrec.errors import ArgumentError

TIER, TENANT, PRIORITY = "tier", "tenant", "priority"
HEADERS = {"fastrec-tier": TIER, "fastrec-tenant": TENANT, "fastrec-priority": PRIORITY}
_MAX_TEXT = 128
_MAX_PRIORITY = 2**32 - 1


@dataclass(slots=True)
class RequestParameters:
    """Parameters as the client claims them; :mod:`fastrec.serving.wire.auth` checks the claims.

    Args:
        priority: 1 is the highest, 0 the default.
        timeout_s: seconds from arrival; None = not said.
        tier, tenant: "" = not said.
    """

    priority: int = 0
    timeout_s: float | None = None
    tier: str = ""
    tenant: str = ""


def from_values(values: Mapping[str, Any]) -> RequestParameters:
    """Parse plain Python values; other keys are ignored.

    Raises:
        ArgumentError: a value of the wrong type or range.
    """
    parameters = RequestParameters()
    if not values:
        return parameters
    priority = values.get(PRIORITY)
    if priority is not None:
        parameters.priority = _whole(PRIORITY, priority, _MAX_PRIORITY)
    timeout = values.get("timeout")
    if timeout is not None:
        micros = _whole("timeout", timeout, 2**63 - 1)
        # As for Triton, 0 is no timeout of the request's own.
        parameters.timeout_s = micros / 1e6 if micros else None
    parameters.tier = _text(TIER, values.get(TIER))
    parameters.tenant = _text(TENANT, values.get(TENANT))
    return parameters


def parameter_values(parameters: Any) -> dict[str, Any]:
    """The values of a map of InferParameter.

    A parameter of a type that its sender's schema has and ours has not (or the other way round: the
    KServe SDK drops unsigned numbers) arrives without a value and counts as not sent.
    """
    values = {}
    for name, parameter in parameters.items():
        which = parameter.WhichOneof("parameter_choice")
        if which is not None:
            values[name] = getattr(parameter, which)
    return values


def with_headers(values: dict[str, Any], headers: Any) -> dict[str, Any]:
    """Fill in from (name, value) pairs of metadata or headers what ``values`` does not say."""
    for name, value in headers:
        key = HEADERS.get(name)
        if key is not None and key not in values:
            if key == PRIORITY:
                if not (value.isascii() and value.isdigit() and len(value) <= 10):
                    raise ArgumentError(name, "a whole number of 0 or more", value[:64])
                values[key] = int(value)
            else:
                values[key] = value
    return values


def _whole(name: str, value: Any, limit: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
        raise ArgumentError(name, f"a whole number in 0..{limit}", value)
    return value


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not value.isprintable():
        raise ArgumentError(name, f"printable text of up to {_MAX_TEXT} characters", value)
    return value
