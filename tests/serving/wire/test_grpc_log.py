"""gRPC's core writes what clients send into the log, unless it is told not to."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_PROGRAM = """
import re, socket, struct
from concurrent import futures
import fastrec.serving.server
import grpc

server = grpc.server(futures.ThreadPoolExecutor(1))
port = server.add_insecure_port("127.0.0.1:0")
server.start()

def literal(name, value):
    return b"\\0" + bytes([len(name)]) + name + bytes([len(value)]) + value

def frame(kind, flags, stream, body):
    head = struct.pack(">I", len(body))[1:] + bytes([kind, flags])
    return head + struct.pack(">I", stream) + body

headers = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/a/b"), (b":authority", b"x")]
headers += [(b"content-type", b"application/grpc"), (b"grpc-status", b"FORGED")]
block = b"".join(literal(*header) for header in headers)
with socket.create_connection(("127.0.0.1", port)) as client:
    begin = b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n"
    client.sendall(begin + frame(4, 0, 0, b"") + frame(1, 5, 1, block))
    client.settimeout(10)
    came = b""
    # The request's stream is answered or reset.
    while not re.search(rb"[\\x01\\x03][\\x00\\x04\\x05]\\x00\\x00\\x00\\x01", came):
        came += client.recv(4096)
server.stop(0).wait()
"""


@pytest.mark.parametrize("asked", [None, "ERROR"])
def test_what_clients_send_is_logged_only_where_asked(asked: str | None) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "GRPC_VERBOSITY"}
    if asked is not None:
        environment["GRPC_VERBOSITY"] = asked
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ("grpc-status" in done.stderr) == (asked is not None), done.stderr
