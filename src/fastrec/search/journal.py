"""Results of a search so far, in one JSON file: an interrupted search continues from it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fastrec.errors import ArtifactError
from fastrec.files import atomic_write
from fastrec.train.checkpoint import tensors_digest


class Journal:
    """``OUT/journal.json``: item -> result, written after each; without a folder, in memory.

    A journal of another model, space or setting is set aside as ``journal.json.old``.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self.folder, self.key = folder, key
        self.items: dict[str, Any] = {}
        self.reused = 0
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "journal.json"
        if self._file.exists():
            try:
                found = json.loads(self._file.read_text())
                items = found["items"] if found["key"] == key else None
            except (ValueError, KeyError, TypeError) as error:
                raise ArtifactError(f"{self._file}: not a journal of autotune ({error})") from error
            if items is None:
                os.replace(self._file, f"{self._file}.old")
            else:
                self.items = items

    def item(self, name: str, make: Callable[[], Any]) -> Any:
        """The item's result, made unless it is there."""
        if name in self.items:
            self.reused += 1
            return self.items[name]
        self.items[name] = result = make()
        self.write()
        return result

    def write(self) -> None:
        """Keep the items, whole or not at all."""
        if self.folder is not None:
            with atomic_write(self._file) as draft:
                draft.write_text(json.dumps({"key": self.key, "items": self.items}))


def fingerprint(model: nn.Module, *parts: Any) -> str:
    """Of a model's tensors and anything JSON can hold."""
    return tensors_digest(model.state_dict(), parts)[:32]
