"""Which backend ``backend="auto"`` took, kept in the user's cache and used again.

A choice holds for one machine (CPU, its instruction sets, usable cores, GPUs that can run), one
model (weights, shapes and code), one size of input, and the versions of everything that was
measured. All of it is in the name of the file, so what was chosen elsewhere, or for something else,
is not found. A choice that is found is still checked against torch before it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

import fastrec
from fastrec import env
from fastrec.measure.machine import cpu_identity
from fastrec.runtime.backends import BACKENDS, backend_module
from fastrec.runtime.cache import digest, read_checked, write_checked
from fastrec.runtime.engine import BuildOptions


def model_hash(model: nn.Module) -> str:
    """SHA-256 over what a model computes: its tensors, its modules as torch prints them, and the
    code of their classes' methods."""
    total = hashlib.sha256(repr(model).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        total.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        # As bytes, because numpy has no bfloat16; a scalar has no view of another width.
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(memoryview(raw.numpy()))
    for kind in sorted({type(module) for module in model.modules()}, key=_name):
        if not kind.__module__.startswith("torch."):  # whose version is known
            own = [f for _, f in sorted(vars(kind).items()) if isinstance(f, FunctionType)]
            total.update(digest([_name(kind), [_code(f.__code__) for f in own]]).encode())
    return total.hexdigest()


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _code(code: CodeType) -> Any:
    """A function's code without its place and layout."""
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), code.co_names, constants]


def choice_file(
    model: nn.Module, examples: Sequence[torch.Tensor], options: BuildOptions
) -> tuple[Path, dict[str, Any]]:
    """Where the choice for these lies, and what it holds for."""
    able: dict[str, Any] = {}
    for name in BACKENDS:
        module = backend_module(name)
        reason = module.can_run()
        able[name] = module.versions() if reason is None else reason
    holds_for = {
        "fastrec": fastrec.__version__,
        "machine": cpu_identity(),
        "backends": able,
        "model": model_hash(model),
        "inputs": [[str(t.dtype), list(t.shape)] for t in examples],
        "accepted": options.spec.to_dict(),
        "threads": options.threads,
        "precision": options.precision,
        "settings": {name: repr(value) for name, value in sorted(options.settings.items())},
        "calibration": len(options.calibration),
    }
    return env.cache_dir() / "auto" / f"{digest(holds_for)}.json", holds_for


def recall(file: Path, holds_for: Mapping[str, Any]) -> dict[str, Any] | None:
    """The choice in a file, or None where there is none, or it is damaged or another one's."""
    content = read_checked(file)
    if content is None:
        return None
    try:
        found = json.loads(content)
    except ValueError:
        return None
    if not isinstance(found, dict) or found.get("holds for") != holds_for:
        return None
    rows, backend = found.get("rows"), found.get("backend")
    if backend not in BACKENDS or not isinstance(rows, list):
        return None
    return found if all(isinstance(row, dict) for row in rows) else None


def remember(
    file: Path, holds_for: Mapping[str, Any], backend: str, rows: list[dict[str, Any]], date: str
) -> None:
    """Keep a choice; a cache that cannot be written is no error."""
    content = {"holds for": dict(holds_for), "backend": backend, "rows": rows, "date": date}
    write_checked(file, json.dumps(content).encode())
