"""The reference names everything public; the site's pages are those of ``docs/``."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ROOMS = ("compress", "data", "kernels", "models", "nn", "runtime", "search", "train")


def listed() -> set[str]:
    """What the reference pages take their text from."""
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
