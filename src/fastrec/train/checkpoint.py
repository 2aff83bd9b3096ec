"""Training checkpoints and trained models as safetensors files: no pickle, checksummed, atomic."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastrec.errors import ArgumentError, ArtifactError, StorageError
from fastrec.files import atomic_write
from fastrec.models import MODELS

FORMAT = 1


def tensors_digest(tensors: Mapping[str, Tensor], *others: Any) -> str:
    """SHA-256 of named tensors, in their order, and of ``others`` as JSON; hex."""
    digest = hashlib.sha256()
    for other in others:
        digest.update(json.dumps(other, sort_keys=True, default=str).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(data.view(torch.uint8).numpy())
    return digest.hexdigest()


def _checksum(tensors: dict[str, Tensor]) -> str:
    return tensors_digest(dict(sorted(tensors.items())))


def write_tensors(path: Path, kind: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and JSON metadata to ``path`` in one step: a reader sees old or new, whole.

    Args:
        path: the file.
        kind: "checkpoint" or "model"; :func:`read_tensors` asks for it.
        tensors: by name, on any device.
        meta: plain JSON values.

    Raises:
        StorageError: the file cannot be written.
    """
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "fastrec": json.dumps({"kind": kind, "format": FORMAT, "sha256": _checksum(host), **meta})
    }
    with atomic_write(path) as draft:
        try:
            save_file(host, draft, metadata=header)
        except SafetensorError as error:  # an OSError only by its words
            raise StorageError(path, OSError(errno.EIO, str(error))) from error


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote: (tensors on the CPU, metadata).

    Raises:
        ArtifactError: no such file, truncated, altered, another kind of file, or too new a format.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("fastrec", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path}: truncated, altered or not safetensors ({error})") from error
    if not isinstance(meta, dict) or meta.get("kind") != kind:
        raise ArtifactError(f"{path}: not a fastrec {kind} file")
    if meta.get("format") != FORMAT:
        raise ArtifactError(
            f"{path}: format {meta.get('format')}, this version reads format {FORMAT}"
        )
    if meta.get("sha256") != _checksum(tensors):
        raise ArtifactError(f"{path}: the checksum does not match, the file was altered")
    return tensors, meta


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Everything that a bit-exact continuation needs.

    Args:
        path: the file.
        model: its weights are kept.
        optimizer: its state is kept.
        state: plain JSON values of the loop; torch's random state is added.

    Raises:
        StorageError: the file cannot be written.
    """
    state_dict = unwrapped(model).state_dict()
    tensors = {f"model.{name}": tensor for name, tensor in state_dict.items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(v) for name, v in slots.items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    write_tensors(path, "checkpoint", tensors, {"state": state})


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore what :func:`save_checkpoint` wrote in place; returns its ``state``.

    Raises:
        ArtifactError: the file is damaged, or belongs to another model.
    """
    tensors, meta = read_tensors(path, "checkpoint")
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "rng": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    _fill(unwrapped(model), parts["model"], path)
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        index, _, slot = name.partition(".")
        slots.setdefault(int(index), {})[slot] = tensor
    current = optimizer.state_dict()
    optimizer.load_state_dict({"state": slots, "param_groups": current["param_groups"]})
    torch.set_rng_state(parts["rng"]["cpu"])
    if "cuda" in parts["rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(parts["rng"]["cuda"])
    return dict(meta["state"])


def _fill(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ArtifactError(f"{path}: does not fit this model ({error})") from error


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``.

    These wrappers put a prefix before every name.
    """
    while True:
        inner = model._modules.get("_orig_mod")
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def save_model(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Write a trained model's weights, with name and config for a model of ``fastrec.models``."""
    model = unwrapped(model)
    meta: dict[str, Any] = {"model": None, "config": None}
    for name, (cls, _) in MODELS.items():
        if type(model) is cls:
            config: Any = model.config
            meta = {"model": name, "config": config.to_dict()}
    write_tensors(Path(path), "model", model.state_dict(), meta)


def load_model(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Read what :func:`save_model` wrote, into ``model`` or a new one built from the saved config.

    Args:
        path: the file, or the output folder of a training run.

    Raises:
        ArtifactError: the file is damaged, or does not fit.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    tensors, meta = read_tensors(path, "model")
    if model is None:
        if meta.get("model") not in MODELS:
            raise ArtifactError(f"{path}: names no model of fastrec, pass one to load into")
        cls, config_cls = MODELS[meta["model"]]
        try:
            model = cls(config_cls.from_dict(meta["config"]))
        except (ArgumentError, TypeError) as error:
            raise ArtifactError(f"{path}: bad config ({error})") from error
        model.eval()
    _fill(unwrapped(model), tensors, path)
    return model
