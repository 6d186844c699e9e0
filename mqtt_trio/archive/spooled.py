"""What archive groups put into their spool: runs of frames as they were received, other messages as a frame each. Pure.

The bytes outlive the program that wrote them, so they begin with a version.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, TypeAlias

from mqtt_trio.broker.message import Message
from mqtt_trio.broker.tap import FrameRun, read_run
from mqtt_trio.errors import MalformedPacketError
from mqtt_trio.protocol.codes import ProtocolVersion, QoS
from mqtt_trio.protocol.decode import decode_publish
from mqtt_trio.protocol.encode import encode_publish
from mqtt_trio.protocol.packets import NO_PROPERTIES, Publish
from mqtt_trio.protocol.wire import read_header

Item: TypeAlias = FrameRun | Message

RUN: Final = 1
MESSAGE: Final = 2
HEAD: Final = struct.Struct("<BBBdIHI")
"""Kind (which is also its version), QoS, protocol version, publish time, messages, bytes of the client id and of the
frames; both follow."""


def count_of(item: Item) -> int:
    """Return how many messages an item is."""
    return 1 if isinstance(item, Message) else item.count


def pack_items(items: Sequence[Item]) -> bytes:
    """Return the bytes of a record that stands for `items`, in order."""
    parts: list[bytes] = []
    for item in items:
        client = item.client_id.encode()
        if isinstance(item, Message):
            version = ProtocolVersion.MQTT_3_1_1 if item.properties is NO_PROPERTIES else ProtocolVersion.MQTT_5_0
            packet_id = 1 if item.qos else None
            packet = Publish(
                item.topic_name,
                item.payload,
                QoS(item.qos),
                item.retain,
                packet_id=packet_id,
                properties=item.properties,
            )
            frames = encode_publish(packet, version)
            head = HEAD.pack(MESSAGE, item.qos, version, item.published_at, 1, len(client), len(frames))
        else:
            frames = item.frames
            head = HEAD.pack(
                *(RUN, item.qos, item.protocol_version, item.published_at, item.count, len(client), len(frames))
            )
        parts += (head, client, frames)
    return b"".join(parts)


def read_items(data: bytes) -> list[Message]:
    """Return the messages of a record.

    Raises:
      RemoteProtocolError: `pack_items` of this version did not make it.
    """
    messages: list[Message] = []
    at = 0
    while at < len(data):
        if len(data) - at < HEAD.size:
            raise MalformedPacketError("a spooled record ends within the head of an item")
        kind, qos, version_number, published_at, count, client_size, size = HEAD.unpack_from(data, at)
        at += HEAD.size
        end = at + client_size + size
        if kind not in (RUN, MESSAGE) or version_number not in (3, 4, 5) or end > len(data):
            raise MalformedPacketError(f"a spooled item of kind {kind} is not known to this version, or is cut off")
        version = ProtocolVersion(version_number)
        client_id = data[at : at + client_size].decode(errors="replace")
        frames = data[at + client_size : end]
        if kind == RUN:
            messages += read_run(FrameRun(frames, count, qos, version, client_id, published_at))
        else:
            messages.append(_read_message(frames, version, client_id, published_at))
        at = end
    return messages


def _read_message(frame: bytes, version: ProtocolVersion, client_id: str, published_at: float) -> Message:
    header = read_header(frame, 0)
    if header is None or header[1] != len(frame):
        raise MalformedPacketError("a spooled message is no whole frame")
    packet = decode_publish(frame[0] & 15, frame, *header, version)
    return Message.of(packet, client_id, published_at)
