"""``python -m fastrec.serving.core.worker FD``: runs an engine for :mod:`.process` over a socket.

Ends when the socket closes. No torch is imported unless the engine's own factory does.
"""

from __future__ import annotations

import sys

from fastrec.serving.core.engines import EntryPoint, Source, call, open_source
from fastrec.serving.core.process import receive, send, worker_socket


def main(argv: list[str]) -> int:
    """Entry point."""
    peer = worker_socket(argv)
    try:
        order, _ = receive(peer)
        source: Source = (
            EntryPoint(order["entry"], order["options"]) if "entry" in order else order["path"]
        )
        try:
            engine = open_source(source, order["threads"])
        except Exception as error:
            send(peer, {"error": f"{type(error).__name__}: {error}"})
            return 1
        send(peer, {"spec": engine.spec.to_dict()})
        while True:
            _, arrays = receive(peer)
            ran = call(engine, arrays)
            if ran.error is not None:
                send(peer, {"error": f"{type(ran.error).__name__}: {ran.error}"})
            else:
                header = {"names": list(ran.outputs), "recall": ran.recall}
                send(peer, header, list(ran.outputs.values()))
    except (EOFError, OSError):
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
