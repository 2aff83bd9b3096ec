"""Writes the alert rules and the dashboard, for the tiers and goals of a server's configuration.

    python deploy/observability/make.py [SERVER.json]

Without an argument: for deploy/k8s/base/server.json. Writes ``rules.yaml`` and ``dashboard.json``
here, and the same rules for Prometheus' operator into k8s/components/monitoring.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from fastrec.serving.core import ServingConfig

HERE = Path(__file__).parent
K8S = HERE.parent / "k8s"
HEAD = "# Written by deploy/observability/make.py: change that, or the server's configuration.\n"

# Target share of answered requests. Used-up quotas, wrong requests and cancelled ones are the
# caller's and do not count; refusals under load do.
AVAILABILITY = 0.999
BAD = "overload|queue_full|deadline_infeasible|expired|not_ready|internal"
CALLERS = "quota|invalid|not_found|cancelled"
# Google's SRE workbook, for goals over 30 days: how much faster than allowed the budget burns, over
# a long window and, so that the alert ends soon after the trouble, a short one.
BURNS = {
    "page": ((14.4, "1h", "5m"), (6, "6h", "30m")),
    "ticket": ((3, "1d", "2h"), (1, "3d", "6h")),
}
WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
# Requests a second below which a share says nothing.
TRAFFIC = 0.1


def edge(seconds: float) -> str:
    """A matcher of a bucket's upper edge: 1 is "1" or "1.0", by Prometheus' version."""
    text = f"{seconds:g}"
    return f'le=~"{text}([.]0)?"' if text.isdigit() else f'le="{text}"'


def recorded(config: ServingConfig) -> list[dict[str, Any]]:
    """Shares of bad and of slow requests, over every window."""
    counts, buckets = (f"fastrec_request_duration_seconds_{kind}" for kind in ("count", "bucket"))
    rules = []
    for window in WINDOWS:

        def rate(metric: str, matchers: str, by: str, over: str = window) -> str:
            return f"sum by ({by}) (rate({metric}{{{matchers}}}[{over}]))"

        total = rate(counts, f'outcome!~"{CALLERS}"', "model")
        bad = rate(counts, f'outcome=~"{BAD}"', "model")
        rules.append({"record": f"fastrec:requests:rate{window}", "expr": total})
        # Where nothing was ever bad there is no such series: that is a share of 0.
        rules.append(
            {
                "record": f"fastrec:bad:ratio_rate{window}",
                "expr": f"({bad} or {total} * 0) / {total}",
            }
        )
        slow = []
        for tier in config.tiers:
            within = f'{edge(config.latency_s(tier))},outcome="ok",tier="{tier}"'
            good = rate(buckets, within, "model, tier")
            ok = rate(counts, f'outcome="ok",tier="{tier}"', "model, tier")
            slow.append(f"(1 - {good} / {ok})")
        rules.append({"record": f"fastrec:slow:ratio_rate{window}", "expr": " or ".join(slow)})
    return rules


def burning(severity: str, name: str, record: str, budget: float, about: str) -> dict[str, Any]:
    """An alert on two pairs of windows."""
    pairs = [
        f"({record}{long} > {factor * budget:g} and {record}{short} > {factor * budget:g})"
        for factor, long, short in BURNS[severity]
    ]
    return {
        "alert": name,
        "expr": f"({' or '.join(pairs)}) and on (model) fastrec:requests:rate1h > {TRAFFIC}",
        "labels": {"severity": severity},
        "annotations": {
            "summary": f"{about} ({{{{ $labels.model }}}})",
            "description": "{{ $value | humanizePercentage }} of the requests; the budget is "
            f"{100 * budget:g} % over 30 days.",
        },
    }


def alerts(config: ServingConfig) -> list[dict[str, Any]]:
    """Alerts for a person to look at, now (page) or today (ticket)."""
    rules = []
    for severity in BURNS:
        rules.append(
            burning(severity, "FastrecUnavailable", "fastrec:bad:ratio_rate", 1 - AVAILABILITY,
                    "Requests are refused or fail"),
        )  # fmt: skip
        rules.append(
            burning(severity, "FastrecSlow", "fastrec:slow:ratio_rate", 1 - config.slo.target,
                    "Answers come later than the goal of tier {{ $labels.tier }}"),
        )  # fmt: skip
    errors = "sum by (model, version) (rate(fastrec_engine_errors_total[10m]))"
    taken_back = 'increase(fastrec_rollout_actions_total{action="rollback"}[15m])'
    guard, lag = (
        f"{how} by (namespace, pod) (fastrec_{metric})"
        for how, metric in (("min", "guard_ratio"), ("max", "event_loop_lag_seconds"))
    )
    for severity, name, expr, wait, summary in (
        ("page", "FastrecNotReady", "max by (model) (fastrec_model_ready) == 0", "2m",
         "No server has an engine that can run {{ $labels.model }}"),
        ("page", "FastrecAbsent", "absent(fastrec_build_info)", "5m", "No server is there"),
        ("ticket", "FastrecEngineErrors", f"{errors} > 0", "10m",
         "Engine calls of {{ $labels.model }} {{ $labels.version }} fail"),
        ("ticket", "FastrecRolledBack", f"sum by (model) ({taken_back}) > 0", "0m",
         "A release of {{ $labels.model }} was taken back"),
        ("ticket", "FastrecGuarded", f"{guard} < 0.9", "10m",
         "Throttled CPU time, memory or a late event loop lowers the limit of {{ $labels.pod }}"),
        ("ticket", "FastrecLoopLate", f"{lag} > 0.02", "10m",
         "The event loop of {{ $labels.pod }} is late: too many requests for one process"),
    ):  # fmt: skip
        rules.append(
            {"alert": name, "expr": expr, "for": wait, "labels": {"severity": severity},
             "annotations": {"summary": summary}},
        )  # fmt: skip
    return rules


def groups(config: ServingConfig) -> list[dict[str, Any]]:
    """As a rule file has them."""
    return [
        {"name": "fastrec-shares", "interval": "30s", "rules": recorded(config)},
        {"name": "fastrec-alerts", "interval": "30s", "rules": alerts(config)},
    ]


def panel(title: str, unit: str, *queries: tuple[str, str], **more: Any) -> dict[str, Any]:
    """A panel of (PromQL, legend) pairs; its place is given later."""
    return {
        "title": title,
        "type": "timeseries",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {"defaults": {"unit": unit, **more}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend}
            for i, (expr, legend) in enumerate(queries)
        ],
    }


def quantile(q: float, metric: str, by: str, matchers: str = "") -> str:
    where = f'model=~"$model"{"," if matchers else ""}{matchers}'
    rate = f"sum by (le, {by}) (rate({metric}_bucket{{{where}}}[$__rate_interval]))"
    return f"histogram_quantile({q}, {rate})"


def dashboard() -> dict[str, Any]:
    """Load and goals above, causes below."""
    done, model = "fastrec_request_duration_seconds", 'model=~"$model"'
    budget = f'{{model=~"$model"}} / {1 - AVAILABILITY:g}'
    taken = f"increase(fastrec_rollout_actions_total{{{model}}}[$__rate_interval])"

    def rate(metric: str, by: str, matchers: str = "") -> str:
        where = f"{model}{',' if matchers else ''}{matchers}"
        return f"sum by ({by}) (rate({metric}{{{where}}}[$__rate_interval]))"

    panels = [
        panel("Requests by outcome", "reqps", (rate(f"{done}_count", "outcome"), "{{outcome}}")),
        panel("Latency of answers by tier, p99", "s",
              (quantile(0.99, done, "tier", 'outcome="ok"'), "{{tier}}")),
        panel("Slower than the goal, by tier", "percentunit",
              ('fastrec:slow:ratio_rate5m{model=~"$model"}', "{{model}} {{tier}}"), min=0),
        panel("Error budget burnt, times the allowed pace", "none",
              (f"fastrec:bad:ratio_rate1h{budget}", "{{model}} 1 h"),
              (f"fastrec:bad:ratio_rate6h{budget}", "{{model}} 6 h")),
        panel("Waiting for an engine, p95", "s",
              (quantile(0.95, "fastrec_queue_duration_seconds", "lane"), "{{lane}}")),
        panel("Refused, by reason", "reqps",
              (rate(f"{done}_count", "outcome", f'outcome=~"{BAD}|quota"'), "{{outcome}}")),
        panel("Queued and open requests", "none",
              ("sum(fastrec_queued_requests)", "queued"), ("sum(fastrec_open_requests)", "open")),
        panel("Engine calls, p50 and p99", "s",
              (quantile(0.5, "fastrec_batch_duration_seconds", "lane"), "{{lane}} p50"),
              (quantile(0.99, "fastrec_batch_duration_seconds", "lane"), "{{lane}} p99")),
        panel("Rows of an engine call, mean", "none",
              (" / ".join(rate(f"fastrec_batch_rows_{part}", "lane") for part in ("sum", "count")),
               "{{lane}}")),
        panel("Busy engines", "none",
              (rate("fastrec_batch_duration_seconds_sum", "version"), "busy, {{version}}"),
              ('sum(fastrec_engines{model=~"$model",state="READY"})', "ready")),
        panel("Engine seconds that may be in flight", "s",
              ("sum(fastrec_concurrency_limit_seconds)", "limit"),
              ("min(fastrec_guard_ratio)", "guard")),
        panel("Event loop lag, worst", "s", ("max(fastrec_event_loop_lag_seconds)", "lag")),
        panel("Shares of versions", "percentunit",
              ('max by (model, version) (fastrec_rollout_weight_ratio{model=~"$model"})',
               "{{model}} {{version}}"), min=0, max=1),
        panel("Engines by state", "none",
              ('sum by (state) (fastrec_engines{model=~"$model"})', "{{state}}")),
        panel("Engine errors, releases", "none",
              (rate("fastrec_engine_errors_total", "version"), "errors/s {{version}}"),
              (f"sum by (action) ({taken})", "{{action}}")),
        panel("Ready servers by version", "none",
              ("count by (version) (fastrec_build_info)", "{{version}}"),
              ('sum by (model) (fastrec_model_ready{model=~"$model"})', "ready: {{model}}")),
    ]  # fmt: skip
    for i, made in enumerate(panels):
        made |= {"id": i + 1, "gridPos": {"x": i % 2 * 12, "y": i // 2 * 8, "w": 12, "h": 8}}
    variable = {"type": "query", "multi": True, "includeAll": True, "refresh": 2}
    return {
        "uid": "fastrec-serving",
        "title": "fastrec: serving",
        "tags": ["fastrec"],
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                {
                    **variable,
                    "name": "model",
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "query": "label_values(fastrec_model_ready, model)",
                },
            ]
        },
        "panels": panels,
    }


def files(config: ServingConfig) -> dict[Path, str]:
    """Everything that this writes."""
    made = {"groups": groups(config)}
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "fastrec"},
        "spec": made,
    }
    plain, operator = (yaml.safe_dump(v, sort_keys=False, width=110) for v in (made, resource))
    return {
        HERE / "rules.yaml": HEAD + plain,
        K8S / "components/monitoring/prometheusrule.yaml": HEAD + operator,
        HERE / "dashboard.json": json.dumps(dashboard(), indent=1) + "\n",
    }


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else K8S / "base/server.json"
    for path, text in files(ServingConfig.load(given)).items():
        path.write_text(text)
