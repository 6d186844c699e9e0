"""Listeners: their options, opening ports with errors that name the mend, and accepting without ever stopping."""

from __future__ import annotations

import errno
import ipaddress
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Generic, Literal, Protocol, TypeAlias, TypeVar

import attrs
import trio
from attrs.validators import ge, gt, le

from mqtt_trio.broker.metrics import Metrics
from mqtt_trio.errors import StartError
from mqtt_trio.server.tls import TlsOptions, TlsServer

logger = logging.getLogger(__name__)

ACCEPT_PAUSE: Final = 0.1
"""Seconds until the next attempt when accepting failed, for want of file descriptors most likely."""
BACKLOG: Final = 65_535
"""Connections that may wait to be accepted; the kernel cuts it to its own limit (net.core.somaxconn)."""
SAME_PORT_ATTEMPTS: Final = 10
"""How often to look for a free port that all addresses of a host can share."""

_ORIGIN: Final = re.compile(r"(\*|null|[a-z][a-z0-9+.-]*://[^\s/?#@]+)\Z")
_DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}


def normal_origin(origin: str) -> str:
    """Return an origin as browsers write it (RFC 6454): lower case, no trailing slash, no default port."""
    origin = origin.strip().lower().removesuffix("/")
    return origin.removesuffix(_DEFAULT_PORTS.get(origin.partition("://")[0], "\n"))


def _normal_origins(origins: Sequence[str]) -> tuple[str, ...]:
    return tuple(normal_origin(origin) for origin in origins)


def _check_origins(_instance: object, _attribute: attrs.Attribute[Any], origins: Sequence[str]) -> None:
    for origin in origins:
        if not _ORIGIN.match(origin):
            raise ValueError(f"expected origins such as https://example.org:8443, found {origin!r}")


def _check_path(_instance: object, _attribute: attrs.Attribute[Any], path: str) -> None:
    if not re.fullmatch(r"/[!-~]*", path) or "?" in path or "#" in path:
        raise ValueError(f"expected a path that starts with / and has no query, found {path!r}")


@attrs.frozen(kw_only=True)
class ListenerOptions:
    """One [[Listeners]] table."""

    type: Literal["tcp", "websocket"] = "tcp"
    host: str = "127.0.0.1"
    """Address or host name to bind; 0.0.0.0 or :: for every address, "" for both of them."""
    tls: TlsOptions | None = None
    """None: in the clear."""
    port: int = attrs.field(validator=[ge(0), le(65_535)])
    """0: any free one. Default: 1883, for websocket 8083; with TLS 8883 and 8084."""
    path: str = attrs.field(default="/mqtt", validator=_check_path)
    """Path of the WebSocket; "/" is accepted, too."""
    allowed_origins: tuple[str, ...] = attrs.field(default=(), converter=_normal_origins, validator=_check_origins)
    """Origins (scheme://host[:port]) whose pages may connect; empty or "*": any. Others get HTTP 403. Clients that
    send no Origin, which browsers always do, are accepted."""
    max_connections: int = attrs.field(default=100_000, validator=ge(1))
    """Network Connections of this listener at a time. Outcome: a further one is closed at once, counted."""
    connect_timeout: float = attrs.field(default=10.0, validator=[gt(0), le(3600)], metadata={"unit": "seconds"})
    """Seconds from accepting a Network Connection to its CONNECT; TLS handshake and WebSocket request are included."""

    @port.default
    def _default_port(self) -> int:
        if self.tls is not None:
            return 8084 if self.type == "websocket" else 8883
        return 8083 if self.type == "websocket" else 1883


class Endpoint(Protocol):
    """What a listener needs to know: [[Listeners]] tables have it, and whatever else accepts connections."""

    @property
    def type(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def path(self) -> str: ...
    @property
    def tls(self) -> TlsOptions | None: ...
    @property
    def max_connections(self) -> int: ...


E = TypeVar("E", bound=Endpoint)

Handler: TypeAlias = Callable[[trio.SocketStream, E, str, TlsServer | None], Awaitable[None]]
"""Serves one connection (`Clients.serve`); nothing but Cancelled may leave it. The third argument is the listener's
name."""


class Listener(Generic[E]):
    """The bound sockets of one endpoint: one, or one per address of a host name."""

    def __init__(self, options: E, sockets: Sequence[trio.SocketListener], tls: TlsServer | None = None) -> None:
        self.options = options
        self.tls = tls
        """None: in the clear. `tls.reload()` reads its files again."""
        self.connections = 0
        """Network Connections that are being served."""
        self._sockets = tuple(sockets)
        self._failing = False
        self._full = False
        self.addresses = tuple(_show_address(one.socket.getsockname()) for one in sockets)
        """Bound addresses, each `host:port`."""
        self.port: int = sockets[0].socket.getsockname()[1]
        """The bound port, the same at every address."""
        self.kind = options.type if tls is None else f"{options.type}+tls"
        self.name = f"{self.kind} {self.addresses[0]}"
        """Stands in logs, events and `ClientConnected.listener`."""

    def describe(self) -> str:
        """One line for the start-up summary: what is served where, and who can reach it."""
        path = self.options.path if self.options.type == "websocket" else ""
        where = ", ".join(address + path for address in self.addresses)
        secured = "" if self.tls is None else f"; {self.tls.describe()}"
        return f"{self.kind} {where}: {reach(self._sockets[0].socket.getsockname()[0])}{secured}"

    @property
    def trouble(self) -> str | None:
        """Why nobody can connect at the moment; None: everybody can."""
        return f"{self.name} cannot accept connections" if self._failing else None

    async def serve(self, handler: Handler[E], nursery: trio.Nursery, metrics: Metrics) -> None:
        """Accept until `close` or cancellation; the connections' tasks live in `nursery`, which outlasts this call."""
        async with trio.open_nursery() as accepting:
            for one in self._sockets:
                accepting.start_soon(self._accept, one, handler, nursery, metrics)

    def close(self) -> None:
        """Stop accepting: `serve` returns, connections go on."""
        for one in self._sockets:
            one.socket.close()

    async def _accept(
        self, listener: trio.SocketListener, handler: Handler[E], nursery: trio.Nursery, metrics: Metrics
    ) -> None:
        while True:
            try:
                stream = await listener.accept()
            except trio.ClosedResourceError:
                return
            except OSError as exc:
                # Nobody but the operator can mend it, and it may pass by itself: the clients that are there stay.
                metrics.accept_failures += 1
                if not self._failing:
                    logger.warning("%s cannot accept connections, goes on trying: %s%s", self.name, exc, _mend(exc))
                self._failing = True
                await trio.sleep(ACCEPT_PAUSE)
                continue
            if self._failing:
                self._failing = False
                logger.warning("%s accepts connections again", self.name)
            if self.connections >= self.options.max_connections:
                metrics.connections_over_limit += 1
                if not self._full:
                    logger.warning("%s is full: MaxConnections is %d", self.name, self.options.max_connections)
                self._full = True
                stream.socket.close()
                continue
            self.connections += 1
            nursery.start_soon(self._serve_one, handler, stream)

    async def _serve_one(self, handler: Handler[E], stream: trio.SocketStream) -> None:
        try:
            await handler(stream, self.options, self.name, self.tls)
        finally:
            self.connections -= 1
            # The log says once that the listener is full, until a tenth of it is free again.
            self._full = self._full and self.connections > self.options.max_connections * 0.9
            stream.socket.close()


async def open_listeners(options: Sequence[E]) -> list[Listener[E]]:
    """Bind all listeners, or none.

    Raises:
      StartError: the first one that cannot be bound, with its path in the configuration.
    """
    listeners: list[Listener[E]] = []
    try:
        for index, one in enumerate(options):
            listeners.append(await open_listener(one, f"Listeners[{index}]"))
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


async def open_listener(options: E, path: str = "Listeners[0]") -> Listener[E]:
    """Bind one listener; from then on connections wait for `Listener.serve`.

    Raises:
      StartError: says what is wrong and how to mend it; `path` names the listener.
    """
    where = f"{path} ({options.type} on {options.host or '*'}:{options.port})"
    tls = None
    if options.tls is not None:
        # What pages speak behind ALPN is HTTP; "mqtt" is the registered name of the other one.
        protocols = ("mqtt",) if options.type == "tcp" else ("http/1.1",)
        tls = TlsServer(options.tls, f"{path}.Tls", protocols)
        if tls.warning is not None:
            logger.warning("%s: %s", where, tls.warning)
    try:
        return Listener(options, await _bind(options.host or None, options.port), tls)
    except OSError as exc:  # socket.gaierror is one, too
        raise StartError(f"{where}: {_what_is_wrong(exc, options)}") from None
    except ValueError:  # host names that no resolver takes: UnicodeError, NUL
        raise StartError(f"{where}: {options.host!r} is no host name or address; set {path}.Host to one") from None


async def _bind(host: str | None, port: int) -> list[trio.SocketListener]:
    """Bind every address of `host` at one port.

    Addresses that this machine does not have (`localhost` may name ::1 where IPv6 is off) are left out if another one
    can be bound.
    """
    for attempts_left in reversed(range(SAME_PORT_ATTEMPTS)):
        found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM, flags=trio.socket.AI_PASSIVE)
        bound: list[trio.SocketListener] = []
        absent: OSError | None = None
        try:
            for family, _, _, _, address in dict.fromkeys(found):
                chosen = bound[0].socket.getsockname()[1] if bound else port
                try:
                    bound.append(await _bind_one(family, (address[0], chosen, *address[2:])))
                except OSError as exc:
                    if exc.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        raise
                    absent = exc
        except OSError as exc:
            for one in bound:
                one.socket.close()
            if port == 0 and exc.errno == errno.EADDRINUSE and attempts_left:
                continue  # the port that the kernel chose for the first address is taken at another one
            raise
        if bound:
            return bound
        raise absent or OSError(errno.EADDRNOTAVAIL, "no address")
    raise AssertionError("unreachable")


async def _bind_one(family: int, address: tuple[Any, ...]) -> trio.SocketListener:
    sock = trio.socket.socket(family, trio.socket.SOCK_STREAM)
    try:
        # A restart must not wait for connections of the last run in TIME_WAIT.
        sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
        if family == trio.socket.AF_INET6:
            sock.setsockopt(trio.socket.IPPROTO_IPV6, trio.socket.IPV6_V6ONLY, 1)
        await sock.bind(address)
        sock.listen(BACKLOG)
        return trio.SocketListener(sock)
    except BaseException:
        sock.close()
        raise


def _what_is_wrong(exc: OSError, options: Endpoint) -> str:
    host, port = options.host, options.port
    if isinstance(exc, trio.socket.gaierror):
        return f'the host name "{host}" is unknown ({exc.strerror}); set Host to an address of this machine'
    if exc.errno == errno.EADDRINUSE:
        flag = {"tcp": " or --port", "websocket": " or --ws-port"}.get(options.type, "")
        return (
            f"the port is in use; stop the program that has it (ss -ltnp 'sport = :{port}' shows which), "
            f"or choose another Port{flag} (0: any free one)"
        )
    if exc.errno in (errno.EACCES, errno.EPERM):
        return "no permission to bind the port; ports below 1024 need CAP_NET_BIND_SERVICE, so choose a higher Port"
    if exc.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return f'"{host}" is no address of this machine (ip addr shows them); set Host to one of them'
    return f"{exc.strerror or exc}{_mend(exc)}"


def _mend(exc: OSError) -> str:
    if exc.errno in (errno.EMFILE, errno.ENFILE):
        return " (raise the limit of open files: ulimit -n, LimitNOFILE of systemd)"
    return ""


def _show_address(address: tuple[Any, ...]) -> str:
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"


def reach(host: str) -> str:
    """Say who can reach a bound address, and why."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_loopback:
        return "this machine only (loopback address)"
    if address.is_unspecified:
        return "everybody who can reach any address of this machine"
    kind = "local network" if address.is_private or address.is_link_local else "internet"
    return f"everybody who can reach {host} ({kind} address)"
