"""The server's configuration: frozen, checked when it is made, read from JSON or TOML.

Every duration says its unit in its name. ``ServingConfig()`` is a sensible server: one tier, no
quota, an express queue for priority 1, batches that end within a quarter of the latency goal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastrec.errors import ConfigError
from fastrec.serving.core.config_parsing import ParsedConfig, check


@dataclass(frozen=True)
class SLO:
    """The goal: ``target`` of the requests answered within ``latency_ms``."""

    latency_ms: float = 50.0
    target: float = 0.99

    def __post_init__(self) -> None:
        check("slo.latency_ms", self.latency_ms, 0, above=True)
        check("slo.target", self.target, 0, 1)


@dataclass(frozen=True)
class Quota:
    """One tenant's quota: engine microseconds a second, and the burst it may save up."""

    engine_us_per_s: float
    burst_us: float

    def __post_init__(self) -> None:
        check("quota.engine_us_per_s", self.engine_us_per_s, 0, above=True)
        check("quota.burst_us", self.burst_us, 0, above=True)


@dataclass(frozen=True)
class Tier:
    """A class of users.

    Args:
        weight: the share of the engines under overload, against the other tiers' weights.
        quota: of each tenant; None = none.
        latency_ms: this tier's latency goal, and its requests' deadline where they bring none;
            None = the server's.
        express: whether its requests of default priority take the express queue.
        max_tenants: tenants whose quota is remembered; the longest unseen is forgotten first.
    """

    weight: float = 1.0
    quota: Quota | None = None
    latency_ms: float | None = None
    express: bool = False
    max_tenants: int = 10_000

    def __post_init__(self) -> None:
        check("tier.weight", self.weight, 0, above=True)
        check("tier.max_tenants", self.max_tenants, 1)
        if self.latency_ms is not None:
            check("tier.latency_ms", self.latency_ms, 0, above=True)


@dataclass(frozen=True)
class QueuePolicy:
    """Triton's policy of one priority level.

    Args:
        max_queue_size: requests that may wait; 0 = no limit of its own.
        default_timeout_us: of requests that bring none; 0 = the tier's goal.
        timeout_action: "REJECT", or "DELAY": requests timed out wait behind all others instead.
        allow_timeout_override: whether a request's own timeout counts.
    """

    max_queue_size: int = 0
    default_timeout_us: int = 0
    timeout_action: str = "REJECT"
    allow_timeout_override: bool = True

    def __post_init__(self) -> None:
        check("queue_policy.max_queue_size", self.max_queue_size, 0)
        check("queue_policy.default_timeout_us", self.default_timeout_us, 0)
        if self.timeout_action not in ("REJECT", "DELAY"):
            raise ConfigError(
                "queue_policy.timeout_action: expected REJECT or DELAY, "
                f"got {self.timeout_action!r}"
            )


@dataclass(frozen=True)
class Queueing:
    """How requests queue.

    Args:
        express_priorities: levels that bypass batching; () = no express queue.
        reserved_slots: engine slots that only express requests take; None = 1 where there are at
            least two slots, else 0.
        express_share: the largest share of engine time that counts as express; requests beyond it
            are queued with the others, or express would mean nothing.
        priority_levels, default_priority: as Triton's: 1 is the highest.
        priority_step_ms: how much earlier than its own each higher level's deadline counts; None =
            the latency goal.
        age_ms: a request that has waited this long is next, past earlier deadlines;
            None = twice the latency goal.
        max_queued: requests waiting at one model, all tiers together.
        max_queued_bytes: bytes of their inputs.
        policies: by priority level; ``default_policy`` for those not named.
        hold_until: do not start a batch until this many requests are queued (once): repeatable
            batches in tests (Triton's TRITONSERVER_DELAY_SCHEDULER); 0 = off.
    """

    express_priorities: tuple[int, ...] = (1,)
    reserved_slots: int | None = None
    express_share: float = 0.2
    priority_levels: int = 3
    default_priority: int = 2
    priority_step_ms: float | None = None
    age_ms: float | None = None
    max_queued: int = 10_000
    max_queued_bytes: int = 1 << 30
    policies: Mapping[int, QueuePolicy] = field(default_factory=dict)
    default_policy: QueuePolicy = QueuePolicy()
    hold_until: int = 0

    def __post_init__(self) -> None:
        check("lanes.priority_levels", self.priority_levels, 1)
        check("lanes.default_priority", self.default_priority, 1, self.priority_levels)
        check("lanes.express_share", self.express_share, 0, 1)
        check("lanes.max_queued", self.max_queued, 1)
        check("lanes.max_queued_bytes", self.max_queued_bytes, 1)
        check("lanes.hold_until", self.hold_until, 0)
        for name in ("reserved_slots", "priority_step_ms", "age_ms"):
            if getattr(self, name) is not None:
                check(f"lanes.{name}", getattr(self, name), 0)
        for level in (*self.express_priorities, *self.policies):
            check("lanes: priority level", level, 1, self.priority_levels)


@dataclass(frozen=True)
class Batching:
    """How batches are made.

    Args:
        enabled: False = one request a call.
        max_users: users in one call; None = the engine's own limit, or 64.
        max_rows: users x candidates in one call; larger requests are split.
        max_batch_ms: the predicted time a call may take, so that nothing waits longer for a slot;
            None = a quarter of the latency goal.
        max_delay_ms: how long a call may be put off to fill up; 0 = an idle engine starts at once,
            which is best where a batch is hardly cheaper than its parts (CPUs).
        candidate_symbol: the dimension of the model's inputs that counts candidates; "" = none.
        pad_to: candidate counts that smaller ones are padded to, so that they share a call; () =
            only equal ones do. Used where the engine's answers show that it scores each candidate
            apart.
    """

    enabled: bool = True
    max_users: int | None = None
    max_rows: int = 4096
    max_batch_ms: float | None = None
    max_delay_ms: float = 0.0
    candidate_symbol: str = "m"
    pad_to: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check("batching.max_rows", self.max_rows, 1)
        check("batching.max_delay_ms", self.max_delay_ms, 0)
        for name in ("max_users", "max_batch_ms"):
            if getattr(self, name) is not None:
                check(f"batching.{name}", getattr(self, name), 0, above=True)
        if any(not isinstance(n, int) or n < 1 for n in self.pad_to) or (
            sorted(set(self.pad_to)) != list(self.pad_to)
        ):
            raise ConfigError(f"batching.pad_to: expected rising positive sizes, got {self.pad_to}")


@dataclass(frozen=True)
class Pool:
    """The engines of a model version.

    Args:
        engines: that take requests.
        spares: warm ones that take over when one fails.
        kind: "thread" (in this process, the GIL released), "process" (a worker process each: one
            that dies costs no request), or "inline" (in the event loop: for engines of some
            microseconds only).
        threads: an engine's own; None = as it was saved.
        warm_users, warm_candidates: the shape buckets that run before an engine is ready; () = from
            the batching limits and the model's spec.
        warm_calls: runs of each bucket.
        start_timeout_s: loading and warming may take so long.
        max_tries: engines that are tried before a request fails.
        stall_factor, stall_floor_ms: a call that takes longer than ``stall_factor`` x the predicted
            time, and the floor, is run on another engine, and its own is taken out.
        eject_errors: failed calls in a row that take an engine out.
        eject_slowdown: an engine slower than the median of its peers by this factor is taken out.
        eject_ms: for so long, longer each time.
        max_ejected: the largest share of engines that may be out for being slow.
    """

    engines: int = 1
    spares: int = 0
    kind: str = "thread"
    threads: int | None = None
    warm_users: tuple[int, ...] = ()
    warm_candidates: tuple[int, ...] = ()
    warm_calls: int = 3
    start_timeout_s: float = 120.0
    max_tries: int = 3
    stall_factor: float = 20.0
    stall_floor_ms: float = 1000.0
    eject_errors: int = 5
    eject_slowdown: float = 3.0
    eject_ms: float = 1000.0
    max_ejected: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in ("thread", "process", "inline"):
            raise ConfigError(f"pool.kind: expected thread, process or inline, got {self.kind!r}")
        for name in ("engines", "warm_calls", "max_tries", "eject_errors"):
            check(f"pool.{name}", getattr(self, name), 1)
        check("pool.spares", self.spares, 0)
        for name in ("stall_factor", "eject_slowdown"):
            check(f"pool.{name}", getattr(self, name), 1, above=True)
        for name in ("start_timeout_s", "stall_floor_ms", "eject_ms"):
            check(f"pool.{name}", getattr(self, name), 0, above=True)
        check("pool.max_ejected", self.max_ejected, 0, 1)
        if self.threads is not None:
            check("pool.threads", self.threads, 1)


@dataclass(frozen=True)
class Admission:
    """Which requests are admitted.

    Args:
        enabled: False = everything is queued (for comparison).
        adaptive: whether the concurrency limit moves.
        min_limit_ms, max_limit_ms: engine time in flight per slot between which it moves; None =
            two capped batches, and the latency goal less one.
        tolerance: service times may rise by this factor before the limit shrinks (Gradient2).
        window: requests between two steps of the limit.
        smoothing: weight of a step.
        long_window: requests over which the usual service time is averaged.
        check_deadlines: refuse requests at arrival that cannot be answered in time.
        margin: times the 99th percentile of the prediction's error that is kept in hand.
        throttled_high, throttled_low: share of time throttled by the cgroup at which the guard
            steps in, and out (hysteresis); the same for memory and for the loop's lag.
    """

    enabled: bool = True
    adaptive: bool = True
    min_limit_ms: float | None = None
    max_limit_ms: float | None = None
    tolerance: float = 1.5
    window: int = 100
    smoothing: float = 0.2
    long_window: int = 600
    check_deadlines: bool = True
    margin: float = 1.0
    guard_period_ms: float = 250.0
    throttled_high: float = 0.10
    throttled_low: float = 0.02
    memory_high: float = 0.90
    memory_low: float = 0.80
    lag_high_ms: float = 20.0
    lag_low_ms: float = 5.0

    def __post_init__(self) -> None:
        check("admission.tolerance", self.tolerance, 1)
        check("admission.window", self.window, 1)
        check("admission.long_window", self.long_window, 1)
        check("admission.smoothing", self.smoothing, 0, 1, above=True)
        check("admission.margin", self.margin, 0)
        check("admission.guard_period_ms", self.guard_period_ms, 0, above=True)
        for name in ("throttled", "memory", "lag"):
            unit = "_ms" if name == "lag" else ""
            low, high = (getattr(self, f"{name}_{end}{unit}") for end in ("low", "high"))
            check(f"admission.{name}_low{unit}", low, 0, high)


@dataclass(frozen=True)
class Screening:
    """Cuts the candidates of large requests before the deep tower, for models that have a screen
    beside their file (``fastrec.runtime.screening``).

    Args:
        keep: candidates of a user that are scored in full; 0 = all, no screening.
        audit: share of screened calls that are scored whole too, to measure recall; these take as
            long as without the screen.
        audit_k: recall is measured over this many of the best candidates.
    """

    keep: int = 0
    audit: float = 0.0
    audit_k: int = 10

    def __post_init__(self) -> None:
        if self.keep:
            check("screening.keep", self.keep, 8)
            check("screening.audit_k", self.audit_k, 1, self.keep)
        check("screening.audit", self.audit, 0, 1)


@dataclass(frozen=True)
class Canary:
    """A grey release: how a new version's share grows, and what takes it back.

    Args:
        steps: shares of the traffic, one after another; the last is 1.
        window_s: how long a step lasts at least.
        min_requests: answers of the new version that a verdict needs.
        max_error_rate: beyond the old version's.
        max_slowdown: of p50 and p99, against the old version's in the same window.
        good_windows: windows without a fault before the next step.
    """

    steps: tuple[float, ...] = (0.01, 0.05, 0.25, 1.0)
    window_s: float = 30.0
    min_requests: int = 50
    max_error_rate: float = 0.01
    max_slowdown: float = 1.5
    good_windows: int = 1

    def __post_init__(self) -> None:
        if not self.steps or list(self.steps) != sorted(self.steps) or self.steps[-1] != 1.0:
            raise ConfigError(
                f"canary.steps: expected rising shares that end with 1, got {self.steps}"
            )
        for step in self.steps:
            check("canary.steps", step, 0, 1, above=True)
        check("canary.window_s", self.window_s, 0, above=True)
        check("canary.min_requests", self.min_requests, 1)
        check("canary.max_error_rate", self.max_error_rate, 0, 1)
        check("canary.max_slowdown", self.max_slowdown, 1)
        check("canary.good_windows", self.good_windows, 1)


@dataclass(frozen=True)
class ServingConfig(ParsedConfig):
    """All of it. ``tiers`` by name; requests that name none are of ``default_tier``."""

    slo: SLO = SLO()
    tiers: Mapping[str, Tier] = field(default_factory=lambda: {"default": Tier()})
    default_tier: str = ""
    lanes: Queueing = Queueing()
    batching: Batching = Batching()
    pool: Pool = Pool()
    admission: Admission = Admission()
    canary: Canary = Canary()
    screening: Screening = Screening()

    def __post_init__(self) -> None:
        if not self.tiers:
            raise ConfigError("tiers: expected at least one tier, got none")
        if not self.default_tier:
            object.__setattr__(self, "default_tier", next(iter(self.tiers)))
        if self.default_tier not in self.tiers:
            raise ConfigError(
                f"default_tier: expected one of {sorted(self.tiers)}, got {self.default_tier!r}"
            )

    def latency_s(self, tier: str) -> float:
        """The latency goal of a tier, in seconds."""
        own = self.tiers[tier].latency_ms
        return (self.slo.latency_ms if own is None else own) / 1e3
