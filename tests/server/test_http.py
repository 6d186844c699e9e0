"""The HTTP interface over streams in memory: what is answered, what a client may cost, and what it cannot disturb."""

from __future__ import annotations

import logging
from typing import Final

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from mqtt_trio.server.http import (
    ANSWER_TIMEOUT,
    IDLE_TIMEOUT,
    LINGER_TIMEOUT,
    MAXIMUM_BODY_SIZE,
    MAXIMUM_HEAD_SIZE,
    RECEIVE_SIZE,
    REQUEST_TIMEOUT,
    Handler,
    HttpOptions,
    HttpServer,
    Request,
    Response,
    is_loopback,
)
from mqtt_trio.testing.pipe import Pipe, PipeOptions, PipeStream
from tests.http_support import Answer, answers, read_all, request

TOKEN: Final = "correct-horse"
BIG: Final = 300_000


def hello(request: Request) -> Response:
    return Response(200, f"hello {request.method} {request.path} {request.query}")


def big(_request: Request) -> Response:
    return Response(200, "x" * BIG)


def broken(_request: Request) -> Response:
    raise RuntimeError("planted")


ROUTES: Final[dict[str, Handler]] = {"/hello": hello, "/big": big, "/broken": broken}


class Desk:
    """A server, and connections to it."""

    def __init__(self, nursery: trio.Nursery, *, token: str | None = None, host: str = "127.0.0.1") -> None:
        self.server = HttpServer(HttpOptions(port=0, token=token, host=host), ROUTES)
        self.nursery = nursery
        self.pipes: list[Pipe] = []

    async def open(self, options: PipeOptions | None = None) -> PipeStream:
        pipe = Pipe(options)
        self.pipes.append(pipe)
        self.nursery.start_soon(self.server.serve, pipe.broker)
        return pipe.client

    async def say(self, data: bytes) -> list[Answer]:
        """Send bytes on a new connection, then nothing more; return all answers."""
        stream = await self.open()
        await stream.send_all(data)
        await stream.send_eof()
        return answers(await read_all(stream))

    async def ask(self, *headers: str, line: str = "GET /hello HTTP/1.1", host: str = "localhost:80") -> Answer:
        """Send one request; return its answer."""
        (answer,) = await self.say(request(*headers, line=line, host=host))
        return answer


@pytest.fixture
def desk(nursery: trio.Nursery) -> Desk:
    return Desk(nursery)


async def closed_after(stream: PipeStream) -> float:
    """Read on; return the seconds until the server has closed."""
    started = trio.current_time()
    try:
        await read_all(stream)
    except trio.BrokenResourceError:
        pass
    return trio.current_time() - started


# What is answered


async def test_a_page(desk: Desk, autojump_clock: MockClock) -> None:
    answer = await desk.ask(line="GET /hello?a=1&b HTTP/1.1")
    assert (answer.status, answer.body) == (200, "hello GET /hello a=1&b")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_head_is_the_page_without_its_body(desk: Desk, autojump_clock: MockClock) -> None:
    (answer,) = answers(await say_raw(desk, request(line="HEAD /hello HTTP/1.1")), "H")
    assert (answer.status, answer.headers["content-length"]) == (200, str(len("hello HEAD /hello ")))


async def say_raw(desk: Desk, data: bytes) -> bytes:
    stream = await desk.open()
    await stream.send_all(data)
    await stream.send_eof()
    return await read_all(stream)


async def test_http_1_0_is_closed_behind_its_answer(desk: Desk, autojump_clock: MockClock) -> None:
    stream = await desk.open()
    await stream.send_all(b"GET /hello HTTP/1.0\r\n\r\n")
    (answer,) = answers(await read_all(stream))
    assert (answer.status, trio.current_time()) == (200, 0.0)


async def test_the_absolute_form_is_understood(desk: Desk, autojump_clock: MockClock) -> None:
    assert (await desk.ask(line="GET http://localhost/hello HTTP/1.1")).status == 200


@pytest.mark.parametrize(
    "line, status",
    [
        ("GET / HTTP/1.1", 404),
        ("GET /hello/ HTTP/1.1", 404),
        ("GET /../hello HTTP/1.1", 404),
        ("GET //hello HTTP/1.1", 404),
        ("GET /%68ello HTTP/1.1", 404),
        ("OPTIONS * HTTP/1.1", 404),
        ("CONNECT localhost:1883 HTTP/1.1", 404),
        ("GET http://[/hello HTTP/1.1", 400),
        ("POST /hello HTTP/1.1", 405),
        ("DELETE /hello HTTP/1.1", 405),
        ("get /hello HTTP/1.1", 400),
        ("GET /hello HTTP/9", 400),
        ("GET /hel lo HTTP/1.1", 400),
        ("GET", 400),
    ],
)
async def test_wrong_requests(desk: Desk, autojump_clock: MockClock, line: str, status: int) -> None:
    answer = await desk.ask(line=line)
    assert answer.status == status
    assert answer.headers["connection"] == "close"
    assert answer.body.endswith(".\n") or status == 404
    assert answer.headers.get("allow") == ("GET, HEAD" if status == 405 else None)


async def test_a_request_without_host_is_wrong(desk: Desk, autojump_clock: MockClock) -> None:
    (answer,) = await desk.say(b"GET /hello HTTP/1.1\r\n\r\n")
    assert answer.status == 400


async def test_an_error_of_a_page_is_its_own(
    desk: Desk, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    found = await desk.say(request(line="GET /broken HTTP/1.1") + request())
    assert [answer.status for answer in found] == [500, 200]
    assert "planted" not in found[0].body
    assert "planted" in caplog.text
    assert desk.server.failures == 1


async def test_a_small_body_is_ignored(desk: Desk, autojump_clock: MockClock) -> None:
    body = b"x" * MAXIMUM_BODY_SIZE
    found = await desk.say(request(f"Content-Length: {len(body)}") + body + request())
    assert [answer.status for answer in found] == [200, 200]


async def test_a_large_body_is_refused_before_it_is_read(desk: Desk, autojump_clock: MockClock) -> None:
    stream = await desk.open()
    await stream.send_all(request(f"Content-Length: {MAXIMUM_BODY_SIZE + 1}", "Expect: 100-continue"))
    head = await stream.receive_some(65_536)
    assert head.startswith(b"HTTP/1.1 413 ")


async def test_a_large_body_of_unknown_length_is_refused(desk: Desk, autojump_clock: MockClock) -> None:
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    (answer,) = await desk.say(request("Transfer-Encoding: chunked") + chunk * 5)
    assert answer.status == 413


async def test_smuggling_is_refused(desk: Desk, autojump_clock: MockClock) -> None:
    """Two lengths, or a length beside chunks: whatever stands before us may have understood it otherwise."""
    (answer,) = await desk.say(request("Content-Length: 5", "Content-Length: 6") + b"GET /h")
    assert answer.status == 400
    (answer, *rest) = await desk.say(
        request("Content-Length: 60", "Transfer-Encoding: chunked") + b"0\r\n\r\n" + request(line="GET /big HTTP/1.1")
    )
    assert (answer.status, len(rest)) == (200, 1)  # chunks win [RFC 9112 6.3]; the rest is a request of its own


# Connections


async def test_keep_alive_and_pipelining(desk: Desk, autojump_clock: MockClock) -> None:
    many = [request(line=f"GET /hello?{number} HTTP/1.1") for number in range(100)]
    found = await desk.say(b"".join(many))
    assert [answer.body for answer in found] == [f"hello GET /hello {number}" for number in range(100)]
    assert desk.server.answers == {200: 100}


async def test_a_refusal_ends_a_pipeline(desk: Desk, autojump_clock: MockClock) -> None:
    found = await desk.say(request() + request(line="POST /hello HTTP/1.1") + request())
    assert [answer.status for answer in found] == [200, 405]


async def test_an_idle_connection_is_closed(desk: Desk, autojump_clock: MockClock) -> None:
    stream = await desk.open()
    for _ in range(3):
        await stream.send_all(request())
        assert (await stream.receive_some(65_536)).startswith(b"HTTP/1.1 200 OK\r\n")
        await trio.sleep(IDLE_TIMEOUT - 1)
    assert await closed_after(stream) == 1.0


async def test_a_connection_that_says_nothing_is_closed(desk: Desk, autojump_clock: MockClock) -> None:
    assert await closed_after(await desk.open()) == REQUEST_TIMEOUT
    assert not desk.server.answers


async def test_a_byte_per_second_is_too_slow(desk: Desk, autojump_clock: MockClock) -> None:
    """Neither as the first request nor as a later one."""
    stream = await desk.open()
    await stream.send_all(request())
    await stream.receive_some(65_536)
    for _ in range(2):
        started = trio.current_time()
        for byte in request("X-Header: and a long one"):
            await stream.send_all(bytes([byte]))
            await trio.sleep(1)
            if trio.current_time() - started >= REQUEST_TIMEOUT:
                break
        (answer,) = answers(await read_all(stream))
        assert answer.status == 408
        assert trio.current_time() - started <= REQUEST_TIMEOUT + 1
        stream = await desk.open()


async def test_a_body_that_comes_slowly_is_too_slow(desk: Desk, autojump_clock: MockClock) -> None:
    stream = await desk.open()
    await stream.send_all(request("Content-Length: 100"))
    for _ in range(9):
        await trio.sleep(1)
        await stream.send_all(b"x")
    (answer,) = answers(await read_all(stream))
    assert (answer.status, trio.current_time()) == (408, REQUEST_TIMEOUT)


async def test_a_client_that_does_not_read_is_closed(desk: Desk, autojump_clock: MockClock) -> None:
    stream = await desk.open(PipeOptions(capacity=4096))
    await stream.send_all(request(line="GET /big HTTP/1.1"))
    await trio.sleep(ANSWER_TIMEOUT + 1)
    assert len(await read_all(stream)) <= 4096


async def test_a_byte_per_second_is_too_slow_a_reader(desk: Desk, autojump_clock: MockClock) -> None:
    stream = await desk.open(PipeOptions(capacity=4096))
    await stream.send_all(request(line="GET /big HTTP/1.1"))
    for _ in range(int(ANSWER_TIMEOUT) + 1):
        await trio.sleep(1)
        assert await stream.receive_some(1)
    assert len(await read_all(stream)) <= 4096


async def test_a_refused_client_that_goes_on_sending_is_left(desk: Desk, autojump_clock: MockClock) -> None:
    stream = await desk.open()
    await stream.send_all(b"BREW /hello HTTP/1.1\r\nHost: localhost\r\n\r\n")
    (answer,) = answers(await read_all(stream))
    assert answer.status == 405
    with pytest.raises(trio.BrokenResourceError):  # noqa: PT012
        while True:
            await stream.send_all(b"x" * 100)
            await trio.sleep(0.1)
    assert trio.current_time() <= LINGER_TIMEOUT + 0.2


@pytest.mark.parametrize("head", [b"GET /" + b"x" * 40_000, b"GET /hello HTTP/1.1\r\nX: " + b"x" * 40_000])
async def test_an_endless_head_is_refused(desk: Desk, autojump_clock: MockClock, head: bytes) -> None:
    stream = await desk.open()
    await stream.send_all(head)
    (answer,) = answers(await read_all(stream))
    assert answer.status == 431
    await trio.testing.wait_all_tasks_blocked()
    assert desk.pipes[0].to_broker.waiting_size == 0, "what was on its way is read, so that the answer arrives"


async def test_the_bound_of_the_head(desk: Desk, autojump_clock: MockClock) -> None:
    """A read may take it a little beyond."""
    assert (await desk.ask("X: " + "x" * (MAXIMUM_HEAD_SIZE - 200))).status == 200
    assert (await desk.ask("X: " + "x" * (MAXIMUM_HEAD_SIZE + 2 * RECEIVE_SIZE))).status == 431


@pytest.mark.parametrize(
    "data, words",
    [(b"\x16\x03\x01\x02\x00\x01\x00", "TLS"), (b"\x10\x10\x00\x04MQTT\x05", "no HTTP"), (b"\x00" * 50, "no HTTP")],
)
async def test_other_protocols_are_told_at_once(desk: Desk, autojump_clock: MockClock, data: bytes, words: str) -> None:
    stream = await desk.open()
    await stream.send_all(data)
    received = await stream.receive_some(65_536)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert words.encode() in received
    assert trio.current_time() == 0.0


async def test_clients_that_leave_are_no_errors(
    desk: Desk, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    whole = request(line="GET /big HTTP/1.1")
    for size in range(0, len(whole), 5):
        stream = await desk.open(PipeOptions(capacity=1000))
        await stream.send_all(whole[:size])
        await stream.aclose()
    cut = await desk.open(PipeOptions(capacity=1000))
    await cut.send_all(whole)
    await trio.sleep(1)
    desk.pipes[-1].cut()
    await trio.sleep(100)
    assert desk.server.failures == 0
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []


async def test_others_get_their_turn_between_two_pages(
    desk: Desk, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """Connections that ask for page after page hold the loop for one page at a time."""
    order: list[str] = []

    def page(request: Request) -> Response:
        order.append("page")
        return Response(200, "")

    async def other() -> None:
        while len(order) < 400:
            order.append("other")
            await trio.lowlevel.checkpoint()

    desk.server.routes = {"/hello": page}
    nursery.start_soon(other)
    streams = [await desk.open() for _ in range(20)]
    for stream in streams:
        await stream.send_all(request() * 50)
    while len(order) < 400:
        await trio.lowlevel.checkpoint()
    longest = max(len(run) for run in "".join(word[0] for word in order).split("o"))
    assert order.count("page") > 100
    assert longest <= 2


# Who may ask


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8080", "127.0.0.1:80", "[::1]:80", "[::1]", "10.1.2.3", "a.localhost", "LOCALHOST."],
)
async def test_without_a_token_addresses_are_answered(desk: Desk, autojump_clock: MockClock, host: str) -> None:
    assert (await desk.ask(host=host)).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.nip.example"]
)
async def test_pages_of_other_sites_are_kept_away(desk: Desk, autojump_clock: MockClock, host: str) -> None:
    """A site may have its name resolved to 127.0.0.1 and let its visitors' browsers ask."""
    answer = await desk.ask(host=host)
    assert answer.status == 421
    assert "hello" not in answer.body


async def test_the_token_opens(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    desk = Desk(nursery, token=TOKEN, host="0.0.0.0")
    for scheme in ("Bearer", "bearer", "BEARER"):
        answer = await desk.ask(f"Authorization: {scheme} {TOKEN}", host="broker.example")
        assert answer.status == 200


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Authorization: Bearer",),
        ("Authorization: Bearer wrong",),
        (f"Authorization: Bearer {TOKEN}x",),
        (f"Authorization: Bearer {TOKEN[:-1]}",),
        (f"Authorization: Basic {TOKEN}",),
        (f"Authorization: {TOKEN}",),
        (f"Authorization: Bearer {TOKEN}", "Authorization: Bearer x"),
        ("Authorization: Bearer \xff\xfe",),
        (f"X-Authorization: Bearer {TOKEN}",),
    ],
)
@pytest.mark.parametrize("line", ["GET /hello HTTP/1.1", "GET /none HTTP/1.1", "POST /hello HTTP/1.1"])
async def test_without_the_token_nothing_is_told(
    nursery: trio.Nursery, autojump_clock: MockClock, headers: tuple[str, ...], line: str
) -> None:
    desk = Desk(nursery, token=TOKEN)
    answer = await desk.ask(*headers, line=line)
    assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert TOKEN not in answer.body
    assert "hello" not in answer.body


# Options


@pytest.mark.parametrize("token", ["", "with space", "new\nline", "ümlaut", "x" * 4097])
def test_tokens_that_no_header_carries(token: str) -> None:
    with pytest.raises(ValueError, match="expected 1 to 4096 printable ASCII"):
        HttpServer(HttpOptions(port=0, token=token), ROUTES)


def test_who_needs_a_token() -> None:
    assert HttpOptions(port=1, host="0.0.0.0").is_open
    assert not HttpOptions(port=1, host="0.0.0.0", token="x").is_open
    assert not HttpOptions(port=1).is_open
    assert not HttpOptions(host="0.0.0.0").is_open, "it is off"


@pytest.mark.parametrize(
    "host, expected",
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("", False), ("::", False),
     ("broker.example", False), ("192.168.1.1", False)],
)  # fmt: skip
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_the_token_is_never_shown() -> None:
    assert TOKEN not in repr(HttpOptions(token=TOKEN))
