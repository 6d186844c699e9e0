"""Packed, versioned bus records [K21]: pure, no I/O.

A record is a header and a body, big endian throughout::

    version u8 | kind u8 | flags u8 | instance 16 bytes | sequence u64 | stream u16 |
    node id length u16 | node id | body

The body of a `Kind.BATCH` is a list of items: runs of PUBLISH packets as their publisher sent them, and single
messages in fields of their own, with choices in front of them (`bus_choices`) where share groups are to get them. The
bodies of the other kinds are in `node_facts`, `bus_clients` and `bus_choices`; `schemas/mqtt_bus.layout.json` describes
all of them. A body that is larger than one Kafka record may be is cut into parts with sequences side by side: all but
the last have `Flag.MORE`, all but the first `Flag.CONTINUED`.

Decoding checks everything that a receiver relies on, because anybody may write to a Kafka topic; the packets inside a
run at QoS 0 are left to `LocalClient.publish_runs`, which reads them anyway.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

import attrs

from gateways.kafka.bus_choices import TAG_CHOICES, Chosen, behind_choices, decode_choices
from gateways.kafka.bus_errors import FORMAT_VERSION as FORMAT_VERSION
from gateways.kafka.bus_errors import BusRecordError as BusRecordError
from gateways.kafka.bus_errors import UnknownVersionError as UnknownVersionError
from mqtt_trio.gateway import NO_PROPERTIES, FrameRun, Message, MessageProperties, ProtocolVersion

HEADER: Final = struct.Struct(">BBB16sQHH")
FLAGS_AT: Final = 2
INSTANCE: Final = slice(3, 19)
"""Where the instance id lies, in every version: own records are recognised before anything is decoded."""
RUN_HEAD: Final = struct.Struct(">BBBHdII")
MESSAGE_HEAD: Final = struct.Struct(">BBBdHHI")
NUMBER: Final = struct.Struct(">I")
LENGTH: Final = struct.Struct(">H")
"""MQTT strings and binary data have at most 65,535 bytes [MQTT5-1.5.4]."""
LATEST: Final = 253_402_300_799.0
"""UTC seconds of the last moment that a calendar here can show."""
CONTINUES: Final = 0x80
"""Bit of a Variable Byte Integer's byte: more bytes follow."""
TAG_RUN: Final = 1
TAG_MESSAGE: Final = 2
RUN_OVERHEAD: Final = 200
"""Bytes that a run or a message is counted for beside its content: what it costs in memory while it waits."""
VERSIONS: Final = {int(version): version for version in (ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0)}

HAS_FORMAT: Final = 0x01
FORMAT_IS_UTF8: Final = 0x02
HAS_EXPIRY: Final = 0x04
HAS_CONTENT_TYPE: Final = 0x08
HAS_RESPONSE_TOPIC: Final = 0x10
HAS_CORRELATION: Final = 0x20
HAS_USER_PROPERTIES: Final = 0x40
MAX_PACKETS: Final = 131_072
"""Packets and messages of one record. A node writes fewer: RECORD_SIZE bytes and one item more."""
SMALL_BODY: Final = 5 * MAX_PACKETS
"""Bytes of a body that cannot hold more packets: the smallest PUBLISH has five."""
MAX_PROPERTIES: Final = 262_144
"""User properties of one message. Outcome: the message does not go to the bus [K4], counted."""
LONGEST_NAME: Final = 1024
"""Bytes of a name that stands in logs."""
LAST_SEQUENCE: Final = 2**53
"""Far above what any process can write; higher ones would spoil the counters."""
QOS_BITS: Final = 0x03
RETAIN_BIT: Final = 0x04


class Kind(enum.IntEnum):
    BATCH = 0
    HELLO = 1
    """A node has begun to listen."""
    ANNOUNCE = 2
    """A node is alive."""
    ALIVE = 3
    """The node that wrote this is the earlier one of two with its id; `NodeFacts.target` is the later one."""
    GOODBYE = 4
    """A node ends in good order."""
    PARTITIONS = 5
    """In mqtt.retained: over how many partitions topics are spread."""
    CLIENTS = 6
    """Clients have connected to a node (`bus_clients`)."""
    GROUPS = 7
    """Of which share groups a node has members (`bus_choices`)."""


ABOUT_NODES: Final = frozenset((Kind.HELLO, Kind.ANNOUNCE, Kind.ALIVE, Kind.GOODBYE))


class Flag(enum.IntFlag):
    NONE = 0
    MORE = 1
    """The body goes on in the record with the next sequence."""
    CONTINUED = 2
    """The body began in an earlier record."""


PARTS: Final = Flag.MORE | Flag.CONTINUED


Item: TypeAlias = FrameRun | bytes
"""What waits for `encode_items`: a run, or what `encode_message` or `encode_run` made, with or without a choice."""
Decoded: TypeAlias = FrameRun | Message


@attrs.define
class Header:
    """Who wrote a record, and which of its records for this partition it is."""

    kind: Kind
    instance_id: bytes
    node_id: str
    sequence: int
    """Counts the records of one stream of the instance from 1; all of them are in one partition."""
    flags: Flag
    body_start: int
    """Where the body begins in the record's value."""
    stream: int = 0
    """Which of the instance's sequences it is: it has one for each partition and kind of message."""

    @property
    def writer(self) -> bytes:
        """Whose sequence it is."""
        return self.instance_id + self.stream.to_bytes(2, "big")


# --- writing


def encode_header(
    kind: Kind, instance_id: bytes, node_id: str, sequence: int, flags: Flag = Flag.NONE, stream: int = 0
) -> bytes:
    """The first bytes of a record; the body follows."""
    name = node_id.encode()
    return HEADER.pack(FORMAT_VERSION, kind, flags, instance_id, sequence, stream, len(name)) + name


def encode_message(message: Message) -> bytes:
    """Pack one message of the full path, without loss.

    Raises:
      BusRecordError: no MQTT message: a string that is no UTF-8, a value out of range.
    """
    try:
        properties = message.properties
        topic, client = message.topic_name.encode(), message.client_id.encode()
        present, extra = (0, b"") if properties is NO_PROPERTIES else _encode_properties(properties)
        head = MESSAGE_HEAD.pack(
            TAG_MESSAGE,
            message.qos | (RETAIN_BIT if message.retain else 0),
            present,
            message.published_at,
            len(topic),
            len(client),
            len(message.payload),
        )
        return b"".join((head, topic, client, message.payload, extra))
    except (struct.error, UnicodeEncodeError) as exc:
        raise BusRecordError(f"a message that no bus record can hold: {exc}") from None


def _encode_properties(properties: MessageProperties) -> tuple[int, bytes]:
    present = 0
    parts: list[bytes] = []
    if properties.payload_format_indicator is not None:
        present |= HAS_FORMAT | (FORMAT_IS_UTF8 if properties.payload_format_indicator else 0)
    if properties.message_expiry_interval is not None:
        present |= HAS_EXPIRY
        parts.append(NUMBER.pack(properties.message_expiry_interval))
    for bit, value in (
        (HAS_CONTENT_TYPE, properties.content_type),
        (HAS_RESPONSE_TOPIC, properties.response_topic),
        (HAS_CORRELATION, properties.correlation_data),
    ):
        if value is not None:
            present |= bit
            raw = value.encode() if isinstance(value, str) else value
            parts += (LENGTH.pack(len(raw)), raw)
    if properties.user_properties:
        if len(properties.user_properties) > MAX_PROPERTIES:
            raise BusRecordError(f"a message with more than {MAX_PROPERTIES} user properties")
        present |= HAS_USER_PROPERTIES
        parts.append(NUMBER.pack(len(properties.user_properties)))
        for pair in properties.user_properties:
            for text in pair:
                raw = text.encode()
                parts += (LENGTH.pack(len(raw)), raw)
    return present, b"".join(parts)


def encode_items(items: Iterable[Item], head: bytes = b"") -> bytes:
    """The body of a batch behind `head`. Runs side by side of one client, QoS, version and instant become one run."""
    parts = [head]
    add = parts.append
    last: FrameRun | None = None
    count = size = place = 0
    client = b""
    for item in items:
        if type(item) is bytes:
            if last is not None:
                parts[place] = _run_head(last, client, count, size)
                last = None
            add(item)
            continue
        run: FrameRun = item  # type: ignore[assignment]  # mypy does not narrow the union by `type(...) is`
        if (
            last is not None
            and run.published_at == last.published_at
            and run.client_id == last.client_id
            and run.qos == last.qos
            and run.protocol_version == last.protocol_version
        ):
            count += run.count
            size += len(run.frames)
            add(run.frames)
            continue
        if last is not None:
            parts[place] = _run_head(last, client, count, size)
        last, count, size, place = run, run.count, len(run.frames), len(parts)
        client = run.client_id.encode()
        add(b"")  # the head comes here when the run's end is known
        add(run.frames)
    if last is not None:
        parts[place] = _run_head(last, client, count, size)
    return b"".join(parts)


def encode_run(run: FrameRun) -> bytes:
    """Pack one run by itself."""
    return _run_head(run, run.client_id.encode(), run.count, len(run.frames)) + run.frames


def messages_of(item: Item) -> int:
    """How many messages an item holds."""
    if isinstance(item, FrameRun):
        return item.count
    start = behind_choices(item)
    return RUN_HEAD.unpack_from(item, start)[5] if item[start] == TAG_RUN else 1


def _run_head(run: FrameRun, client: bytes, count: int, size: int) -> bytes:
    version = 5 if run.protocol_version == 5 else 4  # 3.1 and 3.1.1 write the same PUBLISH
    return RUN_HEAD.pack(TAG_RUN, version, run.qos, len(client), run.published_at, count, size) + client


# --- reading


def decode_header(value: bytes) -> Header:
    """Read the header.

    Raises:
      UnknownVersionError: a node of another format version wrote this.
      BusRecordError: no bus record.
    """
    if not value:
        raise BusRecordError("an empty record")
    if value[0] != FORMAT_VERSION:
        raise UnknownVersionError(value[0])
    if len(value) < HEADER.size:
        raise BusRecordError(f"{len(value)} bytes, the header alone has {HEADER.size}")
    _, kind, flags, instance_id, sequence, stream, length = HEADER.unpack_from(value)
    body_start = HEADER.size + length
    if body_start > len(value):
        raise BusRecordError("the node id runs past the end of the record")
    if sequence > LAST_SEQUENCE:
        raise BusRecordError(f"sequence {sequence}")
    try:
        return Header(
            Kind(kind),
            instance_id,
            read_name(value[HEADER.size : body_start]),
            sequence,
            _FLAGS[flags],
            body_start,
            stream,
        )
    except (ValueError, KeyError) as exc:  # UnicodeDecodeError is a ValueError
        raise BusRecordError(f"unknown kind or flags, or a node id that is no UTF-8: {exc}") from None


_FLAGS: Final = {number: Flag(number) for number in range(4)}


def read_name(raw: bytes) -> str:
    """A name that stands in logs, so without control characters."""
    if len(raw) <= LONGEST_NAME and (name := raw.decode()).isprintable():
        return name
    raise BusRecordError("a name that is too long, or with characters that cannot be shown")


def decode_items(body: bytes, start: int = 0) -> list[Decoded | Chosen]:
    """Read the body of a batch from `start` to its end, in order.

    Raises:
      BusRecordError: something in it cannot be; nothing of it is to be delivered then.
    """
    items: list[Decoded | Chosen] = []
    end = len(body)
    room = MAX_PACKETS if end - start > SMALL_BODY else None
    try:
        while start < end:
            into = items
            if body[start] == TAG_CHOICES:
                chosen, start = decode_choices(body, start)
                items.append(chosen)
                into = chosen.items  # type: ignore[assignment]  # a list of fewer types, which is filled with these
            if room is not None:
                room -= _packets(body, start, room)
            if body[start] == TAG_RUN:
                start = _decode_run(body, start, into)
            elif body[start] == TAG_MESSAGE:
                start = _decode_message(body, start, into)
            else:
                raise BusRecordError(f"an item of unknown type {body[start]}")
    except struct.error:
        raise BusRecordError("an item runs past the end of the record") from None
    except UnicodeDecodeError as exc:
        raise BusRecordError(f"a string that is no UTF-8: {exc.reason}") from None
    return items


def _decode_run(body: bytes, start: int, items: list[Decoded | Chosen]) -> int:
    _, version, qos, client_size, published_at, count, size = RUN_HEAD.unpack_from(body, start)
    name = start + RUN_HEAD.size
    first = name + client_size
    stop: int = first + size
    if stop > len(body):
        raise BusRecordError("a run that is longer than its record")
    protocol_version = VERSIONS.get(version)
    if protocol_version is None or qos > 2 or not 0 <= published_at <= LATEST:
        raise BusRecordError("a run with an unknown protocol version or QoS, or without a time")
    if not 0 < count <= size // 2:
        raise BusRecordError(f"{count} packets in {size} bytes")
    client_id = body[name:first].decode()
    frames = body[first:stop]
    if frames[0] != 0x30 | qos << 1:  # PUBLISH of this QoS, neither DUP nor RETAIN
        raise BusRecordError("a run that does not begin with a PUBLISH of its QoS")
    if qos == 0 or count == 1:
        items.append(FrameRun(frames, count, qos, protocol_version, client_id, published_at))
        return stop
    pieces = split_frames(frames)
    if len(pieces) != count:
        raise BusRecordError(f"a run of {len(pieces)} packets that says {count}")
    items += [FrameRun(piece, 1, qos, protocol_version, client_id, published_at) for piece in pieces]
    return stop


def _packets(body: bytes, start: int, room: int) -> int:
    """Count what the next item of a large body holds, before anything is made of it.

    Raises:
      BusRecordError: more than `room`, or it is no item.
    """
    if body[start] == TAG_RUN:
        _, _, _, client_size, _, count, size = RUN_HEAD.unpack_from(body, start)
        first = start + RUN_HEAD.size + client_size
        if count <= room and len(split_frames(body[first : first + size], room)) == count:
            return int(count)
    elif room:
        return 1
    raise BusRecordError(f"more than {MAX_PACKETS} packets, or a run that says another number than it has")


def split_frames(frames: bytes, most: int = MAX_PACKETS) -> list[bytes]:
    """Cut packets that lie side by side.

    Raises:
      BusRecordError: they do not end where `frames` ends, or are more than `most`.
    """
    pieces: list[bytes] = []
    start, end = 0, len(frames)
    while start < end:
        if len(pieces) >= most:
            raise BusRecordError(f"more than {most} packets")
        at, shift, remaining = start + 1, 0, 0
        while True:
            if at >= end or shift > 21:  # four bytes at most [MQTT5-1.5.5]
                raise BusRecordError("a packet with a broken length")
            byte = frames[at]
            at += 1
            remaining |= (byte & 0x7F) << shift
            if byte < CONTINUES:
                break
            shift += 7
        stop = at + remaining
        if stop > end:
            raise BusRecordError("a packet that runs past the end of its run")
        pieces.append(frames[start:stop])
        start = stop
    return pieces


def _decode_message(body: bytes, start: int, items: list[Decoded | Chosen]) -> int:
    _, flags, present, published_at, topic_size, client_size, payload_size = MESSAGE_HEAD.unpack_from(body, start)
    topic_at = start + MESSAGE_HEAD.size
    client_at = topic_at + topic_size
    payload_at = client_at + client_size
    stop: int = payload_at + payload_size
    if stop > len(body):
        raise BusRecordError("a message that is longer than its record")
    if flags & ~(QOS_BITS | RETAIN_BIT) or flags & QOS_BITS == QOS_BITS or present & 0x80:
        raise BusRecordError("a message with unknown flags")
    if not 0 <= published_at <= LATEST or not topic_size:
        raise BusRecordError("a message without a topic or a time")
    properties = NO_PROPERTIES
    topic, client = body[topic_at:client_at].decode(), body[client_at:payload_at].decode()
    check_topic(topic)
    payload = body[payload_at:stop]
    if present:
        properties, stop = _decode_properties(body, stop, present)
    retain = bool(flags & RETAIN_BIT)
    items.append(Message(topic, payload, flags & QOS_BITS, retain, properties, client, published_at))
    return stop


def check_topic(topic: str) -> None:
    """Make sure that `topic` may be published to [MQTT5-3.3.2-2].

    Raises:
      BusRecordError: a wildcard, U+0000 or nothing, or a node's own.
    """
    if not topic or "#" in topic or "+" in topic or "\0" in topic:
        raise BusRecordError("a Topic Name with a wildcard or U+0000, or an empty one")
    if topic.startswith("$SYS") and topic[4:5] in ("", "/"):
        raise BusRecordError("a topic below $SYS, which is each node's own")


def _decode_properties(body: bytes, at: int, present: int) -> tuple[MessageProperties, int]:
    properties = MessageProperties()
    if present & HAS_FORMAT:
        properties.payload_format_indicator = 1 if present & FORMAT_IS_UTF8 else 0
    elif present & FORMAT_IS_UTF8:
        raise BusRecordError("a message with unknown flags")
    if present & HAS_EXPIRY:
        (properties.message_expiry_interval,) = NUMBER.unpack_from(body, at)
        at += NUMBER.size
    if present & HAS_CONTENT_TYPE:
        raw, at = _take(body, at)
        properties.content_type = raw.decode()
    if present & HAS_RESPONSE_TOPIC:
        raw, at = _take(body, at)
        properties.response_topic = raw.decode()
    if present & HAS_CORRELATION:
        properties.correlation_data, at = _take(body, at)
    if present & HAS_USER_PROPERTIES:
        (count,) = NUMBER.unpack_from(body, at)
        at += NUMBER.size
        if count > min((len(body) - at) // (2 * LENGTH.size), MAX_PROPERTIES):  # before anything is made for a lie
            raise BusRecordError("more user properties than there may be, or than the record has room for")
        pairs: list[tuple[str, str]] = []
        for _ in range(count):
            name, at = _take(body, at)
            text, at = _take(body, at)
            pairs.append((name.decode(), text.decode()))
        properties.user_properties = tuple(pairs)
    return properties, at


def _take(body: bytes, at: int) -> tuple[bytes, int]:
    (length,) = LENGTH.unpack_from(body, at)
    at += LENGTH.size
    if at + length > len(body):
        raise BusRecordError("a property that runs past the end of the record")
    return body[at : at + length], at + length


# --- parts


def cut_body(body: bytes, part_size: int) -> Sequence[bytes]:
    """Cut a body into parts of at most `part_size` bytes."""
    if len(body) <= part_size:
        return (body,)
    return [body[at : at + part_size] for at in range(0, len(body), part_size)]
