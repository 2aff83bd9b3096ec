"""The models of one folder: what is there, loaded, reloaded, and nothing from outside it.

    PATH                     one model: a native engine's file, or a folder that ``engine.save`` or
                             ``fastrec.save`` wrote; served under the file's or folder's name
    PATH/NAME                several models
    PATH/NAME/VERSION        versions of one, VERSION a number; the highest is served (Triton's
                             default policy), the others wait on disk
    PATH/NAME/VERSION/model.fastrec    the same in Triton's layout

A checkpoint of ``fastrec.save`` has to be compiled, which takes torch: a process of its own does
that once and leaves an engine file in the cache. The serving process imports no torch.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fastrec import __version__, env
from fastrec.errors import ArtifactError, FastrecError
from fastrec.runtime.native.file import is_engine_file, is_whole
from fastrec.runtime.screening import SUFFIX as SCREEN_SUFFIX
from fastrec.serving.compile import REPLACED, digest_of
from fastrec.serving.core.inference_core import InferenceCore
from fastrec.serving.core.request import Kind, Rejected

log = logging.getLogger("fastrec.serving")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_COMPILE_TIMEOUT_S = 600.0
_REPLACEMENTS = 5  # of a checkpoint while it is compiled, until it is given up


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
        self._cache = cache or env.cache_dir() / "engines"
        self._loaded: dict[tuple[str, str], Found] = {}
        self._reasons: dict[tuple[str, str], str] = {}
        # Private copies of engine files, by model and version.
        self._copies: dict[tuple[str, str], Path] = {}
        self._left_out: set[tuple[Path, str]] = set()
        self._changing = asyncio.Lock()

    def scan(self) -> dict[str, dict[str, Found]]:
        """Model -> version -> files there now. Models that are left out are logged, once each."""
        single = _model_at(self._root.resolve())
        if single is not None:
            root = self._root.resolve()
            name = root.stem if root.is_file() else root.name
            if not _NAME.fullmatch(name):
                raise ArtifactError(f"{root}: {name!r} is no model's name ({_NAME.pattern})")
            return {name: {"1": single}}
        models: dict[str, dict[str, Found]] = {}
        for child in sorted(self._root.iterdir()):
            if child.name.startswith("."):
                continue
            name = child.stem if child.is_file() else child.name
            versions = self._versions(child)
            if not versions:
                continue
            if not _NAME.fullmatch(name):
                self._leave_out(child, f"{name!r} is no model's name ({_NAME.pattern})")
            elif name in models:
                self._leave_out(child, f"there is another model named {name!r}")
            else:
                models[name] = versions
        return models

    def index(self) -> list[dict[str, str]]:
        """Rows with name, version, state and reason: the loaded, then what lies there unloaded."""
        rows = []
        seen = set()
        for info in self._core.models():
            seen.add((info.name, info.version))
            state = "READY" if info.state == "READY" else "LOADING"
            reason = self._reasons.get((info.name, info.version), "")
            row = {"name": info.name, "version": info.version, "state": state, "reason": reason}
            rows.append(row)
        for name, versions in self.scan().items():
            latest = max(versions, key=int)
            for version in versions:
                if (name, version) in seen:
                    continue
                usual = "not loaded" if version == latest else f"version {latest} is the latest"
                reason = self._reasons.get((name, version), usual)
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
        """Serve the latest version of a model as it is on disk now.

        The version served before continues until the new one is warm, and where it cannot be
        loaded.

        Raises:
            Rejected: NOT_FOUND: the repository has no such model.
            FastrecError: the latest version cannot be loaded.
        """
        async with self._changing:
            versions = self.scan().get(name) if _NAME.fullmatch(name) else None
            if not versions:
                raise Rejected(Kind.NOT_FOUND, f"the repository has no model {name[:128]!r}")
            latest = max(versions, key=int)
            if self._loaded.get((name, latest)) != versions[latest]:
                try:
                    await self._load(name, latest, versions[latest])
                except FastrecError as error:
                    self._reasons[name, latest] = str(error)
                    log.warning("%s version %s: not loaded: %s", name, latest, error)
                    raise
            for key in [key for key in self._loaded if key[0] == name and key[1] != latest]:
                await self._core.unload(*key)
                self._forget(key)

    async def unload(self, name: str) -> None:
        """Drain and unload all versions of a model.

        Raises:
            Rejected: NOT_FOUND: it is not loaded.
        """
        async with self._changing:
            await self._core.unload(name)
            for key in [key for key in self._loaded if key[0] == name]:
                self._forget(key)

    def close(self) -> None:
        """Remove the private copies of engine files, once the engines are closed."""
        for key in list(self._loaded):
            self._forget(key)

    def _forget(self, key: tuple[str, str]) -> None:
        del self._loaded[key]
        _remove(self._copies.pop(key, None))

    async def _load(self, name: str, version: str, found: Found) -> None:
        key, path, copy = (name, version), found.path, None
        if found.kind == "checkpoint":
            folder = _writable(self._cache)
            try:
                path = await compiled(path, folder)
            except BaseException:
                _remove(None if folder == self._cache else folder / path.name)
                raise
            copy = None if folder == self._cache else path
        elif path.is_file():
            path = copy = await asyncio.to_thread(_copied, path)
        try:
            replace = key in self._loaded
            await self._core.load(name, path, version=version, weight=1.0, replace=replace)
        except BaseException as error:
            _remove(copy)
            if copy is not None and isinstance(error, ArtifactError):
                text = str(error).replace(str(copy), str(found.path))
                raise ArtifactError(text) from error
            raise
        _remove(self._copies.pop(key, None))
        if copy is not None:
            self._copies[key] = copy
        self._loaded[key] = found
        self._reasons.pop(key, None)
        log.info("%s version %s: loaded from %s", name, version, found.path)

    def _versions(self, child: Path) -> dict[str, Found]:
        single = self._inside(child)
        if single is not None:
            return {"1": single}
        found = {}
        for grandchild in child.iterdir() if child.is_dir() else ():
            version = self._inside(grandchild)
            if version is not None and _VERSION.fullmatch(grandchild.name):
                found[grandchild.name] = version
            elif version is not None:
                self._leave_out(grandchild, "a version's name is a whole number from 1")
        return found

    def _inside(self, path: Path) -> Found | None:
        """The model at a path, None for one that a link takes out of the repository."""
        root = self._root.resolve()
        found = _model_at(path.resolve()) if path.resolve().is_relative_to(root) else None
        if found is None and path.is_symlink():
            self._leave_out(path, "it leads out of the repository, or to no model")
        elif found is not None and not found.path.resolve().is_relative_to(root):
            self._leave_out(path, "its file is out of the repository")
            return None
        return found

    def _leave_out(self, path: Path, reason: str) -> None:
        if (path, reason) not in self._left_out:
            self._left_out.add((path, reason))
            log.warning("%s is left out of the model repository: %s", path, reason)


def _copied(file: Path) -> Path:
    """A private copy of an engine file, and of its screen.

    Engines map their file. One that is overwritten in place, as ``cp`` does, would change the
    scores of the engine that runs, and end the process where it is cut.

    Raises:
        ArtifactError: the copy cannot be made.
    """
    folder = Path(tempfile.mkdtemp(prefix="fastrec-serving-"))
    try:
        for path in (file, file.with_name(file.name + SCREEN_SUFFIX)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    except OSError as error:
        _remove(folder / file.name)
        raise ArtifactError(f"{file}: cannot be copied to {folder}: {error.strerror}") from error
    return folder / file.name


def _writable(cache: Path) -> Path:
    """The cache, or a folder of its own for one engine where the cache cannot be written."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except OSError:
        return Path(tempfile.mkdtemp(prefix="fastrec-serving-"))


def _remove(copy: Path | None) -> None:
    if copy is not None:
        shutil.rmtree(copy.parent, ignore_errors=True)


async def compiled(checkpoint: Path, cache: Path) -> Path:
    """The engine file of a checkpoint, compiled now if it is not in the cache, or damaged there.

    Raises:
        ArtifactError: it cannot be compiled, and why.
    """
    for _ in range(_REPLACEMENTS):
        try:
            digest = digest_of(checkpoint)
        except OSError as error:
            raise ArtifactError(f"{checkpoint}: not a fastrec model ({error})") from error
        key = hashlib.sha256(f"{digest} {__version__}".encode()).hexdigest()[:24]
        path = cache / f"{checkpoint.name}-{key}.engine"
        if await asyncio.to_thread(is_whole, path):
            return path
        path.unlink(missing_ok=True)
        log.info("%s: compiling (torch runs in a process of its own)", checkpoint)
        if await _compile(checkpoint, path, digest):
            return path
    raise ArtifactError(f"{checkpoint}: replaced again and again while it was compiled")


async def _compile(checkpoint: Path, engine: Path, digest: str) -> bool:
    """Compile in a process of its own, which is killed if this task is cancelled; False where the
    checkpoint is no longer the one of this digest."""
    command = [
        sys.executable,
        "-m",
        "fastrec.serving.compile",
        str(checkpoint),
        str(engine),
        digest,
    ]
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
    if process.returncode == REPLACED:
        return False
    if process.returncode != 0:
        lines = stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
        raise ArtifactError(f"{checkpoint}: cannot be compiled: {lines[-1]}")
    return True


def _model_at(path: Path) -> Found | None:
    """The model that a file or folder is."""
    if path.is_dir():
        for name, kind in (("engine.json", "engine"), ("model.json", "checkpoint")):
            if (path / name).is_file():
                return Found(path, kind, _stamp(path / name))
        files = [file for file in path.glob("model.*") if file.is_file()]
        if len(files) != 1:
            return None
        path = files[0]
    return Found(path, "engine", _stamp(path)) if is_engine_file(path) else None


def _stamp(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
