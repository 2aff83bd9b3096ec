"""A client of several servers: each request goes to the one that probes say is best.

    async with Client(["10.0.0.1:8001", "10.0.0.2:8001"]) as client:
        outputs = await client.infer("ranker", inputs, timeout_s=0.05, tier="gold")

The rule is Prequal's (:mod:`fastrec.serving.core.probes`). A server that cannot be reached is left
alone for a while, and its requests go to another one: a model scores, so a second run does no harm.
Refusals of a server that answers are the caller's to handle; what sheds load is not asked again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence

import numpy as np

from fastrec.errors import ArgumentError, MissingDependencyError
from fastrec.serving.core.probes import ProbePool, Probing
from fastrec.serving.core.request import Kind, Rejected
from fastrec.serving.core.tasks import keep

try:
    import grpc

    from fastrec.serving.wire.messages import (
        LOAD_SERVICE,
        SERVICE,
        InferRequest,
        InferResponse,
        message,
    )
    from fastrec.serving.wire.status import rejected
    from fastrec.serving.wire.tensors import add_raw, from_raw
except ImportError as error:
    raise MissingDependencyError("grpcio", "serve", "fastrec.serving.client") from error

_ProbeRequest = message("fastrec.serving.ProbeRequest")
_ProbeReply = message("fastrec.serving.ProbeReply")
# A server that was not reached is left alone for so long, twice as long each time.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0


class _Host:
    """One server."""

    def __init__(self, target: str, channel: grpc.aio.Channel) -> None:
        self.target, self.channel = target, channel
        self.infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        self.probe = channel.unary_unary(f"/{LOAD_SERVICE}/Probe")
        self.pause_s = 0.0
        self.paused_until = 0.0

    def reached(self) -> None:
        self.pause_s = self.paused_until = 0.0

    def missed(self, now: float) -> None:
        self.pause_s = min(max(2 * self.pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
        self.paused_until = now + self.pause_s


class Client:
    """Spreads requests over servers. Made and used in one event loop.

    Args:
        targets: ``HOST:PORT`` of each server.
        credentials: of gRPC, for TLS; None = plain text.
        token: sent as ``authorization: Bearer``; None = none.
        probing: how servers are probed.
        tries: servers that are tried before a failure to reach one is raised.
        message_mib: largest request or answer.

    Raises:
        ArgumentError: no target, or one that is listed twice.
    """

    def __init__(
        self,
        targets: Sequence[str],
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        probing: Probing | None = None,
        tries: int = 3,
        message_mib: int = 16,
        rng: random.Random | None = None,
    ) -> None:
        if not targets or len(set(targets)) != len(targets):
            raise ArgumentError("targets", "addresses, each once", list(targets))
        if tries < 1:
            raise ArgumentError("tries", "at least 1", tries)
        self.probing = probing or Probing()
        self._tries = tries
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        size = message_mib << 20
        options = [
            ("grpc.max_receive_message_length", size),
            ("grpc.max_send_message_length", size),
        ]
        self._hosts = [
            _Host(
                target,
                grpc.aio.insecure_channel(target, options)
                if credentials is None
                else grpc.aio.secure_channel(target, credentials, options),
            )
            for target in targets
        ]
        self._rng = rng or random.Random()
        # Servers may hold different models: what one is asked of a model says nothing of others.
        self._pools: dict[tuple[str, str], ProbePool[_Host]] = {}
        self._probes: set[asyncio.Task[None]] = set()
        self.sent = dict.fromkeys(targets, 0)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. Closing twice is harmless."""
        for probe in list(self._probes):
            probe.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)
        await asyncio.gather(*(host.channel.close() for host in self._hosts))

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, np.ndarray],
        *,
        version: str = "",
        timeout_s: float | None = None,
        priority: int = 0,
        tier: str = "",
        tenant: str = "",
        outputs: Sequence[str] = (),
        request_id: str = "",
    ) -> dict[str, np.ndarray]:
        """The outputs by name, as read-only views of the answer.

        Args:
            timeout_s: for all tries together; None = the tier's goal on the server, and no end
                here.
            priority: 1 is the highest, 0 the default level.
            outputs: names asked for; none = all.

        Raises:
            Rejected: a server refused, and why; NOT_READY where none was reached, EXPIRED where
                ``timeout_s`` passed.
            DtypeError: an array of a type that the protocol has not.
        """
        data = _encoded(model, version, inputs, priority, tier, tenant, outputs, request_id)
        end = None if timeout_s is None else time.monotonic() + timeout_s
        failure: Rejected | None = None
        failed: set[_Host] = set()
        for _ in range(min(self._tries, len(self._hosts))):
            host = await self._choose(model, version, failed)
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise Rejected(Kind.EXPIRED, f"no answer within {timeout_s:g} s") from failure
            try:
                self.sent[host.target] += 1
                reply = await host.infer(data, timeout=left, metadata=self._metadata)
                host.reached()
                return _decoded(reply)
            except grpc.aio.AioRpcError as error:
                failure = rejected(error.code(), error.details(), error.trailing_metadata())
                if failure.kind is not Kind.NOT_READY:
                    raise failure from error
                # Not reached, or it cannot run the model: another server is asked.
                self._pools[model, version].drop(host)
                host.missed(time.monotonic())
                failed.add(host)
        assert failure is not None
        raise failure

    async def _choose(self, model: str, version: str, failed: set[_Host]) -> _Host:
        pool = self._pools.get((model, version))
        if pool is None:
            rng = random.Random(self._rng.random())
            pool = self._pools[model, version] = ProbePool(self._hosts, self.probing, rng)
        now = time.monotonic()
        probes = [
            keep(self._probes, self._probe(pool, host, model, version)) for host in pool.targets()
        ]
        if probes and not pool.fresh(now):
            # Nothing is known: better asked first than guessed. A server that hangs is not waited
            # for where the others have answered.
            await _all_but_one(probes, self.probing.timeout_s)
            now = time.monotonic()
        return pool.pick(now, lambda host: host not in failed and host.paused_until <= now)

    async def _probe(self, pool: ProbePool[_Host], host: _Host, model: str, version: str) -> None:
        asked = _ProbeRequest(model=model, version=version).SerializeToString()
        start = time.monotonic()
        try:
            data = await host.probe(asked, timeout=self.probing.timeout_s, metadata=self._metadata)
            reply = _ProbeReply.FromString(data)
        except grpc.aio.AioRpcError:
            # Slow or away: what it said before is no news any more.
            pool.drop(host)
            return
        now = time.monotonic()
        if reply.ready:
            host.reached()
            # The way there and back is part of what a request would take.
            latency_s = reply.latency_s + now - start
            pool.add(host, reply.in_flight, latency_s, now, reply.each_s)
        else:
            pool.drop(host)


async def _all_but_one(tasks: Sequence[asyncio.Task[None]], timeout_s: float) -> None:
    waiting = set(tasks)
    end = time.monotonic() + timeout_s
    while len(waiting) > (1 if len(tasks) > 1 else 0) and (left := end - time.monotonic()) > 0:
        _, waiting = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)


def _encoded(
    model: str,
    version: str,
    inputs: Mapping[str, np.ndarray],
    priority: int,
    tier: str,
    tenant: str,
    outputs: Sequence[str],
    request_id: str,
) -> bytes:
    request = InferRequest(model_name=model, model_version=version, id=request_id)
    add_raw(request.inputs, request.raw_input_contents, inputs)
    for name in outputs:
        request.outputs.add(name=name)
    if priority:
        request.parameters["priority"].uint64_param = priority
    for key, text in (("tier", tier), ("tenant", tenant)):
        if text:
            request.parameters[key].string_param = text
    return bytes(request.SerializeToString())


def _decoded(data: bytes) -> dict[str, np.ndarray]:
    reply = InferResponse.FromString(data)
    return {
        tensor.name: from_raw(tensor.name, tensor.datatype, tensor.shape, raw)
        for tensor, raw in zip(reply.outputs, reply.raw_output_contents, strict=True)
    }
