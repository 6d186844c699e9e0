"""Opening listeners, what they say when they cannot, and accepting under bounds and failures."""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mqtt_trio.broker.metrics import Metrics
from mqtt_trio.errors import StartError
from mqtt_trio.server.listeners import (
    ACCEPT_PAUSE,
    Listener,
    ListenerOptions,
    open_listener,
    open_listeners,
    reach,
)
from mqtt_trio.server.tls import TlsServer


async def echo(stream: trio.SocketStream, options: ListenerOptions, name: str, tls: TlsServer | None) -> None:
    async with stream:
        async for data in stream:
            await stream.send_all(name.encode() + b" " + data)


async def ask(port: int, host: str = "127.0.0.1") -> bytes:
    """Return what the listener answers; empty: it closed the connection."""
    async with await trio.open_tcp_stream(host, port) as stream:
        try:
            await stream.send_all(b"x")
            return bytes(await stream.receive_some())
        except trio.BrokenResourceError:
            return b""


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something in this process that no event announces."""
    with trio.fail_after(10):
        while not condition():
            await trio.lowlevel.checkpoint()


async def test_port_0_is_any_free_one_and_reported(nursery: trio.Nursery) -> None:
    listener = await open_listener(ListenerOptions(port=0))
    assert listener.port > 0
    assert listener.addresses == (f"127.0.0.1:{listener.port}",)
    assert listener.name == f"tcp 127.0.0.1:{listener.port}"
    metrics = Metrics()
    nursery.start_soon(listener.serve, echo, nursery, metrics)
    assert await ask(listener.port) == f"{listener.name} x".encode()
    await until(lambda: listener.connections == 0)
    listener.close()


async def test_all_addresses_share_the_port_that_was_free() -> None:
    listener = await open_listener(ListenerOptions(host="", port=0))
    try:
        assert {int(address.rpartition(":")[2]) for address in listener.addresses} == {listener.port}
        assert f"0.0.0.0:{listener.port}" in listener.addresses
        assert "any address" in listener.describe()
    finally:
        listener.close()


def localhost_with(second: str) -> Callable[..., Awaitable[list[Any]]]:
    async def getaddrinfo(host: str | None, port: int, **_: Any) -> list[Any]:
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, (second, port)), (*kind, ("127.0.0.1", port))]

    return getaddrinfo


async def test_addresses_that_the_machine_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trio.socket, "getaddrinfo", localhost_with("192.0.2.1"))
    listener = await open_listener(ListenerOptions(host="localhost", port=0))
    assert listener.addresses == (f"127.0.0.1:{listener.port}",)
    listener.close()


async def test_a_host_name_with_two_addresses_is_one_listener(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    monkeypatch.setattr(trio.socket, "getaddrinfo", localhost_with("127.0.0.2"))
    listener = await open_listener(ListenerOptions(host="localhost", port=0))
    monkeypatch.undo()
    nursery.start_soon(listener.serve, echo, nursery, Metrics())
    assert listener.addresses == (f"127.0.0.2:{listener.port}", f"127.0.0.1:{listener.port}")
    for host in ("127.0.0.1", "127.0.0.2"):
        assert await ask(listener.port, host) == f"tcp 127.0.0.2:{listener.port} x".encode()
    listener.close()


async def test_port_in_use_names_listener_and_mend() -> None:
    first = await open_listener(ListenerOptions(port=0))
    wanted = [ListenerOptions(port=0), ListenerOptions(type="websocket", port=first.port)]
    try:
        with pytest.raises(StartError) as caught:
            await open_listeners(wanted)
    finally:
        first.close()
    text = str(caught.value)
    assert f"Listeners[1] (websocket on 127.0.0.1:{first.port}): the port is in use" in text
    assert "--ws-port" in text
    assert "\n" not in text


async def test_all_listeners_or_none() -> None:
    with pytest.raises(StartError, match="unknown"):
        await open_listeners([first := ListenerOptions(port=free_port()), ListenerOptions(host="no.such.invalid")])
    again = await open_listener(first)  # it was let go
    again.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    "code, words",
    [
        (errno.EACCES, "no permission"),
        (errno.EPERM, "CAP_NET_BIND_SERVICE"),
        (errno.EADDRNOTAVAIL, "no address of this machine"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
async def test_other_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, code: int, words: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, "as the system says it")

    monkeypatch.setattr(trio.socket, "socket", refuse)
    with pytest.raises(StartError, match=words) as caught:
        await open_listener(ListenerOptions(port=443), "Listeners[3]")
    assert "Listeners[3] (tcp on 127.0.0.1:443)" in str(caught.value)


async def test_a_foreign_address() -> None:
    with pytest.raises(StartError, match="no address of this machine"):
        await open_listener(ListenerOptions(host="192.0.2.1", port=0))


@pytest.mark.parametrize("host", ["no.such.invalid", "a" * 300, "nul\0", "ä" * 70 + ".example"])
async def test_unknown_hosts(host: str) -> None:
    with pytest.raises(StartError, match=r"unknown|no host name"):
        await open_listener(ListenerOptions(host=host, port=0))


async def test_max_connections(nursery: trio.Nursery) -> None:
    listener, metrics = await open_listener(ListenerOptions(port=0, max_connections=2)), Metrics()
    nursery.start_soon(listener.serve, echo, nursery, metrics)
    streams = [await trio.open_tcp_stream("127.0.0.1", listener.port) for _ in range(2)]
    await until(lambda: listener.connections == 2)
    assert await ask(listener.port) == b""
    assert metrics.connections_over_limit == 1
    await streams[0].aclose()
    await until(lambda: listener.connections == 1)
    assert await ask(listener.port) != b""
    await streams[1].aclose()
    listener.close()


async def test_closing_stops_accepting_and_leaves_connections(nursery: trio.Nursery) -> None:
    listener = await open_listener(ListenerOptions(port=0))
    async with trio.open_nursery() as serving:
        serving.start_soon(listener.serve, echo, nursery, Metrics())
        stream = await trio.open_tcp_stream("127.0.0.1", listener.port)
        await until(lambda: listener.connections == 1)
        listener.close()
    with pytest.raises(OSError, match="connect"):
        await trio.open_tcp_stream("127.0.0.1", listener.port)
    await stream.send_all(b"still here")
    assert (await stream.receive_some()).endswith(b"still here")
    await stream.aclose()


class Exhausted(trio.abc.Listener[trio.SocketStream]):
    """Fails as the kernel does without file descriptors, then gives one stream, then is closed."""

    def __init__(self, failures: int, stream: trio.SocketStream, sock: trio.socket.SocketType) -> None:
        self.failures = failures
        self.stream: trio.SocketStream | None = stream
        self.socket = sock

    async def accept(self) -> trio.SocketStream:
        await trio.lowlevel.checkpoint()
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        if self.stream is None:
            raise trio.ClosedResourceError
        stream, self.stream = self.stream, None
        return stream

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_running_out_of_descriptors_is_outlived(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = trio.socket.socketpair()
    bound = trio.socket.socket()
    await bound.bind(("127.0.0.1", 0))
    served: list[str] = []

    async def handler(stream: trio.SocketStream, options: ListenerOptions, name: str, tls: TlsServer | None) -> None:
        await trio.lowlevel.checkpoint()
        served.append(name)

    start, metrics = trio.current_time(), Metrics()
    fake: Any = Exhausted(5, trio.SocketStream(theirs), bound)
    listener = Listener(ListenerOptions(port=0), [fake])
    async with trio.open_nursery() as nursery:
        await listener.serve(handler, nursery, metrics)
    assert served == [listener.name]
    assert metrics.accept_failures == 5
    assert trio.current_time() - start == pytest.approx(5 * ACCEPT_PAUSE)
    assert [record.message for record in caplog.records] == [
        f"{listener.name} cannot accept connections, goes on trying: [Errno 24] Too many open files"
        " (raise the limit of open files: ulimit -n, LimitNOFILE of systemd)",
        f"{listener.name} accepts connections again",
    ]
    ours.close()
    bound.close()


@pytest.mark.parametrize(
    "host, words",
    [
        ("127.0.0.1", "this machine only"),
        ("::1", "this machine only"),
        ("0.0.0.0", "any address"),
        ("::", "any address"),
        ("192.168.1.5", "local network"),
        ("fe80::1%eth0", "local network"),
        ("8.8.8.8", "internet"),
    ],
)
def test_reach(host: str, words: str) -> None:
    assert words in reach(host)


def test_ports_by_type() -> None:
    assert ListenerOptions().port == 1883
    assert ListenerOptions(type="websocket").port == 8083


@pytest.mark.parametrize(
    "bad",
    [
        {"port": -1},
        {"port": 65_536},
        {"path": "mqtt"},
        {"path": "/mqtt?x"},
        {"path": "/m q"},
        {"allowed_origins": ["app.example"]},
        {"allowed_origins": ["https://app.example/path"]},
        {"max_connections": 0},
        {"connect_timeout": 0.0},
    ],
)
def test_bad_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        ListenerOptions(**bad)


def test_origins_are_kept_as_browsers_write_them() -> None:
    options = ListenerOptions(allowed_origins=["HTTPS://App.Example:443/", "http://h:8080", "http://h:80", "*", "null"])
    assert options.allowed_origins == ("https://app.example", "http://h:8080", "http://h", "*", "null")
