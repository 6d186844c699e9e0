"""Whatever can be encoded comes back, and no bytes at all do more harm than a RemoteProtocolError."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mqtt_trio.errors import RemoteProtocolError
from mqtt_trio.protocol import packets as p
from mqtt_trio.protocol.codes import CONNECT_RETURN_CODES, REASON_CODES, PacketType, ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.connection import ClientConnection, ServerConnection, State
from mqtt_trio.protocol.decode import DECODERS
from mqtt_trio.protocol.encode import EncodedPublish, encode
from mqtt_trio.protocol.wire import read_header

V31, V311, V5 = ProtocolVersion.MQTT_3_1, ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
topic_names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0+#"), min_size=1, max_size=12)
levels = st.one_of(st.just("+"), st.text("ab é", max_size=3))
topic_filters = st.one_of(
    st.just("#"),
    st.lists(levels, min_size=1, max_size=4).map("/".join).filter(bool),
    st.lists(levels, min_size=1, max_size=3).map(lambda parts: "/".join([*parts, "#"])),
    st.lists(levels, min_size=1, max_size=3).map("/".join).filter(bool).map(lambda inner: f"$share/g/{inner}"),
)
data = st.binary(max_size=20)
bits, u16, u32 = st.integers(0, 1), st.integers(0, 65_535), st.integers(0, 2**32 - 1)
packet_ids = st.integers(1, 65_535)
identifiers = st.integers(1, 268_435_455)
qos = st.sampled_from(QoS)
user_properties = st.lists(st.tuples(text, text), max_size=3).map(tuple)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


message_properties = st.builds(
    p.MessageProperties,
    payload_format_indicator=maybe(bits),
    message_expiry_interval=maybe(u32),
    content_type=maybe(text),
    response_topic=maybe(topic_names),
    correlation_data=maybe(data),
    user_properties=user_properties,
)
wills = st.builds(
    p.Will,
    topic_name=topic_names,
    payload=data,
    qos=qos,
    retain=st.booleans(),
    will_delay_interval=u32,
    properties=message_properties,
)


def reasons(packet_type: PacketType) -> st.SearchStrategy[ReasonCode]:
    return st.sampled_from(sorted(set(REASON_CODES[packet_type].values())))


def acks(make: Any, packet_type: PacketType) -> st.SearchStrategy[Any]:
    return st.builds(make, packet_ids, reasons(packet_type), maybe(text), user_properties)


def consistent_connect(packet: p.Connect) -> p.Connect:
    if packet.authentication_method is None:
        packet.authentication_data = None
    return packet


def consistent_publish(packet: p.Publish) -> p.Publish:
    return attrs.evolve(packet, packet_id=packet.packet_id if packet.qos else None, dup=packet.dup and packet.qos > 0)


def no_local_on_shares(packet: p.Subscribe) -> p.Subscribe:
    for item in packet.subscriptions:
        item.no_local = item.no_local and not item.topic_filter.startswith("$share/")
    return packet


connects = st.builds(
    p.Connect,
    client_id=text,
    clean_start=st.booleans(),
    keep_alive=u16,
    will=maybe(wills),
    user_name=maybe(text),
    password=maybe(data),
    session_expiry_interval=maybe(u32),
    receive_maximum=maybe(packet_ids),
    maximum_packet_size=maybe(st.integers(1, 2**32 - 1)),
    topic_alias_maximum=maybe(u16),
    request_response_information=maybe(bits),
    request_problem_information=maybe(bits),
    authentication_method=maybe(text),
    authentication_data=maybe(data),
    user_properties=user_properties,
).map(consistent_connect)
connacks = st.builds(
    p.ConnAck,
    session_present=st.booleans(),
    session_expiry_interval=maybe(u32),
    receive_maximum=maybe(packet_ids),
    maximum_qos=maybe(bits),
    retain_available=maybe(bits),
    maximum_packet_size=maybe(st.integers(1, 2**32 - 1)),
    assigned_client_identifier=maybe(text),
    topic_alias_maximum=maybe(u16),
    reason_string=maybe(text),
    user_properties=user_properties,
    wildcard_subscription_available=maybe(bits),
    subscription_identifier_available=maybe(bits),
    shared_subscription_available=maybe(bits),
    server_keep_alive=maybe(u16),
    response_information=maybe(text),
    server_reference=maybe(text),
    authentication_method=maybe(text),
    authentication_data=maybe(data),
) | st.builds(p.ConnAck, reason_code=reasons(PacketType.CONNACK), reason_string=maybe(text))
publishes = st.builds(
    p.Publish,
    topic_names,
    st.binary(max_size=300),
    qos,
    st.booleans(),
    st.booleans(),
    packet_ids,
    message_properties,
    maybe(packet_ids),
    st.lists(identifiers, max_size=3).map(tuple),
).map(consistent_publish)
subscriptions = st.builds(p.Subscription, topic_filters, qos, st.booleans(), st.booleans(), st.integers(0, 2))
subscribes = st.builds(
    p.Subscribe,
    packet_ids,
    st.lists(subscriptions, min_size=1, max_size=4).map(tuple),
    maybe(identifiers),
    user_properties,
).map(no_local_on_shares)
packets_5: st.SearchStrategy[Any] = st.one_of(
    connects,
    connacks,
    publishes,
    acks(p.PubAck, PacketType.PUBACK),
    acks(p.PubRec, PacketType.PUBREC),
    acks(p.PubRel, PacketType.PUBREL),
    acks(p.PubComp, PacketType.PUBCOMP),
    subscribes,
    st.builds(
        p.SubAck,
        packet_ids,
        st.lists(reasons(PacketType.SUBACK), min_size=1, max_size=4).map(tuple),
        maybe(text),
        user_properties,
    ),
    st.builds(p.Unsubscribe, packet_ids, st.lists(topic_filters, min_size=1, max_size=4).map(tuple), user_properties),
    st.builds(
        p.UnsubAck,
        packet_ids,
        st.lists(reasons(PacketType.UNSUBACK), min_size=1, max_size=4).map(tuple),
        maybe(text),
        user_properties,
    ),
    st.just(p.PingReq()),
    st.just(p.PingResp()),
    st.builds(p.Disconnect, reasons(PacketType.DISCONNECT), maybe(u32), maybe(text), maybe(text), user_properties),
    st.builds(p.Auth, reasons(PacketType.AUTH), text, maybe(data), maybe(text), user_properties),
)


def decode(frame: bytes, version: ProtocolVersion) -> p.Packet:
    header = read_header(frame, 0)
    assert header is not None
    assert header[1] == len(frame)
    return DECODERS[PacketType(frame[0] >> 4)](frame[0] & 15, frame, *header, version)


def in_3(packet: Any, version: ProtocolVersion) -> Any:
    """Return what of a packet 3.x carries: every attribute that only 5.0 knows at its default."""
    kept = {
        p.Connect: ("client_id", "clean_start", "keep_alive", "will", "user_name", "password"),
        p.ConnAck: ("session_present", "reason_code"),
        p.Publish: ("topic_name", "payload", "qos", "retain", "dup", "packet_id"),
        p.Subscribe: ("packet_id", "subscriptions"),
        p.Subscription: ("topic_filter", "qos"),
        p.SubAck: ("packet_id", "reason_codes"),
        p.Unsubscribe: ("packet_id", "topic_filters"),
        p.Will: ("topic_name", "payload", "qos", "retain"),
    }.get(type(packet), ("packet_id",) if hasattr(packet, "packet_id") else ())
    values = {name: getattr(packet, name) for name in kept}
    if isinstance(packet, p.Connect):
        values |= {"protocol_version": version, "will": packet.will and in_3(packet.will, version)}
        values["password"] = packet.password if packet.user_name is not None else None
    if isinstance(packet, p.Subscribe):
        values["subscriptions"] = tuple(in_3(item, version) for item in packet.subscriptions)
    if isinstance(packet, p.SubAck):
        values["reason_codes"] = tuple(ReasonCode(min(code, 0x80)) for code in packet.reason_codes)
    if isinstance(packet, p.ConnAck) and version is V31:
        values["session_present"] = False
    return type(packet)(**values)


@given(packets_5)
@settings(max_examples=300, deadline=None)
def test_round_trip_5(packet: p.Packet) -> None:
    assert decode(encode(packet, V5), V5) == packet


@pytest.mark.parametrize("version", [V31, V311])
@given(packet=packets_5.filter(lambda packet: not isinstance(packet, p.Auth)))
@settings(max_examples=100, deadline=None)
def test_round_trip_3(version: ProtocolVersion, packet: p.Packet) -> None:
    if isinstance(packet, p.ConnAck) and CONNECT_RETURN_CODES.get(packet.reason_code) is None:
        packet = p.ConnAck(reason_code=ReasonCode.NOT_AUTHORIZED)
    packet = in_3(packet, version)
    decoded = decode(encode(packet, version), version)
    if isinstance(packet, p.ConnAck) and packet.reason_code:
        assert isinstance(decoded, p.ConnAck)
        assert CONNECT_RETURN_CODES[decoded.reason_code] == CONNECT_RETURN_CODES[packet.reason_code]
    else:
        assert decoded == packet


@given(st.sampled_from([V31, V311, V5]), publishes)
@settings(deadline=None)
def test_encoded_publish_equals_encode(version: ProtocolVersion, packet: p.Publish) -> None:
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
    frame = encode(packet, version)
    assert encoded.size == len(frame)
    assert encoded.frame(packet.packet_id or 0, dup=packet.dup) == frame
    if packet.qos and not packet.dup:
        assert packet.packet_id is not None
        assert encoded.head + packet.packet_id.to_bytes(2, "big") + encoded.tail == frame


@given(packets_5, st.data())
@settings(max_examples=100, deadline=None)
def test_one_changed_byte(packet: p.Packet, draw: st.DataObject) -> None:
    frame = bytearray(encode(packet, V5))
    frame[draw.draw(st.integers(0, len(frame) - 1))] = draw.draw(st.integers(0, 255))
    for connection in (server(V5), client(V5), ServerConnection(), ClientConnection()):
        drain(connection, bytes(frame))


@given(st.lists(st.one_of(st.binary(max_size=30), packets_5.map(lambda packet: encode(packet, V5))), max_size=5))
@settings(max_examples=100, deadline=None)
def test_any_bytes(parts: list[bytes]) -> None:
    stream = b"".join(parts)
    for version in ProtocolVersion:
        for make in (server, client):
            whole = drain(make(version), stream)
            cut = make(version)
            seen: list[Any] = []
            for index in range(len(stream)):
                seen += drain(cut, stream[index : index + 1])
            assert seen == whole


@pytest.mark.parametrize("packet_type", list(PacketType))
@given(version=st.sampled_from(ProtocolVersion), flags=st.integers(0, 15), body=st.binary(max_size=40))
@settings(max_examples=50, deadline=None)
def test_any_body(packet_type: PacketType, version: ProtocolVersion, flags: int, body: bytes) -> None:
    try:
        packet = DECODERS[packet_type](flags, body, 0, len(body), version)
    except RemoteProtocolError as exc:
        assert ReasonCode(exc.reason_code) >= 0x80  # noqa: PT017
    else:
        assert type(packet).__name__.upper() == packet_type.name


def server(version: ProtocolVersion) -> ServerConnection:
    connection = ServerConnection()
    connection.state, connection.protocol_version = State.CONNECTED, version
    return connection


def client(version: ProtocolVersion) -> ClientConnection:
    connection = ClientConnection(protocol_version=version)
    connection.state, connection.topic_alias_maximum = State.CONNECTED, 65_535
    return connection


def drain(connection: ServerConnection | ClientConnection, stream: bytes) -> list[Any]:
    """Feed bytes; return the packets, and the class of the error that ended them."""
    connection.receive_data(stream)
    seen: list[Any] = []
    try:
        while (packet := connection.next_packet()) is not None:
            seen.append(packet)
    except RemoteProtocolError as exc:
        seen.append((type(exc), exc.reason_code))
    return seen
