"""Manifests are valid, and say what a latency service needs; checked without a cluster."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from fastrec import __version__
from fastrec.serving.cli import serve
from fastrec.serving.core import ServingConfig
from fastrec.serving.wire.messages import SERVICE, methods

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="Kubernetes' schemas come with fastrec-kernels[dev]"
)
HERE = Path(__file__).parent
DEPLOY = HERE.parents[1] / "deploy"
KUBERNETES = "1.34"
CUSTOM = {path.stem for path in (HERE / "schemas").glob("*.json")}
CORE = {
    "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "NetworkPolicy", "PersistentVolumeClaim",
    "PodDisruptionBudget", "PriorityClass", "Service", "ServiceAccount",
}  # fmt: skip
# The pods that serve.
SERVERS = {"fastrec", "kserve-container"}


def pods(made: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod specs within an object."""
    if made["kind"] == "ServingRuntime":
        return [made["spec"]]
    if made["kind"] == "RayService":
        cluster = made["spec"]["rayClusterConfig"]
        groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
        return [group["template"]["spec"] for group in groups]
    if made["kind"] == "Deployment":
        return [made["spec"]["template"]["spec"]]
    return []


def test_every_object_is_valid(objects: list[dict[str, Any]]) -> None:
    for made in objects:
        kind = made["kind"]
        if kind in CUSTOM:
            schema = json.loads((HERE / f"schemas/{kind}.json").read_text())
            jsonschema.validate(made, schema)
            assert kind not in CORE
        else:
            assert kind in CORE, f"{kind}: neither a kind of Kubernetes nor one with a schema here"
            kubernetes_validate.validate(made, KUBERNETES, strict=True)
        for spec in pods(made):
            # Custom resources hold pods whose schema was cut down; they are pods all the same.
            pod = {"containers": spec["containers"], "volumes": spec.get("volumes", [])}
            kubernetes_validate.validate(
                {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod},
                KUBERNETES,
                strict=True,
            )


def test_the_validators_see_mistakes(region: dict[str, list[dict[str, Any]]]) -> None:
    deployment = json.loads(json.dumps(region["Deployment"][0]))
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(Exception, match="readynessProbe"):
        kubernetes_validate.validate(deployment, KUBERNETES, strict=True)
    for kind in ("Rollout", "ScaledObject", "DestinationRule", "GRPCRoute", "PrometheusRule"):
        wrong = {**region[kind][0], "spec": {**region[kind][0]["spec"], "replica": 1}}
        schema = json.loads((HERE / f"schemas/{kind}.json").read_text())
        with pytest.raises(jsonschema.ValidationError, match="replica"):
            jsonschema.validate(wrong, schema)


def parsed(arguments: list[str]) -> dict[str, Any]:
    """A container's arguments, parsed by ``fastrec serve``."""
    app = typer.Typer(add_completion=False)
    app.command()(serve)
    return typer.main.get_command(app).make_context("serve", list(arguments)).params


def servers(made: dict[str, Any]) -> list[dict[str, Any]]:
    return [c for spec in pods(made) for c in spec["containers"] if c["name"] in SERVERS]


def test_servers_are_probed_where_they_listen(objects: list[dict[str, Any]]) -> None:
    for made in objects:
        for container in servers(made):
            options = parsed(container["args"])
            for probe in ("startupProbe", "readinessProbe"):
                assert container[probe]["grpc"]["port"] == options["grpc_port"]
            # A pod without a ready model is alive: restarting it would not load the model sooner.
            alive = container["livenessProbe"]["httpGet"]
            named = {p["name"]: p["containerPort"] for p in container.get("ports", [])}
            assert named.get(alive["port"], alive["port"]) == options["http_port"]
            assert alive["path"] == "/v2/health/live"
            warm = container["startupProbe"]
            assert warm["periodSeconds"] * warm["failureThreshold"] >= 120
            assert options["host"] == "0.0.0.0"
            assert options["admin"] is None, "loading over the wire stays off"


def test_a_pod_ends_after_its_drain(objects: list[dict[str, Any]]) -> None:
    for made in objects:
        for spec in pods(made):
            for container in spec["containers"]:
                if container["name"] == "fastrec":
                    options = parsed(container["args"])
                    assert options["linger_s"] >= 10
                    needed = options["linger_s"] + options["drain_s"]
                    assert spec["terminationGracePeriodSeconds"] > needed


def test_no_container_has_a_cpu_limit_and_every_image_is_pinned(
    objects: list[dict[str, Any]],
) -> None:
    for made in objects:
        for spec in pods(made):
            for container in spec["containers"]:
                resources = container["resources"]
                assert "cpu" not in resources.get("limits", {}), container["name"]
                assert resources["requests"]["memory"] == resources["limits"]["memory"]
                tag = container["image"].rpartition(":")[2]
                assert tag not in ("", "latest", container["image"])
                if container["name"] in SERVERS:
                    assert tag in (
                        f"{__version__}-cpu",
                        f"{__version__}-cuda",
                        f"{__version__}-ray",
                    )


def test_engines_threads_and_cpus_agree(region: dict[str, list[dict[str, Any]]]) -> None:
    (config,) = region["ConfigMap"]
    pool = ServingConfig.from_dict(json.loads(config["data"]["server.json"])).pool
    (container,) = (c for d in region["Deployment"] for c in servers(d))
    assert pool.threads is not None
    assert int(container["resources"]["requests"]["cpu"]) == pool.engines * pool.threads
    # The configuration's name holds its hash: a change of it is a change of the pods.
    volumes = region["Deployment"][0]["spec"]["template"]["spec"]["volumes"]
    assert config["metadata"]["name"] in [v.get("configMap", {}).get("name") for v in volumes]


def test_pods_run_unprivileged(region: dict[str, list[dict[str, Any]]]) -> None:
    (spec,) = (pods(d)[0] for d in region["Deployment"] if servers(d))
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["automountServiceAccountToken"] is False
    own = spec["containers"][0]["securityContext"]
    assert own["readOnlyRootFilesystem"]
    assert own["capabilities"] == {"drop": ["ALL"]}
    writable = {
        m["mountPath"] for m in spec["containers"][0]["volumeMounts"] if "readOnly" not in m
    }
    assert parsed(spec["containers"][0]["args"])["cache"].as_posix() in writable


def test_selectors_find_the_pods(region: dict[str, list[dict[str, Any]]]) -> None:
    (template,) = (d["spec"]["template"] for d in region["Deployment"] if servers(d))
    labels = template["metadata"]["labels"].items()
    assert len(region["Service"]) == 4
    for service in region["Service"]:
        assert service["spec"]["selector"].items() <= labels
        grpc = next(p for p in service["spec"]["ports"] if p["name"] == "grpc")
        assert grpc["appProtocol"] == "kubernetes.io/h2c"
    for kind in ("PodDisruptionBudget",):
        assert region[kind][0]["spec"]["selector"]["matchLabels"].items() <= labels
    assert region["PodDisruptionBudget"][0]["spec"]["maxUnavailable"] == 1
    assert [s for s in region["Service"] if s["spec"].get("clusterIP") == "None"]


def test_a_release_can_be_taken_back(region: dict[str, list[dict[str, Any]]]) -> None:
    (rollout,) = region["Rollout"]
    spec = rollout["spec"]
    assert spec["rollbackWindow"]["revisions"] == 3
    assert spec["workloadRef"]["name"] in [d["metadata"]["name"] for d in region["Deployment"]]
    canary = spec["strategy"]["canary"]
    services = {s["metadata"]["name"] for s in region["Service"]}
    assert {canary["stableService"], canary["canaryService"]} <= services
    templates = {t["metadata"]["name"] for t in region["AnalysisTemplate"]}
    assert {t["templateName"] for t in canary["analysis"]["templates"]} <= templates
    weights = [step["setWeight"] for step in canary["steps"] if "setWeight" in step]
    assert weights == sorted(weights)
    assert weights[0] <= 1
    (virtual,) = region["VirtualService"]
    named = canary["trafficRouting"]["istio"]["virtualService"]
    assert named["name"] == virtual["metadata"]["name"]
    (route,) = virtual["spec"]["http"]
    assert named["routes"] == [route["name"]]
    hosts = {part["destination"]["host"] for part in route["route"]}
    assert hosts == {canary["stableService"], canary["canaryService"]}
    # What scales the pods must scale the Rollout, which took them over.
    target = region["ScaledObject"][0]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Rollout", rollout["metadata"]["name"])


def test_scaling_goes_up_at_once_and_down_slowly() -> None:
    hpa = yaml.safe_load((DEPLOY / "k8s/components/hpa/hpa.yaml").read_text())
    keda = yaml.safe_load((DEPLOY / "k8s/components/keda/scaledobject.yaml").read_text())
    kubernetes_validate.validate(hpa, KUBERNETES, strict=True)
    advanced = keda["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    for behaviour in (hpa["spec"]["behavior"], advanced):
        assert behaviour["scaleUp"]["stabilizationWindowSeconds"] <= 15
        assert behaviour["scaleDown"]["stabilizationWindowSeconds"] == 300
    for trigger in keda["spec"]["triggers"]:
        assert {"serverAddress", "query", "threshold", "activationThreshold"} <= set(
            trigger["metadata"]
        )
    server = ServingConfig.load(DEPLOY / "k8s/base/server.json")
    busy, delay = (float(t["metadata"]["threshold"]) for t in keda["spec"]["triggers"])
    assert busy == pytest.approx(0.6 * server.pool.engines)
    assert delay == pytest.approx(server.slo.latency_ms / 1e3 / 5)


def test_istio_can_fail_over(region: dict[str, list[dict[str, Any]]]) -> None:
    policy = region["DestinationRule"][0]["spec"]["trafficPolicy"]
    locality = policy["loadBalancer"]["localityLbSetting"]
    assert {(f["from"], f["to"]) for f in locality["failover"]} == {
        ("eu-west-1", "us-east-1"),
        ("us-east-1", "eu-west-1"),
    }
    # Without it, Istio sends everything to a locality whose pods are all bad.
    assert policy["outlierDetection"]["consecutiveLocalOriginFailures"] > 0


def test_the_gateway_lets_requests_pass_and_no_admin_calls(
    region: dict[str, list[dict[str, Any]]],
) -> None:
    rules = region["GRPCRoute"][0]["spec"]["rules"]
    allowed = {match["method"]["method"] for rule in rules for match in rule["matches"]}
    assert {match["method"]["service"] for rule in rules for match in rule["matches"]} == {SERVICE}
    assert allowed <= set(methods(SERVICE))
    assert "ModelInfer" in allowed
    assert not [name for name in allowed if re.match("Repository", name)]


def test_ray_serves_what_the_manifest_says() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="fastrec-kernels[ray] is not installed")
    from fastrec.serving.ray import build

    made = yaml.safe_load((DEPLOY / "k8s/ray/rayservice.yaml").read_text())["spec"]
    told = yaml.safe_load(made["serveConfigV2"])
    config = schema.ServeDeploySchema.model_validate(told)
    (application,) = config.applications
    for path in (application.import_path, *config.grpc_options.grpc_servicer_functions):
        module, _, name = path.partition(":")
        assert hasattr(importlib.import_module(module), name)
    deployment = build(application.args)._bound_deployment
    (group,) = made["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    needed = deployment.ray_actor_options["num_cpus"]
    assert int(container["resources"]["requests"]["cpu"]) == needed
    own = json.loads((DEPLOY / "k8s/base/server.json").read_text())
    assert application.args["config"] == own
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > 30
