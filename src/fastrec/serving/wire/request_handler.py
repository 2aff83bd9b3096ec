"""Handling of decoded requests, the same for gRPC and HTTP: check, run, count, log.

Nothing here knows gRPC or HTTP beyond the names of their status codes.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import numpy as np

from fastrec.errors import ArgumentError, FastrecError
from fastrec.serving.core.request import Kind, Rejected, Request, Response
from fastrec.serving.wire.auth import ANYONE, Auth, Identity, settle
from fastrec.serving.wire.request_parameters import RequestParameters
from fastrec.serving.wire.status import ErrorReply, Refused, error_reply

if TYPE_CHECKING:
    from fastrec.serving.core.inference_core import InferenceCore, ModelInfo
    from fastrec.serving.observe.traces import Traces

log = logging.getLogger("fastrec.serving")

# What is implemented, and nothing else: clients key on it.
EXTENSIONS = (
    "schedule_policy",
    "parameters",
    "statistics",
    "model_configuration",
    "model_repository",
    "binary_tensor_data",
)
_LOG_AGAIN_S = 60.0
# Share of the client's timeout reserved for the network return, and its cap in seconds.
_RETURN_SHARE, _RETURN_S = 0.05, 0.0025
_MOST_LOGGED = 256


class Repository(Protocol):
    """Source of models (:mod:`fastrec.serving.repository`)."""

    def index(self) -> list[dict[str, str]]:
        """Rows with name, version, state and reason: all that is there."""

    async def load(self, name: str) -> None:
        """Load or reload a model."""

    async def unload(self, name: str) -> None:
        """Drain and unload a model."""


class RequestHandler:
    """Checks decoded requests and runs them on the core.

    Args:
        core: the scheduler and its engines.
        repository: where models are loaded from; None = they come another way (notebooks, Ray).
        auth: who may call; None = anyone, trusted with the tier and tenant it names.
        admin: whether models may be loaded and unloaded; None = from loopback addresses alone
            (and, with ``auth``, by identities that are admins).
        statistics: ``(name, version) -> list`` of rows for ModelStatistics.
        traces: makes spans of requests; None = none.
        max_users: most users that one request may hold.
    """

    def __init__(
        self,
        core: InferenceCore,
        repository: Repository | None = None,
        *,
        auth: Auth | None = None,
        admin: bool | None = None,
        statistics: Callable[[str, str], list[dict[str, Any]]] | None = None,
        traces: Traces | None = None,
        max_users: int = 1024,
    ) -> None:
        self.core, self.repository, self.auth = core, repository, auth
        self._admin = admin
        self.statistics = statistics or (lambda name, version: [])
        self._max_users, self._traces = max_users, traces
        self.running = 0
        self._logged: dict[tuple[str, str], tuple[float, int]] = {}

    def identify(self, authorization: str | None, certificate_names: Iterable[str]) -> Identity:
        """Who calls.

        Raises:
            Refused: auth is on, and the caller proves no identity.
        """
        if self.auth is None:
            return ANYONE
        return self.auth.identify(authorization, certificate_names)

    def require_admin(self, identity: Identity, peer: str) -> None:
        """Let admins pass.

        Raises:
            Refused: admin calls are off for this peer, or the identity is no admin.
        """
        allowed = is_loopback(peer) if self._admin is None else self._admin
        if not allowed or not identity.admin:
            raise Refused(
                "permission_denied",
                "loading and unloading models is not allowed from here",
                grpc.StatusCode.PERMISSION_DENIED,
                403,
            )

    async def infer(
        self,
        model: str,
        version: str,
        inputs: dict[str, np.ndarray],
        parameters: RequestParameters,
        identity: Identity,
        *,
        remaining_s: float | None = None,
        request_id: str = "",
        outputs: Sequence[str] = (),
        headers: Iterable[tuple[str, Any]] = (),
    ) -> Response:
        """Score one request.

        Args:
            remaining_s: what the protocol's own deadline leaves; the earlier of it and the
                request's timeout counts.
            outputs: names asked for; none = all.
            headers: metadata or headers, for the trace that the caller is in.

        Raises:
            Rejected, Refused, FastrecError: see :func:`fastrec.serving.wire.status.error_reply`.
        """
        if outputs:
            known = self.core.model(model, version).outputs
            for name in outputs:
                if name not in known:
                    raise ArgumentError("outputs", f"names among {sorted(known)}", name[:64])
        for name, array in inputs.items():
            if array.ndim and array.shape[0] > self._max_users:
                raise ArgumentError(
                    name, f"at most {self._max_users} users a request", array.shape[0]
                )
        request = self._request(
            model, version, inputs, parameters, identity, remaining_s, request_id
        )
        trace = None if self._traces is None else self._traces.begin(headers)
        self.running += 1
        try:
            response = await self.core.infer(request)
        except BaseException as error:
            if trace is not None:
                trace.failed(request, error)
            raise
        finally:
            self.running -= 1
        if trace is not None:
            trace.answered(request, response)
        if outputs:
            response.outputs = {name: response.outputs[name] for name in outputs}
        return response

    def turn_away(
        self,
        model: str,
        version: str,
        inputs: Iterable[Any],
        parameters: RequestParameters,
        identity: Identity,
        remaining_s: float | None,
    ) -> None:
        """Refuse what :meth:`infer` would, where that is known before the inputs are decoded: while
        the model sheds load.

        Args:
            inputs: of the message, with a name and a shape each.

        Raises:
            Rejected, Refused: see :meth:`infer`.
        """
        scheduler = self.core.shedding(model, version)
        if scheduler is None:
            return
        size = scheduler.signature.size_of({i.name: i.shape for i in inputs})
        if size is not None:
            request = self._request(model, version, {}, parameters, identity, remaining_s, "")
            scheduler.turn_away(request, size)

    def _request(
        self,
        model: str,
        version: str,
        inputs: dict[str, np.ndarray],
        parameters: RequestParameters,
        identity: Identity,
        remaining_s: float | None,
        request_id: str,
    ) -> Request:
        tier, tenant = settle(identity, parameters)
        timeout = parameters.timeout_s
        if remaining_s is not None and (timeout is None or remaining_s < timeout):
            timeout = remaining_s
        if timeout is not None:
            timeout -= min(_RETURN_SHARE * timeout, _RETURN_S)
        return Request(
            model,
            version,
            inputs,
            priority=parameters.priority,
            deadline=None if timeout is None else self.core.clock.now() + timeout,
            tier=tier,
            tenant=tenant,
            id=request_id,
        )

    def versions(self, name: str) -> list[str]:
        """Versions of a model, in order. Empty where it is unknown."""
        return sorted({info.version for info in self.core.models() if info.name == name})

    def details(self, info: ModelInfo) -> dict[str, str]:
        """Configuration parameters beyond Triton's own fields."""
        config = self.core.config
        return {
            "max_users": str(self._max_users),
            "users_per_call": str(info.max_users),
            "latency_goal_ms": f"{config.slo.latency_ms:g}",
            "tiers": ",".join(config.tiers),
            # With the id ranges, which the protocol cannot say: what load generators draw from.
            "inputs": json.dumps(info.spec.to_dict()),
        }

    def index(self) -> list[dict[str, str]]:
        """Rows with name, version, state and reason."""
        if self.repository is not None:
            return self.repository.index()
        return [
            {"name": i.name, "version": i.version, "state": i.state, "reason": ""}
            for i in self.core.models()
        ]

    async def load(self, name: str, identity: Identity, peer: str) -> None:
        """Load or reload a model of the repository.

        Raises:
            Refused, Rejected, FastrecError: not allowed, not there, or not loadable.
        """
        await self._admin_repository(identity, peer).load(name)

    async def unload(self, name: str, identity: Identity, peer: str) -> None:
        """Drain and unload a model.

        Raises:
            Refused, Rejected: not allowed, or not there.
        """
        await self._admin_repository(identity, peer).unload(name)

    def _admin_repository(self, identity: Identity, peer: str) -> Repository:
        self.require_admin(identity, peer)
        if self.repository is None:
            raise Rejected(Kind.NOT_FOUND, "this server has no model repository")
        return self.repository

    def error_reply(self, error: BaseException, where: str) -> ErrorReply:
        """The reply for an error, logged once a minute for each kind: a flood of bad requests must
        not become a flood of log lines."""
        told = error_reply(error)
        expected = isinstance(error, Rejected) and error.kind is not Kind.INTERNAL
        unknown = not isinstance(error, FastrecError)
        if expected and error.kind not in (Kind.INVALID, Kind.NOT_FOUND):  # type: ignore[attr-defined]
            return told  # counted by the metrics; nothing is wrong with the request
        key = (where, type(error).__name__ + told.reason)
        now = time.monotonic()
        at, times = self._logged.get(key, (-_LOG_AGAIN_S, 0))
        if now - at < _LOG_AGAIN_S:
            self._logged[key] = (at, times + 1)
            return told
        if len(self._logged) >= _MOST_LOGGED:
            self._logged.clear()
        self._logged[key] = (now, 0)
        again = f" ({times} more since the last line)" if times else ""
        level = logging.ERROR if told.http >= 500 else logging.WARNING
        # %r: what a client sent must not forge lines.
        log.log(
            level, "%s: %r%s", where, str(error)[:500], again, exc_info=error if unknown else None
        )
        return told


def is_loopback(peer: str) -> bool:
    """Whether a peer, as gRPC writes it (``ipv4:127.0.0.1:5050``, ``unix:...``), is local."""
    kind, _, address = peer.partition(":")
    if kind == "unix":
        return True
    if kind not in ("ipv4", "ipv6"):
        return False
    host = address.rsplit(":", 1)[0].replace("%5B", "[").replace("%5D", "]").strip("[]")
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback
