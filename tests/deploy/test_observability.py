"""Alerts, dashboards and scaling ask for metrics that a server has, with labels that it gives."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as families

from fastrec.serving.core import ServingConfig
from fastrec.serving.core.events import BatchDone, RequestDone, RolloutChanged
from fastrec.serving.core.inference_core import ModelInfo
from fastrec.serving.core.request import Kind
from fastrec.serving.observe.metrics import Metrics
from fastrec.serving.observe.recorder import Recorder

promql = pytest.importorskip("promql_parser", reason="promql-parser is not installed")

DEPLOY = Path(__file__).parents[2] / "deploy"
MAKE = DEPLOY / "observability/make.py"
CONFIG = ServingConfig.load(DEPLOY / "k8s/base/server.json")
# Labels that Prometheus and its operator add.
TARGET_LABELS = {"namespace", "pod", "rollouts_pod_template_hash"}


class Stand:
    """Stands in for the core and the request handler."""

    running = 0

    def models(self) -> list[ModelInfo]:
        from fastrec.spec import InputSpec

        return [ModelInfo("ranker", "1", "READY", 1.0, InputSpec(()), {}, 8, {"READY": 1})]

    def ready(self, model: str, version: str) -> bool:
        return True

    def stats(self) -> dict[str, Any]:
        return {"queued": 0}


@pytest.fixture(scope="module")
def exposition() -> str:
    """The metrics of a server of that configuration after every kind of event."""
    recorder = Recorder(CONFIG)
    for tier in CONFIG.tiers:
        for outcome in ["ok", *map(str, Kind)]:
            done = RequestDone(
                0.0, "ranker", "1", tier, "standard", 2, outcome, 5, 0.0, 0.01, 0.01, ""
            )
            recorder.on_event(done)
    batch = partial(BatchDone, 0.0, "ranker", "1", "e", "standard", 1, 5, 0.01, 0.01)
    for error in ("", "failed"):
        recorder.on_event(batch(error))
    recorder.on_event(RolloutChanged(0.0, "ranker", "1", "rollback", 0.0, ""))
    stand: Any = Stand()
    return Metrics(recorder, stand, stand).exposition("")[0].decode()


@pytest.fixture(scope="module")
def exported(exposition: str) -> dict[str, dict[str, set[str]]]:
    """Metric name -> label -> values."""
    found: dict[str, dict[str, set[str]]] = {}
    for family in families(exposition):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for key, value in sample.labels.items():
                labels.setdefault(key, set()).add(value)
    return found


def queries() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of everything in deploy/ that asks Prometheus."""
    for group in yaml.safe_load((DEPLOY / "observability/rules.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]
    board = json.loads((DEPLOY / "observability/dashboard.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield f"dashboard: {panel['title']}", target["expr"]
    keda = yaml.safe_load((DEPLOY / "k8s/components/keda/scaledobject.yaml").read_text())
    for trigger in keda["spec"]["triggers"]:
        yield f"keda: {trigger['name']}", trigger["metadata"]["query"]
    path = DEPLOY / "k8s/components/rollout/analysistemplate.yaml"
    for metric in yaml.safe_load(path.read_text())["spec"]["metrics"]:
        yield f"analysis: {metric['name']}", metric["provider"]["prometheus"]["query"]


def selectors(expression: Any) -> Iterator[Any]:
    """The vector selectors of a parsed expression."""
    if isinstance(expression, promql.VectorSelector):
        yield expression
    elif isinstance(expression, promql.MatrixSelector):
        yield expression.vector_selector
    else:
        for name in ("lhs", "rhs", "expr", "param"):
            inner = getattr(expression, name, None)
            if inner is not None and not isinstance(inner, str | float):
                yield from selectors(inner)
        for inner in getattr(expression, "args", None) or []:
            yield from selectors(inner)


def test_every_query_names_metrics_and_labels_that_are_exported(
    exported: dict[str, dict[str, set[str]]],
) -> None:
    recorded = {where for where, _ in queries() if ":" in where and " " not in where}
    asked = set()
    for where, query in queries():
        plain = re.sub(r"\$__rate_interval", "5m", query)
        for selector in selectors(promql.parse(plain)):
            asked.add(selector.name)
            if selector.name in recorded:
                continue
            assert selector.name in exported, f"{where}: {selector.name}"
            known = exported[selector.name]
            for matcher in selector.matchers.matchers:
                if matcher.name in TARGET_LABELS or matcher.value.startswith("$"):
                    continue
                assert matcher.name in known, f"{where}: {selector.name} has no {matcher.name}"
                values, regex = known[matcher.name], str(matcher.op).endswith("Re")
                named = matcher.value.split("|") if regex and "[" not in matcher.value else []
                assert set(named) <= values, f"{where}: {set(named) - values}"
                if not regex:
                    assert matcher.value in values, f"{where}: {matcher.value}"
    assert len(asked) > 15


def test_each_outcome_is_the_servers_or_the_callers() -> None:
    made = runpy.run_path(str(MAKE))
    ours, callers = set(made["BAD"].split("|")), set(made["CALLERS"].split("|"))
    assert ours | callers == {str(kind) for kind in Kind}
    assert not ours & callers


def test_files_are_what_the_script_writes() -> None:
    for path, text in runpy.run_path(str(MAKE))["files"](CONFIG).items():
        assert path.read_text() == text, f"{path.name}: run deploy/observability/make.py"


def test_goals_are_edges_of_the_buckets(exported: dict[str, dict[str, set[str]]]) -> None:
    edges = exported["fastrec_request_duration_seconds_bucket"]["le"]
    for tier in CONFIG.tiers:
        assert f"{CONFIG.latency_s(tier):g}" in edges


def test_whole_seconds_match_both_spellings() -> None:
    edge = runpy.run_path(str(MAKE))["edge"]
    assert edge(0.05) == 'le="0.05"'
    pattern = edge(1.0).partition('"')[2].rstrip('"')
    assert all(re.fullmatch(pattern, text) for text in ("1", "1.0"))
    assert not re.fullmatch(pattern, "10")


def test_the_dashboard_can_be_imported() -> None:
    board = json.loads((DEPLOY / "observability/dashboard.json").read_text())
    assert board["uid"] == "fastrec-serving"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]}
    assert len(places) == len(board["panels"])
    variables = {v["name"]: v for v in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for panel in board["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"]


def promtool() -> str:
    here = Path(sys.executable).with_name("promtool")
    found = shutil.which("promtool") or (str(here) if here.exists() else None)
    if found is None:
        pytest.skip("promtool is not installed (make promtool)")
    return found


def run(*arguments: str | Path, stdin: str | None = None) -> None:
    command = [promtool(), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_ring_when_they_should() -> None:
    run("check", "rules", DEPLOY / "observability/rules.yaml")
    run("test", "rules", Path(__file__).with_name("rules_test.yaml"))


def test_prometheus_own_lint_passes(exposition: str) -> None:
    run("check", "metrics", stdin=exposition)
