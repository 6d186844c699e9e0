"""A client that speaks bytes: packets are made and read here without the codec under test."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.testing import PATIENCE, MemoryBroker

V31, V311, V5 = ProtocolVersion.MQTT_3_1, ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0
both_versions = pytest.mark.parametrize("version", [V311, V5])
ILL_FORMED = {
    "lone byte": b"\xff",
    "surrogate": b"\xed\xa0\x80",
    "overlong": b"\xc0\xaf",
    "beyond U+10FFFF": b"\xf4\x90\x80\x80",
    "cut": b"a\xe2\x82",
    "U+0000": b"a\0b",
}
"""Bytes that are no text; U+0000 is well-formed and forbidden all the same."""

ill_formed = pytest.mark.parametrize("bad", ILL_FORMED.values(), ids=ILL_FORMED)


def text(value: str | bytes) -> bytes:
    """A string, or binary data, behind its length."""
    data = value.encode() if isinstance(value, str) else value
    return len(data).to_bytes(2, "big") + data


def number(value: int) -> bytes:
    """A variable byte integer."""
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def packet(first_byte: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return bytes([first_byte]) + number(len(body)) + body


def block(version: ProtocolVersion, properties: bytes = b"") -> bytes:
    """A property block, which only 5.0 has."""
    return number(len(properties)) + properties if version is V5 else b""


def connect(
    version: ProtocolVersion,
    *payload: bytes,
    flags: int = 2,
    keep_alive: int = 0,
    properties: bytes = b"",
    name: bytes = b"MQTT",
) -> bytes:
    """CONNECT; `payload` is what stands behind the properties, a Client Identifier `c` by default."""
    head = text(name) + bytes([version, flags]) + keep_alive.to_bytes(2, "big")
    return packet(0x10, head, block(version, properties), *(payload or (text("c"),)))


def publish(
    version: ProtocolVersion,
    topic_name: str | bytes,
    payload: bytes = b"",
    *,
    flags: int = 0,
    packet_id: int = 0,
    properties: bytes = b"",
) -> bytes:
    """PUBLISH; `flags` are DUP 8, QoS 6, RETAIN 1."""
    middle = packet_id.to_bytes(2, "big") if flags & 6 else b""
    return packet(0x30 | flags, text(topic_name), middle, block(version, properties), payload)


def ack(first_byte: int, packet_id: int, code: int | None = None) -> bytes:
    """PUBACK 0x40, PUBREC 0x50, PUBREL 0x62 or PUBCOMP 0x70; `code` is for 5.0."""
    return packet(first_byte, packet_id.to_bytes(2, "big"), b"" if code is None else bytes([code]))


def subscribe(
    version: ProtocolVersion, packet_id: int, *filters: tuple[str | bytes, int], properties: bytes = b""
) -> bytes:
    """SUBSCRIBE of (Topic Filter, options)."""
    payload = b"".join(text(topic_filter) + bytes([options]) for topic_filter, options in filters)
    return packet(0x82, packet_id.to_bytes(2, "big"), block(version, properties), payload)


def unsubscribe(version: ProtocolVersion, packet_id: int, *filters: str | bytes) -> bytes:
    return packet(0xA2, packet_id.to_bytes(2, "big"), block(version), *map(text, filters))


PINGREQ, PINGRESP, DISCONNECT = b"\xc0\0", b"\xd0\0", b"\xe0\0"


async def receive(stream: trio.abc.ReceiveStream) -> bytes:
    """What comes next, nothing at the end of the connection. A peer that neither says something nor closes fails the
    test here, long before its time limit; on a fake clock that takes no time."""
    on_fake_clock = isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock)
    limit = PATIENCE if on_fake_clock else 5.0
    with trio.move_on_after(limit):
        try:
            return bytes(await stream.receive_some(65_536))
        except trio.BrokenResourceError:
            return b""
    raise AssertionError(f"nothing came within {limit:.0f} s and the connection is still open")


class Wire:
    """One end of a stream: sends bytes, reads whole packets."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.received = b""

    async def send(self, *data: bytes) -> None:
        await self.stream.send_all(b"".join(data))

    def _whole(self) -> int:
        """Length of the first packet that is there whole, or 0."""
        data, length, shift = self.received, 0, 0
        for at in range(1, min(len(data), 5)):
            length |= (data[at] & 127) << shift
            shift += 7
            if data[at] < 128:
                return at + 1 + length if len(data) >= at + 1 + length else 0
        return 0

    async def read(self) -> bytes:
        """The next packet, or nothing at the end of the connection."""
        while not (end := self._whole()):
            if not (data := await receive(self.stream)):
                assert not self.received, "the connection ended inside a packet"
                return b""
            self.received += data
        first, self.received = self.received[:end], self.received[end:]
        return first

    async def until_closed(self) -> list[bytes]:
        """All packets up to the end of the connection."""
        packets: list[bytes] = []
        while data := await self.read():
            packets.append(data)
        return packets

    async def until_pong(self) -> list[bytes]:
        """All packets that the peer sent, as a ping that comes back behind them tells."""
        await self.send(PINGREQ)
        packets: list[bytes] = []
        while (data := await self.read()) != PINGRESP:
            assert data, f"the connection ended behind {packets}"
            packets.append(data)
        return packets

    async def cut(self) -> None:
        """Break the connection without a word."""
        await trio.aclose_forcefully(self.stream)
        await trio.testing.wait_all_tasks_blocked()


async def open_wire(memory: MemoryBroker, *data: bytes) -> Wire:
    """Open a connection and send `data`."""
    wire = Wire(await memory.open_stream())
    await wire.send(*data)
    return wire


async def join(
    memory: MemoryBroker,
    version: ProtocolVersion,
    client_id: str = "c",
    *rest: bytes,
    flags: int = 2,
    keep_alive: int = 0,
    properties: bytes = b"",
) -> Wire:
    """Connect, with `rest` behind the Client Identifier; the CONNACK must be a success and is read."""
    wire = await open_wire(
        memory, connect(version, text(client_id), *rest, flags=flags, keep_alive=keep_alive, properties=properties)
    )
    connack = await wire.read()
    assert connack[0] == 0x20
    assert connack[3] == 0
    return wire


def packet_ids(packets: list[bytes]) -> list[int]:
    """Packet Identifiers of short acknowledgements."""
    return [int.from_bytes(data[2:4], "big") for data in packets]
