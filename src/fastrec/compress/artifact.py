"""``save`` and ``load``: a model as a folder of two files, safetensors and JSON. Never pickle.

    PATH/model.safetensors   the tensors, through the codecs of ``codec.py``
    PATH/model.json          format, version, model class and config, which modules are quantised,
                             codec of each tensor, recipe, SHA-256 of the tensor file and of itself

Loading looks names up in tables and fills buffers; nothing in the files is executed. A change of
either file, by accident, is found by its checksum before anything is built. Sizes, shapes and
scales are checked apart from that, so a forged file gives an error and no wild memory access.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastrec import __version__
from fastrec.compress.codec import DTYPES, cannot_store, decode, encode
from fastrec.compress.fake_quant import FakeQuant, FakeQuantEmbedding
from fastrec.compress.selection import check_model, set_module
from fastrec.compress.serving_numerics import match_serving_numerics_
from fastrec.compress.take_apart import ENCODER_LAYERS, name_activation_
from fastrec.errors import ArgumentError, ArtifactError
from fastrec.files import atomic_folder, recover
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern
from fastrec.models import MODELS
from fastrec.models.attention import SelfAttention
from fastrec.nn import (
    GroupedLinear,
    Int8Embedding,
    LowRankLinear,
    MultiheadAttention,
    PointwiseConv,
    SeparableInt8Projection,
    SeparableProjection,
    SparseInt8Linear,
    WindowSparseAttention,
    WindowSparseInt8Attention,
)

FORMAT = "fastrec-model"
VERSION = 2  # 1 had neither masks of single elements nor Huffman codes
READABLE = (1, VERSION)
MANIFEST, TENSORS = "model.json", "model.safetensors"

PathLike = str | os.PathLike[str]


def save(
    model: nn.Module,
    path: PathLike,
    *,
    recipe: Any = None,
    info: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``model`` to the folder ``path``, whole or not at all; an artifact already there is
    replaced.

    Args:
        model: any torch model; pruned, quantised or plain. The classes of ``fastrec.models`` are
            rebuilt by :func:`load`; of another class only the state and the quantised structure are
            kept, and ``load(path, model=...)`` fills an instance.
        path: the folder to make. Its name is the name a server gives the model.
        recipe: the :class:`Recipe` that made the model, kept beside the weights.
        info: anything JSON can hold (variant, metrics, ...); see :func:`read_manifest`.

    Raises:
        ArgumentError: ``path`` is a file or a folder that holds something else; the model is
            prepared for QAT but not converted, or holds state other than dense tensors of the usual
            dtypes.
        StorageError: the folder cannot be written.
    """
    model = check_model(model)
    path = Path(path)
    if path.exists() and not (path.is_dir() and _is_replaceable(path)):
        raise ArgumentError("path", "a new folder, or an artifact to replace", str(path))
    stored, entries = encode(_state(model))
    data = safetensors.torch.save(stored)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "fastrec": __version__,
        **_identity(model),
        "modules": _structure(model),
        "tensors": entries,
        "recipe": recipe.to_dict() if hasattr(recipe, "to_dict") else recipe,
        "info": dict(info or {}),
        "file": {"name": TENSORS, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
    }
    try:
        text = json.dumps(manifest | {"sha256": _own_hash(manifest)}, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArgumentError("info", "values that JSON can hold", str(error)) from error
    with atomic_folder(path) as draft:
        (draft / TENSORS).write_bytes(data)
        (draft / MANIFEST).write_text(text)
    return path


def load(path: PathLike, model: nn.Module | None = None) -> nn.Module:
    """The model that :func:`save` wrote, in eval mode.

    Args:
        path: the folder.
        model: for a class that ``fastrec.models`` does not know: an instance with the same float
            structure, which is rewritten (quantised modules swapped in) and filled in place.

    Raises:
        ArtifactError: a file is missing, truncated, altered or extra, from a newer version, of an
            unknown class, or does not fit ``model``.
        ArgumentError: ``model`` is needed and not given.
    """
    path = Path(path)
    manifest = read_manifest(path)
    tensors = decode(_read_tensors(path, manifest), manifest["tensors"])
    if model is None:
        model = _build(manifest)
    model = check_model(model)
    _restructure(model, manifest["modules"])
    if any(isinstance(m, SparseInt8Linear | Int8Embedding) for m in model.modules()):
        match_serving_numerics_(model)
    _match_dtypes(model, tensors)
    try:
        model.load_state_dict(tensors)
    except (RuntimeError, ArgumentError) as error:
        raise ArtifactError(f"{path}: does not fit {type(model).__name__}: {error}") from error
    return model.eval()


def read_manifest(path: PathLike) -> dict[str, Any]:
    """The checked contents of ``model.json``: class, config, modules, recipe, info.

    Raises:
        ArtifactError: missing, altered, not an artifact, or of a newer version.
    """
    recover(path)
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ArtifactError(f"{file}: truncated or altered ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{file}: not a fastrec model")
    version = manifest.get("version")
    if version not in READABLE:
        raise ArtifactError(
            f"{file}: version {version!r}; this fastrec {__version__} reads versions {READABLE}"
        )
    expected = manifest.pop("sha256", None)
    if expected != _own_hash(manifest):
        raise ArtifactError(f"{file}: altered, its checksum does not match")
    kinds = {"tensors": dict, "modules": dict, "file": dict, "info": dict}
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            raise ArtifactError(f"{file}: {key!r} is missing")
    return manifest


def artifact_bytes(path: PathLike) -> int:
    """Size on disk of an artifact, both files together.

    Raises:
        ArtifactError: ``path`` is no artifact.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        raise ArtifactError(f"{path}: not a fastrec model folder (no {MANIFEST})")
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def _own_hash(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_replaceable(path: Path) -> bool:
    names = {child.name for child in path.iterdir()}
    return not names or (MANIFEST in names and names <= {MANIFEST, TENSORS})


def _state(model: nn.Module) -> dict[str, Tensor]:
    for name, module in model.named_modules():
        if isinstance(module, FakeQuant | FakeQuantEmbedding):
            raise ArgumentError(
                "model", "a converted model: quantize_(model, QAT('convert'))", f"{name!r} prepared"
            )
    state: dict[str, Tensor] = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ArgumentError("model", "a state of tensors only", f"{name!r}: {type(value)}")
        if (reason := cannot_store(value)) is not None:
            raise ArgumentError(
                "model", f"dense tensors of {', '.join(DTYPES)}", f"{name!r}: {reason}"
            )
    return state


def _identity(model: nn.Module) -> dict[str, Any]:
    known = {cls: name for name, (cls, _) in MODELS.items()}
    qualified = f"{type(model).__module__}.{type(model).__qualname__}"
    if type(model) not in known:
        return {"model": None, "class": qualified}
    config: Any = model.config
    return {"model": known[type(model)], "config": config.to_dict(), "class": qualified}


def _structure(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Modules that may differ from the float model, by name, parents before children."""
    modules: dict[str, dict[str, Any]] = {}
    inside: set[int] = set()  # modules that the entry of their parent makes
    for name, module in model.named_modules():
        if isinstance(module, SeparableInt8Projection):
            inside.add(id(module.pointwise))
        entry = _entry(module)
        if entry is not None and name and id(module) not in inside:
            modules[name] = entry
    return modules


def _entry(module: nn.Module) -> dict[str, Any] | None:
    """Constructor arguments of ``module``; None if the model's own class makes it."""
    kind = type(module).__name__
    names: tuple[str, ...]
    if isinstance(module, SeparableInt8Projection):
        names = ("in_features", "out_features", "kernel_size", "bias", "causal")
    elif isinstance(module, SparseInt8Linear):
        names = ("in_features", "out_features", "bias", "activation")
    elif isinstance(module, Int8Embedding):
        names = ("num_embeddings", "embedding_dim")
    elif isinstance(module, LowRankLinear):
        return {"type": kind, **_sizes(module.down, module.up), "rank": module.rank}
    elif isinstance(module, GroupedLinear):
        names = ("in_features", "out_features", "bias", "groups", "shuffle")
    elif isinstance(module, PointwiseConv):
        names = ("in_channels", "out_channels", "dims")
        sizes = {name: getattr(module, name) for name in names}
        return {"type": kind, **sizes, "bias": module.linear.bias is not None}
    elif isinstance(module, MultiheadAttention):
        names = ("embed_dim", "num_heads", "dropout", "kdim", "vdim", "batch_first")
        return {"type": kind, **{name: getattr(module, name) for name in names}} | {
            "bias": any(key.endswith("bias") for key in module.state_dict())
        }
    elif isinstance(module, WindowSparseAttention):
        names = ("embed_dim", "num_heads", "dropout", "batch_first", "projection", "groups",
                 "kernel_size", "rank")  # fmt: skip
        bias = any(key.endswith("bias") for key in module.state_dict())
        narrow = None if module.qk_dim == module.head_dim else module.qk_dim
        # Through JSON, so that tuples compare with what is read from a file.
        pattern = json.loads(json.dumps(asdict(module.pattern)))
        made = {"type": kind, **{name: getattr(module, name) for name in names}}
        return made | {"bias": bias, "qk_rank": narrow, "pattern": pattern}
    elif type(module) is nn.Identity:
        names = ()
    else:
        return None
    made = {"type": kind, **{name: getattr(module, name) for name in names}}
    return made | {"bias": module.bias is not None} if "bias" in names else made


def _sizes(first: nn.Module, last: nn.Module) -> dict[str, Any]:
    return {
        "in_features": int(first.in_features),
        "out_features": int(last.out_features),
        "bias": last.bias is not None,
    }


def _read_tensors(path: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    entry = manifest["file"]
    names = sorted(child.name for child in path.iterdir() if child.suffix == ".safetensors")
    if entry.get("name") != TENSORS or names != [TENSORS]:
        raise ArtifactError(f"{path}: expected the tensor file {TENSORS} alone, got {names}")
    file = path / TENSORS
    data = file.read_bytes()
    if len(data) != entry.get("bytes"):
        raise ArtifactError(f"{file}: {len(data)} bytes, expected {entry.get('bytes')}: truncated?")
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise ArtifactError(f"{file}: altered, its checksum does not match")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (SafetensorError, ValueError) as error:
        raise ArtifactError(f"{file}: not a safetensors file ({error})") from error
    return tensors


def _build(manifest: Mapping[str, Any]) -> nn.Module:
    name = manifest.get("model")
    if name is None:
        raise ArgumentError(
            "model", f"an instance of {manifest.get('class')} to fill: load(path, model=...)", None
        )
    if name not in MODELS:
        raise ArtifactError(f"unknown model class {name!r}; this version knows {sorted(MODELS)}")
    cls, config_cls = MODELS[name]
    try:
        return cls(config_cls.from_dict(manifest.get("config")))
    except (ArgumentError, TypeError) as error:
        raise ArtifactError(f"bad config of {name!r}: {error}") from error


def _restructure(model: nn.Module, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Swap in the modules of :func:`replace_`, parents before children, then the quantised ones.

    Each of the latter is checked against the float module before any is swapped.
    """
    for module in model.modules():
        if isinstance(module, ENCODER_LAYERS):
            name_activation_(module)  # an Identity may take its place
    for name, entry in modules.items():
        if entry.get("type") in _REPLACED:
            _swap(model, {name: _twin(model, name, entry)})
    _swap(
        model,
        {
            name: _twin(model, name, entry)
            for name, entry in modules.items()
            if entry.get("type") not in _REPLACED
        },
    )


def _swap(model: nn.Module, twins: Mapping[str, nn.Module]) -> None:
    for name, new in twins.items():
        if _entry(model.get_submodule(name)) != _entry(new):
            set_module(model, name, new)


def _twin(model: nn.Module, name: str, entry: Mapping[str, Any]) -> nn.Module:
    try:
        old = model.get_submodule(name)
    except AttributeError as error:
        raise ArtifactError(f"{type(model).__name__} has no module {name!r}") from error
    options = {key: value for key, value in entry.items() if key != "type"}
    made = _MAKERS.get(str(entry.get("type")))
    if made is not None and isinstance(old, made[1]):
        try:
            if all(getattr(old, k, v) == v for k, v in options.items() if k in _SAME):
                return made[0](**options)
        except (ArgumentError, TypeError) as error:
            raise ArtifactError(f"module {name!r}: {dict(entry)}: {error}") from error
    raise ArtifactError(f"module {name!r}: {old} cannot become {dict(entry)}")


def _with_pattern(kind: type[WindowSparseAttention]) -> Callable[..., nn.Module]:
    def make(pattern: Mapping[str, Any], **options: Any) -> nn.Module:
        return kind(pattern=AttentionPattern(**pattern), **options)

    return make


# Sizes in which a module and what takes its place agree.
_SAME = ("in_features", "out_features", "kernel_size", "causal", "num_embeddings", "embedding_dim")
_ATTENTION = {
    kind.__name__: (
        _with_pattern(kind),
        (nn.MultiheadAttention, SelfAttention, WindowSparseAttention),
    )
    for kind in (WindowSparseAttention, WindowSparseInt8Attention)
}
_REPLACED = ("MultiheadAttention", "PointwiseConv", "LowRankLinear", "GroupedLinear", *_ATTENTION)
_LINEAR = (nn.Linear, GroupedLinear, SparseInt8Linear, LowRankLinear)
# type of an entry -> its constructor, and the classes that it may replace.
_MAKERS: dict[str, tuple[Callable[..., nn.Module], tuple[type[nn.Module], ...]]] = {
    "Identity": (nn.Identity, (nn.Module,)),
    "SparseInt8Linear": (SparseInt8Linear, _LINEAR),
    "SeparableInt8Projection": (
        SeparableInt8Projection,
        (SeparableProjection, SeparableInt8Projection),
    ),
    "Int8Embedding": (Int8Embedding, (nn.Embedding, Int8Embedding)),
    "PointwiseConv": (PointwiseConv, (nn.Conv1d, nn.Conv2d, PointwiseConv)),
    "MultiheadAttention": (MultiheadAttention, (nn.MultiheadAttention, MultiheadAttention)),
    "LowRankLinear": (LowRankLinear, _LINEAR),
    "GroupedLinear": (GroupedLinear, _LINEAR),
    **_ATTENTION,
}


def _match_dtypes(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers the stored dtypes (a bf16 student stays bf16)."""
    for module_name, module in model.named_modules():
        if isinstance(module, SparseInt8Linear | Int8Embedding):
            continue
        for key, own in [*module._parameters.items(), *module._buffers.items()]:
            stored = tensors.get(f"{module_name}.{key}".lstrip("."))
            if own is not None and stored is not None and own.dtype != stored.dtype:
                if own.is_floating_point() != stored.is_floating_point():
                    raise ArtifactError(
                        f"{module_name}.{key}: expected {own.dtype}, got {stored.dtype}"
                    )
                with torch.no_grad():
                    own.data = own.data.to(stored.dtype)
