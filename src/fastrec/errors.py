"""Typed errors: each names the argument, what was expected and what came.

Every error fastrec raises on purpose derives from :class:`FastrecError`, so a service can catch one
class; each also derives from the built-in a Python user would expect (ValueError, TypeError, ...).
"""

from __future__ import annotations

# The name on PyPI, where "fastrec" is another project's package.
DISTRIBUTION = "fastrec-kernels"


def install_command(*extras: str) -> str:
    """The shell command that installs fastrec with ``extras``, such as ``"torch"``."""
    return f"pip install '{DISTRIBUTION}[{','.join(extras)}]'"


def not_installed(package: str, extra: str) -> str:
    """Why something cannot run: ``package``, which ``extra`` brings, is missing."""
    return f"{package} is not installed: {install_command(extra)}"


class FastrecError(Exception):
    """Base of every error that fastrec raises on purpose."""


class ArgumentError(FastrecError, ValueError):
    """An argument has a wrong value, shape or size.

    Args:
        argument: name of the argument as the caller wrote it, e.g. ``"x_u8"``.
        expected: what would have been accepted, e.g. ``"shape [M, 1024]"``.
        got: what came, e.g. ``"shape [50, 512]"``.
    """

    def __init__(self, argument: str, expected: str, got: object) -> None:
        self.argument, self.expected, self.got = argument, expected, got
        super().__init__(f"{argument}: expected {expected}, got {got}")

    def __reduce__(self) -> tuple[type, tuple[str, str, object]]:
        return type(self), (self.argument, self.expected, self.got)


class ShapeError(ArgumentError):
    """A tensor has the wrong rank or size."""


class DtypeError(ArgumentError, TypeError):
    """A tensor or argument has the wrong dtype or type."""


class DeviceError(ArgumentError):
    """A tensor lives on a device that the operation cannot use."""


class IdRangeError(ArgumentError, IndexError):
    """An id lies outside its table."""


class BudgetError(ArgumentError):
    """No choice that was searched keeps within a budget; says what is the nearest that can be had.

    Args:
        expected: what could have been asked for, e.g. ``"at least 0.41 ms"``.
        got: what was asked for.
        nearest: limit -> the nearest value reached, e.g. ``{"latency_ms": 0.41}``.
    """

    def __init__(self, expected: str, got: object, nearest: dict[str, float]) -> None:
        self.nearest = nearest
        super().__init__("budget", expected, got)

    def __reduce__(self) -> tuple[type, tuple[str, object, dict[str, float]]]:  # type: ignore[override]
        return type(self), (self.expected, self.got, self.nearest)


class BackendError(FastrecError, RuntimeError):
    """A backend that was asked for by name cannot run; the message says why."""


class IsaError(BackendError):
    """A forced instruction set is unknown or this CPU (or its OS) lacks it."""


class CudaError(BackendError):
    """CUDA refused a launch or a query.

    Args:
        what: what was asked of it, e.g. an op's id.
        code: the ``cudaError_t``, e.g. 35 where the driver is missing or too old.
        message: CUDA's own words for it.
    """

    def __init__(self, what: str, code: int, message: str) -> None:
        self.what, self.code, self.message = what, code, message
        super().__init__(f"{what}: CUDA error {code}: {message}")

    def __reduce__(self) -> tuple[type, tuple[str, int, str]]:
        return type(self), (self.what, self.code, self.message)


class MissingDependencyError(BackendError, ImportError):
    """An optional package is not installed; the message names the command that installs it.

    Args:
        package: name of the package, e.g. ``"polars"``.
        extra: extra of the distribution that brings it, e.g. ``"data"``.
        purpose: what needs it, e.g. ``"fastrec.export"``.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.package, self.extra, self.purpose = package, extra, purpose
        super().__init__(f"{purpose} needs {package}: {install_command(extra)}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.package, self.extra, self.purpose)


class ArtifactError(FastrecError, ValueError):
    """A saved file is truncated, altered, too new, or not a fastrec artifact."""


class StorageError(FastrecError, OSError):
    """A file or folder cannot be written: disk full, read-only folder and the like.

    Args:
        path: the file or folder that was to be written.
        error: what the system said; its ``errno`` is kept.
    """

    def __init__(self, path: object, error: OSError) -> None:
        self.path, self.error = path, error
        super().__init__(error.errno, error.strerror)

    def __str__(self) -> str:
        return f"{self.path}: cannot be written ({self.error.strerror or self.error})"

    def __reduce__(self) -> tuple[type, tuple[object, OSError]]:
        return type(self), (self.path, self.error)


class DataError(FastrecError, ValueError):
    """A log holds something that cannot be used; names file and line where there is one."""


class ServingError(FastrecError, RuntimeError):
    """A request or an order to the server could not be carried out."""


class ConfigError(ServingError, ValueError):
    """A server's configuration holds an unknown key or a wrong value; names where it stands."""


class FallbackWarning(UserWarning):
    """A model that was to run on fastrec's kernels runs, in whole, on something slower."""
