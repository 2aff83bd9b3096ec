"""What is said of Pythons, images and releases agrees, file against file."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from fastrec.serving.cli import serve

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None  # type: ignore[assignment]

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github/workflows/release.yml"
# Ray's image runs what KubeRay says.
IMAGES = [ROOT / f"deploy/docker/{kind}.Dockerfile" for kind in ("cpu", "cuda")]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    if tomllib is None:
        pytest.skip("TOML needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def jobs() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text())["jobs"]


def test_the_pythons_promised_are_the_pythons_tested(project: dict[str, Any]) -> None:
    named = [
        line.rpartition(" ")[2]
        for line in project["project"]["classifiers"]
        if re.search(r":: Python :: 3\.\d+$", line)
    ]
    lowest = named[0]
    tool = project["tool"]
    assert project["project"]["requires-python"] == f">={lowest}"
    assert tool["mypy"]["python_version"] == lowest
    assert tool["ruff"]["target-version"] == "py" + lowest.replace(".", "")
    built = [f"3.{build[3:-2]}" for build in tool["cibuildwheel"]["build"]]
    assert built == named, "each promised Python gets a wheel, and each wheel is tested"
    assert "wheel_smoke.py" in tool["cibuildwheel"]["test-command"]
    assert f"{lowest} to {named[-1]}" in (ROOT / "README.md").read_text()


def test_the_workflow_runs_what_is_in_the_tree(jobs: dict[str, Any]) -> None:
    commands = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    named = re.findall(r"(?:tests|deploy)/[\w./]+", commands)
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name
    for job in jobs.values():
        needs = job.get("needs", [])
        assert {needs} if isinstance(needs, str) else set(needs) <= set(jobs)
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d[\d.]*|release/v\d)", step["uses"])


def test_only_the_publishing_job_can_prove_who_it_is(jobs: dict[str, Any]) -> None:
    text = yaml.safe_load(WORKFLOW.read_text())
    assert text["permissions"] == {"contents": "read"}
    allowed = {name: job.get("permissions") for name, job in jobs.items()}
    assert {name for name, granted in allowed.items() if granted} == {"publish"}
    assert allowed["publish"] == {"id-token": "write"}
    assert "startsWith(github.ref, 'refs/tags/v')" in jobs["publish"]["if"]
    assert set(jobs["publish"]["needs"]) == {"wheels", "sdist", "images"}
    assert "password" not in WORKFLOW.read_text()


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments), continuation lines joined."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.M).replace("\\\n", " ")
    lines = [line.partition(" ") for line in text.splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in lines]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_images_run_unprivileged_and_start_a_server(path: Path) -> None:
    found = instructions(path)
    by_word: dict[str, list[str]] = {}
    for word, rest in found:
        by_word.setdefault(word, []).append(rest)
    assert all("python:${PYTHON}-slim-" in image for image in by_word["FROM"])
    assert by_word["USER"] == ["10001:10001"]
    entry, command = (yaml.safe_load(by_word[w][0]) for w in ("ENTRYPOINT", "CMD"))
    assert entry == ["fastrec", "serve"]
    app = typer.Typer(add_completion=False)
    app.command()(serve)
    parsed = typer.main.get_command(app).make_context("serve", list(command))
    assert parsed.params["host"] == "0.0.0.0"
    ports = {str(parsed.params[name]) for name in ("grpc_port", "http_port")}
    assert set(shlex.split(by_word["EXPOSE"][0])) == ports
    assert "/v2/health/ready" in by_word["HEALTHCHECK"][0]
    assert "--only-binary=:all:" in path.read_text(), "an image must not compile what it installs"


def test_the_cpu_image_has_no_torch() -> None:
    text = (ROOT / "deploy/docker/cpu.Dockerfile").read_text()
    assert "[serve]" in text
    assert not re.search(r"gcc|torch\]|,torch", text)
