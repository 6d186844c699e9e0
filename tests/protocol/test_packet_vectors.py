"""Every packet as bytes written by hand: decoded, encoded, cut anywhere, with bytes too many."""

from __future__ import annotations

import pytest

from mqtt_trio.errors import RemoteProtocolError
from mqtt_trio.protocol import packets as p
from mqtt_trio.protocol.codes import PacketType, ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.connection import ClientConnection, ServerConnection, State
from mqtt_trio.protocol.decode import DECODERS
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.packets import MessageProperties
from mqtt_trio.protocol.wire import read_header

V31, V311, V5 = ProtocolVersion.MQTT_3_1, ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0
R = ReasonCode
USER = (("k", "v"), ("k", "w"))
USER_HEX = "26 0001 6b 0001 76  26 0001 6b 0001 77"
TEXT_HEX = "1f 0002 6e6f"

VECTORS: list[tuple[str, ProtocolVersion, str, p.Packet]] = [
    (
        "connect-3.1",
        V31,
        "10 12  0006 4d5149736470 03 02 003c  0004 64657631",
        p.Connect(client_id="dev1", protocol_version=V31, keep_alive=60),
    ),
    (
        "connect-3.1.1-full",
        V311,
        "10 20  0004 4d515454 04 ec 000a  0001 63  0003 772f74 0002 00ff  0001 75  0005 7365637200",
        p.Connect(
            client_id="c",
            protocol_version=V311,
            clean_start=False,
            keep_alive=10,
            will=p.Will(topic_name="w/t", payload=b"\0\xff", qos=QoS.AT_LEAST_ONCE, retain=True),
            user_name="u",
            password=b"secr\0",
        ),
    ),
    ("connect-5-small", V5, "10 0d  0004 4d515454 05 02 0000 00 0000", p.Connect()),
    (
        "connect-5-full",
        V5,
        "10 63  0004 4d515454 05 d6 ffff"
        f" 2a  11 ffffffff  15 0001 6d  16 0001 64  17 00  19 01  21 0014  22 0005  {USER_HEX}  27 00010000"
        " 0001 63"
        " 1f  01 01  02 0000003c  03 0001 74  08 0001 72  09 0001 00  26 0001 61 0001 62  18 00000009"
        " 0001 77 0000  0001 75  0001 70",
        p.Connect(
            client_id="c",
            keep_alive=65535,
            session_expiry_interval=0xFFFFFFFF,
            authentication_method="m",
            authentication_data=b"d",
            request_problem_information=0,
            request_response_information=1,
            receive_maximum=20,
            topic_alias_maximum=5,
            user_properties=USER,
            maximum_packet_size=65536,
            will=p.Will(
                topic_name="w",
                qos=QoS.EXACTLY_ONCE,
                will_delay_interval=9,
                properties=MessageProperties(
                    payload_format_indicator=1,
                    message_expiry_interval=60,
                    content_type="t",
                    response_topic="r",
                    correlation_data=b"\0",
                    user_properties=(("a", "b"),),
                ),
            ),
            user_name="u",
            password=b"p",
        ),
    ),
    ("connect-5-password-only", V5, "10 10  0004 4d515454 05 42 0000 00 0000 0001 70", p.Connect(password=b"p")),
    ("connack-3.1", V31, "20 02 00 00", p.ConnAck()),
    ("connack-3.1.1", V311, "20 02 01 00", p.ConnAck(session_present=True)),
    ("connack-3.1.1-refused", V311, "20 02 00 05", p.ConnAck(reason_code=R.NOT_AUTHORIZED)),
    ("connack-5-small", V5, "20 03 00 00 00", p.ConnAck()),
    ("connack-5-refused", V5, "20 03 00 95 00", p.ConnAck(reason_code=R.PACKET_TOO_LARGE)),
    (
        "connack-5-full",
        V5,
        "20 47 01 00 44  11 00000e10  12 0001 69  13 001e  15 0001 6d  16 0001 64  1a 0001 72  1c 0001 73"
        f" {TEXT_HEX}  21 000a  22 0010  24 01  25 00  {USER_HEX}  27 00001000  28 01  29 00  2a 01",
        p.ConnAck(
            session_present=True,
            session_expiry_interval=3600,
            assigned_client_identifier="i",
            server_keep_alive=30,
            authentication_method="m",
            authentication_data=b"d",
            response_information="r",
            server_reference="s",
            reason_string="no",
            receive_maximum=10,
            topic_alias_maximum=16,
            maximum_qos=1,
            retain_available=0,
            user_properties=USER,
            maximum_packet_size=4096,
            wildcard_subscription_available=1,
            subscription_identifier_available=0,
            shared_subscription_available=1,
        ),
    ),
    ("publish-3.1.1-qos0", V311, "30 07  0003 612f62 6869", p.Publish("a/b", b"hi")),
    ("publish-3.1.1-empty", V311, "31 03  0001 61", p.Publish("a", retain=True)),
    (
        "publish-3.1.1-qos1-dup",
        V311,
        "3a 07  0003 612f62 000a",
        p.Publish("a/b", b"", QoS.AT_LEAST_ONCE, dup=True, packet_id=10),
    ),
    ("publish-5-qos0", V5, "30 06  0001 61 00 6869", p.Publish("a", b"hi")),
    (
        "publish-5-qos2-full",
        V5,
        "3d 2c  0001 61 ffff 24"
        " 01 00  02 00000000  03 0002 c3a9  08 0003 722f74  09 0000  26 0000 0000  0b 80808001  0b 01  23 0001 00ff",
        p.Publish(
            "a",
            b"\0\xff",
            QoS.EXACTLY_ONCE,
            True,
            True,
            65535,
            MessageProperties(
                payload_format_indicator=0,
                message_expiry_interval=0,
                content_type="é",
                response_topic="r/t",
                correlation_data=b"",
                user_properties=(("", ""),),
            ),
            1,
            (2097152, 1),
        ),
    ),
    ("publish-5-alias", V5, "30 06  0000 03 23 0005", p.Publish("", topic_alias=5)),
    (
        "subscribe-3.1.1",
        V311,
        "82 0a  0001  0001 61 01  0001 23 02",
        p.Subscribe(1, (p.Subscription("a", QoS.AT_LEAST_ONCE), p.Subscription("#", QoS.EXACTLY_ONCE))),
    ),
    ("subscribe-5-small", V5, "82 07  0001 00 0001 2b 00", p.Subscribe(1, (p.Subscription("+"),))),
    (
        "subscribe-5-full",
        V5,
        f"82 27  0102 11 0b 8001 {USER_HEX}  0003 612f23 2d  000a 2473686172652f672f78 02",
        p.Subscribe(
            0x0102,
            (p.Subscription("a/#", QoS.AT_LEAST_ONCE, True, True, 2), p.Subscription("$share/g/x", QoS.EXACTLY_ONCE)),
            128,
            USER,
        ),
    ),
    ("suback-3.1.1", V311, "90 06  0001 00 01 02 80", p.SubAck(1, (R(0), R(1), R(2), R.UNSPECIFIED_ERROR))),
    (
        "suback-5",
        V5,
        f"90 18  0001 13 {TEXT_HEX} {USER_HEX} 8f a2",
        p.SubAck(1, (R.TOPIC_FILTER_INVALID, R.WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED), "no", USER),
    ),
    ("unsubscribe-3.1.1", V311, "a2 08  0001  0001 61  0001 62", p.Unsubscribe(1, ("a", "b"))),
    ("unsubscribe-5", V5, f"a2 14  0001 0e {USER_HEX}  0001 61", p.Unsubscribe(1, ("a",), USER)),
    ("unsuback-3.1.1", V311, "b0 02  0001", p.UnsubAck(1)),
    (
        "unsuback-5",
        V5,
        f"b0 18  0001 13 {TEXT_HEX} {USER_HEX}  00 11",
        p.UnsubAck(1, (R.SUCCESS, R.NO_SUBSCRIPTION_EXISTED), "no", USER),
    ),
    ("puback-3.1.1", V311, "40 02  1234", p.PubAck(0x1234)),
    ("puback-5-short", V5, "40 02  0001", p.PubAck(1)),
    ("puback-5-code", V5, "40 03  0001 87", p.PubAck(1, R.NOT_AUTHORIZED)),
    ("puback-5-full", V5, f"40 17  0001 87 13 {TEXT_HEX} {USER_HEX}", p.PubAck(1, R.NOT_AUTHORIZED, "no", USER)),
    ("pubrec-3.1.1", V311, "50 02  1234", p.PubRec(0x1234)),
    ("pubrec-5-short", V5, "50 02  0001", p.PubRec(1)),
    ("pubrec-5-code", V5, "50 03  0001 97", p.PubRec(1, R.QUOTA_EXCEEDED)),
    ("pubrec-5-full", V5, f"50 17  0001 97 13 {TEXT_HEX} {USER_HEX}", p.PubRec(1, R.QUOTA_EXCEEDED, "no", USER)),
    ("pubrel-3.1.1", V311, "62 02  1234", p.PubRel(0x1234)),
    ("pubrel-5-short", V5, "62 02  0001", p.PubRel(1)),
    ("pubrel-5-code", V5, "62 03  0001 92", p.PubRel(1, R.PACKET_IDENTIFIER_NOT_FOUND)),
    (
        "pubrel-5-full",
        V5,
        f"62 17  0001 92 13 {TEXT_HEX} {USER_HEX}",
        p.PubRel(1, R.PACKET_IDENTIFIER_NOT_FOUND, "no", USER),
    ),
    ("pubcomp-3.1.1", V311, "70 02  1234", p.PubComp(0x1234)),
    ("pubcomp-5-short", V5, "70 02  0001", p.PubComp(1)),
    ("pubcomp-5-code", V5, "70 03  0001 92", p.PubComp(1, R.PACKET_IDENTIFIER_NOT_FOUND)),
    (
        "pubcomp-5-full",
        V5,
        f"70 17  0001 92 13 {TEXT_HEX} {USER_HEX}",
        p.PubComp(1, R.PACKET_IDENTIFIER_NOT_FOUND, "no", USER),
    ),
    ("pingreq", V311, "c0 00", p.PingReq()),
    ("pingreq-5", V5, "c0 00", p.PingReq()),
    ("pingresp", V311, "d0 00", p.PingResp()),
    ("pingresp-5", V5, "d0 00", p.PingResp()),
    ("disconnect-3.1.1", V311, "e0 00", p.Disconnect()),
    ("disconnect-5", V5, "e0 00", p.Disconnect()),
    ("disconnect-5-code", V5, "e0 01 97", p.Disconnect(R.QUOTA_EXCEEDED)),
    (
        "disconnect-5-full",
        V5,
        f"e0 1e 9d 1c  11 00000001  1c 0001 73  {TEXT_HEX}  {USER_HEX}",
        p.Disconnect(R.SERVER_MOVED, 1, "no", "s", USER),
    ),
    ("auth-success", V5, "f0 00", p.Auth()),
    (
        "auth-full",
        V5,
        f"f0 1d 18 1b  15 0001 6d  16 0001 64  {TEXT_HEX}  {USER_HEX}",
        p.Auth(R.CONTINUE_AUTHENTICATION, "m", b"d", "no", USER),
    ),
]

# Forms that are allowed and that `encode` does not choose.
OTHER_FORMS: list[tuple[str, ProtocolVersion, str, p.Packet]] = [
    ("puback-5-success-spelled-out", V5, "40 03  0001 00", p.PubAck(1)),
    ("puback-5-no-properties", V5, "40 04  0001 10 00", p.PubAck(1, R.NO_MATCHING_SUBSCRIBERS)),
    ("disconnect-5-no-properties", V5, "e0 02 00 00", p.Disconnect()),
    ("auth-5-no-properties", V5, "f0 02 00 00", p.Auth()),
    ("publish-3.1.1-long-remaining-length", V311, "30 83 00  0001 61", p.Publish("a")),
    ("pubrel-3.1-dup", V31, "6a 02  0001", p.PubRel(1)),
    ("subscribe-3.1-dup", V31, "8a 06  0001 0001 61 00", p.Subscribe(1, (p.Subscription("a"),))),
    ("connack-3.1-reserved", V31, "20 02 ff 00", p.ConnAck()),
    (
        "connect-3.1-announced-but-left-out",
        V31,
        "10 0f  0006 4d5149736470 03 c2 0000  0001 63",
        p.Connect(client_id="c", protocol_version=V31),
    ),
]


def unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", ""))


def decode(frame: bytes, version: ProtocolVersion) -> p.Packet:
    header = read_header(frame, 0)
    assert header is not None
    assert header[1] == len(frame)
    return DECODERS[PacketType(frame[0] >> 4)](frame[0] & 15, frame, *header, version)


def accepting(frame: bytes, version: ProtocolVersion) -> ServerConnection | ClientConnection:
    """Return an end in the state where it takes the packet."""
    packet_type = frame[0] >> 4
    connection: ServerConnection | ClientConnection
    if packet_type in (PacketType.CONNACK, PacketType.SUBACK, PacketType.UNSUBACK, PacketType.PINGRESP) or (
        packet_type in (PacketType.PUBLISH, PacketType.AUTH, PacketType.DISCONNECT) and version is V5
    ):
        connection = ClientConnection(protocol_version=version)
        connection.state = State.AWAIT_CONNACK if packet_type == PacketType.CONNACK else State.CONNECTED
        connection.topic_alias_maximum = 10
        connection._aliases[5] = ""
    else:
        connection = ServerConnection()
        if packet_type != PacketType.CONNECT:
            connection.state, connection.protocol_version = State.CONNECTED, version
    return connection


ALL = [pytest.param(version, unhex(text), packet, id=name) for name, version, text, packet in VECTORS + OTHER_FORMS]
CHOSEN = [pytest.param(version, unhex(text), packet, id=name) for name, version, text, packet in VECTORS]


@pytest.mark.parametrize("version,frame,packet", ALL)
def test_decode(version: ProtocolVersion, frame: bytes, packet: p.Packet) -> None:
    assert decode(frame, version) == packet


@pytest.mark.spec("MQTT5-1.5.5-1", "MQTT5-2.1.3-1", "MQTT5-3.3.2-18")
@pytest.mark.parametrize("version,frame,packet", CHOSEN)
def test_encode(version: ProtocolVersion, frame: bytes, packet: p.Packet) -> None:
    assert encode(packet, version).hex(" ") == frame.hex(" ")


# disconnect-5-full has properties of both senders.
@pytest.mark.parametrize("version,frame,packet", [row for row in ALL if row.id != "disconnect-5-full"])
def test_byte_by_byte_and_in_two(version: ProtocolVersion, frame: bytes, packet: p.Packet) -> None:
    connection = accepting(frame, version)
    for index in range(len(frame)):
        assert connection.next_packet() is None
        connection.receive_data(frame[index : index + 1])
    assert connection.next_packet() == packet
    assert connection.next_packet() is None
    for cut in range(len(frame) + 1):
        connection = accepting(frame, version)
        connection.receive_data(frame[:cut])
        first = connection.next_packet()
        connection.receive_data(frame[cut:])
        assert (first or connection.next_packet()) == packet


@pytest.mark.parametrize("version,frame,packet", ALL)
def test_every_truncation_waits_or_is_refused(version: ProtocolVersion, frame: bytes, packet: p.Packet) -> None:
    """Cut without a word, the packet is awaited; cut with a Remaining Length that agrees, it is another one or bad."""
    header = read_header(frame, 0)
    assert header is not None
    for length in range(len(frame)):
        assert read_header(frame[:length], 0) in (None, header)
    body = frame[header[0] :]
    for length in range(len(body)):
        try:
            shorter = DECODERS[PacketType(frame[0] >> 4)](frame[0] & 15, body[:length], 0, length, version)
        except RemoteProtocolError:
            continue
        assert shorter != packet or (version, frame[0] >> 4) in SHORTENABLE


SHORTENABLE = ((V5, PacketType.PUBACK), (V5, PacketType.DISCONNECT), (V5, PacketType.AUTH))
"""OTHER_FORMS has longer forms of these that say the same."""


@pytest.mark.parametrize("version,frame,packet", [row for row in ALL if not isinstance(row.values[2], p.Publish)])
def test_trailing_data_is_refused(version: ProtocolVersion, frame: bytes, packet: p.Packet) -> None:
    header = read_header(frame, 0)
    assert header is not None
    longer = frame[header[0] :] + b"\xff\xff\xff"  # begins nothing that may follow in any packet
    with pytest.raises(RemoteProtocolError) as caught:
        DECODERS[PacketType(frame[0] >> 4)](frame[0] & 15, longer, 0, len(longer), version)
    assert caught.value.reason_code in (R.MALFORMED_PACKET, R.PROTOCOL_ERROR)


@pytest.mark.parametrize("version,frame,packet", ALL)
def test_neighbours_are_not_read(version: ProtocolVersion, frame: bytes, packet: p.Packet) -> None:
    data = b"\xff\xff" + frame + b"\xff" * 8
    header = read_header(data, 2)
    assert header is not None
    assert header[1] == 2 + len(frame)
    assert DECODERS[PacketType(frame[0] >> 4)](frame[0] & 15, data, *header, version) == packet
