"""Ray Serve: the choices of router and autoscaler alone, and a real cluster of three nodes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray.serve", reason="fastrec-kernels[ray] is not installed")

from serving_process import request_of

from fastrec.errors import ArgumentError, ConfigError
from fastrec.runtime import load_engine
from fastrec.serving.core import ServingConfig
from fastrec.serving.core.events import BatchDone, RequestDone
from fastrec.serving.ray import RayOptions, add_inference_service, build
from fastrec.serving.ray.load_meter import LoadMeter
from fastrec.serving.ray.routing import ranks, way
from fastrec.serving.ray.scaling import QueueDelay

HERE = ("eu", "eu-a", "n1")
NETWORK_S = (0.0, 0.0005, 0.002, 0.08)


@pytest.mark.parametrize(
    ("there", "kind"),
    [
        (("eu", "eu-a", "n1"), 0),
        (("eu", "eu-a", "n2"), 1),
        (("eu", "eu-b", "n2"), 2),
        (("us", "us-a", "n2"), 3),
        (("us", "eu-a", "n2"), 3),
    ],
)
def test_ways(there: tuple[str, str, str], kind: int) -> None:
    assert way(HERE, there) == kind


def test_nodes_without_labels_are_near_each_other() -> None:
    assert way(("", "", "n1"), ("", "", "n2")) == 2


def replica(name: str, there: tuple[str, str, str] | None, wait_s: float = 0.0) -> Any:
    stats = {} if there is None else {"place": list(there), "wait_s": wait_s}
    return SimpleNamespace(replica_id=name, node_id=name, routing_stats=stats)


def order(*replicas: Any) -> list[set[str]]:
    return [{r.replica_id for r in rank} for rank in ranks(replicas, HERE, NETWORK_S)]


def test_the_nearest_comes_first_and_the_far_one_last() -> None:
    near, other, far = (
        replica("near", ("eu", "eu-a", "n2")),
        replica("other", ("eu", "eu-b", "n3"), 0.01),
        replica("far", ("us", "us-a", "n4")),
    )
    for given in ((near, other, far), (far, other, near)):
        assert order(*given) == [{"near"}, {"other"}, {"far"}]


def test_a_loaded_region_is_left_once_the_way_is_shorter_than_the_wait() -> None:
    far = replica("far", ("us", "us-a", "n4"), 0.01)
    assert order(replica("near", HERE, 0.05), far)[0] == {"near"}
    assert order(replica("near", HERE, 0.12), far)[0] == {"far"}


def test_equals_share_the_requests() -> None:
    replicas = [replica(f"r{i}", ("eu", "eu-a", f"n{i + 2}"), 0.0001 * i) for i in range(5)]
    seen: set[str] = set()
    for _ in range(200):
        first, *others = order(*replicas)
        assert len(first) == 2, "two to choose from, by what is queued at them right now"
        assert [len(rank) for rank in others] == [1, 1, 1]
        seen |= first
    assert seen == {r.replica_id for r in replicas}


def test_a_replica_that_has_said_nothing_yet_is_the_last_choice() -> None:
    assert order(replica("new", None), replica("near", HERE))[0] == {"near"}
    assert order(replica("new", None)) == [{"new"}]


def scaled(
    busy: list[float], delay_s: list[float], *, least: int = 1, most: int = 100, now: int = 0
) -> int:
    context = SimpleNamespace(
        current_num_replicas=now or len(busy),
        target_num_replicas=now or len(busy),
        aggregated_metrics={
            "busy": dict(enumerate(busy)),
            "queue_delay_s": dict(enumerate(delay_s)),
        },
        capacity_adjusted_min_replicas=least,
        capacity_adjusted_max_replicas=most,
    )
    wanted, state = QueueDelay(goal_s=0.01, busy=0.6)(context)  # type: ignore[arg-type]
    assert state == {}
    return wanted


def test_as_many_replicas_as_the_work_takes() -> None:
    assert scaled([0.6] * 4, [0.0] * 4) == 4
    assert scaled([0.9] * 4, [0.0] * 4) == 6
    assert scaled([0.15] * 4, [0.0] * 4) == 1
    assert scaled([0.0] * 4, [0.0] * 4, least=2) == 2


def test_a_queue_that_is_late_asks_for_more_at_most_twice_as_many() -> None:
    assert scaled([0.5] * 4, [0.011] * 4) == 5
    assert scaled([0.5] * 4, [0.015] * 4) == 6
    assert scaled([0.5] * 4, [9.0] * 4) == 8
    assert scaled([0.5] * 4, [9.0] * 4, most=6) == 6


def test_without_news_nothing_changes() -> None:
    assert scaled([], [], now=3) == 3


class Still:
    """A core whose clock stands where it is put."""

    def __init__(self) -> None:
        self.config = ServingConfig()
        self.clock = SimpleNamespace(now=lambda: self.at)
        self.at = 0.0

    def models(self) -> list[Any]:
        return [SimpleNamespace(engines={"READY": 2, "FAILED": 1})]

    def stats(self) -> dict[str, Any]:
        version = {"in_flight_s": 0.3, "batch_gain": 0.5, "engines": [{}, {}]}
        return {"models": {"ranker": {"1": version, "2": {"state": "LOADING"}}}}


def test_what_a_replica_tells_of_its_load() -> None:
    core = Still()
    load = LoadMeter(core)  # type: ignore[arg-type]
    assert (load.queue_delay_s(), load.busy()) == (0.0, 0.0)
    for i in range(100):
        core.at = i / 100
        wait = 0.1 if i >= 90 else 0.001
        load.on_event(
            RequestDone(core.at, "ranker", "1", "default", "", 2, "ok", 5, wait, 0, 0, "")
        )
        load.on_event(BatchDone(core.at, "ranker", "1", "e", "", 1, 5, 0.05, 0.05, ""))
    assert load.queue_delay_s() == pytest.approx(0.1)
    assert load.busy() == pytest.approx(100 * 0.05 / 5 / 2)
    assert load.wait_s() == pytest.approx(0.3 * 0.5 / 2)
    refused = RequestDone(1.0, "ranker", "1", "default", "", 2, "overload", 5, 0, 0, 0, "")
    for _ in range(200):
        load.on_event(refused)
    assert load.queue_delay_s() == core.config.latency_s("default")
    core.at = 60.0
    assert (load.queue_delay_s(), load.busy()) == (0.0, 0.0)


def test_options_are_checked() -> None:
    with pytest.raises(ArgumentError, match="path"):
        build({})
    with pytest.raises(ArgumentError, match=r"options: expected names among .*, got replicas"):
        build({"path": "models", "replicas": 3})
    with pytest.raises(ConfigError, match="num_cpus"):
        build({"path": "models"})
    with pytest.raises(ConfigError, match=r"pool\.kind"):
        build({"path": "models", "config": {"pool": {"kind": "fibre"}}})
    for wrong in (
        {"min_replicas": 3, "max_replicas": 2},
        {"busy": 0.0},
        {"network_ms": (1, 0, 2, 3)},
    ):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            RayOptions("models", **wrong)  # type: ignore[arg-type]


def test_the_deployment_takes_its_size_from_the_configuration() -> None:
    made = build({"path": "models", "config": {"pool": {"engines": 2, "threads": 3}}})
    deployment = made._bound_deployment
    assert deployment.ray_actor_options["num_cpus"] == 6


def test_the_servicer_function_offers_what_a_replica_answers() -> None:
    handlers: list[Any] = []
    server = SimpleNamespace(add_generic_rpc_handlers=handlers.extend)
    add_inference_service(SimpleNamespace(**dict.fromkeys(_calls(), print)), server)
    (handler,) = handlers
    service = "/inference.GRPCInferenceService/"
    assert {name.removeprefix(service) for name in handler._method_handlers} == set(_calls())


def _calls() -> tuple[str, ...]:
    from fastrec.serving.ray.replica import CALLS

    return CALLS


@pytest.fixture(scope="module")
def told(engine_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of ``ray_cluster.py``."""
    request = tmp_path_factory.mktemp("ray") / "request.npz"
    np.savez(request, **request_of())
    source = str(Path(__file__).parents[2] / "src")
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Two busy cores start Ray's agents more slowly than its own limit has it.
        "RAY_agent_register_timeout_ms": "180000",
        "PYTHONPATH": os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    script = Path(__file__).with_name("ray_cluster.py")
    command = [sys.executable, str(script), str(engine_path), str(request)]
    code, output, errors = finished(command, environment)
    assert code == 0, errors[-5000:]
    told: dict[str, Any] = json.loads(output.splitlines()[-1])
    return told


def finished(command: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
    """A command's exit code and output; nothing of it is left."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate(timeout=400)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output, errors


@pytest.mark.slow
def test_scores_over_grpc_are_the_engines(told: dict[str, Any], engine_path: Path) -> None:
    expected = load_engine(engine_path)(*request_of().values())
    np.testing.assert_array_equal(np.array(told["grpc"]["scores"], np.float32), expected)
    assert told["grpc"]["inputs"] == list(request_of())


@pytest.mark.slow
def test_refusals_keep_their_codes_texts_and_trailers(told: dict[str, Any]) -> None:
    code, text, trailers = told["grpc"]["bad_input"]
    assert code == "INVALID_ARGUMENT"
    assert "cand_item: expected ids in 0..299" in text
    assert "grpc-status-details-bin" in trailers
    assert told["grpc"]["bad_message"][0] == "INVALID_ARGUMENT"
    assert told["grpc"]["unknown_model"][:2] == [
        "NOT_FOUND",
        "Request for unknown model: 'other' is not found",
    ]


@pytest.mark.slow
def test_load_brings_a_second_replica(told: dict[str, Any]) -> None:
    assert (told["replicas_before"], told["replicas_after"]) == (1, 2)


@pytest.mark.slow
def test_requests_stay_in_their_region_until_it_is_lost(told: dict[str, Any]) -> None:
    assert set(told["near"]) == {"eu"}
    assert set(told["after_loss"]) == {"us"}
    assert told["grpc_after_loss"]
