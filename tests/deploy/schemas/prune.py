"""Makes the small copies of custom resources' JSON schemas that the tests of deploy/ use.

    python tests/deploy/schemas/prune.py CATALOG KUBERAY

``CATALOG`` and ``KUBERAY`` are checkouts; README.md says of what. Descriptions are dropped, and so
is every part that is large and that no manifest of deploy/ uses: it becomes ``false``, so a
manifest that begins to use it fails until this is run again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
K8S = HERE.parents[2] / "deploy/k8s"
LARGE = 1500
FROM_CATALOG = {
    "AnalysisTemplate": "argoproj.io/analysistemplate_v1alpha1.json",
    "DestinationRule": "networking.istio.io/destinationrule_v1.json",
    "GRPCRoute": "gateway.networking.k8s.io/grpcroute_v1.json",
    "Gateway": "gateway.networking.k8s.io/gateway_v1.json",
    "InferenceService": "serving.kserve.io/inferenceservice_v1beta1.json",
    "PrometheusRule": "monitoring.coreos.com/prometheusrule_v1.json",
    "Rollout": "argoproj.io/rollout_v1alpha1.json",
    "ScaledObject": "keda.sh/scaledobject_v1alpha1.json",
    "ServiceMonitor": "monitoring.coreos.com/servicemonitor_v1.json",
    "ServingRuntime": "serving.kserve.io/servingruntime_v1alpha1.json",
    "VirtualService": "networking.istio.io/virtualservice_v1.json",
}
RAY_SERVICE = "ray-operator/config/crd/bases/ray.io_rayservices.yaml"


def used() -> dict[str, list[Any]]:
    """The manifests, by kind."""
    found: dict[str, list[Any]] = {}
    for path in K8S.rglob("*.yaml"):
        for manifest in yaml.safe_load_all(path.read_text()):
            found.setdefault(manifest.get("kind", ""), []).append(manifest)
    return found


def pruned(schema: Any, values: list[Any]) -> Any:
    """The schema of values like these."""
    if isinstance(schema, bool):
        return schema
    if not values and len(json.dumps(schema)) > LARGE:
        return False
    kept = {k: v for k, v in schema.items() if k not in ("description", "status", "example")}
    if "pattern" in schema:
        # Go takes flags anywhere, Python at the start alone.
        kept["pattern"] = schema["pattern"].replace("^(?i)", "(?i)^")
    for key, inner in schema.items():
        if key == "properties":
            kept[key] = {
                name: pruned(part, [v[name] for v in values if isinstance(v, dict) and name in v])
                for name, part in inner.items()
                if name != "status"
            }
        elif key == "items":
            items = [part for v in values if isinstance(v, list) for part in v]
            kept[key] = pruned(inner, items)
        elif key == "additionalProperties" and isinstance(inner, dict):
            known = schema.get("properties", {})
            parts = [
                p for v in values if isinstance(v, dict) for k, p in v.items() if k not in known
            ]
            kept[key] = pruned(inner, parts)
        elif key in ("anyOf", "oneOf", "allOf"):
            kept[key] = [pruned(part, values) for part in inner]
    return kept


def openapi_closed(schema: Any) -> Any:
    """A structural schema, as Kubernetes takes it: what it does not name is refused."""
    if isinstance(schema, list):
        return [openapi_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {k: openapi_closed(v) for k, v in schema.items() if not k.startswith("x-kubernetes")}
    if schema.get("x-kubernetes-int-or-string"):
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        made.pop("type", None)
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in schema and "additionalProperties" not in schema and not open_ended:
        made["additionalProperties"] = False
    return made


def shown(repository: str, path: str) -> str:
    """A file of a checkout, or of a bare copy."""
    command = ["git", "-C", repository, "show", f"HEAD:{path}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    manifests = used()
    schemas = {kind: json.loads(shown(sys.argv[1], path)) for kind, path in FROM_CATALOG.items()}
    crd = yaml.safe_load(shown(sys.argv[2], RAY_SERVICE))
    (version,) = (v for v in crd["spec"]["versions"] if v["storage"])
    schemas["RayService"] = openapi_closed(version["schema"]["openAPIV3Schema"])
    schemas["RayService"]["properties"]["metadata"] = {"type": "object"}
    schemas["RayService"].pop("additionalProperties", None)
    for kind, schema in schemas.items():
        text = json.dumps(pruned(schema, manifests[kind]), separators=(",", ":"))
        (HERE / f"{kind}.json").write_text(text + "\n")
