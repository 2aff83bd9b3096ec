"""Who is calling, and what of a claim is believed.

Without an auth file every caller is trusted with the tier and tenant it names. With one, both come
from the identity that a token or a client certificate proves, and nothing else: a tier that the
identity does not hold is refused.

    {"identities": [
        {"name": "shop-front", "token_sha256": "9f86...", "tenant": "shop",
         "tiers": ["gold", "bulk"]},
        {"name": "deploy", "certificate": "deploy.example.org", "admin": true}
    ]}

``tiers``: the first is the default, the others may be asked for. ``certificate`` is the common name
or a subject alternative name of a certificate that the configured authority signed. The file holds
digests, never tokens: ``fastrec serve --new-token`` prints a token and its digest.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from fastrec.errors import ArgumentError
from fastrec.serving.wire.request_parameters import RequestParameters
from fastrec.serving.wire.status import Refused

_KEYS = {"name", "token_sha256", "certificate", "tenant", "tiers", "admin"}


@dataclass(frozen=True)
class Identity:
    """A caller.

    Args:
        name: as in the auth file.
        tenant: whose quota its requests are charged to.
        tiers: those it may use, its default first; empty = the server's default alone.
        admin: whether it may load and unload models.
        trusted: whether the tier and tenant that it claims are believed (no auth file).
    """

    name: str
    tenant: str = ""
    tiers: tuple[str, ...] = ()
    admin: bool = False
    trusted: bool = False


ANYONE = Identity("anonymous", admin=True, trusted=True)


class Auth:
    """The identities of an auth file."""

    def __init__(self, tokens: dict[str, Identity], certificates: dict[str, Identity]) -> None:
        self._tokens, self._certificates = tokens, certificates

    @classmethod
    def read(cls, path: str | Path) -> Auth:
        """Read an auth file.

        Raises:
            ArgumentError: it cannot be read, or an entry is wrong.
        """
        try:
            entries = json.loads(Path(path).read_text())["identities"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArgumentError(
                "auth", '{"identities": [...]} as JSON', f"{path}: {error!r}"
            ) from error
        if not isinstance(entries, list):
            raise ArgumentError("identities", "a list", entries)
        return cls.of(entries)

    @classmethod
    def of(cls, entries: Iterable[Any]) -> Auth:
        """Of the entries of a file's ``identities``.

        Raises:
            ArgumentError: an entry is wrong.
        """
        tokens: dict[str, Identity] = {}
        certificates: dict[str, Identity] = {}
        for entry in entries:
            identity, proofs = _identity(entry)
            for table, key in zip((tokens, certificates), proofs, strict=True):
                if key is not None and table.setdefault(key, identity) is not identity:
                    raise ArgumentError("identities", "one identity a proof", identity.name)
        if not tokens and not certificates:
            raise ArgumentError("identities", "at least one", "none")
        return cls(tokens, certificates)

    @property
    def by_certificate(self) -> bool:
        """Whether an identity needs a client certificate."""
        return bool(self._certificates)

    def identify(self, authorization: str | None, certificate_names: Iterable[str]) -> Identity:
        """The caller.

        Args:
            authorization: the header of that name, ``Bearer TOKEN``.
            certificate_names: names in the client's verified certificate.

        Raises:
            Refused: it proves no known identity.
        """
        if authorization is not None:
            scheme, _, token = authorization.partition(" ")
            if scheme.lower() == "bearer":
                # A digest is looked up, not the token compared: no timing tells a prefix.
                identity = self._tokens.get(_digest(token.strip()))
                if identity is not None:
                    return identity
        else:
            for name in certificate_names:
                identity = self._certificates.get(name)
                if identity is not None:
                    return identity
        raise Refused(
            "unauthenticated",
            "a valid token (authorization: Bearer TOKEN) or client certificate is needed",
            grpc.StatusCode.UNAUTHENTICATED,
            401,
        )


def settle(identity: Identity, parameters: RequestParameters) -> tuple[str, str]:
    """The tier and tenant that a request runs under.

    Raises:
        Refused: the identity does not hold the tier or tenant that the request claims.
    """
    if identity.trusted:
        return parameters.tier, parameters.tenant
    if parameters.tier and parameters.tier not in identity.tiers:
        raise _not_allowed(f"{identity.name} does not hold the tier it asked for")
    tenant = identity.tenant or identity.name
    if parameters.tenant and parameters.tenant != tenant:
        raise _not_allowed(f"{identity.name} does not speak for the tenant it named")
    return parameters.tier or (identity.tiers[0] if identity.tiers else ""), tenant


def new_token() -> tuple[str, str]:
    """A random token, and the digest that the auth file holds."""
    token = secrets.token_urlsafe(32)
    return token, _digest(token)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def _not_allowed(message: str) -> Refused:
    return Refused("permission_denied", message, grpc.StatusCode.PERMISSION_DENIED, 403)


def _identity(entry: Any) -> tuple[Identity, tuple[str | None, str | None]]:
    if not isinstance(entry, dict) or set(entry) - _KEYS:
        raise ArgumentError("identities", f"objects with keys among {sorted(_KEYS)}", entry)
    name, tiers = entry.get("name"), entry.get("tiers", [])
    token, certificate = entry.get("token_sha256"), entry.get("certificate")
    if not isinstance(name, str) or not name:
        raise ArgumentError("identities", "a name in each", name)
    if not isinstance(tiers, list) or not all(isinstance(tier, str) for tier in tiers):
        raise ArgumentError(f"identities[{name!r}].tiers", "a list of names", tiers)
    if token is None and certificate is None:
        raise ArgumentError(f"identities[{name!r}]", "token_sha256 or certificate", "neither")
    for key, value in (("certificate", certificate), ("tenant", entry.get("tenant", ""))):
        if value is not None and not isinstance(value, str):
            raise ArgumentError(f"identities[{name!r}].{key}", "text", value)
    if token is not None and not (
        isinstance(token, str)
        and len(token) == 64
        and set(token.lower()) <= set("0123456789abcdef")
    ):
        # The value may be a token put there by mistake: it is not shown.
        raise ArgumentError(f"identities[{name!r}].token_sha256", "64 hexadecimal digits", "others")
    admin = entry.get("admin", False)
    if not isinstance(admin, bool):
        raise ArgumentError(f"identities[{name!r}].admin", "true or false", admin)
    identity = Identity(name, entry.get("tenant", ""), tuple(tiers), admin)
    return identity, (None if token is None else token.lower(), certificate)
