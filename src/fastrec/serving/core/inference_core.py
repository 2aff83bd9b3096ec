"""The inference core: loads models, schedules requests, returns answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fastrec.errors import ArgumentError, FastrecError
from fastrec.serving.core.clock import Clock, LoopClock
from fastrec.serving.core.config import ServingConfig
from fastrec.serving.core.engines import Source
from fastrec.serving.core.events import Event, Observer, RolloutChanged
from fastrec.serving.core.guard import Guard, Signals
from fastrec.serving.core.pool import EnginePool
from fastrec.serving.core.queues import PendingRequest
from fastrec.serving.core.rate_limits import quotas_of
from fastrec.serving.core.request import Kind, LoadReport, Rejected, Request, Response, Timings
from fastrec.serving.core.rollout import Rollout
from fastrec.serving.core.scheduler import Scheduler
from fastrec.serving.core.signature import ModelSignature
from fastrec.serving.core.snapshot import snapshot
from fastrec.serving.core.tasks import keep
from fastrec.spec import InputSpec

_LOG = logging.getLogger("fastrec.serving")


@dataclass(frozen=True)
class ModelInfo:
    """A version of a model.

    Args:
        name, version: what requests call it.
        state: the pool's: LOADING, WARMING, READY, DRAINING or FAILED.
        weight: its share of requests that name no version.
        spec: inputs, in order, with their limits.
        outputs: name -> (dims, numpy dtype), dims as in ``spec``; known once it is READY.
        max_users: users that one call takes, larger requests are split.
        engines: engines by state.
    """

    name: str
    version: str
    state: str
    weight: float
    spec: InputSpec
    outputs: dict[str, tuple[tuple[int | str, ...], str]]
    max_users: int
    engines: dict[str, int]


class _Version:
    """A version of a model: its engines, its scheduler, its share."""

    def __init__(self, pool: EnginePool, weight: float) -> None:
        self.pool, self.weight = pool, weight
        self.credit = 0.0
        self.is_new = False  # of a release under way

    @property
    def scheduler(self) -> Scheduler | None:
        return self.pool.scheduler

    def ready(self) -> bool:
        return (
            not self.pool.draining
            and self.scheduler is not None
            and bool(self.scheduler.router.slots)
        )

    def info(self) -> ModelInfo:
        pool, signature = self.pool, self.pool.signature
        states = pool.states()
        state = "READY"
        if pool.draining:
            state = "DRAINING"
        elif not self.ready():
            state = next((s for s in ("WARMING", "LOADING") if s in states), "FAILED")
        return ModelInfo(
            pool.name,
            pool.version,
            state,
            self.weight,
            InputSpec(()) if signature is None else signature.spec,
            {} if signature is None else dict(signature.outputs),
            1 if self.scheduler is None else self.scheduler.batcher.most_users,
            states,
        )


class InferenceCore:
    """Schedules requests over engines.

    Everything but the engines runs in the thread of one event loop, in which it must be made.

    Attributes:
        loading: the server is starting: not ready as a whole, even if single models are.
        ending: the server is shutting down: nothing is ready, requests are still answered.

    Args:
        config: see :class:`ServingConfig`; its defaults where None.
        clock: the loop's where None.
        guard_probe: reads the system's state; the cgroup's files where None.
    """

    def __init__(
        self,
        config: ServingConfig | None = None,
        *,
        clock: Clock | None = None,
        guard_probe: Callable[[], Signals] | None = None,
    ) -> None:
        self.config = config or ServingConfig()
        self.clock = clock or LoopClock()
        self._observers: list[Observer] = []
        self._models: dict[str, dict[str, _Version]] = {}
        self._rollouts: dict[str, Rollout] = {}
        self._quotas = quotas_of(self.config)
        self.guard = Guard(self.config.admission, self.clock, guard_probe)
        self.loading = self.ending = self._draining = False
        self._tasks: set[asyncio.Task[None]] = set()

    def subscribe(self, observer: Observer) -> Callable[[], None]:
        """Call ``observer.on_event`` from now on; the result ends that."""
        self._observers.append(observer)
        return lambda: self._observers.remove(observer)

    async def load(
        self,
        model: str,
        source: Source,
        *,
        version: str = "1",
        weight: float | None = None,
        engines: int | None = None,
        kind: str | None = None,
        replace: bool = False,
    ) -> ModelInfo:
        """Load a version, warm it, and let it take requests; returns once it is READY.

        Args:
            model: its name.
            source: a path that ``load_engine`` reads, an :class:`EntryPoint`, or a factory.
            version: must be new, unless ``replace``.
            weight: its share of the requests that name no version, against the other versions'
                weights; None = all of it for the first version, 0 for others.
            engines, kind: instead of the configured ones.
            replace: take the place of a loaded version of this name, which answers requests until
                the new one is warm and is then drained. Both are in memory meanwhile.

        Raises:
            ArgumentError: the version is there already.
            FastrecError: it cannot be loaded or warmed; nothing of it is left, and what it was to
                replace goes on.
        """
        versions = self._models.setdefault(model, {})
        before = versions.get(version)
        if before is not None and not replace:
            raise ArgumentError("version", "a new one", version)
        share = (0.0 if versions else 1.0) if weight is None else weight

        def scheduler(signature: ModelSignature) -> Scheduler:
            return Scheduler(
                model,
                version,
                self.config,
                self.clock,
                signature,
                quotas=self._quotas,
                emit=self._emit,
                guard=lambda: self.guard.factor,
                on_lost=pool.lost,
            )

        pool = EnginePool(
            model,
            version,
            source,
            self.config,
            self.clock,
            self._emit,
            scheduler,
            engines=engines,
            kind=kind,
        )
        entry = _Version(pool, 0.0)
        if before is None:
            versions[version] = entry
        try:
            await pool.start()
        except BaseException:
            if before is None:
                versions.pop(version, None)
            if not versions:
                self._models.pop(model, None)
            raise
        entry.weight = share
        if before is not None:
            entry.weight = before.weight
            versions[version] = entry
            await before.pool.drain()
        return entry.info()

    async def release(
        self,
        model: str,
        source: Source,
        *,
        version: str,
        engines: int | None = None,
        kind: str | None = None,
    ) -> Rollout:
        """Load a version and let it take over, step by step, unless it proves bad.

        Returns once the first step has begun; :class:`RolloutChanged` events report the rest. The
        version that loses is drained and unloaded: no accepted request is lost.

        Args:
            model: its name.
            source: see :meth:`load`.
            version: of the new one.
            engines, kind: instead of the configured ones.

        Raises:
            ArgumentError: the version is there already, or a release of the model is under way.
            Rejected: NOT_FOUND, there is no version to take over from.
            FastrecError: it cannot be loaded or warmed; the old version goes on.
        """
        if model in self._rollouts:
            raise ArgumentError("model", "one without a release under way", model)
        old = self._find(model, "")
        await self.load(model, source, version=version, weight=0.0, engines=engines, kind=kind)
        new = self._models[model][version]
        new.is_new = True
        before = old.weight or 1.0

        def set_weight(share: float, action: str) -> None:
            new.weight, old.weight = before * share, before * (1 - share)
            self._emit(RolloutChanged(self.clock.now(), model, version, action, share, ""))

        def ended(action: str, reason: str) -> None:
            share = 1.0 if action == "promote" else 0.0
            new.weight, old.weight = before * share, before * (1 - share)
            self._rollouts.pop(model, None)
            new.is_new = False
            self._emit(RolloutChanged(self.clock.now(), model, version, action, share, reason))
            loser = old if action == "promote" else new
            keep(self._tasks, self._retire(model, loser))

        rollout = Rollout(self.config.canary, self.clock, set_weight, ended)
        self._rollouts[model] = rollout
        return rollout

    async def _retire(self, model: str, loser: _Version) -> None:
        versions = self._models.get(model, {})
        if versions.get(loser.pool.version) is loser:
            await loser.pool.drain()
            versions.pop(loser.pool.version, None)

    async def unload(self, model: str, version: str = "") -> None:
        """Take no more requests, answer those accepted, free the engines.

        Args:
            version: "" = all.

        Raises:
            Rejected: NOT_FOUND.
        """
        self._find(model, version)
        versions = self._models[model]
        rollout = self._rollouts.pop(model, None)
        if rollout is not None:
            rollout.cancel("unloaded")
        leaving = [version] if version else list(versions)
        await asyncio.gather(*(versions[key].pool.drain() for key in leaving))
        for key in leaving:
            versions.pop(key, None)
        if not versions:
            self._models.pop(model, None)

    async def infer(self, request: Request) -> Response:
        """The answer to one request. Cancelling the task takes the request out at once.

        Raises:
            Rejected: not answered, and why.
        """
        if self._draining:
            raise Rejected(Kind.NOT_READY, "the server is shutting down")
        chosen = self._choose(request.model, request.version)
        scheduler = chosen.scheduler
        if scheduler is None or not chosen.ready():
            raise Rejected(
                Kind.NOT_READY, f"model '{request.model}' has no engine that can run", 1.0
            )
        arrays = _checked(request, scheduler.signature)
        future: asyncio.Future[PendingRequest] = asyncio.get_running_loop().create_future()
        pending = PendingRequest(request, arrays, partial(_resolve, future))
        scheduler.submit(pending, arrays)
        try:
            await future
        except asyncio.CancelledError:
            scheduler.cancel(pending)
            raise
        now = self.clock.now()
        if self._rollouts:
            self._tell_rollout(request.model, chosen, pending, now)
        if pending.error is not None:
            raise pending.error
        times = Timings(
            pending.started - pending.arrival,
            pending.compute_s,
            now - pending.arrival,
            pending.batch_rows,
            pending.sub_count,
            pending.tries,
            pending.engine,
        )
        return Response(pending.outputs, request.model, chosen.pool.version, times)

    def shedding(self, model: str, version: str) -> Scheduler | None:
        """The scheduler of a model, where it has just refused requests for want of room; None
        where it has not, or where versions share the requests."""
        versions = self._models.get(model)
        if self._draining or version or versions is None or len(versions) != 1:
            return None
        scheduler = next(iter(versions.values())).scheduler
        return scheduler if scheduler is not None and scheduler.shedding() else None

    def _tell_rollout(
        self, model: str, chosen: _Version, pending: PendingRequest, now: float
    ) -> None:
        rollout = self._rollouts.get(model)
        if rollout is None:
            return
        error = pending.error
        if error is None or error.kind in (Kind.INTERNAL, Kind.NOT_READY):
            rollout.add(chosen.is_new, now - pending.arrival, error is not None)

    def _choose(self, model: str, version: str) -> _Version:
        """The version for a request: by name, or in turn, in proportion to the weights."""
        versions = self._models.get(model)
        if version or not versions:
            return self._find(model, version)
        if len(versions) == 1:
            return next(iter(versions.values()))
        total, best = 0.0, None
        for entry in versions.values():
            if entry.weight and entry.ready():
                total += entry.weight
                entry.credit += entry.weight
                if best is None or entry.credit > best.credit:
                    best = entry
        if best is None:
            return self._find(model, "")
        best.credit -= total
        return best

    def ready(self, model: str = "", version: str = "") -> bool:
        """Whether the server ("" = all its models, at least one) or a model is ready.

        All probes report this: gRPC's health service, ServerReady, ModelReady, HTTP, metrics, page.
        """
        if self.ending or self._draining or (self.loading and not model):
            return False
        names = [model] if model else list(self._models)
        return bool(names) and all(
            any(
                entry.ready()
                for key, entry in self._models.get(name, {}).items()
                if version in ("", key)
            )
            for name in names
        )

    def load_of(self, model: str, version: str = "", users: int = 0, rows: int = 0) -> LoadReport:
        """How busy a version is ("" = the one with the largest weight).

        Args:
            users, rows: of the request that would follow; 0 = usual ones.

        Raises:
            Rejected: NOT_FOUND.
        """
        chosen = self._find(model, version)
        if self.ending or chosen.scheduler is None or not chosen.ready():
            return LoadReport(False, 0)
        return chosen.scheduler.load(users, rows)

    def models(self) -> list[ModelInfo]:
        """Every version, loading ones too."""
        return [v.info() for versions in self._models.values() for v in versions.values()]

    def model(self, model: str, version: str = "") -> ModelInfo:
        """One version; "" = the one with the largest weight.

        Raises:
            Rejected: NOT_FOUND.
        """
        return self._find(model, version).info()

    def stats(self) -> dict[str, Any]:
        """A snapshot in plain JSON types: ``models`` by name and version, and the ``guard``."""
        return {
            "models": {
                name: {
                    key: {
                        "state": entry.info().state,
                        "weight": entry.weight,
                        "pool": entry.pool.states(),
                        "failures": entry.pool.failures,
                        **({} if entry.scheduler is None else snapshot(entry.scheduler)),
                    }
                    for key, entry in versions.items()
                }
                for name, versions in self._models.items()
            },
            "guard": {
                "factor": self.guard.factor,
                "reason": self.guard.reason,
                "loop_lag_s": self.guard.lag_s,
                "throttled_share": self.guard.throttled,
                "memory_share": self.guard.memory,
            },
            "tenants": {tier: len(quota) for tier, quota in self._quotas.items()},
            "draining": self._draining,
        }

    async def drain(self, timeout_s: float = 30.0) -> bool:
        """Take no more requests and wait for those accepted; whether all were answered in time."""
        self.ending = self._draining = True
        end = self.clock.now() + timeout_s
        while self.clock.now() < end:
            if not any(
                entry.scheduler is not None and entry.scheduler.open
                for versions in self._models.values()
                for entry in versions.values()
            ):
                return True
            await asyncio.sleep(0.005)
        return False

    async def close(self) -> None:
        """Free the engines; requests still there are CANCELLED. Closing twice is harmless."""
        self.ending = self._draining = True
        self.guard.close()
        for rollout in list(self._rollouts.values()):
            rollout.cancel("closed")
        for task in list(self._tasks):
            task.cancel()
        entries = [e for versions in self._models.values() for e in versions.values()]
        self._models.clear()
        for entry in entries:
            if entry.scheduler is not None:
                entry.scheduler.fail_all(Kind.CANCELLED, "the server was closed")
        await asyncio.gather(*(entry.pool.close() for entry in entries))

    def _find(self, model: str, version: str) -> _Version:
        versions = self._models.get(model)
        if not versions:
            raise Rejected(Kind.NOT_FOUND, f"Request for unknown model: '{model}' is not found")
        if version:
            if version not in versions:
                raise Rejected(
                    Kind.NOT_FOUND,
                    f"Request for unknown model: '{model}' version {version} is not found",
                )
            return versions[version]
        return max(versions.values(), key=lambda v: v.weight)

    def _emit(self, event: Event) -> None:
        for observer in self._observers:
            try:
                observer.on_event(event)
            except Exception:
                _LOG.exception("an observer failed on %s", type(event).__name__)


def _checked(request: Request, signature: ModelSignature) -> tuple[np.ndarray, ...]:
    """The inputs in order.

    Raises:
        Rejected: INVALID.
    """
    inputs = request.inputs
    try:
        arrays = tuple([inputs[name] for name in signature.names])
        if len(inputs) != len(arrays):
            unknown = sorted(set(inputs) - set(signature.names))
            raise Rejected(Kind.INVALID, f"unexpected inference input '{unknown[0]}'")
        signature.check(arrays)
    except KeyError as error:
        raise Rejected(Kind.INVALID, f"input {error} is missing") from error
    except FastrecError as error:
        if isinstance(error, Rejected):
            raise
        raise Rejected(Kind.INVALID, str(error)) from error
    return arrays


def _resolve(future: asyncio.Future[PendingRequest], pending: PendingRequest) -> None:
    if not future.done():
        future.set_result(pending)
