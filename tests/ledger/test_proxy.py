"""The network of the ledger: what it does to bytes, and to the connections that stand."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

from tests.ledger.proxy import FAIR, Network, Relay, Weather
from tests.ledger.server import free_port

Ends = tuple[trio.abc.Stream, trio.abc.Stream]


async def join(nursery: trio.Nursery) -> tuple[Relay, trio.abc.Stream, trio.abc.Stream]:
    """Return a relay, and both ends of a connection through it."""
    client, outer = memory_stream_pair()
    inner, server = memory_stream_pair()

    async def connect() -> trio.abc.Stream:
        return inner

    relay = Relay(connect)
    nursery.start_soon(relay.serve, outer)
    return relay, client, server


async def nothing_comes(stream: trio.abc.Stream, seconds: float) -> None:
    with trio.move_on_after(seconds) as scope:
        data = await stream.receive_some(100)
        pytest.fail(f"{data!r} came")
    assert scope.cancelled_caught


async def test_bytes_pass_both_ways(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    relay, client, server = await join(nursery)
    await client.send_all(b"there")
    assert await server.receive_some(100) == b"there"
    await server.send_all(b"back")
    assert await client.receive_some(100) == b"back"
    assert (relay.passed, trio.current_time()) == (9, 0.0)


async def test_the_end_of_one_side_is_that_of_the_other(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    _, client, server = await join(nursery)
    await client.send_all(b"last words")
    await client.aclose()
    assert await server.receive_some(100) == b"last words"
    assert await server.receive_some(100) == b""


async def test_a_frozen_network_is_silent_and_loses_nothing(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    relay, client, server = await join(nursery)
    await client.send_all(b"1")
    assert await server.receive_some(100) == b"1"
    relay.set(Weather(frozen=True))
    await client.send_all(b"2")
    await nothing_comes(server, 100)
    relay.set(FAIR)
    assert await server.receive_some(100) == b"2"
    assert trio.current_time() == 100.0


async def test_a_new_connection_in_a_frozen_network_is_silent(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    client, outer = memory_stream_pair()
    asked = trio.Event()

    async def connect() -> trio.abc.Stream:
        asked.set()
        raise OSError("nobody there")

    relay = Relay(connect)
    relay.set(Weather(frozen=True))
    nursery.start_soon(relay.serve, outer)
    await client.send_all(b"?")
    await nothing_comes(client, 100)
    assert not asked.is_set()
    relay.set(FAIR)
    assert await client.receive_some(100) == b""
    assert asked.is_set()


async def test_a_cut_ends_what_stands_and_what_comes(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    relay, client, server = await join(nursery)
    await client.send_all(b"1")
    assert await server.receive_some(100) == b"1"
    relay.set(Weather(cut=True))
    assert await server.receive_some(100) == b""
    assert await client.receive_some(100) == b""
    later, outer = memory_stream_pair()
    nursery.start_soon(relay.serve, outer)
    assert await later.receive_some(100) == b""


async def test_a_slow_network(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    relay, client, server = await join(nursery)
    relay.set(Weather(delay=2.0))
    await client.send_all(b"1")
    await nothing_comes(server, 1.5)
    assert await server.receive_some(100) == b"1"
    assert trio.current_time() == 2.0
    relay.set(Weather(delay=1000.0))
    await client.send_all(b"2")
    await nothing_comes(server, 10)
    relay.set(Weather(rate=10.0))
    for number in (2, 3, 4):
        await client.send_all(str(number).encode() * 20) if number > 2 else None
        assert await server.receive_some(100)
    assert trio.current_time() == pytest.approx(12.0 + 0.1 + 2.0)


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that says back what it hears; give its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection: socket.socket) -> None:
            with connection:
                try:
                    while data := connection.recv(100):
                        connection.sendall(data)
                except OSError:
                    pass

        def accept() -> None:
            try:
                while True:
                    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
            except OSError:
                pass

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_a_network_of_sockets(echo: int) -> None:
    network = Network([free_port(), free_port()])
    network.go(dict.fromkeys(network.ports, echo))
    try:
        first, second = (socket.create_connection(("127.0.0.1", port), 10) for port in network.ports)
        with first, second:
            for one in (first, second):
                one.sendall(b"hello")
                assert one.recv(100) == b"hello"
            network.set(Weather(cut=True), 0)
            with pytest.raises(ConnectionResetError):
                first.recv(100)
            second.sendall(b"still here")
            assert second.recv(100) == b"still here"
            assert network.passed == 2 * (5 + 5 + 10)
    finally:
        network.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", network.ports[0]), 10)


def test_a_port_that_is_taken_is_told(echo: int) -> None:
    network = Network([echo])
    with pytest.RaisesGroup(OSError):
        network.go({echo: echo})
    network._error = None
    network.close()
