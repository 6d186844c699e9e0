"""`packets` into bytes: ENCODERS by packet class, and a PUBLISH that is encoded once for many receivers.

Raises:
  LocalProtocolError: the packet cannot be written in this version; a bug of whoever made it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from mqtt_trio.errors import LocalProtocolError
from mqtt_trio.protocol import packets as p
from mqtt_trio.protocol.codes import (
    CONNECT_RETURN_CODES,
    REASON_CODES,
    SUBACK_FAILURE,
    PacketType,
    ProtocolVersion,
    QoS,
    ReasonCode,
)
from mqtt_trio.protocol.packets import NO_PROPERTIES, MessageProperties
from mqtt_trio.protocol.properties import with_length, write_message_properties, write_properties
from mqtt_trio.protocol.wire import (
    MAXIMUM_REMAINING_LENGTH,
    PACKET_IDS,
    write_binary,
    write_four_byte_integer,
    write_string,
    write_two_byte_integer,
    write_variable_byte_integer,
)

V3_1: Final = ProtocolVersion.MQTT_3_1
V5: Final = ProtocolVersion.MQTT_5_0


def encode(packet: p.Packet, version: ProtocolVersion) -> bytes:
    """Return the bytes of `packet` in `version`. What the version does not know is left out.

    For 3.x a CONNACK maps its reason code, a SUBACK writes 0x80 for every failure, and the other acknowledgements are
    written without reason code: whoever wants to refuse a 3.x PUBLISH closes the connection [MQTT3-3.3.5-2].
    """
    return ENCODERS[type(packet)](packet, version)


class EncodedPublish:
    """One message, encoded once for all receivers of the same version, QoS, RETAIN and Subscription Identifiers.

    Attributes:
      head, tail: what stands before and behind the Packet Identifier; at QoS 0 `head` is the whole frame.
      size: bytes of the packet.
    """

    __slots__ = ("head", "qos", "size", "tail")

    def __init__(
        self,
        topic_name: str,
        payload: bytes,
        properties: MessageProperties = NO_PROPERTIES,
        *,
        version: ProtocolVersion,
        qos: QoS,
        retain: bool = False,
        subscription_identifiers: tuple[int, ...] = (),
        message_expiry_interval: int | None = None,
        topic_alias: int | None = None,
    ) -> None:
        """`message_expiry_interval`: the seconds that are left, in place of the one in `properties`
        [MQTT5-3.3.2-6]; None leaves the property out."""
        if version is not V5:
            block = b""
        elif properties is NO_PROPERTIES and not subscription_identifiers and topic_alias is None:
            block = b"\x00"
        else:
            block = write_message_properties(properties, message_expiry_interval)
            for identifier in subscription_identifiers:
                if not identifier:
                    raise LocalProtocolError("Subscription Identifier 0")
                block += b"\x0b" + write_variable_byte_integer(identifier)
            if topic_alias is not None:
                if not topic_alias:
                    raise LocalProtocolError("Topic Alias 0")
                block += b"\x23" + write_two_byte_integer(topic_alias)
            block = with_length(block)
        if not topic_name and topic_alias is None:
            raise LocalProtocolError("a PUBLISH without Topic Name and Topic Alias")
        topic = write_string(topic_name)
        length = len(topic) + (2 if qos else 0) + len(block) + len(payload)
        first = 0x31 if retain else 0x30
        self.qos = qos
        if qos:
            self.head = _header(first | qos << 1, length) + topic
            self.tail = block + payload
            self.size = len(self.head) + 2 + len(self.tail)
        else:
            self.head = b"".join((_header(first, length), topic, block, payload))
            self.tail = b""
            self.size = len(self.head)

    def frame(self, packet_id: int = 0, *, dup: bool = False) -> bytes:
        """Return the packet with this Packet Identifier (ignored at QoS 0)."""
        if not self.qos:
            return self.head
        if not packet_id:
            raise LocalProtocolError("a PUBLISH with QoS above 0 and Packet Identifier 0")
        head = self.head
        if dup:
            head = bytes((head[0] | 8,)) + head[1:]  # [MQTT5-3.3.1-1]
        return b"".join((head, PACKET_IDS[packet_id], self.tail))


def _header(first_byte: int, remaining_length: int) -> bytes:
    if remaining_length < 128:
        return bytes((first_byte, remaining_length))
    if remaining_length > MAXIMUM_REMAINING_LENGTH:
        raise LocalProtocolError(f"a packet of {remaining_length} bytes; 268,435,455 is the most")
    return bytes((first_byte,)) + write_variable_byte_integer(remaining_length)


def _framed(first_byte: int, body: bytes) -> bytes:
    return _header(first_byte, len(body)) + body


def _id(packet_id: int | None) -> bytes:
    if not packet_id or not 0 < packet_id < 65_536:
        raise LocalProtocolError(f"{packet_id} is no Packet Identifier")  # [MQTT5-2.2.1-3]
    return PACKET_IDS[packet_id]


def encode_publish(packet: p.Publish, version: ProtocolVersion) -> bytes:
    if packet.dup and not packet.qos:
        raise LocalProtocolError("a PUBLISH with QoS 0 and DUP")
    encoded = EncodedPublish(
        packet.topic_name,
        packet.payload,
        packet.properties,
        version=version,
        qos=packet.qos,
        retain=packet.retain,
        subscription_identifiers=packet.subscription_identifiers,
        message_expiry_interval=packet.properties.message_expiry_interval,
        topic_alias=packet.topic_alias,
    )
    return encoded.frame(packet.packet_id or 0, dup=packet.dup)


_CONNECT_HEADS: Final = {
    ProtocolVersion.MQTT_3_1: b"\x00\x06MQIsdp\x03",
    ProtocolVersion.MQTT_3_1_1: b"\x00\x04MQTT\x04",
    ProtocolVersion.MQTT_5_0: b"\x00\x04MQTT\x05",
}


def encode_connect(packet: p.Connect, version: ProtocolVersion) -> bytes:
    """Encode in the packet's own `protocol_version`; `version` is ignored."""
    version = packet.protocol_version
    flags = 2 if packet.clean_start else 0
    payload = [write_string(packet.client_id)]
    if (will := packet.will) is not None:
        flags |= 4 | will.qos << 3 | (32 if will.retain else 0)
        if version is V5:
            block = write_message_properties(will.properties, will.properties.message_expiry_interval)
            if will.will_delay_interval:
                block += b"\x18" + write_four_byte_integer(will.will_delay_interval)
            payload.append(with_length(block))
        payload += (write_string(will.topic_name), write_binary(will.payload))
    if packet.user_name is not None:
        flags |= 128
        payload.append(write_string(packet.user_name))
    if packet.password is not None:
        if packet.user_name is None and version is not V5:
            raise LocalProtocolError("3.x allows no password without user name")  # [MQTT3-3.1.2-22]
        flags |= 64
        payload.append(write_binary(packet.password))
    head = _CONNECT_HEADS[version] + bytes((flags,)) + write_two_byte_integer(packet.keep_alive)
    if version is V5:
        head += write_properties(PacketType.CONNECT, packet)
    return _framed(0x10, head + b"".join(payload))


def encode_connack(packet: p.ConnAck, version: ProtocolVersion) -> bytes:
    if packet.session_present and packet.reason_code:
        raise LocalProtocolError("a refusing CONNACK with Session Present")  # [MQTT5-3.2.2-6]
    session_present = packet.session_present and version is not V3_1
    if version is V5:
        head = bytes((session_present, _code(PacketType.CONNACK, packet.reason_code)))
        return _framed(0x20, head + write_properties(PacketType.CONNACK, packet))
    return_code = CONNECT_RETURN_CODES.get(packet.reason_code)
    if return_code is None:
        raise LocalProtocolError(f"3.x cannot say {packet.reason_code.name} in a CONNACK")
    return bytes((0x20, 2, session_present, return_code))


def _code(packet_type: PacketType, reason_code: ReasonCode) -> int:
    if reason_code not in REASON_CODES[packet_type]:
        raise LocalProtocolError(f"{reason_code.name} is no reason code of {packet_type.name}")
    return reason_code


def _ack_encoder(packet_type: PacketType, flags: int = 0) -> Callable[[Any, ProtocolVersion], bytes]:
    """Make the encoder of PUBACK, PUBREC, PUBREL or PUBCOMP."""
    short = bytes((packet_type << 4 | flags, 2))

    def encode_ack(packet: Any, version: ProtocolVersion) -> bytes:
        if version is not V5 or (
            not packet.reason_code and packet.reason_string is None and not packet.user_properties
        ):
            return short + _id(packet.packet_id)
        body = _id(packet.packet_id) + bytes((_code(packet_type, packet.reason_code),))
        if packet.reason_string is not None or packet.user_properties:
            body += write_properties(packet_type, packet)
        return _framed(short[0], body)

    return encode_ack


def encode_subscribe(packet: p.Subscribe, version: ProtocolVersion) -> bytes:
    if not packet.subscriptions:
        raise LocalProtocolError("a SUBSCRIBE without Topic Filter")  # [MQTT5-3.8.3-2]
    body = [_id(packet.packet_id)]
    if version is V5:
        body.append(write_properties(PacketType.SUBSCRIBE, packet))
    for item in packet.subscriptions:
        options: int = item.qos
        if version is V5:
            options |= item.no_local << 2 | item.retain_as_published << 3 | item.retain_handling << 4
        body += (write_string(item.topic_filter), bytes((options,)))
    return _framed(0x82, b"".join(body))


def encode_suback(packet: p.SubAck, version: ProtocolVersion) -> bytes:
    body = _id(packet.packet_id)
    if version is V5:
        body += write_properties(PacketType.SUBACK, packet)
        return _framed(0x90, body + bytes([_code(PacketType.SUBACK, code) for code in packet.reason_codes]))
    return _framed(0x90, body + bytes([code if code < 0x80 else SUBACK_FAILURE for code in packet.reason_codes]))


def encode_unsubscribe(packet: p.Unsubscribe, version: ProtocolVersion) -> bytes:
    if not packet.topic_filters:
        raise LocalProtocolError("an UNSUBSCRIBE without Topic Filter")  # [MQTT5-3.10.3-2]
    body = _id(packet.packet_id)
    if version is V5:
        body += write_properties(PacketType.UNSUBSCRIBE, packet)
    return _framed(0xA2, body + b"".join([write_string(topic_filter) for topic_filter in packet.topic_filters]))


def encode_unsuback(packet: p.UnsubAck, version: ProtocolVersion) -> bytes:
    body = _id(packet.packet_id)
    if version is V5:
        body += write_properties(PacketType.UNSUBACK, packet)
        body += bytes([_code(PacketType.UNSUBACK, code) for code in packet.reason_codes])
    return _framed(0xB0, body)


def encode_pingreq(packet: p.PingReq, version: ProtocolVersion) -> bytes:
    return b"\xc0\x00"


def encode_pingresp(packet: p.PingResp, version: ProtocolVersion) -> bytes:
    return b"\xd0\x00"


def encode_disconnect(packet: p.Disconnect, version: ProtocolVersion) -> bytes:
    if version is not V5:
        return b"\xe0\x00"
    block = write_properties(PacketType.DISCONNECT, packet)
    code = _code(PacketType.DISCONNECT, packet.reason_code)
    if block != b"\x00":
        return _framed(0xE0, bytes((code,)) + block)
    return bytes((0xE0, 1, code)) if code else b"\xe0\x00"


def encode_auth(packet: p.Auth, version: ProtocolVersion) -> bytes:
    if version is not V5:
        raise LocalProtocolError("3.x has no AUTH")
    block = write_properties(PacketType.AUTH, packet)
    code = _code(PacketType.AUTH, packet.reason_code)
    if packet.authentication_method is None and (code or block != b"\x00"):
        raise LocalProtocolError("an AUTH without Authentication Method")
    return _framed(0xF0, bytes((code,)) + block) if block != b"\x00" else b"\xf0\x00"


ENCODERS: Final[dict[type[Any], Callable[[Any, ProtocolVersion], bytes]]] = {
    p.Connect: encode_connect,
    p.ConnAck: encode_connack,
    p.Publish: encode_publish,
    p.PubAck: _ack_encoder(PacketType.PUBACK),
    p.PubRec: _ack_encoder(PacketType.PUBREC),
    p.PubRel: _ack_encoder(PacketType.PUBREL, 2),
    p.PubComp: _ack_encoder(PacketType.PUBCOMP),
    p.Subscribe: encode_subscribe,
    p.SubAck: encode_suback,
    p.Unsubscribe: encode_unsubscribe,
    p.UnsubAck: encode_unsuback,
    p.PingReq: encode_pingreq,
    p.PingResp: encode_pingresp,
    p.Disconnect: encode_disconnect,
    p.Auth: encode_auth,
}
