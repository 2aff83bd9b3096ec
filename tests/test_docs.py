"""The reference names everything public; pages are in the site; their Python runs as it stands."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ROOMS = ("compress", "data", "kernels", "models", "nn", "runtime", "search", "train")


def listed() -> set[str]:
    """The names that the reference pages take their text from."""
    pages = [page.read_text() for page in (DOCS / "reference").glob("*.md")]
    return {name for text in pages for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}


def public() -> set[str]:
    """Functions and classes that fastrec and its rooms name, and the errors, by where they are."""
    found: set[str] = set()
    for room in ("fastrec", *(f"fastrec.{name}" for name in ROOMS)):
        module: Any = importlib.import_module(room)
        found |= {where(getattr(module, name)) for name in module.__all__}
    errors = importlib.import_module("fastrec.errors")
    found |= {where(value) for value in vars(errors).values() if inspect.isclass(value)}
    return {name for name in found if name.startswith("fastrec.")}


def where(value: Any) -> str:
    if not callable(value):
        return ""
    return f"{value.__module__}.{getattr(value, '__qualname__', '')}"


def test_the_reference_names_everything_public() -> None:
    pytest.importorskip("torch", reason="fastrec-kernels[torch] is not installed")
    assert listed() == public()


def test_every_page_is_in_the_sites_navigation() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    config = tomllib.loads((ROOT / "zensical.toml").read_text())

    def pages(entry: Any) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        inside = entry.values() if isinstance(entry, dict) else entry
        return set().union(*map(pages, inside))

    written = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert pages(config["project"]["nav"]) == written


# What pages suppose that the reader has.


def ranker() -> dict[str, Any]:
    """A small ranker, its batches, and stand-ins for the reader's own functions."""
    import torch

    import fastrec
    from fastrec.models import Ranker, RankerConfig

    config = RankerConfig(
        n_items=2000, n_categories=30, history_length=20, d=32, category_dim=16, ffn=64,
        n_blocks=1, n_heads=2, tower=(64, 32),
    )  # fmt: skip
    torch.manual_seed(0)

    def request(batch: int) -> tuple[torch.Tensor, ...]:
        def ids(rows: int, *shape: int) -> torch.Tensor:
            return torch.randint(1, rows, shape)

        history = ids(2000, batch, 20), ids(30, batch, 20), ids(4, batch, 20)
        return *history, torch.full((batch,), 20), ids(2000, batch, 50), ids(30, batch, 50)

    model, fixed = Ranker(config).eval(), request(4)
    return {
        "fastrec": fastrec, "torch": torch, "model": model,
        "batches": [request(8) for _ in range(2)], "train": lambda model: None,
        "loss": lambda model: float(model(*fixed).square().mean()),
    }  # fmt: skip


def with_a_log() -> dict[str, Any]:
    from fastrec.data import generate, prepare

    generate("demo.csv", n_users=40, n_items=100, n_categories=8)
    prepare("demo.csv", "data")
    return {}


def hstu() -> dict[str, Any]:
    import torch

    lengths, size = torch.tensor([300, 260]), 300
    seconds = torch.arange(size).expand(2, size)
    return {
        "x": torch.randn(2, size, 512), "lengths": lengths, "seconds": seconds,
        "rows": torch.randn(size, 512), "row_seconds": torch.arange(size),
        "starts": torch.tensor([0, 120, size]),
    }  # fmt: skip


def pointwise() -> dict[str, Any]:
    import torch

    size = 8192
    return {
        "position": torch.randn(2 * size - 1), "time": torch.randn(129),
        "seconds": torch.arange(size)[None], "lengths": torch.tensor([256]),
    }  # fmt: skip


SUPPOSED: dict[str, Callable[[], dict[str, Any]]] = {
    "compression.md": ranker,
    "data.md": with_a_log,
    "kernels.md": pointwise,
    "nn.md": hstu,
    "training.md": with_a_log,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SUPPOSED))
def test_a_pages_python_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torch", "polars", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page", **SUPPOSED[name]()}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        if name == "compression.md":  # each begins with a float model
            names |= ranker()
        exec(compile(block, name, "exec"), names)  # our own pages


def test_all_python_in_the_pages_is_python() -> None:
    """Those that need a cluster, a server or a longer run, too."""
    found = 0
    for page in DOCS.rglob("*.md"):
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            compile(block, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            found += 1
    assert found > 30
