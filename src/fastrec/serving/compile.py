"""``python -m fastrec.serving.compile CHECKPOINT ENGINE``: what ``fastrec serve`` runs for a model
that ``fastrec.save`` wrote, in a process that may import torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastrec.errors import FastrecError


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile; the last line on stderr says what went wrong."""
    checkpoint, engine = sys.argv[1:] if arguments is None else arguments
    try:
        from fastrec.compress import load
        from fastrec.exporters.model_spec import spec_of
        from fastrec.runtime.compiler import compile

        model = load(checkpoint)
        examples = spec_of(model, ()).sample()
        made = compile(model, examples, "native", settings={"executor": "plan"})
        made.save(engine)
    except FastrecError as error:
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
