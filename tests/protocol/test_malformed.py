"""What clients and servers must not send, each with the reason code that the specification names."""

from __future__ import annotations

import pytest

from mqtt_trio.errors import MalformedPacketError, PacketTooLargeError, RemoteProtocolError
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.connection import ClientConnection, ServerConnection, State

V31, V311, V5 = ProtocolVersion.MQTT_3_1, ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0
MALFORMED, PROTOCOL, ALIAS = ReasonCode.MALFORMED_PACKET, ReasonCode.PROTOCOL_ERROR, ReasonCode.TOPIC_ALIAS_INVALID
NAME, FILTER = ReasonCode.TOPIC_NAME_INVALID, ReasonCode.TOPIC_FILTER_INVALID
VERSION = ReasonCode.UNSUPPORTED_PROTOCOL_VERSION

FROM_CLIENT: list[tuple[str, ProtocolVersion, str, ReasonCode, str]] = [
    # Fixed header
    ("type 0", V5, "00 00", MALFORMED, "MQTT5-2.1.2"),
    ("type 15 in 3.1.1", V311, "f0 00", MALFORMED, "MQTT3-2.2.1"),
    ("flags of PUBACK", V5, "41 02 0001", MALFORMED, "MQTT5-2.1.3-1"),
    ("flags of PUBREL", V5, "60 02 0001", MALFORMED, "MQTT5-3.6.1-1"),
    ("flags of PUBREL 3.1.1", V311, "6a 02 0001", MALFORMED, "MQTT3-3.6.1-1"),
    ("flags of SUBSCRIBE", V5, "80 07 0001 00 0001 61 00", MALFORMED, "MQTT5-3.8.1-1"),
    ("flags of SUBSCRIBE 3.1.1", V311, "80 06 0001 0001 61 00", MALFORMED, "MQTT3-3.8.1-1"),
    ("flags of UNSUBSCRIBE", V5, "a0 06 0001 00 0001 61", MALFORMED, "MQTT5-3.10.1-1"),
    ("flags of DISCONNECT", V5, "e1 00", MALFORMED, "MQTT5-3.14.1-1"),
    ("flags of AUTH", V5, "f2 00", MALFORMED, "MQTT5-3.15.1-1"),
    ("five length bytes", V5, "30 80 80 80 80 01", MALFORMED, "MQTT5-1.5.5"),
    ("length bytes to spare", V5, "30 84 00 0001 61 00", MALFORMED, "MQTT5-1.5.5-1"),
    # PUBLISH
    ("QoS 3", V5, "36 06 0001 61 0001 00", MALFORMED, "MQTT5-3.3.1-4"),
    ("QoS 3 in 3.1.1", V311, "36 05 0001 61 0001", MALFORMED, "MQTT3-3.3.1-4"),
    ("DUP with QoS 0", V5, "38 04 0001 61 00", MALFORMED, "MQTT5-3.3.1-2"),
    ("DUP with QoS 0 in 3.1.1", V311, "38 03 0001 61", MALFORMED, "MQTT3-3.3.1-2"),
    ("topic longer than the packet", V5, "30 04 0009 61 00", MALFORMED, "MQTT5-3.3.2-1"),
    ("no room for a topic", V5, "30 01 00", MALFORMED, "MQTT5-3.3.2-1"),
    ("empty PUBLISH", V311, "30 00", MALFORMED, "MQTT3-3.3.2-1"),
    ("no room for the id", V5, "32 04 0001 61 00", MALFORMED, "MQTT5-3.3.2.2"),
    ("id 0", V5, "32 06 0001 61 0000 00", PROTOCOL, "MQTT5-2.2.1-3"),
    ("id 0 in 3.1.1", V311, "32 05 0001 61 0000", PROTOCOL, "MQTT3-2.3.1-1"),
    ("no properties at all", V5, "30 03 0001 61", MALFORMED, "MQTT5-2.2.2-1"),
    ("wildcard +", V5, "30 06 0003 612f2b 00", NAME, "MQTT5-3.3.2-2"),
    ("wildcard # in 3.1.1", V311, "30 03 0001 23", NAME, "MQTT3-3.3.2-2"),
    ("empty topic in 3.1.1", V311, "30 02 0000", NAME, "MQTT3-4.7.3-1"),
    ("no topic and no alias", V5, "30 03 0000 00", PROTOCOL, "MQTT5-3.3.2.1"),
    ("unknown alias", V5, "30 06 0000 03 23 0001", PROTOCOL, "MQTT5-3.3.2.3.4"),
    ("alias 0", V5, "30 07 0001 61 03 23 0000", ALIAS, "MQTT5-3.3.2-8"),
    ("alias above the maximum", V5, "30 07 0001 61 03 23 0011", ALIAS, "MQTT5-3.3.2-9"),
    ("alias twice", V5, "30 0a 0001 61 06 23 0001 23 0001", PROTOCOL, "MQTT5-3.3.2.3.4"),
    ("Subscription Identifier", V5, "30 06 0001 61 02 0b 01", PROTOCOL, "MQTT5-3.3.4-6"),
    ("payload format 2", V5, "30 06 0001 61 02 01 02", PROTOCOL, "MQTT5-3.3.2.3.2"),
    ("wildcard in Response Topic", V5, "30 08 0001 61 04 08 0001 23", PROTOCOL, "MQTT5-3.3.2-14"),
    ("empty Response Topic", V5, "30 07 0001 61 03 08 0000", PROTOCOL, "MQTT5-4.7.3-1"),
    ("properties beyond the packet", V5, "30 05 0001 61 05 01", MALFORMED, "MQTT5-2.2.2.1"),
    ("property cut off", V5, "30 06 0001 61 02 02 00", MALFORMED, "MQTT5-2.2.2.2"),
    ("property runs over the block", V5, "30 0a 0001 61 04 03 0004 61626364", MALFORMED, "MQTT5-2.2.2.2"),
    ("property of another packet", V5, "30 07 0001 61 03 21 0001", MALFORMED, "MQTT5-2.2.2.2"),
    ("unknown property", V5, "30 06 0001 61 02 7f 00", MALFORMED, "MQTT5-2.2.2.2"),
    ("property id with bytes to spare", V5, "30 07 0001 61 03 81 00 01", MALFORMED, "MQTT5-1.5.5-1"),
    ("Property Length with bytes to spare", V5, "30 07 0001 61 82 00 01 01", MALFORMED, "MQTT5-1.5.5-1"),
    ("Property Length of five bytes", V5, "30 08 0001 61 80 80 80 80 01", MALFORMED, "MQTT5-1.5.5"),
    # Strings
    ("surrogate", V5, "30 06 0003 eda080 00", MALFORMED, "MQTT5-1.5.4-1"),
    ("surrogate in 3.1.1", V311, "30 05 0003 eda080", MALFORMED, "MQTT3-1.5.3-1"),
    ("overlong form", V5, "30 05 0002 c0af 00", MALFORMED, "MQTT5-1.5.4-1"),
    ("beyond U+10FFFF", V5, "30 07 0004 f4908080 00", MALFORMED, "MQTT5-1.5.4-1"),
    ("lone byte", V5, "30 04 0001 ff 00", MALFORMED, "MQTT5-1.5.4-1"),
    ("U+0000 in a topic", V5, "30 06 0003 610062 00", MALFORMED, "MQTT5-1.5.4-2"),
    ("U+0000 in a topic 3.1.1", V311, "30 05 0003 610062", MALFORMED, "MQTT3-1.5.3-2"),
    ("U+0000 in a user property", V5, "30 0b 0001 61 07 26 0001 00 0001 61", MALFORMED, "MQTT5-1.5.4-2"),
    ("ill-formed content type", V5, "30 08 0001 61 04 03 0001 80", MALFORMED, "MQTT5-3.3.2-19"),
    # Acknowledgements
    ("PUBACK of one byte", V5, "40 01 00", MALFORMED, "MQTT5-3.4.2"),
    ("PUBACK id 0", V5, "40 02 0000", PROTOCOL, "MQTT5-2.2.1"),
    ("PUBACK with a code it has not", V5, "40 03 0001 92", PROTOCOL, "MQTT5-3.4.2-1"),
    ("PUBREC with a code it has not", V5, "50 03 0001 01", PROTOCOL, "MQTT5-3.5.2-1"),
    ("PUBREL with a code it has not", V5, "62 03 0001 80", PROTOCOL, "MQTT5-3.6.2-1"),
    ("PUBCOMP with a code it has not", V5, "70 03 0001 10", PROTOCOL, "MQTT5-3.7.2-1"),
    ("PUBACK with trailing data", V5, "40 05 0001 00 00 00", MALFORMED, "MQTT5-3.4.2"),
    ("PUBACK with two Reason Strings", V5, "40 0a 0001 00 06 1f 0000 1f 0000", PROTOCOL, "MQTT5-3.4.2.2.2"),
    ("PUBACK of 3.1.1 with a code", V311, "40 03 0001 00", MALFORMED, "MQTT3-3.4.2"),
    # SUBSCRIBE, UNSUBSCRIBE
    ("no filter", V5, "82 03 0001 00", PROTOCOL, "MQTT5-3.8.3-2"),
    ("no filter in 3.1.1", V311, "82 02 0001", PROTOCOL, "MQTT3-3.8.3-3"),
    ("SUBSCRIBE id 0", V5, "82 07 0000 00 0001 61 00", PROTOCOL, "MQTT5-2.2.1-3"),
    ("filter without options", V5, "82 06 0001 00 0001 61", MALFORMED, "MQTT5-3.8.3"),
    ("Subscription Identifier 0", V5, "82 09 0001 02 0b 00 0001 61 00", PROTOCOL, "MQTT5-3.8.2.1.2"),
    ("Subscription Identifier twice", V5, "82 0b 0001 04 0b 01 0b 02 0001 61 00", PROTOCOL, "MQTT5-3.8.2.1.2"),
    ("Maximum QoS 3", V5, "82 07 0001 00 0001 61 03", PROTOCOL, "MQTT5-3.8.3.1"),
    ("requested QoS 3 in 3.1.1", V311, "82 06 0001 0001 61 03", MALFORMED, "MQTT3-3.8.3-4"),
    ("upper bits in 3.1.1", V311, "82 06 0001 0001 61 04", MALFORMED, "MQTT3-3.8.3-4"),
    ("Retain Handling 3", V5, "82 07 0001 00 0001 61 30", PROTOCOL, "MQTT5-3.8.3.1"),
    ("reserved options", V5, "82 07 0001 00 0001 61 40", MALFORMED, "MQTT5-3.8.3-5"),
    ("No Local on a share", V5, "82 10 0001 00 000a 2473686172652f672f61 04", PROTOCOL, "MQTT5-3.8.3-4"),
    ("empty filter", V5, "82 06 0001 00 0000 00", FILTER, "MQTT5-4.7.3-1"),
    ("# inside", V5, "82 09 0001 00 0003 232f61 00", FILTER, "MQTT5-4.7.1-1"),
    ("+ in a level", V311, "82 07 0001 0002 612b 00", FILTER, "MQTT3-4.7.1-3"),
    ("U+0000 in a filter", V5, "82 07 0001 00 0001 00 00", MALFORMED, "MQTT5-4.7.3-2"),
    ("UNSUBSCRIBE without filter", V5, "a2 03 0001 00", PROTOCOL, "MQTT5-3.10.3-2"),
    ("UNSUBSCRIBE of 3.1.1 without filter", V311, "a2 02 0001", PROTOCOL, "MQTT3-3.10.3-2"),
    ("UNSUBSCRIBE with a bad filter", V5, "a2 07 0001 00 0002 2323", FILTER, "MQTT5-4.7.1-1"),
    ("UNSUBSCRIBE id 0", V5, "a2 06 0000 00 0001 61", PROTOCOL, "MQTT5-2.2.1-3"),
    # PINGREQ, DISCONNECT, AUTH
    ("PINGREQ with a body", V5, "c0 01 00", MALFORMED, "MQTT5-3.12.1"),
    ("DISCONNECT of 3.1.1 with a body", V311, "e0 01 00", MALFORMED, "MQTT3-3.14"),
    ("DISCONNECT with a code it has not", V5, "e0 01 01", PROTOCOL, "MQTT5-3.14.2-1"),
    ("DISCONNECT raises expiry from 0", V5, "e0 07 00 05 11 00000001", PROTOCOL, "MQTT5-3.14.2.2.2"),
    ("DISCONNECT with Server Reference", V5, "e0 06 00 04 1c 0001 61", MALFORMED, "MQTT5-3.14.2.2.5"),
    ("AUTH without method in CONNECT", V5, "f0 06 19 04 15 0001 6d", PROTOCOL, "MQTT5-4.12.0-7"),
    ("AUTH without method", V5, "f0 02 18 00", PROTOCOL, "MQTT5-3.15.2.2.2"),
    ("AUTH with a code it has not", V5, "f0 06 01 04 15 0001 6d", PROTOCOL, "MQTT5-3.15.2-1"),
    # Order
    ("second CONNECT", V5, "10 0d 0004 4d515454 05 02 0000 00 0000", PROTOCOL, "MQTT5-3.1.0-2"),
    ("CONNACK from a client", V5, "20 03 00 00 00", PROTOCOL, "MQTT5-4.13.1"),
    ("SUBACK from a client", V311, "90 03 0001 00", PROTOCOL, "MQTT3-4.8.0-1"),
    ("PINGRESP from a client", V5, "d0 00", PROTOCOL, "MQTT5-4.13.1"),
]

CONNECTS: list[tuple[str, str, ReasonCode, str]] = [
    ("PUBLISH first", "30 04 0001 61 00", PROTOCOL, "MQTT5-3.1.0-1"),
    ("flags", "11 0d 0004 4d515454 05 02 0000 00 0000", MALFORMED, "MQTT5-2.1.3-1"),
    ("another protocol", "10 0d 0004 4d515455 05 02 0000 00 0000", VERSION, "MQTT5-3.1.2-1"),
    ("version 6", "10 0d 0004 4d515454 06 02 0000 00 0000", VERSION, "MQTT5-3.1.2-2"),
    ("bridge's version", "10 0c 0004 4d515454 84 02 0000 0000", VERSION, "MQTT3-3.1.2-2"),
    ("MQTT version 3", "10 0c 0004 4d515454 03 02 0000 0000", VERSION, "MQTT3-3.1.2-2"),
    ("reserved flag", "10 0d 0004 4d515454 05 03 0000 00 0000", MALFORMED, "MQTT5-3.1.2-3"),
    ("reserved flag 3.1.1", "10 0c 0004 4d515454 04 03 0000 0000", MALFORMED, "MQTT3-3.1.2-3"),
    ("Will QoS 3", "10 12 0004 4d515454 05 1e 0000 00 0000 00 0000 0000", MALFORMED, "MQTT5-3.1.2-12"),
    ("Will QoS without Will", "10 0d 0004 4d515454 05 0a 0000 00 0000", MALFORMED, "MQTT5-3.1.2-11"),
    ("Will Retain without Will", "10 0c 0004 4d515454 04 22 0000 0000", MALFORMED, "MQTT3-3.1.2-15"),
    ("password alone in 3.1.1", "10 0f 0004 4d515454 04 42 0000 0000 0001 70", MALFORMED, "MQTT3-3.1.2-22"),
    ("wildcard in Will Topic", "10 13 0004 4d515454 05 06 0000 00 0000 00 0001 23 0000", NAME, "MQTT5-4.7.0-1"),
    ("empty Will Topic", "10 12 0004 4d515454 05 06 0000 00 0000 00 0000 0000", NAME, "MQTT5-4.7.3-1"),
    ("Receive Maximum 0", "10 10 0004 4d515454 05 02 0000 03 21 0000 0000", PROTOCOL, "MQTT5-3.1.2.11.3"),
    ("Maximum Packet Size 0", "10 12 0004 4d515454 05 02 0000 05 27 00000000 0000", PROTOCOL, "MQTT5-3.1.2.11.4"),
    ("Request Problem Information 2", "10 0f 0004 4d515454 05 02 0000 02 17 02 0000", PROTOCOL, "MQTT5-3.1.2.11.7"),
    ("Request Response Information 2", "10 0f 0004 4d515454 05 02 0000 02 19 02 0000", PROTOCOL, "MQTT5-3.1.2.11.6"),
    ("property twice", "10 11 0004 4d515454 05 02 0000 04 17 01 17 01 0000", PROTOCOL, "MQTT5-3.1.2.11.7"),
    ("data without method", "10 10 0004 4d515454 05 02 0000 03 16 0000 0000", PROTOCOL, "MQTT5-3.1.2.11.10"),
    ("Will property outside", "10 12 0004 4d515454 05 02 0000 05 18 00000000 0000", MALFORMED, "MQTT5-2.2.2.2"),
    ("no Client Identifier", "10 0b 0004 4d515454 05 02 0000 00", MALFORMED, "MQTT5-3.1.3-3"),
    ("trailing data", "10 0e 0004 4d515454 05 02 0000 00 0000 00", MALFORMED, "MQTT5-4.13.1-1"),
    ("trailing data 3.1", "10 0f 0006 4d5149736470 03 02 0000 0000 00", MALFORMED, "MQTT3-4.8.0"),
    ("bytes to spare", "10 8d 00 0004 4d515454 05 02 0000 00 0000", MALFORMED, "MQTT5-1.5.5-1"),
    ("ill-formed Client Identifier", "10 0e 0004 4d515454 05 02 0000 00 0001 ff", MALFORMED, "MQTT5-1.5.4-1"),
    ("U+0000 in the user name", "10 10 0004 4d515454 05 82 0000 00 0000 0001 00", MALFORMED, "MQTT5-1.5.4-2"),
    ("user name announced, missing", "10 0d 0004 4d515454 05 82 0000 00 0000", MALFORMED, "MQTT5-3.1.2-17"),
    ("empty body", "10 00", MALFORMED, "MQTT5-3.1.2-1"),
]

FROM_SERVER: list[tuple[str, ProtocolVersion, State, str, ReasonCode, str]] = [
    ("PUBLISH first", V5, State.AWAIT_CONNACK, "30 04 0001 61 00", PROTOCOL, "MQTT5-3.2.0-1"),
    ("second CONNACK", V5, State.CONNECTED, "20 03 00 00 00", PROTOCOL, "MQTT5-3.2.0-2"),
    ("DISCONNECT before CONNACK", V5, State.AWAIT_CONNACK, "e0 00", PROTOCOL, "MQTT5-3.14.0-1"),
    ("reserved flags", V5, State.AWAIT_CONNACK, "20 03 02 00 00", MALFORMED, "MQTT5-3.2.2-1"),
    ("refusal with Session Present", V5, State.AWAIT_CONNACK, "20 03 01 87 00", PROTOCOL, "MQTT5-3.2.2-6"),
    ("refusal with Session Present", V311, State.AWAIT_CONNACK, "20 02 01 05", PROTOCOL, "MQTT3-3.2.2-4"),
    ("unknown return code", V311, State.AWAIT_CONNACK, "20 02 00 06", PROTOCOL, "MQTT3-3.2.2.3"),
    ("unknown reason code", V5, State.AWAIT_CONNACK, "20 03 00 04 00", PROTOCOL, "MQTT5-3.2.2-8"),
    ("Maximum QoS 2", V5, State.AWAIT_CONNACK, "20 05 00 00 02 24 02", PROTOCOL, "MQTT5-3.2.2.3.4"),
    ("Receive Maximum 0", V5, State.AWAIT_CONNACK, "20 06 00 00 03 21 0000", PROTOCOL, "MQTT5-3.2.2.3.3"),
    ("SUBACK without codes", V5, State.CONNECTED, "90 03 0001 00", PROTOCOL, "MQTT5-3.9.3"),
    ("SUBACK code of 5.0 in 3.1.1", V311, State.CONNECTED, "90 03 0001 87", PROTOCOL, "MQTT3-3.9.3-2"),
    ("SUBACK with an unknown code", V5, State.CONNECTED, "90 04 0001 00 03", PROTOCOL, "MQTT5-3.9.3-2"),
    ("UNSUBACK without codes", V5, State.CONNECTED, "b0 03 0001 00", PROTOCOL, "MQTT5-3.11.3"),
    ("UNSUBACK with an unknown code", V5, State.CONNECTED, "b0 04 0001 00 01", PROTOCOL, "MQTT5-3.11.3-2"),
    ("UNSUBACK of 3.1.1 with a body", V311, State.CONNECTED, "b0 03 0001 00", MALFORMED, "MQTT3-3.11.1"),
    ("PINGRESP with a body", V5, State.CONNECTED, "d0 01 00", MALFORMED, "MQTT5-3.13.1"),
    ("DISCONNECT in 3.1.1", V311, State.CONNECTED, "e0 00", MALFORMED, "MQTT3-3.14"),
    ("DISCONNECT with expiry", V5, State.CONNECTED, "e0 07 00 05 11 00000000", PROTOCOL, "MQTT5-3.14.2-2"),
    ("alias where none is allowed", V5, State.CONNECTED, "30 07 0001 61 03 23 0001", ALIAS, "MQTT5-3.3.2-11"),
    ("Subscription Identifier 0", V5, State.CONNECTED, "30 06 0001 61 02 0b 00", PROTOCOL, "MQTT5-3.3.2.3.8"),
    ("SUBSCRIBE from a server", V5, State.CONNECTED, "82 07 0001 00 0001 61 00", PROTOCOL, "MQTT5-4.13.1"),
]


def marks(clause: str) -> tuple[pytest.MarkDecorator, ...]:
    """Cite normative statements; a plain section, where the text alone forbids something, stands in the table only."""
    return (pytest.mark.spec(clause),) if clause.count("-") == 2 else ()


def unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", ""))


def server(version: ProtocolVersion) -> ServerConnection:
    connection = ServerConnection()
    connection.receive_data(
        {
            V31: b"\x10\x0f\0\x06MQIsdp\x03\x02\0\0\0\x01c",
            V311: b"\x10\x0d\0\x04MQTT\x04\x02\0\0\0\x01c",
            V5: b"\x10\x0e\0\x04MQTT\x05\x02\0\0\0\0\x01c",
        }[version]
    )
    assert connection.next_packet() is not None
    return connection


def check(connection: ServerConnection | ClientConnection, frame: bytes, code: ReasonCode) -> None:
    """The frame is refused, once, and so is everything behind it."""
    connection.receive_data(frame + b"\xc0\x00")
    with pytest.raises(RemoteProtocolError) as caught:
        connection.next_packet()
    assert caught.value.reason_code == code, str(caught.value)
    assert isinstance(caught.value, MalformedPacketError) is (code in (MALFORMED, NAME, FILTER))
    assert connection.state is State.FAILED
    connection.receive_data(b"\xc0\x00")
    assert connection.next_packet() is None
    assert connection.buffer == b""


@pytest.mark.parametrize(
    "version,text,code",
    [
        pytest.param(version, text, code, id=name, marks=marks(clause))
        for name, version, text, code, clause in FROM_CLIENT
    ],
)
def test_server_refuses(version: ProtocolVersion, text: str, code: ReasonCode) -> None:
    check(server(version), unhex(text), code)


@pytest.mark.parametrize(
    "text,code",
    [pytest.param(text, code, id=name, marks=marks(clause)) for name, text, code, clause in CONNECTS],
)
def test_server_refuses_to_begin(text: str, code: ReasonCode) -> None:
    check(ServerConnection(), unhex(text), code)


@pytest.mark.parametrize(
    "version,state,text,code",
    [
        pytest.param(version, state, text, code, id=f"{name} {version.name}", marks=marks(clause))
        for name, version, state, text, code, clause in FROM_SERVER
    ],
)
def test_client_refuses(version: ProtocolVersion, state: State, text: str, code: ReasonCode) -> None:
    connection = ClientConnection(protocol_version=version)
    connection.state = state
    check(connection, unhex(text), code)


@pytest.mark.spec("MQTT5-3.2.2-15")
def test_too_large_is_known_from_the_header() -> None:
    connection = ServerConnection(maximum_packet_size=100)
    connection.receive_data(b"\x10\x0e\0\x04MQTT\x05\x02\0\0\0\0\x01c")
    assert connection.next_packet() is not None
    connection.receive_data(b"\x30\x62\0\x01a\0" + bytes(94))
    assert connection.next_packet() is not None  # 100 bytes
    connection.receive_data(b"\x30\x63")
    with pytest.raises(PacketTooLargeError) as caught:
        connection.next_packet()
    assert caught.value.reason_code == ReasonCode.PACKET_TOO_LARGE


@pytest.mark.parametrize("text", ["20", "31", "82 ff ff ff 7f", "f1 80 01"])
def test_wrong_packets_are_known_from_the_header(text: str) -> None:
    connection = ServerConnection()
    connection.receive_data(unhex(text) + (b"\x05" if len(text) == 2 else b""))
    with pytest.raises(RemoteProtocolError):
        connection.next_packet()


def test_good_packets_in_front_of_a_bad_one_count() -> None:
    connection = server(V311)
    connection.receive_data(unhex("30 03 0001 61  c0 00  36 05 0001 61 0001"))
    assert connection.next_packet() is not None
    assert connection.next_packet() is not None
    with pytest.raises(MalformedPacketError):
        connection.next_packet()
