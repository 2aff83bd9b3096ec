"""Finished stages of a run, kept in its folder so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastrec.files import atomic_write


def fingerprint(*parts: Any) -> str:
    """A short hash of anything JSON can hold (paths and the like by their text)."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """``OUT/stages/<name>.json``: the result of a stage and the fingerprint of its inputs.

    A stage whose fingerprint differs is done again; a file cut by an interruption counts as absent.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / "stages"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []

    def read(self, name: str, key: str) -> Any | None:
        """The stage's stored result for this key, or None."""
        try:
            kept = json.loads((self.folder / f"{name}.json").read_text())
        except (OSError, json.JSONDecodeError):
            return None
        if not isinstance(kept, dict) or kept.get("key") != key:
            return None
        return kept.get("result")

    def write(self, name: str, key: str, result: Any) -> None:
        """Keep a result, whole or not at all."""
        with atomic_write(self.folder / f"{name}.json") as draft:
            draft.write_text(json.dumps({"key": key, "result": result}))

    def stage(self, name: str, key: str, make: Callable[[], Any]) -> Any:
        """The stage's result, made unless it is there."""
        kept = self.read(name, key)
        if kept is not None:
            self.reused.append(name)
            return kept
        start = time.perf_counter()
        result = make()
        self.add_seconds(name, time.perf_counter() - start)
        self.write(name, key, result)
        return result

    def add_seconds(self, name: str, seconds: float) -> None:
        """Account for time spent on a stage."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
