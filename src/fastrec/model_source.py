"""The MODEL argument of commands: which kind of thing it names, and how that is opened.

| kind | is | written by |
|---|---|---|
| engine | a native engine's file, or the folder of another backend's | ``fastrec compile``, ``engine.save`` |
| checkpoint | a folder with ``model.json`` | ``fastrec.save``, ``fastrec compress`` |
| training | a folder (or file) with ``model.safetensors`` alone | ``fastrec train`` |
| own | ``module:attribute`` or ``file.py:attribute``: a model of one's own, or what makes one | its author |

Folders that hold a result among other things are followed to it: ``best`` of ``fastrec autotune``.
"""  # noqa: E501

from __future__ import annotations

import atexit
import hashlib
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fastrec import __version__, env
from fastrec.errors import ArgumentError, ArtifactError, BackendError
from fastrec.files import atomic_write
from fastrec.terminal import stderr

if TYPE_CHECKING:
    from torch import nn

    from fastrec.runtime import Engine
    from fastrec.spec import InputSpec

Kind = Literal["engine", "checkpoint", "training", "own"]

_OWN = re.compile(r"(?P<module>[\w./-]+\.py|[A-Za-z_][\w.]*):(?P<attribute>[A-Za-z_][\w.]*)")
_ENGINE, _CHECKPOINT, _TENSORS = "engine.json", "model.json", "model.safetensors"
_EXPECTED = (
    "an engine, a folder of fastrec.save or fastrec train, or module:attribute of a model of yours"
)
_WORDS = {
    "engine": "an engine",
    "checkpoint": "a checkpoint",
    "training": "the output of fastrec train",
    "own": "a model of your own",
}
_COMPILE_TIMEOUT_S = 600.0
_REPLACEMENTS = 5  # of a model while it is compiled, until it is given up

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A checkpoint, a folder of train, compress or autotune, or module:attribute.",
    ),
]
ENGINE = typer.Argument(
    metavar="MODEL",
    help="An engine's file; a checkpoint, a folder of train or autotune and module:attribute are "
    "compiled first.",
)
EngineArgument = Annotated[str, ENGINE]
ExampleOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|MODULE:NAME",
        help="For a model of your own: one batch of inputs, as a .npz or a Python name.",
    ),
]


@dataclass(frozen=True)
class ModelSource:
    """A MODEL that was found.

    Args:
        given: as the user wrote it.
        kind: see the module's table.
        path: what is opened; None for a model of one's own.
    """

    given: str
    kind: Kind
    path: Path | None

    @property
    def name(self) -> str:
        """A short name: the file's, the folder's or the attribute's."""
        if self.path is None:
            return self.given.rpartition(":")[2].rpartition(".")[2]
        path = self.path.resolve()
        return path.stem if path.is_file() else path.name

    def announce(self) -> ModelSource:
        """Say on standard error what was found; returns itself."""
        elsewhere = "" if self.path is None or str(self.path) == self.given else f": {self.path}"
        stderr().print(f"{self.given} is {_WORDS[self.kind]}{elsewhere}", style="dim")
        return self

    def model(self) -> nn.Module:
        """The torch model, in eval mode.

        Raises:
            ArgumentError: it is an engine, which holds no torch model; or the attribute is neither
                an ``nn.Module`` nor makes one.
            ArtifactError: the files are damaged.
        """
        from torch import nn

        from fastrec.compress import load
        from fastrec.train import load_model

        if self.kind == "engine":
            raise ArgumentError(
                "MODEL",
                "a torch model: the checkpoint that the engine was compiled from",
                self.given,
            )
        if self.path is not None:
            return (load if self.kind == "checkpoint" else load_model)(self.path).eval()
        found = attribute(self.given)
        made = found if isinstance(found, nn.Module) else _called("MODEL", self.given, found)
        if not isinstance(made, nn.Module):
            raise ArgumentError(
                "MODEL", "an nn.Module, or a callable without arguments that makes one",
                f"{self.given}, which gives {type(made).__name__}",
            )  # fmt: skip
        return made.eval()

    def engine(self, threads: int | None = None) -> Engine:
        """The engine, compiled first where this is a model; imports no torch for that.

        Raises:
            ArtifactError: it cannot be opened or compiled.
        """
        from fastrec.runtime import load_engine

        return load_engine(self.engine_path(), threads=threads)

    def engine_path(self, example: str | None = None) -> Path:
        """Where the engine lies, compiled into the cache first where this is a model: by a process
        of its own, so that this one imports no torch.

        Raises:
            ArtifactError: it cannot be compiled, and why.
        """
        if self.kind == "engine":
            assert self.path is not None
            return self.path
        from fastrec.runtime.native.file import is_whole

        name = f"{self.name}.engine"
        for _ in range(_REPLACEMENTS):
            key = self._key()
            kept = env.cache_dir() / "engines" / key / name
            if key and is_whole(kept):
                return kept
            made = _own_folder() / name
            stderr().print(f"compiling {self.given}", style="dim")
            command = [sys.executable, "-m", "fastrec", "compile", self.given, str(made)]
            _run(command if example is None else [*command, "--example", example], self.given)
            if not key:
                return made
            if self._key() != key:
                continue  # the files were replaced meanwhile: nobody knows of which it is
            try:
                with atomic_write(kept, sync=False) as draft:
                    shutil.copyfile(made, draft)
            except OSError:
                return made  # a cache that cannot be written is no error
            shutil.rmtree(made.parent, ignore_errors=True)
            return kept
        raise ArtifactError(f"{self.given}: replaced again and again while it was compiled")

    def _key(self) -> str:
        """A name of the model's content; "" where nothing tells when its weights change."""
        if self.path is None:
            return ""
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("model.*"))
        total = hashlib.sha256(__version__.encode())
        for file in files:
            total.update(file.name.encode() + b"\0")
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    total.update(block)
        return total.hexdigest()[:24]


def _own_folder() -> Path:
    """A folder for an engine that no cache holds, removed when this process ends."""
    folder = tempfile.mkdtemp(prefix="fastrec-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def find_model(given: str | Path) -> ModelSource:
    """Find out which kind of model is given; nothing is loaded.

    Args:
        given: a path, or ``module:attribute``.

    Raises:
        ArgumentError: nothing is there, it is of another kind, or it is a folder of several models,
            which are named.
    """
    text = str(given)
    path = Path(given)
    if not path.exists():
        if _OWN.fullmatch(text):
            return ModelSource(text, "own", None)
        raise ArgumentError("MODEL", _EXPECTED, f"{text}, which does not exist")
    kind = _kind(path)
    if kind is not None:
        folder = path.parent if path.name == _TENSORS and kind == "checkpoint" else path
        return ModelSource(text, kind, folder)
    if path.is_dir():
        if (path / "journal.json").is_file() and _kind(path / "best") is not None:
            return ModelSource(text, "checkpoint", path / "best")
        held = _held(path)
        if held:
            raise ArgumentError(
                "MODEL", "one model", f"{text}, which holds several: {', '.join(map(str, held))}"
            )
    raise ArgumentError("MODEL", _EXPECTED, f"{text}, which holds neither")


def served_path(given: str | Path, example: str | None = None) -> Path:
    """Path for a server's model repository: an engine, a checkpoint or a folder of several models
    as it is; anything else is compiled first (:meth:`ModelSource.engine_path`).

    Raises:
        ArgumentError: nothing is there, or a file of another kind.
        ArtifactError: it cannot be compiled, and why.
    """
    try:
        source = find_model(given).announce()
    except ArgumentError:
        if Path(given).is_dir():
            return Path(given)
        raise
    if source.kind == "checkpoint" and source.path is not None:
        return source.path
    return source.engine_path(example)


def _kind(path: Path) -> Kind | None:
    from fastrec.runtime.native.file import is_engine_file

    if path.is_file():
        if path.name == _TENSORS:
            return "checkpoint" if (path.parent / _CHECKPOINT).is_file() else "training"
        return "engine" if is_engine_file(path) else None
    for name, kind in ((_ENGINE, "engine"), (_CHECKPOINT, "checkpoint"), (_TENSORS, "training")):
        if (path / name).is_file():
            return kind  # type: ignore[return-value]
    return None


def _held(path: Path) -> list[Path]:
    """Models one folder further down, and in ``variants``, as compress and table1 leave them."""
    folders = [p for p in (path, path / "variants") if p.is_dir()]
    children = [child for folder in folders for child in sorted(folder.iterdir())]
    return [child for child in children if not child.name.startswith(".") and _kind(child)]


def attribute(given: str, argument: str = "MODEL") -> Any:
    """The object that ``module:attribute`` names; the current folder is searched too.

    Args:
        given: as the user wrote it.
        argument: what the error names.

    Raises:
        ArgumentError: there is no such module or attribute, or importing it fails.
    """
    match = _OWN.fullmatch(given)
    if match is None:
        raise ArgumentError(argument, "module:attribute or file.py:attribute", given)
    name = match["module"]
    try:
        if name.endswith(".py"):
            found = _module_of(Path(name))
        else:
            if "" not in sys.path:
                sys.path.insert(0, "")
            found = importlib.import_module(name)
        for part in match["attribute"].split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise ArgumentError(
            "MODEL", "module:attribute that can be imported", f"{given}: {error}"
        ) from error
    return found


def _module_of(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses and pickles look their module up
    spec.loader.exec_module(module)
    return module


def _called(argument: str, given: str, found: Any) -> Any:
    if not callable(found):
        return found
    try:
        return found()
    except TypeError as error:
        raise ArgumentError(
            argument, "a callable without arguments", f"{given}: {error}"
        ) from error


def example_inputs(
    spec: InputSpec, example: str | None, sizes: dict[str, int] | None = None, *, full: bool = False
) -> tuple[Any, ...]:
    """One batch of inputs of a model.

    Args:
        spec: of the model's inputs; the values of fastrec's models can be drawn from it.
        example: value of ``--example``; needed for any other model.
        sizes: symbol of ``spec`` -> size, where values are drawn.
        full: whether histories are as long as they can be.

    Raises:
        ArgumentError: ``--example`` is missing or cannot be read.
    """
    if example is None:
        if not spec.fields or any(f.rows is None for f in spec.fields):
            raise ArgumentError(
                "--example", "a batch of inputs (a .npz or module:attribute) of this model", None
            )
        return spec.sample(sizes, full=full)
    if example.endswith(".npz"):
        return tuple(arrays(example).values())
    from fastrec.exporters.model_spec import as_tensors

    found = _called("--example", example, attribute(example, "--example"))
    tensors = as_tensors("--example", found if isinstance(found, list | tuple) else (found,))
    return tuple(tensor.numpy() for tensor in tensors)


def arrays(path: str | Path) -> dict[str, Any]:
    """The arrays of a .npz, in their order.

    Raises:
        ArgumentError: it cannot be read, or holds none.
    """
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            found = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ArgumentError("--example", "a .npz of arrays", f"{path}: {error}") from error
    if not found:
        raise ArgumentError("--example", "a .npz of arrays", f"{path}, which is empty")
    return found


def calibration_batches(model: nn.Module, data: str | Path, *, seed: int = 0) -> list[Any]:
    """Batches for INT8's ranges, as the model takes them.

    Args:
        model: a Ranker, a SASRec, or one that takes a Ranker's inputs.
        data: a prepared data set (256 training examples of it), or a .npz of one batch.
        seed: of the examples and their candidates.

    Raises:
        ArgumentError, DataError: it is neither.
    """
    if str(data).endswith(".npz"):
        return [tuple(arrays(data).values())]
    from fastrec.data import SequenceDataset
    from fastrec.models import SASRec

    dataset = SequenceDataset.open(Path(data))
    batches = [b.inputs() for b in dataset.batches("train", batch_size=32, seed=seed, limit=256)]
    if not isinstance(model, SASRec):
        return batches
    size = model.config.max_length
    return [(item[:, :size], length.clip(max=size)) for item, _, _, length, *_ in batches]


def _run(command: Sequence[str], given: str) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_COMPILE_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise BackendError(f"{given}: not compiled within {_COMPILE_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise ArtifactError(f"{given}: cannot be compiled: {lines[-1]}")
