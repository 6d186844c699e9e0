"""What the simulated clients know of packets: bytes, made and read without the codec under test."""

from __future__ import annotations

from typing import Final

import attrs

from tests.wire import V5, V311, number, packet, text

PUBACK: Final = 0x40
PUBREC: Final = 0x50
PUBREL: Final = 0x62
PUBCOMP: Final = 0x70
DUP: Final = 8

SIZES: Final = {0x11: 4, 0x13: 2, 0x21: 2, 0x22: 2, 0x23: 2, 0x24: 1, 0x25: 1, 0x27: 4, 0x28: 1, 0x29: 1, 0x2A: 1}
"""Bytes of the properties of CONNACK and PUBLISH that are integers."""
USER_PROPERTY: Final = 0x26
SUBSCRIPTION_IDENTIFIER: Final = 0x0B
RECEIVE_MAXIMUM: Final = 0x21
TOPIC_ALIAS: Final = 0x23


@attrs.define
class Arrived:
    """A PUBLISH as it came."""

    topic_name: str
    payload: bytes
    qos: int
    dup: bool
    packet_id: int
    """0 at QoS 0."""
    user_properties: bytes
    """As they stood in the property block."""
    retain: bool = False


def split(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Take whole packets off: (first byte, body) of each, and the bytes of the incomplete one."""
    packets = []
    pos, end = 0, len(data)
    while end - pos >= 2:
        at, length, shift = pos + 1, 0, 0
        while at < end:
            byte = data[at]
            at += 1
            length |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
        else:
            break
        if at + length > end:
            break
        packets.append((data[pos], data[at : at + length]))
        pos = at + length
    return packets, data[pos:]


def ack(first: int, packet_id: int) -> bytes:
    """Make PUBACK, PUBREC, PUBREL or PUBCOMP."""
    return bytes((first, 2, packet_id >> 8, packet_id & 255))


def two_bytes(data: bytes, at: int = 0) -> int:
    return data[at] << 8 | data[at + 1]


def read_number(data: bytes, at: int) -> tuple[int, int]:
    """Read a variable byte integer; return it and where it ends."""
    value, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def read_properties(data: bytes, at: int) -> tuple[dict[int, int], bytes, int]:
    """Read a property block of CONNACK or PUBLISH; return its integers, its User Properties and where it ends."""
    size, at = read_number(data, at)
    stop = at + size
    values: dict[int, int] = {}
    user_properties = b""
    while at < stop:
        identifier = data[at]
        if identifier == USER_PROPERTY:
            behind = at + 3 + two_bytes(data, at + 1)
            behind += 2 + two_bytes(data, behind)
            user_properties += data[at:behind]
            at = behind
        elif identifier == SUBSCRIPTION_IDENTIFIER:
            values[identifier], at = read_number(data, at + 1)
        else:
            width = SIZES[identifier]
            values[identifier] = int.from_bytes(data[at + 1 : at + 1 + width], "big")
            at += 1 + width
    return values, user_properties, stop


def read_publish(first: int, body: bytes, v5: bool, aliases: dict[int, str]) -> Arrived:
    """Read a PUBLISH; `aliases` are those of the connection."""
    at = 2 + two_bytes(body)
    topic_name = body[2:at].decode()
    qos = first >> 1 & 3
    packet_id = 0
    if qos:
        packet_id = two_bytes(body, at)
        at += 2
    user_properties = b""
    if v5:
        if body[at]:
            values, user_properties, at = read_properties(body, at)
            alias = values.get(TOPIC_ALIAS)
            if alias is not None:
                topic_name = topic_name or aliases.get(alias, "")
                aliases[alias] = topic_name
        else:
            at += 1
    return Arrived(topic_name, body[at:], qos, bool(first & DUP), packet_id, user_properties, bool(first & 1))


def read_code(body: bytes) -> int:
    """Return the Reason Code of an acknowledgement."""
    return body[2] if len(body) > 2 else 0


def write_connect(
    v5: bool,
    client_id: str,
    keep_alive: int,
    receive_maximum: int | None,
    topic_alias_maximum: int,
    *,
    clean: bool,
    lasts: bool,
) -> bytes:
    """Make a CONNECT, with Clean Start (Clean Session) if it is to be `clean`; if the session `lasts`, with a Session
    Expiry Interval of an hour."""
    properties = b""
    if v5:
        properties = b"" if not lasts else b"\x11" + (3600).to_bytes(4, "big")
        if receive_maximum is not None:
            properties += b"\x21" + receive_maximum.to_bytes(2, "big")
        if topic_alias_maximum:
            properties += b"\x22" + topic_alias_maximum.to_bytes(2, "big")
        properties = number(len(properties)) + properties
    version = V5 if v5 else V311
    head = text("MQTT") + bytes([version, 2 if clean else 0]) + keep_alive.to_bytes(2, "big")
    return packet(0x10, head, properties, text(client_id))
