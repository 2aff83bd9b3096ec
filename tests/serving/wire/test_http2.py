"""gRPC over HTTP/2: what peers that keep to the protocol get, and what becomes of those that don't.

Peers here are bytes and a transport that keeps what is written, or gRPC's own client.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import random
import struct

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("hpack", reason="fastrec[serve] is not installed")

from hpack import Encoder

from fastrec.serving.load.caller import Caller, trailers_of
from fastrec.serving.wire import frames as h2
from fastrec.serving.wire.connection import Connection
from fastrec.serving.wire.grpc_host import GrpcHost
from fastrec.serving.wire.grpc_server import Limits

GOOD = h2.PREFACE + h2.settings({})
HEADERS = ((":method", "POST"), (":path", "/a.B/Echo"), ("content-type", "application/grpc"))


class Transport(asyncio.Transport):
    """Keeps what is written, as frames."""

    def __init__(self):
        super().__init__()
        self.written, self.closing = b"", False

    def write(self, data):
        if not self.closing:
            self.written += data

    def is_closing(self):
        return self.closing

    def close(self):
        self.closing = True

    abort = close

    def frames(self):
        """(kind, flags, stream, payload) of each frame written so far; they are then forgotten."""
        found, data = [], self.written.removeprefix(h2.PREFACE)
        self.written = b""
        while data:
            size = int.from_bytes(data[:3], "big")
            found.append((data[3], data[4], int.from_bytes(data[5:9], "big"), data[9 : 9 + size]))
            data = data[9 + size :]
        return found


async def echo(request, context):
    if request == b"abort":
        await context.abort(grpc.StatusCode.DATA_LOSS, "so it is: 100 %\n")
    if request == b"fail":
        raise OSError("/secret")
    if request.startswith(b"large"):
        return bytes(int(request[5:]))
    return request


async def chat(requests, context):
    async for request in requests:
        yield request * 2


def handlers():
    calls = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Chat": grpc.stream_stream_rpc_method_handler(chat),
    }
    return [grpc.method_handlers_generic_handler("a.B", calls)]


@contextlib.asynccontextmanager
async def hosted(**limits):
    """A host whose connections are made by hand, and a way to make them."""
    host = GrpcHost(handlers(), "127.0.0.1:0", Limits(**limits))
    host._loop = asyncio.get_running_loop()
    made = []

    def connect(start=GOOD):
        connection = Connection(host._shared)
        transport = Transport()
        connection.connection_made(transport)
        made.append(connection)
        connection.data_received(start)
        transport.frames()
        return connection, transport

    try:
        yield connect
    finally:
        for connection in made:
            connection.connection_lost(None)
        await host.stop()


def message(data, compressed=0):
    return bytes((compressed,)) + struct.pack(">I", len(data)) + data


def call(data=b"hello", stream=1, headers=HEADERS):
    """The bytes of a whole call."""
    block = Encoder().encode(headers)
    return h2.frame(h2.HEADERS, h2.END_HEADERS, stream, block) + h2.frame(
        h2.DATA, h2.END_STREAM, stream, message(data)
    )


def run(work):
    return asyncio.run(work)


async def answered(transport):
    """Headers and data of each stream's answer, once the loop has nothing more to do."""
    for _ in range(20):
        await asyncio.sleep(0)
    found: dict[int, list] = {}
    reader = h2.Reader(1 << 16)
    for kind, _, stream, payload in transport.frames():
        told = found.setdefault(stream, [{}, b""])
        if kind == h2.HEADERS:
            told[0].update(reader.read(payload))
        elif kind == h2.DATA:
            told[1] += payload
    return found


# --- peers that keep to the protocol


def test_a_call_however_its_bytes_are_cut():
    async def main():
        whole = h2.PREFACE + h2.settings({}) + call()
        for step in (1, 2, 7, 10_000):
            async with hosted() as connect:
                connection, transport = connect(b"")
                for i in range(0, len(whole), step):
                    connection.data_received(whole[i : i + step])
                headers, data = (await answered(transport))[1]
                assert headers[":status"] == "200"
                assert headers["grpc-status"] == "0"
                assert data == message(b"hello")
                assert not transport.closing

    run(main())


def test_headers_in_pieces_padding_priorities_and_unknown_frames():
    async def main():
        block = Encoder().encode(HEADERS)
        padded = bytes((4,)) + b"\x00\x00\x00\x00\x07" + block[:5] + bytes(4)
        data = bytes((3,)) + message(b"hello") + bytes(3)
        sent = (
            h2.frame(0x2A, 0, 0, b"from the future")
            + h2.frame(h2.HEADERS, h2.PADDED | h2.WITH_PRIORITY, 1, padded)
            + h2.frame(h2.CONTINUATION, 0, 1, block[5:9])
            + h2.frame(h2.CONTINUATION, h2.END_HEADERS, 1, block[9:])
            + h2.frame(h2.PRIORITY, 0, 1, bytes(5))
            + h2.frame(h2.DATA, h2.PADDED, 1, data[:1] + data[1:6] + data[-3:])
            + h2.frame(h2.DATA, h2.END_STREAM, 1, data[6:-3])
        )
        async with hosted() as connect:
            connection, transport = connect()
            connection.data_received(sent)
            assert (await answered(transport))[1][1] == message(b"hello")

    run(main())


def test_tables_that_clients_fill_before_they_know_our_size():
    """One encoder, whose table grows, over several calls and two connections."""

    async def main():
        async with hosted() as connect:
            for _ in range(2):
                connection, transport = connect()
                encoder = Encoder()
                for stream in (1, 3, 5, 7):
                    if stream == 5:
                        encoder.header_table_size = 0  # our settings have arrived
                    extra = (("fastrec-tier", f"t{stream % 4}"), ("x-bin", "AAE"))
                    block = encoder.encode((*HEADERS, *extra))
                    connection.data_received(
                        h2.frame(h2.HEADERS, h2.END_HEADERS, stream, block)
                        + h2.frame(h2.DATA, h2.END_STREAM, stream, message(b"x"))
                    )
                found = await answered(transport)
                assert [found[s][0]["grpc-status"] for s in (1, 3, 5, 7)] == ["0"] * 4

    run(main())


def test_answers_wait_for_room_in_both_windows():
    async def main():
        async with hosted() as connect:
            connection, transport = connect(h2.PREFACE + h2.settings({h2.INITIAL_WINDOW: 100}))
            connection.data_received(call(b"large70000"))
            assert len((await answered(transport))[1][1]) == 100
            connection.data_received(h2.settings({h2.INITIAL_WINDOW: 200}))
            assert len((await answered(transport))[1][1]) == 100
            connection.data_received(h2.number(h2.WINDOW_UPDATE, 1, 1 << 20))
            # What is left of the connection's own window.
            assert len((await answered(transport))[1][1]) == h2.WINDOW - 200
            connection.data_received(h2.number(h2.WINDOW_UPDATE, 0, 1 << 20))
            headers, data = (await answered(transport))[1]
            assert len(data) == 70_005 - h2.WINDOW
            assert headers["grpc-status"] == "0"
            assert not connection.streams

    run(main())


def test_statuses():
    async def main():
        async with hosted() as connect:
            connection, transport = connect()
            other = ((":method", "POST"), (":path", "/a.B/No"), HEADERS[2])
            packed = (*HEADERS, ("grpc-encoding", "snappy"))
            connection.data_received(
                call(b"abort")
                + call(b"fail", 3)
                + call(b"", 5, other)
                + h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 7, Encoder().encode(HEADERS))
                + call(b"", 9, (HEADERS[0], HEADERS[1], ("content-type", "text/html")))
                + h2.frame(h2.HEADERS, h2.END_HEADERS, 11, Encoder().encode(packed))
                + h2.frame(h2.DATA, h2.END_STREAM, 11, message(b"?", 1))
                + call(b"x", 13, (*HEADERS, ("grpc-timeout", "soon")))
            )
            found = await answered(transport)
            told = {
                s: (f[0].get("grpc-status"), f[0].get("grpc-message")) for s, f in found.items()
            }
            assert told[1] == ("15", "so it is: 100 %25%0A")
            assert told[3] == ("13", "internal error")
            assert told[5] == ("12", "Method not found!")
            assert told[7] == ("13", "not one whole message")
            assert found[9][0] == {":status": "415"}
            assert told[11][0] == "12"
            assert "snappy" in told[11][1]
            assert found[13][0] == {":status": "400"}
            assert not connection.streams

    run(main())


def test_grpcs_own_client_compressed_large_and_streaming():
    async def main():
        host = GrpcHost(handlers(), "127.0.0.1:0", Limits(message_mib=2))
        await host.start()
        options = [("grpc.max_receive_message_length", 8 << 20)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{host.port}", options=options) as channel:
            unary = channel.unary_unary("/a.B/Echo")
            for kind in (grpc.Compression.Gzip, grpc.Compression.Deflate):
                assert await unary(b"z" * 10_000, compression=kind) == b"z" * 10_000
            assert await unary(b"y" * 1_500_000) == b"y" * 1_500_000
            assert len(await unary(b"large3000000")) == 3_000_000
            # Small on the wire, and not when it is unpacked.
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await unary(bytes(3 << 20), compression=grpc.Compression.Gzip)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            stream = channel.stream_stream("/a.B/Chat")()
            for text in (b"a", b"bc"):
                await stream.write(text)
                assert await stream.read() == text * 2
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
            assert await stream.code() is grpc.StatusCode.OK
        await host.stop()

    run(main())


def test_connections_age_and_lose_no_call():
    """Clients are sent away after a while, and go on over another connection."""

    async def main():
        host = GrpcHost(handlers(), "127.0.0.1:0", Limits(connection_age_s=0.1))
        await host.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{host.port}") as channel:
            unary = channel.unary_unary("/a.B/Echo")
            seen = set()
            end = asyncio.get_running_loop().time() + 0.5
            while asyncio.get_running_loop().time() < end:
                assert await unary(b"x", timeout=20) == b"x"
                seen |= {id(c) for c in host._shared.connections}
        assert len(seen) > 1
        await host.stop()

    run(main())


# --- peers that don't


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (h2.frame(h2.DATA, 0, 1, b"x"), h2.PROTOCOL_ERROR),
        (h2.frame(h2.DATA, 0, 0, b"x"), h2.PROTOCOL_ERROR),
        (h2.frame(h2.HEADERS, h2.END_HEADERS, 2, b"\x82"), h2.PROTOCOL_ERROR),
        (h2.frame(h2.HEADERS, h2.END_HEADERS, 0, b"\x82"), h2.PROTOCOL_ERROR),
        (h2.frame(h2.HEADERS, h2.END_HEADERS, 1, b"\xff\xff\xff\x7f"), h2.COMPRESSION_ERROR),
        (h2.frame(h2.HEADERS, h2.END_HEADERS | h2.PADDED, 1, b"\x09\x82"), h2.PROTOCOL_ERROR),
        (h2.frame(h2.HEADERS, h2.WITH_PRIORITY, 1, b"\x00"), h2.FRAME_SIZE_ERROR),
        (h2.frame(h2.HEADERS, 0, 1, b"\x82") + h2.frame(h2.PING, 0, 0, bytes(8)), 1),
        (h2.frame(h2.CONTINUATION, h2.END_HEADERS, 1, b"\x82"), h2.PROTOCOL_ERROR),
        (h2.frame(h2.WINDOW_UPDATE, 0, 0, bytes(4)), h2.PROTOCOL_ERROR),
        (h2.number(h2.WINDOW_UPDATE, 0, 2**31 - 1), h2.FLOW_CONTROL_ERROR),
        (h2.frame(h2.WINDOW_UPDATE, 0, 0, b"x"), h2.FRAME_SIZE_ERROR),
        (h2.number(h2.RST_STREAM, 9, 0), h2.PROTOCOL_ERROR),
        (h2.number(h2.RST_STREAM, 0, 0), h2.PROTOCOL_ERROR),
        (h2.frame(h2.PING, 0, 0, b"short"), h2.FRAME_SIZE_ERROR),
        (h2.frame(h2.PING, 0, 3, bytes(8)), h2.PROTOCOL_ERROR),
        (h2.settings({h2.INITIAL_WINDOW: 2**31}), h2.FLOW_CONTROL_ERROR),
        (h2.frame(h2.SETTINGS, 0, 0, b"12345"), h2.FRAME_SIZE_ERROR),
        (h2.frame(h2.PUSH_PROMISE, 0, 1, bytes(4)), h2.PROTOCOL_ERROR),
        (h2.frame(h2.GOAWAY, 0, 0, b""), h2.FRAME_SIZE_ERROR),
        (b"\x01\x00\x00\x00\x00\x00\x00\x00\x01", h2.FRAME_SIZE_ERROR),
        (
            call()[:-20] and h2.frame(h2.HEADERS, h2.END_HEADERS, 1, Encoder().encode(HEADERS)) * 2,
            1,
        ),
    ],
)
def test_who_breaks_the_protocol_is_told_so_and_is_gone(sent, code):
    async def main():
        async with hosted() as connect:
            connection, transport = connect()
            connection.data_received(sent)
            kind, _, _, payload = transport.frames()[-1]
            assert (kind, int.from_bytes(payload[4:8], "big")) == (h2.GOAWAY, code)
            assert transport.closing

    run(main())


def test_what_is_no_http2():
    async def main():
        async with hosted() as connect:
            for start in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", b"PRI * HTTP/1"):
                assert connect(start)[1].closing
            connection, transport = connect(h2.PREFACE)
            connection.data_received(h2.frame(h2.PING, 0, 0, bytes(8)))  # before its settings
            assert transport.closing

    run(main())


def test_what_a_peer_may_make_us_hold_is_bounded():
    async def main():
        async with hosted(streams=3, connections=2, message_mib=1) as connect:
            connection, transport = connect()
            block = Encoder().encode(HEADERS)
            for stream in (1, 3, 5, 7):
                connection.data_received(h2.frame(h2.HEADERS, h2.END_HEADERS, stream, block))
            assert transport.frames()[-1][2:] == (7, struct.pack(">I", h2.REFUSED_STREAM))
            assert len(connection.streams) == 3
            connect()
            assert connect()[1].closing  # the third connection

            # A message that says it is too long is refused before it is here.
            connection.data_received(h2.frame(h2.DATA, 0, 1, b"\x00\x7f\xff\xff\xff"))
            assert (await answered(transport))[1][0]["grpc-status"] == "8"
            connection.data_received(h2.frame(h2.DATA, 0, 1, bytes(1000)))  # still on its way
            assert not transport.closing

            # Headers without an end.
            connection.data_received(h2.frame(h2.HEADERS, 0, 9, block))
            for _ in range(3):
                if not transport.closing:
                    connection.data_received(h2.frame(h2.CONTINUATION, 0, 9, bytes(8000)))
            assert transport.closing

    run(main())


def test_more_data_than_there_was_room_for():
    async def main():
        async with hosted(message_mib=4) as connect:
            connection, transport = connect()
            block = Encoder().encode(HEADERS)
            connection.data_received(h2.frame(h2.HEADERS, h2.END_HEADERS, 1, block))
            head = b"\x00" + struct.pack(">I", 4 << 20)
            connection.data_received(h2.frame(h2.DATA, 0, 1, head))
            for _ in range(40):  # as it comes it is given room
                connection.data_received(h2.frame(h2.DATA, 0, 1, bytes(16_000)))
            kinds = [f[0] for f in transport.frames()]
            assert kinds == [h2.WINDOW_UPDATE]
            assert not transport.closing

    run(main())


def test_a_peer_that_reads_nothing_gets_nothing_read():
    async def main():
        async with hosted() as connect:
            connection, transport = connect()
            told = []
            transport.pause_reading = lambda: told.append("pause")
            transport.resume_reading = lambda: told.append("resume")
            connection.pause_writing()
            connection.resume_writing()
            assert told == ["pause", "resume"]

    run(main())


def test_a_reset_cancels_the_call():
    async def main():
        over = asyncio.Event()

        async def wait(request, context):
            try:
                await asyncio.sleep(60)
            finally:
                over.set()

        generic = grpc.method_handlers_generic_handler(
            "a.B", {"Echo": grpc.unary_unary_rpc_method_handler(wait)}
        )
        host = GrpcHost([generic], "127.0.0.1:0", Limits(rpcs=1))
        host._loop = asyncio.get_running_loop()
        connection, transport = Connection(host._shared), Transport()
        connection.connection_made(transport)
        connection.data_received(GOOD + call())
        await asyncio.sleep(0)
        transport.frames()
        connection.data_received(call(stream=3))  # one call at a time
        assert (await answered(transport))[3][0]["grpc-status"] == "8"
        connection.data_received(h2.number(h2.RST_STREAM, 1, h2.CANCEL))
        await asyncio.wait_for(over.wait(), 5)
        assert not connection.streams
        assert host._shared.calls == 0
        connection.connection_lost(None)
        await host.stop()

    run(main())


PIECES = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda kind, flags, stream, payload: h2.frame(kind, flags, stream, payload),
        st.integers(0, 10),
        st.integers(0, 255),
        st.integers(0, 9),
        st.one_of(st.binary(max_size=30), st.just(Encoder().encode(HEADERS))),
    ),
    st.builds(call, st.binary(max_size=9), st.integers(0, 9)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=8), st.randoms(use_true_random=False))
def test_fuzz_any_bytes_are_answered_or_end_the_connection(pieces, chance):
    """Nothing escapes, what is open is bounded, and another connection works afterwards."""

    async def main():
        async with hosted(streams=4) as connect:
            connection, transport = connect()
            sent = b"".join(pieces)
            while sent and not transport.closing:
                cut = chance.randint(1, len(sent))
                connection.data_received(sent[:cut])
                sent = sent[cut:]
            await answered(transport)
            assert len(connection.streams) <= 4
            connection, transport = connect()
            connection.data_received(call())
            assert (await answered(transport))[1][1] == message(b"hello")

    run(main())


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 2**32))
def test_fuzz_the_loads_own_client(data, seed):
    async def main():
        caller, transport = Caller("h:1", "/a.B/Echo"), Transport()
        caller.connection_made(transport)
        done = []
        caller.data_received(h2.settings({}))
        assert caller.ready.done()
        caller.call(b"x", 1.0, done.append)
        sent = data
        chance = random.Random(seed)
        while sent and not transport.closing:
            cut = chance.randint(1, len(sent))
            caller.data_received(sent[:cut])
            sent = sent[cut:]
        caller.connection_lost(None)
        assert len(done) == 1

    run(main())


def test_the_loads_own_client_talks_to_grpcs_server():
    async def main():
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(handlers())
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        from fastrec.serving.load.caller import connect

        caller = await connect(f"127.0.0.1:{port}", "/a.B/Echo", (("x", "y"),), 20.0)
        told = {}

        async def ask(data, timeout=20.0):
            over = asyncio.Event()

            def done(headers):
                told[data[:9]] = trailers_of(headers)
                over.set()

            caller.call(data, timeout, done)
            await asyncio.wait_for(over.wait(), 20)

        await asyncio.gather(*(ask(b"%d" % i) for i in range(20)))
        await ask(b"abort")
        await ask(bytes(200_000))  # in frames, and beyond the first window
        assert {told[b"%d" % i][0] for i in range(20)} == {"0"}
        assert told[b"abort"][0] == "15"
        assert told[bytes(9)][0] == "0"
        assert not caller.streams
        caller.transport.close()
        await server.stop(0)

    run(main())


def test_the_loads_own_client_gives_up_at_its_deadline():
    async def main():
        caller, transport = Caller("h:1", "/a.B/Echo"), Transport()
        caller.connection_made(transport)
        caller.data_received(h2.settings({}))
        transport.frames()
        over, told = asyncio.Event(), []

        def done(headers):
            told.append(trailers_of(headers)[0])
            over.set()

        caller.call(b"x", 0.01, done)
        caller.call(b"x", 60.0, lambda headers: None)
        await asyncio.wait_for(over.wait(), 20)
        assert told == ["4"]
        assert transport.frames()[-1] == (3, 0, 1, struct.pack(">I", h2.CANCEL))
        assert list(caller.streams) == [3]
        caller.connection_lost(None)

    run(main())


def test_gzip_that_never_ends_is_cut():
    bomb = gzip.compress(bytes(50 << 20))

    async def main():
        async with hosted(message_mib=1) as connect:
            connection, transport = connect()
            packed = (*HEADERS, ("grpc-encoding", "gzip"))
            data = message(bomb, 1)
            connection.data_received(
                h2.frame(h2.HEADERS, h2.END_HEADERS, 1, Encoder().encode(packed))
                + h2.data_frames(1, data)
                + h2.frame(h2.DATA, h2.END_STREAM, 1)
            )
            assert (await answered(transport))[1][0]["grpc-status"] == "8"

    run(main())
