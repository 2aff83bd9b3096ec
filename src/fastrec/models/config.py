"""Configs that are saved as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from fastrec.errors import ArgumentError

ConfigT = TypeVar("ConfigT", bound="Config")


@dataclass(frozen=True)
class Config:
    """Base of the configs: to a dict of plain JSON types and back."""

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain JSON types; :meth:`from_dict` reverses it."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
        """Reverse of :meth:`to_dict`; what is missing takes its default.

        Raises:
            ArgumentError: a key is unknown, or one without a default is missing.
        """
        fields = dataclasses.fields(cls)
        known = {field.name for field in fields}
        if unknown := sorted(set(values) - known):
            raise ArgumentError("values", f"keys among {sorted(known)}", unknown)
        required = [
            f.name
            for f in fields
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing := [name for name in required if name not in values]:
            raise ArgumentError("values", " and ".join(required), f"no {', '.join(missing)}")
        return cls(**values)
