"""A client for tests."""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any, TypeVar

import trio
import trio.testing

from mqtt_trio.errors import MqttTrioError
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.connection import ClientConnection
from mqtt_trio.protocol.packets import (
    ConnAck,
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

P = TypeVar("P")


class ConnectionEndedError(MqttTrioError):
    """The broker closed the connection while the test waited for a packet."""


class TestClient:
    """An MQTT client for tests, one packet at a time. QoS flows of messages it gets are answered by `next_message`."""

    __test__ = False

    def __init__(self, stream: trio.abc.Stream, version: ProtocolVersion) -> None:
        self.stream = stream
        self.connection = ClientConnection(protocol_version=version)
        self.waiting: deque[Packet] = deque()
        """Packets that came while the test waited for another one."""
        self.connack: ConnAck | None = None
        self._ids = itertools.cycle(range(1, 65_536))

    async def send(self, packet: Packet) -> None:
        """Send one packet."""
        await self.stream.send_all(self.connection.encode(packet))

    async def next_packet(self) -> Packet:
        """Return the next packet, in the order of arrival.

        Raises:
          ConnectionEndedError: the broker closed the connection first.
        """
        if self.waiting:
            return self.waiting.popleft()
        return await self._read()

    async def _read(self) -> Packet:
        while (packet := self.connection.next_packet()) is None:
            try:
                data = await self.stream.receive_some(65_536)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                raise ConnectionEndedError("the broker closed the connection")
            self.connection.receive_data(bytes(data))
        return packet

    async def expect(self, kind: type[P]) -> P:
        """Return the next packet of one kind; others wait for `next_packet`."""
        for packet in self.waiting:
            if isinstance(packet, kind):
                self.waiting.remove(packet)
                return packet
        while not isinstance(packet := await self._read(), kind):
            self.waiting.append(packet)
        return packet

    async def closed(self) -> Packet | None:
        """Wait until the broker has closed; return the DISCONNECT that came first, if one did."""
        last = None
        try:
            while True:
                last = await self.next_packet()
        except ConnectionEndedError:
            return last if isinstance(last, Disconnect) else None

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
        if qos == 0:
            return ReasonCode.SUCCESS
        if qos == 1:
            return (await self.expect(PubAck)).reason_code
        received = await self.expect(PubRec)
        if received.reason_code < 0x80:
            await self.send(PubRel(received.packet_id))
            await self.expect(PubComp)
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

    async def next_message(self, *, acknowledge: bool = True) -> Publish:
        """Return the next message, acknowledged through its QoS flow unless told otherwise."""
        message = await self.expect(Publish)
        if acknowledge and message.packet_id is not None:
            if message.qos == 1:
                await self.send(PubAck(message.packet_id))
            else:
                await self.send(PubRec(message.packet_id))
                await self.expect(PubRel)
                await self.send(PubComp(message.packet_id))
        return message

    async def nothing_waits(self) -> bool:
        """Whether everything the broker sent has been seen: a ping comes back with nothing in front of it."""
        await self.send(PingReq())
        while not isinstance(packet := await self._read(), PingResp):
            self.waiting.append(packet)
        return not self.waiting

    async def disconnect(self, **fields: Any) -> None:
        """Say goodbye and close."""
        await self.send(Disconnect(**fields))
        await self.closed()
        await self.stream.aclose()

    async def cut(self) -> None:
        """Break the connection without a word."""
        await trio.aclose_forcefully(self.stream)
        await trio.testing.wait_all_tasks_blocked()
