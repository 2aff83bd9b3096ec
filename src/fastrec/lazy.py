"""Public names of a package that are imported on first use (PEP 562).

``import fastrec`` must stay light, and where torch is missing a name that needs it must say how to
install it. No more than this file is needed for either, so no library is.
"""

import importlib

from fastrec.errors import MissingDependencyError

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing costs more than all else here
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any


def attach(
    package: str, names: "Mapping[str, Sequence[str]]", submodules: "Sequence[str]" = ()
) -> "tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]":
    """Values for a package's ``__getattr__``, ``__dir__`` and ``__all__``.

    Args:
        package: its ``__name__``.
        names: module, relative to the package, such as ``".pruning"`` -> public names in it.
        submodules: modules of the package that are public themselves.

    Raises:
        MissingDependencyError: by a name whose module needs torch, where that is not installed.
    """
    where = {name: module for module, held in names.items() for name in held}
    public = sorted([*where, *submodules])

    def __getattr__(name: str) -> "Any":
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(where[name], package)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise MissingDependencyError("torch", "torch", f"{package}.{name}") from error
        return getattr(module, name)

    return __getattr__, lambda: public, public
