"""The properties of 5.0: one table, and the reading and writing that follow from it [MQTT5-2.2.2]."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, Final

import attrs

from mqtt_trio.errors import LocalProtocolError, MalformedPacketError, RemoteProtocolError
from mqtt_trio.protocol import wire
from mqtt_trio.protocol.codes import PacketType as P
from mqtt_trio.protocol.codes import PropertyId as Id
from mqtt_trio.protocol.codes import ReasonCode
from mqtt_trio.protocol.packets import NO_PROPERTIES, MessageProperties
from mqtt_trio.protocol.wire import Reader

WILL: Final = 0
"""Owner of the Will Properties; packet types own the others, and type 0 is no packet."""


class WireType(enum.Enum):
    """How a value is read and written [MQTT5-1.5]."""

    BYTE = enum.auto()
    TWO_BYTE_INTEGER = enum.auto()
    FOUR_BYTE_INTEGER = enum.auto()
    VARIABLE_BYTE_INTEGER = enum.auto()
    UTF8_STRING = enum.auto()
    UTF8_STRING_PAIR = enum.auto()
    BINARY_DATA = enum.auto()


READ: Final[dict[WireType, Callable[[Reader], Any]]] = {
    WireType.BYTE: Reader.byte,
    WireType.TWO_BYTE_INTEGER: Reader.two_byte_integer,
    WireType.FOUR_BYTE_INTEGER: Reader.four_byte_integer,
    WireType.VARIABLE_BYTE_INTEGER: Reader.variable_byte_integer,
    WireType.UTF8_STRING: Reader.string,
    WireType.UTF8_STRING_PAIR: Reader.string_pair,
    WireType.BINARY_DATA: Reader.binary,
}
WRITE: Final[dict[WireType, Callable[[Any], bytes]]] = {
    WireType.BYTE: wire.write_byte,
    WireType.TWO_BYTE_INTEGER: wire.write_two_byte_integer,
    WireType.FOUR_BYTE_INTEGER: wire.write_four_byte_integer,
    WireType.VARIABLE_BYTE_INTEGER: wire.write_variable_byte_integer,
    WireType.UTF8_STRING: wire.write_string,
    WireType.UTF8_STRING_PAIR: wire.write_string_pair,
    WireType.BINARY_DATA: wire.write_binary,
}


@attrs.frozen(kw_only=True)
class Property:
    """One row of the table."""

    property_id: Id
    wire_type: WireType
    packets: frozenset[int]
    """Packet types that may carry it, and WILL."""
    repeatable: frozenset[int] = frozenset()
    """Those of them where it may come more than once."""
    minimum: int = 0
    maximum: int | None = None
    """Bounds of the value beyond what the wire type gives; None: no bound."""
    reason_code: ReasonCode = ReasonCode.PROTOCOL_ERROR
    """What a value out of bounds is answered with."""

    def attribute(self, owner: int) -> str:
        """Return the attribute of the packet class that holds the value."""
        name = self.property_id.name.lower()
        if owner not in self.repeatable:
            return name
        return "user_properties" if self.property_id is Id.USER_PROPERTY else name + "s"


def _row(property_id: Id, wire_type: WireType, *packets: int, **bounds: Any) -> Property:
    return Property(property_id=property_id, wire_type=wire_type, packets=frozenset(packets), **bounds)


_EVERYWHERE: Final = (*(t for t in P if t not in (P.PINGREQ, P.PINGRESP)), WILL)
_REASONED: Final = (P.CONNACK, P.PUBACK, P.PUBREC, P.PUBREL, P.PUBCOMP, P.SUBACK, P.UNSUBACK, P.DISCONNECT, P.AUTH)
_W: Final = WireType

PROPERTIES: Final = (
    _row(Id.PAYLOAD_FORMAT_INDICATOR, _W.BYTE, P.PUBLISH, WILL, maximum=1),
    _row(Id.MESSAGE_EXPIRY_INTERVAL, _W.FOUR_BYTE_INTEGER, P.PUBLISH, WILL),
    _row(Id.CONTENT_TYPE, _W.UTF8_STRING, P.PUBLISH, WILL),
    _row(Id.RESPONSE_TOPIC, _W.UTF8_STRING, P.PUBLISH, WILL),
    _row(Id.CORRELATION_DATA, _W.BINARY_DATA, P.PUBLISH, WILL),
    _row(
        Id.SUBSCRIPTION_IDENTIFIER,
        _W.VARIABLE_BYTE_INTEGER,
        P.PUBLISH,
        P.SUBSCRIBE,
        repeatable=frozenset((P.PUBLISH,)),
        minimum=1,
    ),
    _row(Id.SESSION_EXPIRY_INTERVAL, _W.FOUR_BYTE_INTEGER, P.CONNECT, P.CONNACK, P.DISCONNECT),
    _row(Id.ASSIGNED_CLIENT_IDENTIFIER, _W.UTF8_STRING, P.CONNACK),
    _row(Id.SERVER_KEEP_ALIVE, _W.TWO_BYTE_INTEGER, P.CONNACK),
    _row(Id.AUTHENTICATION_METHOD, _W.UTF8_STRING, P.CONNECT, P.CONNACK, P.AUTH),
    _row(Id.AUTHENTICATION_DATA, _W.BINARY_DATA, P.CONNECT, P.CONNACK, P.AUTH),
    _row(Id.REQUEST_PROBLEM_INFORMATION, _W.BYTE, P.CONNECT, maximum=1),
    _row(Id.WILL_DELAY_INTERVAL, _W.FOUR_BYTE_INTEGER, WILL),
    _row(Id.REQUEST_RESPONSE_INFORMATION, _W.BYTE, P.CONNECT, maximum=1),
    _row(Id.RESPONSE_INFORMATION, _W.UTF8_STRING, P.CONNACK),
    _row(Id.SERVER_REFERENCE, _W.UTF8_STRING, P.CONNACK, P.DISCONNECT),
    _row(Id.REASON_STRING, _W.UTF8_STRING, *_REASONED),
    _row(Id.RECEIVE_MAXIMUM, _W.TWO_BYTE_INTEGER, P.CONNECT, P.CONNACK, minimum=1),
    _row(Id.TOPIC_ALIAS_MAXIMUM, _W.TWO_BYTE_INTEGER, P.CONNECT, P.CONNACK),
    # [MQTT5-3.3.2-8] forbids 0 and names no code; 0x94 is the one for aliases out of range.
    _row(Id.TOPIC_ALIAS, _W.TWO_BYTE_INTEGER, P.PUBLISH, minimum=1, reason_code=ReasonCode.TOPIC_ALIAS_INVALID),
    _row(Id.MAXIMUM_QOS, _W.BYTE, P.CONNACK, maximum=1),
    _row(Id.RETAIN_AVAILABLE, _W.BYTE, P.CONNACK, maximum=1),
    _row(Id.USER_PROPERTY, _W.UTF8_STRING_PAIR, *_EVERYWHERE, repeatable=frozenset(_EVERYWHERE)),
    _row(Id.MAXIMUM_PACKET_SIZE, _W.FOUR_BYTE_INTEGER, P.CONNECT, P.CONNACK, minimum=1),
    _row(Id.WILDCARD_SUBSCRIPTION_AVAILABLE, _W.BYTE, P.CONNACK, maximum=1),
    _row(Id.SUBSCRIPTION_IDENTIFIER_AVAILABLE, _W.BYTE, P.CONNACK, maximum=1),
    _row(Id.SHARED_SUBSCRIPTION_AVAILABLE, _W.BYTE, P.CONNACK, maximum=1),
)
"""Every property of 5.0, by number."""


@attrs.frozen
class _Rule:
    """A row of the table as one owner sees it."""

    attribute: str
    prefix: bytes
    read: Callable[[Reader], Any]
    write: Callable[[Any], bytes]
    repeatable: bool
    minimum: int
    maximum: int | None
    reason_code: ReasonCode

    def check(self, value: int) -> bool:
        """Say whether an integer is within the bounds."""
        return value >= self.minimum and (self.maximum is None or value <= self.maximum)


def _rules(owner: int) -> dict[int, _Rule]:
    return {
        int(row.property_id): _Rule(
            row.attribute(owner),
            bytes((row.property_id,)),
            READ[row.wire_type],
            WRITE[row.wire_type],
            owner in row.repeatable,
            row.minimum,
            row.maximum,
            row.reason_code,
        )
        for row in PROPERTIES
        if owner in row.packets
    }


RULES: Final = {int(owner): _rules(owner) for owner in _EVERYWHERE}


def read_properties(reader: Reader, owner: int) -> dict[str, Any]:
    """Read a property block; return the values by attribute name, absent properties left out.

    Raises:
      MalformedPacketError: unknown, or not of this packet, or cut off.
      RemoteProtocolError: a property twice that may come once, or a value out of its bounds.
    """
    size = reader.variable_byte_integer()
    if not size:
        return {}
    outer_end, end = reader.end, reader.at + size
    if end > outer_end:
        raise MalformedPacketError("the properties are longer than the packet")
    reader.end = end
    rules, values = RULES[owner], dict[str, Any]()
    repeated = dict[str, list[Any]]()
    while reader.at < end:
        rule = rules.get(property_id := reader.variable_byte_integer())
        if rule is None:
            raise MalformedPacketError(f"property 0x{property_id:02x} does not belong here")  # [MQTT5-2.2.2.2]
        value = rule.read(reader)
        if type(value) is int and not rule.check(value):
            raise RemoteProtocolError(f"{rule.attribute} must not be {value}", rule.reason_code)
        if rule.repeatable:
            repeated.setdefault(rule.attribute, []).append(value)
        elif rule.attribute in values:
            raise RemoteProtocolError(f"{rule.attribute} comes twice")
        else:
            values[rule.attribute] = value
    for attribute, items in repeated.items():
        values[attribute] = tuple(items)
    reader.end = outer_end
    return values


def _one(rule: _Rule, value: Any) -> bytes:
    if type(value) is int and not rule.check(value):
        raise LocalProtocolError(f"{rule.attribute} must not be {value}")
    return rule.prefix + rule.write(value)


def write_properties(owner: int, source: object) -> bytes:
    """Write the block of `owner` with its length; `source` has an attribute per property, None or () where absent.

    Raises:
      LocalProtocolError: a value that cannot be written.
    """
    return with_length(_pieces(owner, source))


def _pieces(owner: int, source: object) -> bytes:
    pieces = []
    for rule in RULES[owner].values():
        value = getattr(source, rule.attribute)
        if value is None:
            continue
        if rule.repeatable:
            pieces += [_one(rule, item) for item in value]
        else:
            pieces.append(_one(rule, value))
    return b"".join(pieces)


def write_message_properties(properties: MessageProperties, message_expiry_interval: int | None) -> bytes:
    """Write the properties of an Application Message, without a length in front.

    `message_expiry_interval` (seconds that are left) takes the place of the one in `properties`; None leaves it out.
    """
    if properties is NO_PROPERTIES:
        return b""
    pieces = []
    if properties.payload_format_indicator is not None:
        pieces.append(_one(_MESSAGE[Id.PAYLOAD_FORMAT_INDICATOR], properties.payload_format_indicator))
    if message_expiry_interval is not None:
        pieces.append(b"\x02" + wire.write_four_byte_integer(message_expiry_interval))
    if properties.content_type is not None:
        pieces.append(b"\x03" + wire.write_string(properties.content_type))
    if properties.response_topic is not None:
        pieces.append(b"\x08" + wire.write_string(properties.response_topic))
    if properties.correlation_data is not None:
        pieces.append(b"\x09" + wire.write_binary(properties.correlation_data))
    pieces += [b"\x26" + wire.write_string_pair(pair) for pair in properties.user_properties]  # [MQTT5-3.3.2-18]
    return b"".join(pieces)


def with_length(block: bytes) -> bytes:
    """Put the Property Length in front."""
    return wire.write_variable_byte_integer(len(block)) + block


_MESSAGE: Final = RULES[P.PUBLISH]
