"""An MQTT client on Trio for the commands: one network connection from CONNECT to DISCONNECT.

`converse` runs it: a reader, keep alive and the command's own work beside each other. The first failure ends them all.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeAlias

import attrs
import trio
import trio_websocket

from mqtt_trio.commands.failures import (
    CommandError,
    ConnectionLostError,
    DisconnectedError,
    RefusedError,
    UnreachableError,
)
from mqtt_trio.errors import MqttTrioError, RemoteProtocolError
from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.protocol.connection import ClientConnection
from mqtt_trio.protocol.packets import (
    ConnAck,
    Connect,
    Disconnect,
    Packet,
    PingReq,
    PingResp,
    Publish,
    SubAck,
    Subscribe,
    UnsubAck,
    Unsubscribe,
)

CONNECT_TIMEOUT: Final = 10.0
"""Seconds from the first look at the host name to CONNACK."""
SEND_TIMEOUT: Final = 60.0
"""Seconds that a server may refuse to take CHUNK_SIZE bytes."""
CLOSE_TIMEOUT: Final = 1.0
"""Seconds for the server to close behind our DISCONNECT, and for us to hear why a connection broke."""
CHUNK_SIZE: Final = 65_536

Opener: TypeAlias = Callable[[trio.Nursery], Awaitable[trio.abc.Stream]]
"""Opens the network connection; see `Endpoint.open`."""
Log: TypeAlias = Callable[[str], None]


@attrs.frozen(kw_only=True)
class Session:
    """What a command wants of its connection."""

    opener: Opener
    where: str
    """The server, for messages."""
    connect: Connect
    disconnect: Disconnect = attrs.field(factory=Disconnect)
    log: Log | None = None
    """Takes the lines of -d."""


class Client:
    """One network connection. `receive` is for one task, `send` for any number."""

    def __init__(self, stream: trio.abc.Stream, session: Session) -> None:
        self.session = session
        self.connack = ConnAck()
        self.keep_alive = session.connect.keep_alive
        """Seconds; 0: none."""
        self.farewell = session.disconnect
        """What `run` says at the end."""
        self._stream = stream
        self._connection = ClientConnection(protocol_version=session.connect.protocol_version)
        self._sending = trio.Lock()
        self._sent_at = trio.current_time()
        self._torn = False
        """A packet was not sent to its end: nothing may follow it."""
        self._ahead: list[Packet] = []
        self._ending: CommandError | None = None
        """What to raise behind the good packets of the last read."""
        self._waiting = False
        """Whether the reader waits for bytes; if not, silence says nothing about the server."""
        self._heard = trio.Event()
        self._running = False
        """Whether `run` reads beside what sends."""
        self._failures: list[MqttTrioError] = []
        self._leaving = False
        """The end of the connection is no failure any more."""
        self._closed = trio.Event()

    @property
    def version(self) -> ProtocolVersion:
        """Of the connection."""
        return self._connection.protocol_version

    async def connect(self) -> None:
        """Send CONNECT and wait for CONNACK.

        Raises:
          RefusedError: the server does not want us.
          CommandError: the connection ended, or the server asks for enhanced authentication.
        """
        await self.send(self.session.connect)
        try:
            first, *self._ahead = await self.receive()
        except ConnectionLostError as exc:
            raise ConnectionLostError(
                f"{exc} There was no CONNACK: {self.session.where} may speak something else."
            ) from None
        if not isinstance(first, ConnAck):
            raise CommandError("Error: the server asks for enhanced authentication (AUTH), which is not supported")
        if first.reason_code:
            raise RefusedError(first, self.version)
        self.connack = first
        if first.server_keep_alive is not None:
            self.keep_alive = first.server_keep_alive  # [MQTT5-3.1.2-21]

    async def receive(self) -> list[Packet]:
        """Return all packets of the next read that had any, PINGRESP apart.

        Raises:
          DisconnectedError: the server said DISCONNECT.
          ConnectionLostError: the connection ended without it, or the server broke the protocol.
        """
        if self._ahead:
            packets, self._ahead = self._ahead, []
            return packets
        while True:
            if packets := self._take():
                return packets
            if self._ending is not None:
                raise self._ending
            self._waiting = True
            try:
                data = await self._stream.receive_some(CHUNK_SIZE)
            except trio.BrokenResourceError:
                data = b""
            finally:
                self._waiting = False
            if not data:
                raise ConnectionLostError("Error: The connection was lost.")
            self._heard.set()
            self._connection.receive_data(bytes(data))

    def _take(self) -> list[Packet]:
        packets: list[Packet] = []
        try:
            while self._ending is None and (packet := self._connection.next_packet()) is not None:
                if self.session.log is not None:
                    self.session.log(f"{self._name} received {describe(packet)}")
                if isinstance(packet, Disconnect):
                    self._ending = DisconnectedError(packet)
                elif not isinstance(packet, PingResp):
                    packets.append(packet)
        except RemoteProtocolError as exc:
            self._ending = ConnectionLostError(f"Error: the server breaks the protocol ({exc}).")
        return packets

    async def send(self, *packets: Packet) -> None:
        """Send whole packets in a row. Cancelled in the middle, the connection takes nothing more; behind the farewell
        nothing is sent, without an error: whoever still answers a message is late, not wrong [MQTT5-3.14.4-1].

        Raises:
          LocalProtocolError: a packet cannot be written or is larger than the server takes; nothing was sent.
          ConnectionLostError: the server does not take it.
        """
        if self._leaving and packets != (self.farewell,):
            return
        data = b"".join([self._connection.encode(packet) for packet in packets])
        if self.session.log is not None:
            for packet in packets:
                self.session.log(f"{self._name} sending {describe(packet)}")
        async with self._sending:
            if self._torn:
                raise ConnectionLostError("Error: The connection was lost.")
            self._torn = True
            await self._send_bytes(data)
            self._torn = False
            self._sent_at = trio.current_time()

    async def _send_bytes(self, data: bytes) -> None:
        for start in range(0, len(data), CHUNK_SIZE):
            with trio.move_on_after(SEND_TIMEOUT) as scope:
                try:
                    await self._stream.send_all(data[start : start + CHUNK_SIZE])
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    if self._running:
                        await trio.sleep(CLOSE_TIMEOUT)  # the reader may know why and ends us first
                    raise ConnectionLostError("Error: The connection was lost.") from None
            if scope.cancelled_caught:
                raise ConnectionLostError(f"Error: the server took nothing for {SEND_TIMEOUT:g} s.")

    @property
    def _name(self) -> str:
        client_id = self.connack.assigned_client_identifier or self.session.connect.client_id
        return f"Client {client_id or '(null)'}"

    async def run(self, handle: Handler, work: Work) -> None:
        """Give what arrives to `handle` while `work` runs; then say DISCONNECT and close.

        Raises:
          MqttTrioError: of `handle` or `work`, or the end of the connection before that of `work`.
        """
        self._running = True
        async with trio.open_nursery() as nursery:
            for task in (partial(self._read, handle), self._keep_alive, partial(self._work, work, nursery)):
                nursery.start_soon(self._guarded, task, nursery)
        if self._failures:
            raise self._failures[0]

    async def _guarded(self, task: Callable[[], Awaitable[None]], nursery: trio.Nursery) -> None:
        try:
            await task()
        except MqttTrioError as exc:  # a value, so that no exception group needs unwrapping
            self._failures.append(exc)
            nursery.cancel_scope.cancel()

    async def _read(self, handle: Handler) -> None:
        while True:
            try:
                packets = await self.receive()
            except ConnectionLostError:
                if not self._leaving:
                    raise
                self._closed.set()
                return
            await handle(self, packets)

    async def _work(self, work: Work, nursery: trio.Nursery) -> None:
        try:
            await work(self)
        except ConnectionLostError:
            raise
        except MqttTrioError as exc:  # the command's own: the server is told goodbye all the same
            self._failures.append(exc)
        self._leaving = True
        if not self._torn:
            with trio.move_on_after(CLOSE_TIMEOUT):
                await self.send(self.farewell)
                await self._closed.wait()  # bytes that nobody read would reset the connection and lose ours
        nursery.cancel_scope.cancel()

    async def aclose(self) -> None:
        """Close the network connection, within CLOSE_TIMEOUT."""
        with trio.move_on_after(CLOSE_TIMEOUT):
            try:
                await self._stream.aclose()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

    async def _keep_alive(self) -> None:
        """Send PINGREQ when nothing else was sent for Keep Alive seconds [MQTT5-3.1.2-20].

        Raises:
          ConnectionLostError: nothing came back within as long again.
        """
        while self.keep_alive:
            due = self._sent_at + self.keep_alive
            if trio.current_time() < due:
                await trio.sleep_until(due)
                continue
            self._heard = trio.Event()
            await self.send(PingReq())
            with trio.move_on_after(self.keep_alive):
                await self._heard.wait()
            if self._waiting and not self._heard.is_set():
                raise ConnectionLostError(f"Error: the server did not answer PINGREQ for {self.keep_alive} s.")


Handler: TypeAlias = Callable[[Client, list[Packet]], Awaitable[None]]
"""Takes the packets of a read; nothing more is read until it returns."""
Work: TypeAlias = Callable[[Client], Awaitable[None]]
"""What a command does with a connected client."""


async def converse(session: Session, handle: Handler, work: Work) -> None:
    """Connect, run `work` with the connected client and `handle` for what arrives, disconnect.

    Raises:
      UnreachableError: no connection or no CONNACK within CONNECT_TIMEOUT.
      MqttTrioError: see `Client.connect` and `Client.run`.
    """
    failure: MqttTrioError | None = None
    try:
        async with trio.open_nursery() as nursery:
            # Failures are kept as values, so that no exception group needs unwrapping.
            try:
                client = await _connected(session, nursery)
                try:
                    await client.run(handle, work)
                finally:
                    await client.aclose()
            except MqttTrioError as exc:
                failure = exc
            nursery.cancel_scope.cancel()
    except* trio_websocket.ConnectionRejected as group:
        status = getattr(group.exceptions[0], "status_code", "?")
        failure = UnreachableError(
            f"Error: {session.where} answers the WebSocket request with HTTP {status}; --ws-path names the path"
        )
    if failure is not None:
        raise failure


async def _connected(session: Session, nursery: trio.Nursery) -> Client:
    what = "did not answer"
    with trio.move_on_after(CONNECT_TIMEOUT):
        stream = await session.opener(nursery)
        what = "did not answer CONNECT"
        client = Client(stream, session)
        try:
            await client.connect()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return client
    raise UnreachableError(f"Error: {session.where} {what} within {CONNECT_TIMEOUT:g} s.")


def describe(packet: Packet) -> str:
    """Say in a line of -d what a packet is; payloads, properties and passwords are left out."""
    name = type(packet).__name__.upper()
    if isinstance(packet, Publish):
        return (
            f"{name} (d{packet.dup:d}, q{packet.qos:d}, r{packet.retain:d}, m{packet.packet_id or 0}, "
            f"{packet.topic_name!r}, ... ({len(packet.payload)} bytes))"
        )
    facts = []
    if (packet_id := getattr(packet, "packet_id", None)) is not None:
        facts.append(f"Mid: {packet_id}")
    if isinstance(packet, Subscribe):
        facts += [f"Topic: {each.topic_filter}, QoS: {each.qos:d}" for each in packet.subscriptions]
    elif isinstance(packet, Unsubscribe):
        facts += [f"Topic: {topic_filter}" for topic_filter in packet.topic_filters]
    elif isinstance(packet, SubAck | UnsubAck):
        facts += [f"RC: {reason_code:d}" for reason_code in packet.reason_codes]
    elif isinstance(packet, ConnAck):
        return f"{name} ({packet.reason_code:d})"
    elif reason_code := getattr(packet, "reason_code", None):
        facts.append(f"RC: {reason_code:d}")
    return f"{name} ({', '.join(facts)})" if facts else name
