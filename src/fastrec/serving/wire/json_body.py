"""Bodies of inference requests over HTTP: JSON, with binary tensors behind it.

``json.loads`` holds the GIL, which stops the event loop: a body of 16 MiB for seconds. Large ones
are therefore decoded by a process of their own (``python -m fastrec.serving.wire.json_body FD``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np

from fastrec.errors import ArgumentError, FastrecError
from fastrec.serving.core.process import receive, send, start_worker, worker_socket
from fastrec.serving.core.request import Kind, Rejected
from fastrec.serving.wire.tensors import from_raw
from fastrec.serving.wire.tensors import from_values as tensor_of

# Decoded in the event loop: some 5 ms at most.
_INLINE_BYTES = 64 << 10
_MOST_OUTPUTS = 256
_MAX_ID = 128


class InferBody(NamedTuple):
    """A decoded request.

    Attributes:
        parameters: of the request, plain values.
        request_id: "" where it has none.
        wanted: output asked for -> whether it should come binary; empty = all.
        inputs: by name.
    """

    parameters: dict[str, Any]
    request_id: str
    wanted: dict[str, bool]
    inputs: dict[str, np.ndarray]


def read_object(body: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ArgumentError: it is none, or holds NaN or infinities, which JSON has not.
    """
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        got = f"{len(body)} bytes that do not parse as JSON"
        raise ArgumentError("body", "a JSON object", got) from None
    if not isinstance(value, dict):
        raise ArgumentError("body", "a JSON object", type(value).__name__)
    return value


def decode(head: bytes, binary: bytes | memoryview) -> InferBody:
    """Decode and check the JSON and the binary part of a body.

    Raises:
        ArgumentError, DtypeError, ShapeError: the part that is wrong, named.
    """
    body = read_object(head)
    parameters = body.get("parameters", {})
    if not isinstance(parameters, dict):
        raise ArgumentError("parameters", "an object", type(parameters).__name__)
    plain = {k: v for k, v in parameters.items() if not isinstance(v, dict | list)}
    request_id = body.get("id", "")
    if not isinstance(request_id, str) or len(request_id) > _MAX_ID:
        raise ArgumentError("id", f"text of up to {_MAX_ID} characters", type(request_id).__name__)
    wanted = _outputs(body.get("outputs"), bool(plain.get("binary_data_output")))
    return InferBody(plain, request_id, wanted, _inputs(body.get("inputs"), memoryview(binary)))


class BodyDecoder:
    """Decodes bodies; large ones in a process that is started for the first of them."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._peer: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    async def __call__(self, head: bytes, binary: memoryview) -> InferBody:
        """See :func:`decode`.

        Raises:
            Rejected: INVALID, the part of a large body that is wrong; NOT_READY, the process died.
        """
        if len(head) <= _INLINE_BYTES:
            return decode(head, binary)
        async with self._lock:
            try:
                header, arrays = await asyncio.to_thread(self._ask, head, binary)
            except (EOFError, OSError) as error:
                self.close()
                raise Rejected(Kind.NOT_READY, "the JSON decoder died: send again", 1.0) from error
        if "error" in header:
            raise Rejected(Kind.INVALID, header["error"])
        inputs = dict(zip(header["names"], arrays, strict=True))
        return InferBody(header["parameters"], header["id"], header["wanted"], inputs)

    def _ask(self, head: bytes, binary: memoryview) -> tuple[dict[str, Any], list[np.ndarray]]:
        if self._peer is None:
            self._process, self._peer = start_worker("fastrec.serving.wire.json_body")
        send(self._peer, {}, [np.frombuffer(part, np.uint8) for part in (head, binary)])
        return receive(self._peer)

    def close(self) -> None:
        """End the process. Closing twice is harmless."""
        if self._peer is not None and self._process is not None:
            self._peer.close()
            self._process.kill()
            self._process.wait()
        self._peer = self._process = None


def _no_constant(text: str) -> None:
    raise ValueError(text)


def _inputs(rows: Any, binary: memoryview) -> dict[str, np.ndarray]:
    if not isinstance(rows, list) or not rows:
        raise ArgumentError("inputs", "a list of tensors", type(rows).__name__)
    arrays: dict[str, np.ndarray] = {}
    at = 0
    for row in rows:
        if not isinstance(row, dict):
            raise ArgumentError("inputs", "objects", type(row).__name__)
        name, kind, shape = row.get("name"), row.get("datatype"), row.get("shape")
        if not isinstance(name, str) or not isinstance(kind, str) or len(name) > 256:
            raise ArgumentError("inputs", "a name and a datatype in each", str(row)[:64])
        if name in arrays:
            raise ArgumentError(name[:64], "one input of this name", "two")
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            raise ArgumentError(name[:64], "a shape of whole numbers", str(shape)[:64])
        parameters = row.get("parameters") or {}
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(binary) - at:
                raise ArgumentError(name[:64], "a binary_data_size within the body", size)
            arrays[name] = from_raw(name, kind, shape, binary[at : at + size])
            at += size
        else:
            arrays[name] = tensor_of(name, kind, shape, _flat(name, row.get("data")))
    if at != len(binary):
        raise ArgumentError("body", f"{at} binary bytes as the inputs say", f"{len(binary)}")
    return arrays


def _flat(name: str, data: Any) -> list[Any]:
    """JSON data, nested as the shape or flat."""
    if not isinstance(data, list):
        raise ArgumentError(name[:64], "data: a list", type(data).__name__)
    for _ in range(8):
        if not any(isinstance(part, list) for part in data):
            return data
        if not all(isinstance(part, list) for part in data):
            break
        data = [value for part in data for value in part]
    raise ArgumentError(name[:64], "a list, flat or nested as the shape", "another")


def _outputs(rows: Any, binary: bool) -> dict[str, bool]:
    if rows is None:
        return {}
    if not isinstance(rows, list) or len(rows) > _MOST_OUTPUTS:
        raise ArgumentError("outputs", f"a list of up to {_MOST_OUTPUTS}", type(rows).__name__)
    wanted = {}
    for row in rows:
        name = row.get("name") if isinstance(row, dict) else None
        if not isinstance(name, str) or len(name) > 256:
            raise ArgumentError("outputs", "objects with a name", str(row)[:64])
        parameters = row.get("parameters") or {}
        own = parameters.get("binary_data") if isinstance(parameters, dict) else None
        wanted[name] = binary if own is None else bool(own)
    return wanted


def main(argv: list[str]) -> int:
    """Entry point of the process; ends when the socket closes."""
    peer = worker_socket(argv)
    with contextlib.suppress(EOFError, OSError):
        while True:
            _, (head, binary) = receive(peer)
            try:
                body = decode(head.tobytes(), binary.tobytes())
            except FastrecError as error:
                send(peer, {"error": str(error)})
                continue
            # Other keys are ignored, and could be many.
            used = ("priority", "timeout", "tier", "tenant", "binary_data_output")
            header = {
                "parameters": {k: body.parameters[k] for k in used if k in body.parameters},
                "id": body.request_id,
                "wanted": body.wanted,
                "names": list(body.inputs),
            }
            send(peer, header, list(body.inputs.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
