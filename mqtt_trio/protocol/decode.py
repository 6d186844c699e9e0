"""Bodies of packets into `packets`, one function per packet type.

Each takes (flags, data, start, end, version): the lower four bits of the first byte, the bytes that hold the packet,
the bounds of its body in them. `flags` of packets other than PUBLISH are checked where the header is read
(`connection.py`). What depends on who sent the packet, or on earlier ones, is checked there as well.

Raises:
  MalformedPacketError, RemoteProtocolError: with the reason code that the specification names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

from mqtt_trio.errors import MalformedPacketError, RemoteProtocolError
from mqtt_trio.protocol import packets as p
from mqtt_trio.protocol.codes import (
    CONNECT_RETURN_CODES,
    REASON_CODES,
    ConnectReturnCode,
    PacketType,
    ProtocolVersion,
    QoS,
    ReasonCode,
)
from mqtt_trio.protocol.packets import NO_PROPERTIES, MessageProperties, Publish
from mqtt_trio.protocol.properties import WILL, read_properties
from mqtt_trio.protocol.topics import SHARE_PREFIX, validate_topic_filter, validate_topic_name
from mqtt_trio.protocol.wire import Reader, decode_string

Decoder: TypeAlias = Callable[[int, bytes, int, int, ProtocolVersion], p.Packet]

V3_1: Final = ProtocolVersion.MQTT_3_1
V5: Final = ProtocolVersion.MQTT_5_0
_QOS: Final = (QoS.AT_MOST_ONCE, QoS.AT_LEAST_ONCE, QoS.EXACTLY_ONCE)
_VERSIONS: Final = {
    (b"MQIsdp", 3): ProtocolVersion.MQTT_3_1,
    (b"MQTT", 4): ProtocolVersion.MQTT_3_1_1,
    (b"MQTT", 5): ProtocolVersion.MQTT_5_0,
}


def decode_publish(flags: int, data: bytes, start: int, end: int, version: ProtocolVersion) -> Publish:
    """Decode a PUBLISH. The Topic Name is empty where a Topic Alias stands for it."""
    at = start + 2
    topic_end = at + (data[start] << 8 | data[start + 1]) if at <= end else end + 1
    if topic_end > end:
        raise MalformedPacketError("the packet ends inside its Topic Name")
    topic_name = decode_string(data[at:topic_end])
    if "+" in topic_name or "#" in topic_name:
        validate_topic_name(topic_name)  # raises
    at = topic_end
    packet_id = None
    qos = flags >> 1 & 3
    if qos:
        if qos == 3:
            raise MalformedPacketError("a PUBLISH with QoS 3")  # [MQTT5-3.3.1-4]
        packet_id = _packet_id(data, at, end)
        at += 2
    elif flags & 8:
        raise MalformedPacketError("a PUBLISH with QoS 0 and DUP")  # [MQTT5-3.3.1-2]
    properties = NO_PROPERTIES
    topic_alias = None
    subscription_identifiers: tuple[int, ...] = ()
    if version is V5:
        if at < end and not data[at]:
            at += 1
        else:
            reader = Reader(data, at, end)
            values = read_properties(reader, PacketType.PUBLISH)
            at = reader.at
            topic_alias = values.pop("topic_alias", None)
            subscription_identifiers = values.pop("subscription_identifiers", ())
            properties = _message_properties(values)
    if not topic_name and topic_alias is None:
        if version is V5:
            raise RemoteProtocolError("a PUBLISH without Topic Name and Topic Alias")  # [MQTT5-3.3.2-1]
        validate_topic_name(topic_name)  # raises
    return Publish(
        topic_name,
        data[at:end],
        _QOS[qos],
        flags & 1 == 1,
        flags & 8 == 8,
        packet_id,
        properties,
        topic_alias,
        subscription_identifiers,
    )


def _packet_id(data: bytes, at: int, end: int) -> int:
    if at + 2 > end:
        raise MalformedPacketError("the packet ends inside its Packet Identifier")
    packet_id = data[at] << 8 | data[at + 1]
    if not packet_id:
        raise RemoteProtocolError("Packet Identifier 0")  # [MQTT5-2.2.1-3]
    return packet_id


def _message_properties(values: dict[str, Any]) -> MessageProperties:
    if not values:
        return NO_PROPERTIES
    response_topic = values.get("response_topic")
    if response_topic is not None and (not response_topic or "+" in response_topic or "#" in response_topic):
        raise RemoteProtocolError("the Response Topic is no Topic Name")  # [MQTT5-3.3.2-14]
    return MessageProperties(**values)


def read_protocol_version(data: bytes, start: int, end: int) -> tuple[bytes, int]:
    """Return Protocol Name and Protocol Version of the CONNECT whose body is given, whatever they are."""
    reader = Reader(data, start, end)
    return reader.binary(), reader.byte()


def decode_connect(flags: int, data: bytes, start: int, end: int, version: ProtocolVersion) -> p.Connect:
    """Decode a CONNECT of any version; `version` is ignored, the packet brings its own."""
    name, level = read_protocol_version(data, start, end)
    known = _VERSIONS.get((name, level))
    if known is None:  # [MQTT5-3.1.2-1], [MQTT5-3.1.2-2]
        text = f"protocol {name[:16]!r} version {level} is not supported"
        raise RemoteProtocolError(text, ReasonCode.UNSUPPORTED_PROTOCOL_VERSION)
    version = known
    reader = Reader(data, start + 2 + len(name) + 1, end)
    connect_flags = reader.byte()
    _check_connect_flags(connect_flags, version)
    packet = p.Connect(protocol_version=version, clean_start=connect_flags & 2 != 0)
    packet.keep_alive = reader.two_byte_integer()
    if version is V5:
        for attribute, value in read_properties(reader, PacketType.CONNECT).items():
            setattr(packet, attribute, value)
        if packet.authentication_data is not None and packet.authentication_method is None:
            raise RemoteProtocolError("Authentication Data without Authentication Method")  # [MQTT5-3.1.2.11.10]
    packet.client_id = reader.string()
    if connect_flags & 4:
        packet.will = _will(reader, connect_flags, version)
    # 3.1 allows to leave out what its flags announce, user name and password, at the end of the packet.
    missing_is_fine = version is V3_1
    if connect_flags & 128 and not (missing_is_fine and reader.at == end):
        packet.user_name = reader.string()
    if connect_flags & 64 and not (missing_is_fine and reader.at == end):
        packet.password = reader.binary()
    reader.finish()
    return packet


def _check_connect_flags(flags: int, version: ProtocolVersion) -> None:
    if flags & 1 and version is not V3_1:
        raise MalformedPacketError("the reserved bit of the Connect Flags is set")  # [MQTT5-3.1.2-3]
    if flags & 4:
        if flags >> 3 & 3 == 3:
            raise MalformedPacketError("a Will with QoS 3")  # [MQTT5-3.1.2-12]
    elif flags & 0x38 and version is not V3_1:
        raise MalformedPacketError("Will QoS or Will Retain without Will")  # [MQTT5-3.1.2-11], [MQTT5-3.1.2-13]
    if version is not V5 and flags & 0xC0 == 0x40:
        raise MalformedPacketError("a password without user name")  # [MQTT3-3.1.2-22]


def _will(reader: Reader, flags: int, version: ProtocolVersion) -> p.Will:
    values = read_properties(reader, WILL) if version is V5 else {}
    delay = values.pop("will_delay_interval", 0)
    topic_name = reader.string()
    validate_topic_name(topic_name)
    return p.Will(
        topic_name=topic_name,
        payload=reader.binary(),
        qos=_QOS[flags >> 3 & 3],
        retain=flags & 32 != 0,
        will_delay_interval=delay,
        properties=_message_properties(values),
    )


_FROM_RETURN_CODE: Final = {
    ConnectReturnCode.ACCEPTED: ReasonCode.SUCCESS,
    ConnectReturnCode.UNACCEPTABLE_PROTOCOL_VERSION: ReasonCode.UNSUPPORTED_PROTOCOL_VERSION,
    ConnectReturnCode.IDENTIFIER_REJECTED: ReasonCode.CLIENT_IDENTIFIER_NOT_VALID,
    ConnectReturnCode.SERVER_UNAVAILABLE: ReasonCode.SERVER_UNAVAILABLE,
    ConnectReturnCode.BAD_USER_NAME_OR_PASSWORD: ReasonCode.BAD_USER_NAME_OR_PASSWORD,
    ConnectReturnCode.NOT_AUTHORIZED: ReasonCode.NOT_AUTHORIZED,
}
assert all(CONNECT_RETURN_CODES[reason] is code for code, reason in _FROM_RETURN_CODE.items())
_CONNACK_3: Final = {int(code): reason for code, reason in _FROM_RETURN_CODE.items()}


def decode_connack(flags: int, data: bytes, start: int, end: int, version: ProtocolVersion) -> p.ConnAck:
    reader = Reader(data, start, end)
    acknowledge_flags = reader.byte()
    if version is V3_1:
        acknowledge_flags = 0  # reserved, and not to be looked at
    elif acknowledge_flags > 1:
        raise MalformedPacketError("reserved Connect Acknowledge Flags are set")  # [MQTT5-3.2.2-1]
    codes = REASON_CODES[PacketType.CONNACK] if version is V5 else _CONNACK_3
    packet = p.ConnAck(session_present=acknowledge_flags == 1, reason_code=_reason(reader, codes))
    if packet.session_present and packet.reason_code:
        raise RemoteProtocolError("a refusing CONNACK with Session Present")  # [MQTT5-3.2.2-6]
    if version is V5:
        for attribute, value in read_properties(reader, PacketType.CONNACK).items():
            setattr(packet, attribute, value)
    reader.finish()
    return packet


def _reason(reader: Reader, codes: dict[int, ReasonCode]) -> ReasonCode:
    code = codes.get(number := reader.byte())
    if code is None:
        raise RemoteProtocolError(f"0x{number:02x} is no reason code of this packet")
    return code


def _ack_decoder(packet_type: PacketType, make: Callable[..., Any]) -> Decoder:
    """Make the decoder of PUBACK, PUBREC, PUBREL or PUBCOMP: they differ in name and reason codes."""
    codes = REASON_CODES[packet_type]

    def decode_ack(flags: int, data: bytes, start: int, end: int, version: ProtocolVersion) -> p.Packet:
        packet: p.Packet
        packet_id = _packet_id(data, start, end)
        if end - start == 2:
            packet = make(packet_id)  # success without properties [MQTT5-3.4.2.1]
            return packet
        reader = Reader(data, start + 2, end)
        if version is V5:
            code = _reason(reader, codes)
            values = read_properties(reader, packet_type) if reader.at < end else {}
            packet = make(packet_id, code, **values)
            reader.finish()
            return packet
        raise MalformedPacketError(f"a {packet_type.name} of 3.x has two bytes")

    return decode_ack


def decode_subscribe(flags: int, data: bytes, start: int, end: int, version: ProtocolVersion) -> p.Subscribe:
    reader = Reader(data, start + 2, end)
    packet = p.Subscribe(_packet_id(data, start, end), ())
    if version is V5:
        values = read_properties(reader, PacketType.SUBSCRIBE)
        packet.subscription_identifier = values.get("subscription_identifier")
        packet.user_properties = values.get("user_properties", ())
    subscriptions = []
    while reader.at < end:
        topic_filter = reader.string()
        validate_topic_filter(topic_filter)
        subscriptions.append(_subscription(topic_filter, reader.byte(), version))
    if not subscriptions:
        raise RemoteProtocolError("a SUBSCRIBE without Topic Filter")  # [MQTT5-3.8.3-2]
    packet.subscriptions = tuple(subscriptions)
    return packet


def _subscription(topic_filter: str, options: int, version: ProtocolVersion) -> p.Subscription:
    qos = options & 3
    if version is not V5:
        if (options > 2 and version is not V3_1) or qos == 3:  # 3.1 ignores the upper bits
            raise MalformedPacketError("a requested QoS above 2 or reserved bits are set")  # [MQTT3-3.8.3-4]
        return p.Subscription(topic_filter, _QOS[qos])
    if options & 0xC0:
        raise MalformedPacketError("reserved Subscription Options are set")  # [MQTT5-3.8.3-5]
    if qos == 3 or options & 0x30 == 0x30:
        raise RemoteProtocolError("Maximum QoS 3 or Retain Handling 3")  # [MQTT5-3.8.3.1]
    no_local = options & 4 != 0
    if no_local and topic_filter.startswith(SHARE_PREFIX):
        raise RemoteProtocolError("No Local on a shared subscription")  # [MQTT5-3.8.3-4]
    return p.Subscription(topic_filter, _QOS[qos], no_local, options & 8 != 0, options >> 4 & 3)


def decode_suback(flags: int, data: bytes, start: int, end: int, version: ProtocolVersion) -> p.SubAck:
    reader = Reader(data, start + 2, end)
    packet = p.SubAck(_packet_id(data, start, end), ())
    if version is V5:
        for attribute, value in read_properties(reader, PacketType.SUBACK).items():
            setattr(packet, attribute, value)
    codes = REASON_CODES[PacketType.SUBACK]
    reasons = []
    while reader.at < end:
        code = _reason(reader, codes)
        if version is not V5 and code > 2 and code != ReasonCode.UNSPECIFIED_ERROR:
            raise RemoteProtocolError(f"0x{code:02x} is no SUBACK return code")  # [MQTT3-3.9.3-2]
        reasons.append(code)
    if not reasons:
        raise RemoteProtocolError("a SUBACK without reason codes")
    packet.reason_codes = tuple(reasons)
    return packet


def decode_unsubscribe(flags: int, data: bytes, start: int, end: int, version: ProtocolVersion) -> p.Unsubscribe:
    reader = Reader(data, start + 2, end)
    packet = p.Unsubscribe(_packet_id(data, start, end), ())
    if version is V5:
        packet.user_properties = read_properties(reader, PacketType.UNSUBSCRIBE).get("user_properties", ())
    topic_filters = []
    while reader.at < end:
        topic_filter = reader.string()
        validate_topic_filter(topic_filter)
        topic_filters.append(topic_filter)
    if not topic_filters:
        raise RemoteProtocolError("an UNSUBSCRIBE without Topic Filter")  # [MQTT5-3.10.3-2]
    packet.topic_filters = tuple(topic_filters)
    return packet


def decode_unsuback(flags: int, data: bytes, start: int, end: int, version: ProtocolVersion) -> p.UnsubAck:
    reader = Reader(data, start + 2, end)
    packet = p.UnsubAck(_packet_id(data, start, end))
    if version is V5:
        for attribute, value in read_properties(reader, PacketType.UNSUBACK).items():
            setattr(packet, attribute, value)
        reasons = []
        while reader.at < end:
            reasons.append(_reason(reader, REASON_CODES[PacketType.UNSUBACK]))
        if not reasons:
            raise RemoteProtocolError("an UNSUBACK without reason codes")
        packet.reason_codes = tuple(reasons)
    reader.finish()
    return packet


def decode_pingreq(flags: int, data: bytes, start: int, end: int, version: ProtocolVersion) -> p.PingReq:
    _nothing(start, end)
    return p.PingReq()


def decode_pingresp(flags: int, data: bytes, start: int, end: int, version: ProtocolVersion) -> p.PingResp:
    _nothing(start, end)
    return p.PingResp()


def _nothing(start: int, end: int) -> None:
    if start != end:
        raise MalformedPacketError("a packet that has no body has one")


def decode_disconnect(flags: int, data: bytes, start: int, end: int, version: ProtocolVersion) -> p.Disconnect:
    if version is not V5:
        _nothing(start, end)
    if start == end:
        return p.Disconnect()  # [MQTT5-3.14.2.1]
    reader = Reader(data, start, end)
    code = _reason(reader, REASON_CODES[PacketType.DISCONNECT])
    values = read_properties(reader, PacketType.DISCONNECT) if reader.at < end else {}
    reader.finish()
    return p.Disconnect(code, **values)


def decode_auth(flags: int, data: bytes, start: int, end: int, version: ProtocolVersion) -> p.Auth:
    if version is not V5:
        raise MalformedPacketError("packet type 15 is reserved in 3.x")
    if start == end:
        return p.Auth()  # [MQTT5-3.15.2.1]
    reader = Reader(data, start, end)
    code = _reason(reader, REASON_CODES[PacketType.AUTH])
    values = read_properties(reader, PacketType.AUTH) if reader.at < end else {}
    reader.finish()
    if "authentication_method" not in values and (values or code):
        raise RemoteProtocolError("an AUTH without Authentication Method")  # [MQTT5-3.15.2.2.2]
    return p.Auth(code, **values)


DECODERS: Final[dict[int, Decoder]] = {
    PacketType.CONNECT: decode_connect,
    PacketType.CONNACK: decode_connack,
    PacketType.PUBLISH: decode_publish,
    PacketType.PUBACK: _ack_decoder(PacketType.PUBACK, p.PubAck),
    PacketType.PUBREC: _ack_decoder(PacketType.PUBREC, p.PubRec),
    PacketType.PUBREL: _ack_decoder(PacketType.PUBREL, p.PubRel),
    PacketType.PUBCOMP: _ack_decoder(PacketType.PUBCOMP, p.PubComp),
    PacketType.SUBSCRIBE: decode_subscribe,
    PacketType.SUBACK: decode_suback,
    PacketType.UNSUBSCRIBE: decode_unsubscribe,
    PacketType.UNSUBACK: decode_unsuback,
    PacketType.PINGREQ: decode_pingreq,
    PacketType.PINGRESP: decode_pingresp,
    PacketType.DISCONNECT: decode_disconnect,
    PacketType.AUTH: decode_auth,
}
