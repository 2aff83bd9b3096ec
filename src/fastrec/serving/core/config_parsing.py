"""Frozen dataclasses from plain values and files; errors name the path of the wrong value."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from fastrec.errors import ConfigError

Own = TypeVar("Own", bound="ParsedConfig")


def check(
    name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False
) -> None:
    """Check a number.

    Args:
        name: its path in the configuration, for the error.
        value: what was given.
        low, high: bounds, both allowed.
        above: ``low`` itself is not allowed.

    Raises:
        ConfigError: it is no number within the bounds.
    """
    fine = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if not fine or value > high or value < low or (above and value == low):
        wanted = f"a number above {low:g}" if above else f"a number from {low:g}"
        raise ConfigError(
            f"{name}: expected {wanted}{f' to {high:g}' if high < math.inf else ''}, got {value!r}"
        )


class ParsedConfig:
    """Base of settings dataclasses: from and to plain values and files."""

    @classmethod
    def from_dict(cls: type[Own], values: Mapping[str, Any]) -> Own:
        """From plain JSON types; absent keys take their defaults.

        Raises:
            ConfigError: an unknown key or a wrong value, with its path.
        """
        made = _build(cls, values, "")
        assert isinstance(made, cls)
        return made

    @classmethod
    def load(cls: type[Own], path: str | Path) -> Own:
        """From a ``.json`` or ``.toml`` file.

        Raises:
            ConfigError: it cannot be read, is neither, or holds an unknown key or wrong value.
        """
        path = Path(path)
        try:
            text = path.read_text()
            values = _toml(text) if path.suffix == ".toml" else json.loads(text)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` reverses it."""
        plain = json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[call-overload]
        assert isinstance(plain, dict)
        return plain


def _toml(text: str) -> Any:
    if sys.version_info < (3, 11):
        raise ConfigError("TOML needs Python 3.11; JSON is read by all")
    import importlib

    return importlib.import_module("tomllib").loads(text)


def _build(wanted: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type ``wanted``."""
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where or 'configuration'}: expected a table, got {value!r}")
        types_of = typing.get_type_hints(wanted)
        names = {f.name for f in dataclasses.fields(wanted)}
        if unknown := sorted(set(value) - names):
            raise ConfigError(f"{_at(where, unknown[0])}: expected one of {sorted(names)}, got it")
        parts = {key: _build(types_of[key], part, _at(where, key)) for key, part in value.items()}
        try:
            return wanted(**parts)
        except TypeError as error:
            raise ConfigError(f"{where or 'configuration'}: {error}") from error
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _build(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        return tuple(_build(args[0], part, where) for part in value)
    if origin is not None:  # Mapping
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a table, got {value!r}")
        try:
            keys = [args[0](key) for key in value]
        except ValueError as error:
            raise ConfigError(
                f"{where}: expected keys that are integers, got {list(value)}"
            ) from error
        built = [_build(args[1], part, _at(where, key)) for key, part in value.items()]
        return dict(zip(keys, built, strict=True))
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ConfigError(f"{where}: expected {wanted.__name__}, got {value!r}")
    return value


def _at(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
