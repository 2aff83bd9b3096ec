"""``python -m fastrec.serving.compile CHECKPOINT ENGINE DIGEST``: what ``fastrec serve`` runs for a
model that ``fastrec.save`` wrote, in a process that may import torch.

The engine is one of the checkpoint whose manifest has that digest, or none is written: the folder
may be replaced meanwhile.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from fastrec.errors import FastrecError

MANIFEST = "model.json"
REPLACED = 3  # the exit status where the checkpoint is another one


def digest_of(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint's manifest, which holds the checksum of its weights.

    Raises:
        OSError: there is none.
    """
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile; the last line on stderr says what went wrong."""
    checkpoint, engine, digest = sys.argv[1:] if arguments is None else arguments
    try:
        from fastrec.compress import load
        from fastrec.exporters.model_spec import spec_of
        from fastrec.runtime.compiler import compile

        before = digest_of(Path(checkpoint))
        model = load(checkpoint)
        if not before == digest_of(Path(checkpoint)) == digest:
            return REPLACED
        examples = spec_of(model, ()).sample()
        made = compile(model, examples, "native", settings={"executor": "plan"})
        made.save(engine)
    except (FastrecError, OSError) as error:
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
