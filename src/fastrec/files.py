"""Replace files and folders in one step: readers and crashes see the old or the new one, whole.

A draft beside the target is filled, synced to disk and then takes the target's name; where the
target is a folder that holds files, the two names are exchanged. A killed writer leaves its draft,
which the next writer of the same target removes; a running writer holds a lock on its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Container, Iterator
from pathlib import Path

from fastrec.errors import FastrecError, StorageError

_THIS_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
_HOLDS_SOMETHING = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[Path]:
    """Context manager: an empty draft to write to, which becomes the file ``path`` at the end.

    Args:
        path: the file; its folder is made. After an exception in the block it is as before.
        sync: whether the content must survive a power failure (a cache's need not).

    Raises:
        StorageError: the draft cannot be written: disk full, read-only folder and the like.
    """
    path = _absolute(path)
    with _storage_errors(path), _draft(path, _new_file) as draft:
        yield draft
        install(draft, path, sync=sync)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[Path]:
    """Context manager: an empty folder to fill, which becomes ``path`` at the end.

    The previous content of ``path`` is removed: check first that it may be.

    Args:
        path: the folder; its parent is made. After an exception in the block it is as before.
        sync: whether the content must survive a power failure.

    Raises:
        StorageError: the draft cannot be written: disk full, read-only folder and the like.
    """
    path = _absolute(path)
    with draft_folder(path) as draft, _storage_errors(path):
        yield draft
        install(draft, path, sync=sync)


@contextlib.contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """Context manager: an empty, locked folder beside ``path``, for :func:`install`.

    At the end the folder of that name is removed: the draft, or the one it replaced.

    Raises:
        StorageError: it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        with _storage_errors(path):
            draft = stack.enter_context(_draft(path, Path.mkdir))
        with _storage_errors(path, _CANNOT_WRITE):
            yield draft


def install(draft: Path, path: Path, *, sync: bool = True) -> None:
    """Give ``draft`` the name ``path``; a folder that had it gets the draft's name.

    Raises:
        StorageError: the file system refuses.
    """
    with _storage_errors(path):
        if sync:
            _sync_tree(draft)
        while not (_replace(draft, path) or _exchange(draft, path) or _step_aside(draft, path)):
            pass  # another writer made or removed the target in between
        if sync:
            sync_folder(path.parent)


def recover(path: str | os.PathLike[str]) -> None:
    """Before reading a folder: bring it back if a writer was killed while it had no name.

    Only possible where the file system cannot exchange two names.
    """
    path = _absolute(path)
    if os.path.lexists(path) or not os.path.lexists(_aside(path)):
        return
    with contextlib.suppress(OSError), _locked(path.parent):
        if not os.path.lexists(path):
            os.rename(_aside(path), path)


def sync_folder(path: Path) -> None:
    """Make a folder's entries (created, renamed) durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _storage_errors(path: Path, codes: Container[int | None] | None = None) -> Iterator[None]:
    """StorageError for an OSError in the block; ``codes``: only for these ``errno``."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FastrecError) or (codes is not None and error.errno not in codes):
            raise
        raise StorageError(path, error) from error


@contextlib.contextmanager
def _draft(path: Path, create: Callable[[Path], object]) -> Iterator[Path]:
    _make_folder(path.parent)
    recover(path)
    _remove_stale(path)
    draft, lock = _locked_draft(path, create)
    try:
        yield draft
    finally:
        _remove(draft)
        os.close(lock)


def _locked_draft(path: Path, create: Callable[[Path], object]) -> tuple[Path, int]:
    """A new draft and the handle that holds its lock."""
    while True:
        draft = path.with_name(f"{_prefix(path)}{secrets.token_hex(4)}")
        create(draft)
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(draft, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if draft.exists():
                return draft, lock
            os.close(lock)  # another writer took it for a killed one's


def _new_file(draft: Path) -> None:
    # 0o666 and mkdir's 0o777: what the umask leaves of them
    os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))


def _remove_stale(path: Path) -> None:
    """Remove the drafts of killed writers."""
    pattern = re.compile(re.escape(_prefix(path)) + "[0-9a-f]{8}")
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = os.listdir(path.parent)
    for name in filter(pattern.fullmatch, names):
        with contextlib.suppress(OSError):
            handle = os.open(path.with_name(name), os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path.with_name(name))
            finally:
                os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _replace(draft: Path, path: Path) -> bool:
    """Rename; False where a folder would replace something other than an empty folder."""
    try:
        os.replace(draft, path)
    except OSError as error:
        if error.errno in _HOLDS_SOMETHING:
            return False
        raise
    return True


def _step_aside(draft: Path, path: Path) -> bool:
    """Rename in two steps, between which only :func:`recover` finds the old one; False where it is
    gone."""
    with _locked(path.parent):
        if not os.path.lexists(path):
            return False
        _remove(_aside(path))
        os.rename(path, _aside(path))
        try:
            os.rename(draft, path)
        except OSError:
            os.rename(_aside(path), path)
            raise
        os.rename(_aside(path), draft)
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system cannot, or one of them is gone."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = (_THIS_FOLDER, os.fsencode(first), _THIS_FOLDER, os.fsencode(second))
    if rename(*names, _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (*_NOT_SUPPORTED, errno.ENOENT):
        return False
    raise OSError(code, os.strerror(code), str(second))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _sync_tree(child)
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _make_folder(path: Path) -> None:
    """Make the folder and its parents; each one's entry is synced."""
    if not path.is_dir():
        _make_folder(path.parent)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
        sync_folder(path.parent)


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(path))


def _prefix(path: Path) -> str:
    return f".{path.name}.partial-"


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")
