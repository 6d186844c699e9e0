"""An HTTP client for tests, on any stream."""

from __future__ import annotations

import attrs
import h11
import trio


@attrs.define
class Answer:
    status: int
    headers: dict[str, str]
    body: str


def request(*headers: str, line: str = "GET /hello HTTP/1.1", host: str = "localhost") -> bytes:
    return "\r\n".join([line, f"Host: {host}", *headers, "", ""]).encode("latin-1")


def answers(data: bytes, methods: str = "") -> list[Answer]:
    """Read answers as an HTTP client does; `methods` are the first letters of those that were asked with."""
    found: list[Answer] = []
    connection = h11.Connection(h11.CLIENT)
    connection.receive_data(data)
    connection.receive_data(b"")
    while connection.trailing_data[0]:
        method = "HEAD" if methods[len(found) : len(found) + 1] == "H" else "GET"
        connection.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        connection.send(h11.EndOfMessage())
        event = connection.next_event()
        assert isinstance(event, h11.Response)
        headers = {name.decode(): value.decode() for name, value in event.headers}
        assert "date" in headers
        found.append(Answer(event.status_code, headers, ""))
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            assert isinstance(event, h11.Data)
            found[-1].body += event.data.decode()
        if connection.our_state is h11.DONE and connection.their_state is h11.DONE:
            connection.start_next_cycle()
        else:
            assert not connection.trailing_data[0]
            break
    return found


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    data = b""
    while part := await stream.receive_some(65_536):
        data += part
    return data


async def fetch(port: int, path: str, *headers: str, method: str = "GET") -> Answer:
    """Ask a server of this machine for a page."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(request("Connection: close", *headers, line=f"{method} {path} HTTP/1.1"))
        (answer,) = answers(await read_all(stream), method)
        return answer
