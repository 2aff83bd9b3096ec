"""The models of one folder: what is there, loaded, reloaded, and nothing from outside it.

    PATH                     one model: a native engine's file, or a folder that ``engine.save`` or
                             ``fastrec.save`` wrote; served under the file's or folder's name
    PATH/NAME                several models
    PATH/NAME/VERSION        versions of one, VERSION a number; the highest serves requests that
                             name none

A checkpoint of ``fastrec.save`` has to be compiled, which takes torch: a process of its own does
that once and leaves an engine file in the cache. The serving process imports no torch.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fastrec import __version__
from fastrec.errors import ArtifactError, FastrecError
from fastrec.runtime.native.file import is_engine_file
from fastrec.serving.core.inference_core import InferenceCore
from fastrec.serving.core.request import Kind, Rejected

log = logging.getLogger("fastrec.serving")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_COMPILE_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Found:
    """A version on disk.

    Args:
        path: resolved.
        kind: ``engine`` (what ``load_engine`` opens) or ``checkpoint``.
        stamp: changes when the files do.
    """

    path: Path
    kind: str
    stamp: tuple[int, ...]


class ModelRepository:
    """Loads the models of a folder into a core.

    Args:
        path: see the module's notes.
        cache: where compiled checkpoints are kept; None = a folder in the user's cache.

    Raises:
        ArtifactError: nothing is there.
    """

    def __init__(self, path: str | Path, core: InferenceCore, *, cache: Path | None = None) -> None:
        self._root = Path(path)
        if not self._root.exists():
            raise ArtifactError(f"{path}: there is no such file or folder")
        self._core = core
        self._cache = cache or Path.home() / ".cache" / "fastrec" / "engines"
        self._loaded: dict[tuple[str, str], Found] = {}
        self._reasons: dict[tuple[str, str], str] = {}
        self._changing = asyncio.Lock()

    def scan(self) -> dict[str, dict[str, Found]]:
        """Model -> version -> what is there now. What is no model is left out; why is logged."""
        single = _kind(self._root)
        if single is not None:
            root = self._root.resolve()
            name = root.stem if root.is_file() else root.name
            if not _NAME.fullmatch(name):
                raise ArtifactError(f"{root}: its name is no model's name ({_NAME.pattern})")
            return {name: {"1": Found(root, single, _stamp(root))}}
        models: dict[str, dict[str, Found]] = {}
        for child in sorted(self._root.iterdir()):
            if child.name.startswith("."):
                continue
            versions = self._versions(child)
            name = child.stem if child.is_file() else child.name
            if versions and _NAME.fullmatch(name):
                models[name] = versions
        return models

    def index(self) -> list[dict[str, str]]:
        """Rows with name, version, state and reason: the loaded, then what lies there unloaded."""
        rows = []
        seen = set()
        for info in self._core.models():
            seen.add((info.name, info.version))
            state = "READY" if info.state == "READY" else "LOADING"
            rows.append({"name": info.name, "version": info.version, "state": state, "reason": ""})
        for name, versions in self.scan().items():
            for version in versions:
                if (name, version) not in seen:
                    reason = self._reasons.get((name, version), "not loaded")
                    rows.append(
                        {"name": name, "version": version, "state": "UNAVAILABLE", "reason": reason}
                    )
        return rows

    async def load_all(self) -> None:
        """Load every model.

        Raises:
            ArtifactError: there is none.
            FastrecError: one cannot be loaded.
        """
        names = list(self.scan())
        if not names:
            raise ArtifactError(
                f"{self._root}: holds no engine (engine.save) and no model (fastrec.save)"
            )
        for name in names:
            await self.load(name)

    async def load(self, name: str) -> None:
        """Load what is new of a model, reload what has changed, unload what is gone.

        A version whose files changed is unloaded before its successor is loaded; to go on serving
        meanwhile, put the successor beside it as a new version.

        Raises:
            Rejected: NOT_FOUND: the repository has no such model.
            FastrecError: a version cannot be loaded; the others are.
        """
        async with self._changing:
            versions = self.scan().get(name) if _NAME.fullmatch(name) else None
            if not versions:
                raise Rejected(Kind.NOT_FOUND, f"the repository has no model {name[:128]!r}")
            for key, found in list(self._loaded.items()):
                if key[0] == name and versions.get(key[1]) != found:
                    await self._core.unload(*key)
                    del self._loaded[key]
            failed: FastrecError | None = None
            # The highest first: it takes the requests that name no version.
            for version in sorted(versions, key=int, reverse=True):
                if (name, version) not in self._loaded:
                    try:
                        await self._load(name, version, versions[version])
                    except FastrecError as error:
                        self._reasons[name, version] = str(error)
                        failed = failed or error
            if failed is not None:
                raise failed

    async def unload(self, name: str) -> None:
        """Drain and unload all versions of a model.

        Raises:
            Rejected: NOT_FOUND: it is not loaded.
        """
        async with self._changing:
            await self._core.unload(name)
            for key in [key for key in self._loaded if key[0] == name]:
                del self._loaded[key]

    async def _load(self, name: str, version: str, found: Found) -> None:
        path = found.path
        if found.kind == "checkpoint":
            path = await compiled(path, self._cache)
        await self._core.load(name, path, version=version)
        self._loaded[name, version] = found
        self._reasons.pop((name, version), None)
        log.info("%s version %s: loaded from %s", name, version, found.path)

    def _versions(self, child: Path) -> dict[str, Found]:
        kind = self._inside(child)
        if kind is not None:
            return {"1": Found(child.resolve(), kind, _stamp(child))}
        if not child.is_dir():
            return {}
        found = {}
        for grandchild in child.iterdir():
            if _VERSION.fullmatch(grandchild.name):
                kind = self._inside(grandchild)
                if kind is not None:
                    found[grandchild.name] = Found(grandchild.resolve(), kind, _stamp(grandchild))
        return found

    def _inside(self, path: Path) -> str | None:
        """The kind of model at a path, None for one that a link takes out of the repository."""
        if not path.resolve().is_relative_to(self._root.resolve()):
            log.warning("%s leads out of the model repository and is left out", path)
            return None
        return _kind(path)


async def compiled(checkpoint: Path, cache: Path) -> Path:
    """The engine file of a checkpoint, compiled now if it is not in the cache.

    Raises:
        ArtifactError: it cannot be compiled, and why.
    """
    try:
        manifest = (checkpoint / "model.json").read_bytes()
        json.loads(manifest)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{checkpoint}: not a fastrec model ({error})") from error
    # The manifest holds the checksum of the weights.
    key = hashlib.sha256(manifest + __version__.encode()).hexdigest()[:24]
    path = cache / f"{checkpoint.name}-{key}.engine"
    if is_engine_file(path):
        return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        path = Path(tempfile.mkdtemp(prefix="fastrec-")) / path.name
    log.info("%s: compiling (torch runs in a process of its own)", checkpoint)
    await _compile(checkpoint, path)
    return path


async def _compile(checkpoint: Path, engine: Path) -> None:
    """Compile in a process of its own, which is killed if this task is cancelled."""
    command = [sys.executable, "-m", "fastrec.serving.compile", str(checkpoint), str(engine)]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        _, stderr = await asyncio.wait_for(process.communicate(), _COMPILE_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise ArtifactError(
            f"{checkpoint}: not compiled within {_COMPILE_TIMEOUT_S:.0f} s"
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        lines = stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
        raise ArtifactError(f"{checkpoint}: cannot be compiled: {lines[-1]}")


def _kind(path: Path) -> str | None:
    if path.is_file():
        return "engine" if is_engine_file(path) else None
    if (path / "engine.json").is_file():
        return "engine"
    return "checkpoint" if (path / "model.json").is_file() else None


def _stamp(path: Path) -> tuple[int, ...]:
    file = path
    for name in ("engine.json", "model.json"):
        if (path / name).is_file():
            file = path / name
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
