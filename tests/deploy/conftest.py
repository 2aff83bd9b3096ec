"""Every manifest of deploy/, as ``kubectl kustomize`` would hand it to a cluster."""

from __future__ import annotations

import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

K8S = Path(__file__).parents[2] / "deploy/k8s"


@lru_cache
def rendered(folder: str) -> list[dict[str, Any]]:
    """The objects that a kustomization makes."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which renders the kustomizations, is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", str(K8S / folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def applicable() -> list[str]:
    """Kustomizations that make whole systems; components are parts of them."""
    found = (path.parent.relative_to(K8S) for path in K8S.rglob("kustomization.yaml"))
    return sorted(path.as_posix() for path in found if "components" not in path.parts)


@pytest.fixture(params=applicable())
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Of one kustomization that can be applied."""
    return rendered(request.param)


@pytest.fixture
def region() -> dict[str, list[dict[str, Any]]]:
    """Of the fullest one, by kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    for made in rendered("overlays/region-eu"):
        found.setdefault(made["kind"], []).append(made)
    return found
