"""A client for tests."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, TypeVar

import trio
import trio.testing

from mqtt_trio.errors import MqttTrioError
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.connection import ClientConnection
from mqtt_trio.protocol.packets import (
    ConnAck,
    Connect,
    Disconnect,
    MessageProperties,
    Packet,
    PingReq,
    PingResp,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    SubAck,
    Subscribe,
    Subscription,
    UnsubAck,
    Unsubscribe,
)
from mqtt_trio.testing.pipe import Pipe, PipeStream

P = TypeVar("P")
T = TypeVar("T")
PATIENCE: Final = 30 * 24 * 3600.0
"""Seconds that a client waits unless told otherwise. On a fake clock what never comes fails a test at once."""

FAREWELL: Final = 5.0
"""Seconds that a client waits for the broker to close behind its DISCONNECT."""


class ConnectionEndedError(MqttTrioError):
    """The connection ended while the test waited for a packet."""


class NothingCameError(MqttTrioError, AssertionError):
    """What the test waited for did not come in time."""


class TestClient:
    """An MQTT client for tests, one packet at a time and for one task at a time.

    It does nothing by itself: it reads when it waits for something, and acknowledges what `next_message` and its
    sisters return. Every wait has a `timeout` in seconds, `patience` by default, and raises NothingCameError behind
    it and ConnectionEndedError when the connection ends first.
    """

    __test__ = False

    def __init__(self, stream: trio.abc.Stream, version: ProtocolVersion, *, pipe: Pipe | None = None) -> None:
        self.stream = stream
        self.connection = ClientConnection(protocol_version=version)
        self.waiting: deque[Packet] = deque()
        """Packets that came while the test waited for another one."""
        self.connect_packet: Connect | None = None
        """The CONNECT that it sent."""
        self.connack: ConnAck | None = None
        self.patience = PATIENCE
        self._pipe = stream.pipe if pipe is None and isinstance(stream, PipeStream) else pipe
        self._ids = itertools.cycle(range(1, 65_536))

    @property
    def client_id(self) -> str:
        """The Client Identifier, chosen or assigned; empty before CONNECT."""
        assigned = self.connack and self.connack.assigned_client_identifier
        return assigned or (self.connect_packet.client_id if self.connect_packet is not None else "")

    @property
    def pipe(self) -> Pipe:
        """The network connection and its faults."""
        if self._pipe is None:
            raise MqttTrioError("this client has no Pipe: its stream did not come from a MemoryBroker")
        return self._pipe

    def go_on_after(self, client: TestClient) -> None:
        """Take on from an earlier connection of the same session: its patience, and Packet Identifiers that it has not
        used."""
        self.patience, self._ids = client.patience, client._ids

    async def send(self, packet: Packet) -> None:
        """Send one packet; waits, without a limit, while the connection takes no more.

        Raises:
          ConnectionEndedError: the connection is known to have ended.
        """
        if isinstance(packet, Connect):
            self.connect_packet = packet
        data = self.connection.encode(packet)
        try:
            await self.stream.send_all(data)
        except trio.BrokenResourceError as exc:
            raise ConnectionEndedError(f"{type(packet).__name__} cannot be sent: {exc}") from None

    async def next_packet(self, *, timeout: float | None = None) -> Packet:
        """Return the next packet, in the order of arrival."""
        return await self._within(timeout, "packet", self._next_packet)

    async def expect(self, kind: type[P], *, timeout: float | None = None) -> P:
        """Return the next packet of one kind; others wait for `next_packet`."""
        return await self._within(timeout, kind.__name__, partial(self._next, kind))

    async def closed(self, *, timeout: float | None = None) -> Packet | None:
        """Wait until the connection has ended; return the DISCONNECT that came first, if one did."""
        return await self._within(timeout, "end of the connection", self._closed)

    async def _within(self, timeout: float | None, what: str, wait: Callable[[], Awaitable[T]]) -> T:
        limit = self.patience if timeout is None else timeout
        with trio.move_on_after(limit):
            return await wait()
        came = ", ".join(repr(packet) for packet in self.waiting) or "nothing"
        raise NothingCameError(f"no {what} came to client {self.client_id!r} within {limit:g} s; what came: {came}")

    async def _closed(self) -> Packet | None:
        last = None
        try:
            while True:
                last = await self._next_packet()
        except ConnectionEndedError:
            return last if isinstance(last, Disconnect) else None

    async def _next_packet(self) -> Packet:
        return self.waiting.popleft() if self.waiting else await self._read()

    async def _next(self, kind: type[P], packet_id: int | None = None) -> P:
        """Return the next packet of one kind, and with one Packet Identifier where it matters; keep the others."""
        for packet in self.waiting:
            if isinstance(packet, kind) and _is_about(packet, packet_id):
                self.waiting.remove(packet)
                return packet
        while True:
            packet = await self._read()
            if isinstance(packet, kind) and _is_about(packet, packet_id):
                return packet
            self.waiting.append(packet)

    async def _read(self) -> Packet:
        while (packet := self.connection.next_packet()) is None:
            try:
                data = await self.stream.receive_some(65_536)
            except trio.BrokenResourceError:
                raise ConnectionEndedError("the connection broke") from None
            if not data:
                raise ConnectionEndedError("the broker closed the connection")
            self.connection.receive_data(bytes(data))
        return packet

    async def publish(
        self,
        topic_name: str,
        payload: bytes = b"",
        *,
        qos: int = 0,
        retain: bool = False,
        **properties: Any,
    ) -> ReasonCode:
        """Publish and see the message through its QoS flow; return the reason code of its first acknowledgement."""
        packet_id = next(self._ids) if qos else None
        message = MessageProperties(**properties)
        await self.send(Publish(topic_name, payload, QoS(qos), retain, packet_id=packet_id, properties=message))
        if packet_id is None:
            return ReasonCode.SUCCESS
        return await self._within(None, f"acknowledgement of message {packet_id}", partial(self._flow, qos, packet_id))

    async def _flow(self, qos: int, packet_id: int) -> ReasonCode:
        if qos == 1:
            return (await self._next(PubAck, packet_id)).reason_code
        received = await self._next(PubRec, packet_id)
        if received.reason_code < 0x80:
            await self.send(PubRel(packet_id))
            await self._next(PubComp, packet_id)
        return received.reason_code

    async def subscribe(self, *topic_filters: str, qos: int = 2, **options: Any) -> tuple[ReasonCode, ...]:
        """Subscribe and return the granted codes; `options` are those of `Subscription`."""
        identifier = options.pop("subscription_identifier", None)
        subscriptions = tuple(Subscription(topic_filter, QoS(qos), **options) for topic_filter in topic_filters)
        await self.send(Subscribe(next(self._ids), subscriptions, identifier))
        return (await self.expect(SubAck)).reason_codes

    async def unsubscribe(self, *topic_filters: str) -> tuple[ReasonCode, ...]:
        """Unsubscribe and return the codes."""
        await self.send(Unsubscribe(next(self._ids), topic_filters))
        return (await self.expect(UnsubAck)).reason_codes

    async def next_message(self, *, acknowledge: bool = True, timeout: float | None = None) -> Publish:
        """Return the next message, acknowledged through its QoS flow unless told otherwise."""
        message = await self._within(timeout, "message", partial(self._next, Publish))
        if acknowledge:
            await self.acknowledge(message)
        return message

    async def next_messages(
        self, count: int, *, acknowledge: bool = True, timeout: float | None = None
    ) -> list[Publish]:
        """Return the next `count` messages; `timeout` is for each."""
        return [await self.next_message(acknowledge=acknowledge, timeout=timeout) for _ in range(count)]

    async def waiting_messages(self) -> list[Publish]:
        """Return every message that the broker has for this client by now, acknowledged; an empty list when it has
        none. A ping that comes back with no message in front tells."""
        found: list[Publish] = []
        while True:
            await self.ping()
            messages = [packet for packet in self.waiting if isinstance(packet, Publish)]
            if not messages:
                return found
            self.waiting = deque(packet for packet in self.waiting if not isinstance(packet, Publish))
            for message in messages:
                await self.acknowledge(message)
            found += messages

    async def acknowledge(self, message: Publish, reason_code: ReasonCode = ReasonCode.SUCCESS) -> None:
        """See a message through its QoS flow that was taken with `acknowledge=False`; a code from 0x80 refuses it."""
        packet_id = message.packet_id
        if packet_id is None:
            return
        if message.qos == 1:
            await self.send(PubAck(packet_id, reason_code))
            return
        await self.send(PubRec(packet_id, reason_code))
        if reason_code < 0x80:
            await self._within(None, f"PubRel {packet_id}", partial(self._next, PubRel, packet_id))
            await self.send(PubComp(packet_id))

    async def ping(self, *, timeout: float | None = None) -> float:
        """Send PINGREQ and wait for PINGRESP; return the seconds between them. What came in between waits."""

        async def pong() -> None:
            while not isinstance(packet := await self._read(), PingResp):
                self.waiting.append(packet)

        start = trio.current_time()
        await self.send(PingReq())
        await self._within(timeout, "PingResp", pong)
        return trio.current_time() - start

    async def nothing_waits(self) -> bool:
        """Whether everything the broker sent has been seen: a ping comes back with nothing in front of it."""
        await self.ping()
        return not self.waiting

    async def disconnect(self, **fields: Any) -> None:
        """Say goodbye and close, once the broker has or FAREWELL seconds later [MQTT5-3.14.4-2]; `fields` are those of
        `Disconnect`."""
        await self.send(Disconnect(**fields))
        with trio.move_on_after(FAREWELL):
            await self._closed()  # the broker has seen it all by then
        await self.stream.aclose()

    async def cut(self) -> None:
        """Close the network connection without a word. What was sent still arrives; `pipe.cut` loses it."""
        await trio.aclose_forcefully(self.stream)
        await trio.testing.wait_all_tasks_blocked()


def _is_about(packet: object, packet_id: int | None) -> bool:
    return packet_id is None or getattr(packet, "packet_id", None) == packet_id
