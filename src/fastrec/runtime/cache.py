"""Files of the user's cache: whole or not there. What is corrupt or foreign counts as missing.

A file is its content behind a magic number and the content's SHA-256. Nothing in the cache is
needed: where a file cannot be written (no home, a full disk), what it would have held is made
again next time.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fastrec.files import atomic_write

_MAGIC = b"fastrec-cache-1\n"
_DIGEST = 32


def read_checked(path: Path) -> bytes | None:
    """The content, or None where the file is missing, truncated, altered or another one."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    start = len(_MAGIC) + _DIGEST
    content = data[start:]
    whole = data[: len(_MAGIC)] == _MAGIC
    if not whole or hashlib.sha256(content).digest() != data[len(_MAGIC) : start]:
        return None
    return content


def write_checked(path: Path, content: bytes) -> bool:
    """Write the file, whole or not at all; whether it is there."""
    try:
        with atomic_write(path, sync=False) as draft, draft.open("wb") as file:
            file.write(_MAGIC + hashlib.sha256(content).digest())
            file.write(content)
    except OSError:
        return False
    return True


def digest(value: Any) -> str:
    """A name for plain JSON values: hex, the same for equal ones."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
