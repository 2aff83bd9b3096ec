"""TLS for both ports."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrec.errors import ArgumentError


@dataclass(frozen=True)
class Tls:
    """Files in PEM form.

    Args:
        key, certificate: the server's.
        client_authority: certificates that client certificates must be signed by; None = clients
            need none.
    """

    key: Path
    certificate: Path
    client_authority: Path | None = None

    def read(self) -> tuple[bytes, bytes, bytes | None]:
        """Key, certificate and authority, for gRPC.

        Raises:
            ArgumentError: a file cannot be read.
        """
        try:
            authority = self.client_authority
            signed_by = None if authority is None else authority.read_bytes()
            return self.key.read_bytes(), self.certificate.read_bytes(), signed_by
        except OSError as error:
            raise ArgumentError(
                "tls", "readable PEM files", f"{error.filename}: {error}"
            ) from error

    def context(self) -> ssl.SSLContext:
        """For a listening socket.

        Raises:
            ArgumentError: a file cannot be read, or they do not belong together.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certificate, self.key)
            if self.client_authority is not None:
                context.load_verify_locations(self.client_authority)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ssl.SSLError) as error:
            raise ArgumentError(
                "tls", "readable PEM files that belong together", str(error)
            ) from error
        return context


def names_of(certificate: dict[str, Any] | None) -> tuple[str, ...]:
    """Common name and alternative names of a peer's certificate, as ``ssl`` reports it."""
    certificate = certificate or {}
    names = [
        value
        for part in certificate.get("subject", ())
        for key, value in part
        if key == "commonName"
    ]
    names += [value for _, value in certificate.get("subjectAltName", ())]
    return tuple(names)
