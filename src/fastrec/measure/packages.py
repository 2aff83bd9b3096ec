"""Which packages are installed, told without importing them."""

from __future__ import annotations

from importlib import metadata, util


def package_versions(*packages: str) -> dict[str, str]:
    """Package -> installed version, from the metadata (nothing is imported)."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def missing(module: str) -> bool:
    """Whether ``import module`` would fail for want of the package."""
    try:
        return util.find_spec(module) is None
    except (ModuleNotFoundError, ValueError):
        return True
