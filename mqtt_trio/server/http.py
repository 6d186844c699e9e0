"""HTTP for operators [O3]: GET and HEAD of a few pages, on a listener of its own, by h11.

It shares the loop with MQTT, so whatever a client does here is bounded: how many connections, how large a request, how
long it takes to send one and to read its answer. Pages are made by synchronous functions, one at a time, and MQTT gets
its turn between two of them.
"""

from __future__ import annotations

import email.utils
import hmac
import ipaddress
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Final, TypeAlias
from urllib.parse import urlsplit

import attrs
import h11
import trio
from attrs.validators import ge, le, optional

from mqtt_trio.server.listeners import Endpoint, Listener, open_listener
from mqtt_trio.server.tls import TlsFailure, TlsOptions, TlsServer

logger = logging.getLogger(__name__)

MAXIMUM_HEAD_SIZE: Final = 16_384
"""Bytes of request line and headers. Outcome: 431."""
MAXIMUM_BODY_SIZE: Final = 16_384
"""Bytes of a body, which no page wants: it is read and thrown away. Outcome: 413."""
CONNECTIONS: Final = 64
"""Connections at a time. Outcome: a further one is closed at once."""
REQUEST_TIMEOUT: Final = 10.0
"""Seconds from the first byte of a request to its last; on a new connection from its beginning, TLS included.
Outcome: 408."""
IDLE_TIMEOUT: Final = 30.0
"""Seconds that a connection may be silent between two requests. Outcome: closed."""
ANSWER_TIMEOUT: Final = 10.0
"""Seconds that a client may take to read an answer. Outcome: closed."""
RECEIVE_SIZE: Final = 4096
LINGER_SIZE: Final = 65_536
"""Bytes that are read and thrown away behind a request that was refused half read: closing over unread bytes would
reset the connection, and the client would lose the answer."""
LINGER_TIMEOUT: Final = 2.0

_TOKEN: Final = re.compile(r"[!-~]{1,4096}\Z")
_METHODS: Final = (b"GET", b"HEAD")

PLAIN: Final = "text/plain; charset=utf-8"
JSON: Final = "application/json"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a `Host`; a name that is not looked up cannot promise that."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@attrs.frozen(kw_only=True)
class HttpOptions:
    """[Http]: health, readiness and metrics."""

    host: str = "127.0.0.1"
    """Address or host name to bind. One that others can reach needs a token."""
    port: int | None = attrs.field(default=None, validator=optional([ge(0), le(65_535)]))
    """None: off; 0: any free one."""
    token: str | None = attrs.field(default=None, repr=False, metadata={"secret": True})
    """What clients send as `Authorization: Bearer TOKEN`, read at the start; None: nobody is asked."""
    tls: TlsOptions | None = None
    """None: in the clear."""

    def check_token(self) -> str | None:
        """Return what is wrong with the token, without saying it. No validator: its text would be kept back, as that of
        every secret is."""
        if self.token is None or _TOKEN.match(self.token):
            return None
        return "expected 1 to 4096 printable ASCII characters without spaces"

    @property
    def is_open(self) -> bool:
        """Whether others than this machine could use it and nobody would ask them for a token."""
        return self.port is not None and self.token is None and not is_loopback(self.host)


@attrs.frozen
class Request:
    """What a page is made of."""

    method: str
    """GET or HEAD."""
    path: str
    """As it came, without the query."""
    query: str = ""


@attrs.frozen
class Response:
    """An answer. For HEAD the body is made, measured and not sent."""

    status: int
    body: str
    content_type: str = PLAIN
    headers: tuple[tuple[str, str], ...] = ()


Handler: TypeAlias = Callable[[Request], Response]
"""Makes a page: synchronous, quick, and on the Trio thread."""


class Refusal(Exception):
    """An answer that ends the connection, because the rest of the request is not read."""

    def __init__(self, status: int, text: str, *headers: tuple[str, str]) -> None:
        super().__init__(text)
        self.response = Response(status, f"{text}\n", headers=headers)


class _Gone(Exception):
    """The client left, or took too long to say anything."""


@attrs.frozen(kw_only=True)
class _Endpoint:
    """[Http] as a listener sees it."""

    host: str
    port: int
    tls: TlsOptions | None
    type: str = "http"
    path: str = ""
    max_connections: int = CONNECTIONS


async def open_http(options: HttpOptions) -> Listener[Endpoint]:
    """Bind the listener; `options.port` is not None.

    Raises:
      StartError: says what is wrong and how to mend it.
    """
    endpoint: Endpoint = _Endpoint(host=options.host, port=options.port or 0, tls=options.tls)
    return await open_listener(endpoint, "Http")


class HttpServer:
    """Answers the requests of all connections.

    Attributes:
      answers: how many, by status.
      failures: connections that ended by an error of our own; each is logged with its traceback.
    """

    def __init__(self, options: HttpOptions, routes: Mapping[str, Handler]) -> None:
        """`routes`: path -> what makes the page.

        Raises:
          ValueError: no client could send the token, or everybody could: it is empty.
        """
        if (problem := options.check_token()) is not None:
            raise ValueError(problem)
        self.options = options
        self.routes = routes
        self.answers: Counter[int] = Counter()
        self.failures = 0
        self._token = None if options.token is None else options.token.encode()
        self._turn = trio.Lock()

    async def serve(
        self,
        stream: trio.abc.Stream,
        _endpoint: Endpoint | None = None,
        listener: str = "memory",
        tls: TlsServer | None = None,
    ) -> None:
        """Serve one connection; the stream is closed in any case, and nothing but Cancelled leaves."""
        try:
            deadline = trio.current_time() + REQUEST_TIMEOUT
            if tls is not None:
                stream = await _secure(stream, tls, deadline)
            await _Conversation(self, stream).run(deadline)
        except TlsFailure as exc:
            logger.info("TLS handshake at %s failed: %s", listener, exc)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client left; HTTP has no way to say more
        except Exception:
            self.failures += 1
            logger.exception("a connection at %s ended by an error of the broker", listener)
        finally:
            await trio.aclose_forcefully(stream)

    def check(self, request: h11.Request) -> Request:
        """Decide on the head of a request.

        Raises:
          Refusal: it gets no page.
        """
        headers = [(name, value) for name, value in request.headers]
        self._check_access(headers)
        try:
            target = urlsplit(request.target.decode("ascii"))
        except ValueError:
            raise Refusal(400, "The address of the page cannot be read.") from None
        if target.path not in self.routes:
            raise Refusal(404, f"There is no such page. These are served: {', '.join(self.routes)}")
        if request.method not in _METHODS:
            raise Refusal(405, "Pages are only read here: GET or HEAD.", ("Allow", "GET, HEAD"))
        length = next((value for name, value in headers if name == b"content-length"), b"0")
        if int(length) > MAXIMUM_BODY_SIZE:  # h11 has seen to it that it is a number
            raise _too_large()
        return Request(request.method.decode("ascii"), target.path, target.query)

    def _check_access(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Ask for the token; where there is none, keep pages of other sites away that had their name resolved to this
        machine: a browser says which name it believes to speak to."""
        if self._token is None:
            names = [value.decode("latin-1") for name, value in headers if name == b"host"]
            if not all(map(self._is_own_name, names)):
                raise Refusal(421, "This is not the host that you asked for. Use its address, or set Http.TokenFile.")
            return
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        # The time that the comparison takes tells nothing about the token but its length.
        if not hmac.compare_digest(token.strip(), self._token) or scheme.lower() != b"bearer":
            text = "This page needs the header `Authorization: Bearer TOKEN`, with the token of Http.TokenFile."
            raise Refusal(401, text, ("WWW-Authenticate", "Bearer"))

    def _is_own_name(self, name: str) -> bool:
        host = name.rpartition(":")[0] if re.search(r":\d*\Z", name) else name
        host = host.strip("[]").lower().rstrip(".")
        if host in ("localhost", self.options.host.lower()) or host.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True

    async def make(self, request: Request) -> Response:
        """Make a page when it is this request's turn."""
        async with self._turn:
            try:
                return self.routes[request.path](request)
            except Exception:
                self.failures += 1
                logger.exception("the page %s could not be made", request.path)
                return Response(500, "An error of the broker; its log says more.\n")


async def _secure(stream: trio.abc.Stream, tls: TlsServer, deadline: float) -> trio.abc.Stream:
    """Shake hands.

    Raises:
      TlsFailure: also when it takes too long.
    """
    with trio.move_on_at(deadline):
        return await tls.handshake(stream)
    raise TlsFailure(f"no end of it within {REQUEST_TIMEOUT:g} s")


class _Conversation:
    """One connection: requests and answers, one after the other."""

    def __init__(self, server: HttpServer, stream: trio.abc.Stream) -> None:
        self._server = server
        self._stream = stream
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAXIMUM_HEAD_SIZE)
        self._request: h11.Request | None = None
        self._heard = False
        """Something of the present request has come."""

    async def run(self, deadline: float) -> None:
        """Serve until either side has had enough; the first request is whole at `deadline`.

        Raises:
          trio.BrokenResourceError: the client left.
        """
        try:
            while True:
                await self._send(await self._server.make(await self._read(deadline)))
                if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                    return
                self._http.start_next_cycle()
                self._request, self._heard = None, bool(self._http.trailing_data[0])
                await self._wait_for_more()
                deadline = trio.current_time() + REQUEST_TIMEOUT
        except Refusal as refusal:
            await self._send(refusal.response, last=True)
            await self._linger()
        except _Gone:
            pass

    async def _wait_for_more(self) -> None:
        """Wait for the first bytes of a further request, unless they have come already."""
        if not self._heard:
            with trio.move_on_after(IDLE_TIMEOUT) as silence:
                await self._receive()
            if silence.cancelled_caught:
                raise _Gone

    async def _read(self, deadline: float) -> Request:
        """Read a request to its end.

        Raises:
          Refusal: it is none that gets a page.
          _Gone: nothing came.
        """
        with trio.move_on_at(deadline):
            return await self._read_whole()
        if not self._heard:
            raise _Gone
        raise Refusal(408, "The request took too long.")

    async def _read_whole(self) -> Request:
        request: Request | None = None
        body_size = 0
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as exc:
                if exc.error_status_hint == 431:
                    raise Refusal(431, f"The head of the request has more than {MAXIMUM_HEAD_SIZE} bytes.") from None
                raise Refusal(400, "What came is no HTTP request.") from None
            if event is h11.NEED_DATA:
                await self._receive()
            elif isinstance(event, h11.Request):
                self._request = event
                request = self._server.check(event)
            elif isinstance(event, h11.Data):
                body_size += len(event.data)
                if body_size > MAXIMUM_BODY_SIZE:
                    raise _too_large()
            elif isinstance(event, h11.EndOfMessage) and request is not None:
                return request
            else:  # ConnectionClosed
                raise _Gone

    async def _receive(self) -> None:
        data = bytes(await self._stream.receive_some(RECEIVE_SIZE))
        if data and self._request is None and not self._heard and not data[:1].isupper() and data[:1] not in b"\r\n":
            # h11 would wait for the end of a line that never comes.
            what = "TLS (https://)" if data[:1] == b"\x16" else "no HTTP request"
            raise Refusal(400, f"This port speaks plain HTTP, and what came is {what}.")
        self._heard = self._heard or bool(data)
        self._http.receive_data(data)

    async def _send(self, response: Response, *, last: bool = False) -> None:
        """Send an answer.

        Raises:
          _Gone: it is not taken in time.
        """
        self._server.answers[response.status] += 1
        body = response.body.encode()
        headers = [
            ("Date", email.utils.formatdate(usegmt=True)),
            ("Content-Type", response.content_type),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            *response.headers,
        ]
        if last:
            headers.append(("Connection", "close"))
        head = self._request is not None and self._request.method == b"HEAD"
        phrase = HTTPStatus(response.status).phrase
        start = h11.Response(status_code=response.status, headers=headers, reason=phrase)
        data = self._http.send(start) or b""
        if body and not head:
            data += self._http.send(h11.Data(data=body)) or b""
        data += self._http.send(h11.EndOfMessage()) or b""
        with trio.move_on_after(ANSWER_TIMEOUT):
            await self._stream.send_all(data)
            return
        raise _Gone

    async def _linger(self) -> None:
        """Let the client read the last answer although it has more to say."""
        with trio.move_on_after(LINGER_TIMEOUT):
            if isinstance(self._stream, trio.abc.HalfCloseableStream):
                await self._stream.send_eof()
            thrown_away = 0
            while thrown_away < LINGER_SIZE and (data := await self._stream.receive_some(RECEIVE_SIZE)):
                thrown_away += len(data)


def _too_large() -> Refusal:
    return Refusal(413, f"The body of the request has more than {MAXIMUM_BODY_SIZE} bytes.")
